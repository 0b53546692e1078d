"""Runs a module as `python -m` does, with a fault in its training: `faulty.py KIND:RANK:STEP [python arguments]`.

KIND is `raise`, `kill` (SIGKILL, as the kernel does when memory is short), `hang` or `slow` (every step from STEP on
sleeps 0.25 s, for a run that must last and not load the machine).
"""

import os
import runpy
import signal
import sys
import time

kind, rank, first_step = sys.argv[1].split(":")
assert sys.argv[2] == "-m"
module, arguments = sys.argv[3], sys.argv[4:]


def with_fault(train_step):
    def step(engine, *arguments, **options):
        engine.num_steps = getattr(engine, "num_steps", 0) + 1
        if kind == "slow" and engine.num_steps >= int(first_step):
            time.sleep(0.25)
        elif os.environ["RANK"] == rank and engine.num_steps == int(first_step):
            if kind == "raise":
                raise ValueError("a fault that comes every time")
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)

        return train_step(engine, *arguments, **options)

    return step


if module == "megatron_mea" and arguments[0] == "train":
    # As the command does: before the import of torch, which takes a while.
    from megatron_mea.training.signals import StopSignal

    StopSignal()
    from megatron_mea.training.engine import Engine

    Engine.train_step = with_fault(Engine.train_step)
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
