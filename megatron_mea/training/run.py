"""The verb `train`: a training run from a checked configuration to FINISHED."""

from __future__ import annotations

from importlib.util import find_spec

from megatron_mea.config import Config
from megatron_mea.config.layout import check_layout
from megatron_mea.errors import UserError
from megatron_mea.printing import show
from megatron_mea.training.rank_env import RankEnv
from megatron_mea.training.signals import StopSignal
from megatron_mea.training.startup import open_corpora, read_run_state


def train(config: Config, stop: StopSignal) -> None:
    """Trains as this process's rank; resumes from the newest intact checkpoint of the run folder.

    Raises:
        UserError: anything that can be checked before processes meet and memory is taken.
    """
    rank_env = RankEnv.from_environment()
    dims = check_layout(config, rank_env.world_size)

    state = read_run_state(config)
    if state.finished_step is not None:
        if rank_env.rank == 0:
            show(f"{config.run.dir} is finished at step {state.finished_step}; raise training.steps to go on")
        return

    if find_spec("deepspeed") is None:
        raise UserError(
            where="environment",
            got="no deepspeed",
            expected="deepspeed 0.19.8: training needs it",
            hint="pip install deepspeed==0.19.8",
        )

    data = open_corpora(config=config, dims=dims, state=state)

    # These import torch, which takes longer than all checks above.
    from megatron_mea.training.loop import run
    from megatron_mea.training.startup import open_run_inputs

    inputs = open_run_inputs(config=config, rank_env=rank_env, dims=dims, state=state, data=data)
    run(config=config, inputs=inputs, stop=stop)
