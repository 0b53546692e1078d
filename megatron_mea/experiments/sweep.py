"""The `sweep` verb: one run a combination of variant, learning rate and seed, here or as a SLURM array."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from megatron_mea import failures
from megatron_mea.cluster import slurm
from megatron_mea.cluster.script import Site, render
from megatron_mea.cluster.submit import (
    Resources,
    check_resources,
    check_run,
    config_of_jobs,
    files_of_jobs,
    header,
    note_jobs,
)
from megatron_mea.config import Config, dump_config
from megatron_mea.config.load import load_config
from megatron_mea.errors import RunError, UserError
from megatron_mea.outputs import output_place, written
from megatron_mea.training import records
from megatron_mea.training.before import look_at

MIXING = ("mea", "mea_no_norm")
_POLL = 0.2


def combinations(
    path: str,
    overrides: Sequence[str],
    variants: Sequence[str],
    learning_rates: Sequence[str],
    seeds: Sequence[str],
    out: Path,
) -> list[Config]:
    """A configuration a run, in folders of `out` that are named after what differs.

    An empty sequence leaves the value of the file. Variants that do not combine keys and values have as many component
    heads as composite ones, whatever the file says.

    Raises:
        UserError: a combination is no valid configuration, or two are the same.
    """
    base = load_config(path, overrides)
    configs: dict[tuple[str, float, int], Config] = {}
    for variant, rate, seed in itertools.product(
        variants or [base.model.attention_variant], learning_rates or [str(base.optimizer.lr)], seeds or [""]
    ):
        name = f"{variant}-lr{rate}" + (f"-seed{seed}" if seed else "")
        given = [f"model.attention_variant={variant}", f"optimizer.lr={rate}", f"run.dir={out / name}"]
        given += [f"training.seed={seed}"] if seed else []
        given += [] if variant in MIXING else ["model.num_component_heads=null"]
        config = load_config(path, [*overrides, *given])
        # 1e-3 and 0.001 are the same.
        what = (config.model.attention_variant, config.optimizer.lr, config.training.seed)
        if what in configs:
            raise UserError("sweep", f"{Path(configs[what].run.dir).name} and {name}", "each combination once")
        configs[what] = config
    return list(configs.values())


def run_here(configs: Sequence[Config], at_once: int = 1) -> str:
    """Trains them on this machine, each in a process of its own, and skips those that have ended.

    A run that diverges is a result. What each prints goes to `train.log` in its folder.

    Args:
        at_once: runs that may run at the same time; they share the cores, and take the GPUs in turn.

    Raises:
        UserError: one has a folder that is none, or is finished with other settings; nothing was trained.
        RunError: some failed; the others were trained all the same.
    """
    if at_once < 1:
        raise UserError("--at-once", at_once, "at least 1")
    # All of them before the first is trained, which may take days.
    ended = {config.run.dir: _has_ended(config) for config in configs}
    with output_place(Path(configs[0].run.dir).parent, folder=True):
        pass
    waiting = deque(config for config in configs if not ended[config.run.dir])
    slots: list[_Run | None] = [None] * min(at_once, len(waiting))
    failed, done, begin = [], 0, time.monotonic()
    count = len(waiting)
    print(f"{len(configs)} runs, {len(configs) - count} of them done before; each writes train.log", flush=True)
    try:
        while waiting or any(slots):
            for slot, run in enumerate(slots):
                if run is not None and run.process.poll() is not None:
                    done, slots[slot], failure = done + 1, None, run.failure()
                    failed += [f"{run.dir}: {failure}"] if failure else []
                    left = (time.monotonic() - begin) / done * (count - done)
                    print(f"run {done} of {count}: {run.dir} {run.result()} | {_clock(left)} left", flush=True)
                if slots[slot] is None and waiting:
                    slots[slot] = _Run(waiting.popleft(), slot, len(slots))
            time.sleep(_POLL)
    except BaseException:
        # Asked to stop, or the disk refused something: the runs in hand save.
        for run in filter(None, slots):
            run.process.send_signal(signal.SIGTERM)
        for run in filter(None, slots):
            run.process.wait()
        raise
    if failed:
        raise RunError("\n  ".join([f"{len(failed)} of {len(configs)} runs failed:", *failed]))
    return f"{len(configs)} runs are done: megatron-mea report {Path(configs[0].run.dir).parent} --out report.html"


class _Run:
    """A run of this machine, in a process of its own."""

    def __init__(self, config: Config, slot: int, slots: int) -> None:
        self.dir = Path(config.run.dir)
        self._note, self._failed = self.dir / "slurm" / "failed-sweep", self.dir / records.FAILED
        path = config_of_jobs(config)
        with written(self.dir):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dump_config(config), encoding="utf-8")
            for left in (self._note, self._failed):
                left.unlink(missing_ok=True)
            log = (self.dir / "train.log").open("ab")
        with log:
            command = [sys.executable, "-m", "megatron_mea", "train", str(path)]
            environment = os.environ | _share(slot, slots) | {failures.NOTE: str(self._note)}
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def failure(self) -> str | None:
        """Why it failed, which is left in the folder too; None where it did not."""
        if self.process.returncode == 0 or (self.dir / records.DIVERGED).exists():
            return None
        note = self._note.read_text() if self._note.exists() else ""
        reason = note.partition("\n")[2].strip() or f"status {self.process.returncode}; see {self.dir}/train.log"
        records.write_atomically(self._failed, json.dumps({"status": self.process.returncode, "reason": reason}) + "\n")
        return reason

    def result(self) -> str:
        for mark in (records.DIVERGED, records.FAILED):
            if (self.dir / mark).exists():
                return mark.lower()
        try:
            row = json.loads((self.dir / "metrics.jsonl").read_text().splitlines()[-1])
        except (OSError, ValueError, IndexError):
            return "ended"
        losses = [f"{key.replace('_', ' ')} {row[key]:.4f}" for key in ("loss", "validation_loss") if key in row]
        return ", ".join([f"at step {row['step']}", *losses])


def _has_ended(config: Config) -> bool:
    """Whether a run is finished, or diverged with these very settings: it would do so again."""
    if look_at(config).finished is not None:
        return True
    trained = config_of_jobs(config)
    diverged = (Path(config.run.dir) / records.DIVERGED).exists()
    return diverged and trained.is_file() and trained.read_text(encoding="utf-8") == dump_config(config)


def _share(slot: int, slots: int) -> dict[str, str]:
    """Environment of one of several runs on this machine: threads, and a GPU where there are some."""
    # Not before all runs have been checked: it takes seconds.
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // slots)))}
    gpus = torch.cuda.device_count()
    if gpus and slots > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(gpu) for gpu in range(gpus)]
        share["CUDA_VISIBLE_DEVICES"] = names[slot % gpus]
    return share


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def submit_array(configs: Sequence[Config], out: Path, resources: Resources, at_once: int | None, dry_run: bool) -> str:
    """Submits those that have not ended as the elements of an array; returns what to print.

    Args:
        at_once: elements that may run at the same time; None: as many as the cluster lets.

    Raises:
        UserError: a run or the resources would fail; nothing was submitted.
    """
    open_ones = [config for config in configs if not _has_ended(config)]
    if not open_ones:
        return f"all {len(configs)} runs are done"
    if at_once is not None and at_once < 1:
        raise UserError("--at-once", at_once, "at least 1")
    warnings = list(dict.fromkeys(line for config in open_ones for line in check_run(config, resources)[2]))
    site, state = Site.read(), out.resolve() / "slurm"
    path = state / "sweep.sbatch"
    options, more = check_resources(open_ones, resources, site, needs_scheduler=not dry_run)
    values = header(open_ones, resources, path, "%A_%a.log")
    runs = [str(Path(config.run.dir).resolve()) for config in open_ones]
    values |= {
        "ARRAY": f"0-{len(runs) - 1}" + (f"%{at_once}" if at_once else ""),
        "RUNS": runs,
        "STEPS": open_ones[0].steps,
    }
    script = render("sweep.sbatch", site, options, values)
    warned = [f"warning: {line}" for line in [*warnings, *more]]
    if dry_run:
        return "\n".join([script, *(f"# {line}" for line in warned)])
    expected = slurm.check_script(script)
    with files_of_jobs(open_ones, path, script) as jobs:
        jobs.append(job := slurm.submit(str(path)))
        for index, config in enumerate(open_ones):
            note_jobs(config, [f"{job}_{index}"])
    lines = [f"Submitted batch job {job}", *warned]
    lines += [f"  {job}_{index}  {run}" for index, run in enumerate(runs)]
    lines += [
        f"  scheduler     {expected}",
        f"  logs          {state}/{job}_*.log",
        f"  state         squeue --array --job {job}",
        f"  save, stop    scancel --batch --signal=USR1 {job}_0",
        f"  cancel        scancel {job}",
    ]
    return "\n".join(lines)
