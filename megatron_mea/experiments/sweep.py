"""The `sweep` verb: one run a combination of variant, learning rate and seed, here or as a SLURM array."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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
from megatron_mea.training.run import look_at

PLAIN = ("plain", "plain_norm")


def combinations(
    path: str,
    overrides: Sequence[str],
    variants: Sequence[str],
    learning_rates: Sequence[str],
    seeds: Sequence[str],
    out: Path,
) -> list[Config]:
    """A configuration a run, in folders of `out` that are named after what differs.

    An empty sequence leaves the value of the file. Variants without a head combination have as many component heads
    as composite ones, whatever the file says.

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
        given += ["model.num_component_heads=null"] if variant in PLAIN else []
        config = load_config(path, [*overrides, *given])
        # 1e-3 and 0.001 are the same.
        what = (config.model.attention_variant, config.optimizer.lr, config.training.seed)
        if what in configs:
            raise UserError("sweep", f"{Path(configs[what].run.dir).name} and {name}", "each combination once")
        configs[what] = config
    return list(configs.values())


def run_here(configs: Sequence[Config]) -> str:
    """Trains them one after the other on this machine, each in a process of its own; skips those that are finished.

    Raises:
        UserError: one has a folder that is none, or is finished with other settings; nothing was trained.
        RunError: some failed; the others were trained all the same.
    """
    # All of them before the first is trained, which may take days.
    finished, failed = [look_at(config).finished is not None for config in configs], []
    for number, (config, done) in enumerate(zip(configs, finished, strict=True), 1):
        print(f"run {number} of {len(configs)}: {config.run.dir}", flush=True)
        if done:
            continue
        path = config_of_jobs(config)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_config(config), encoding="utf-8")
        command = [sys.executable, "-m", "megatron_mea", "train", str(path)]
        with subprocess.Popen(command) as run:
            try:
                run.wait()
            except SystemExit:
                # Asked to stop: the run in hand saves.
                run.send_signal(signal.SIGTERM)
                raise
        if run.returncode:
            failed.append(config.run.dir)
    if failed:
        raise RunError(f"{len(failed)} of {len(configs)} runs failed: {', '.join(failed)}")
    return f"{len(configs)} runs are finished"


def submit_array(configs: Sequence[Config], out: Path, resources: Resources, at_once: int | None, dry_run: bool) -> str:
    """Submits those that are not finished as the elements of an array; returns what to print.

    Args:
        at_once: elements that may run at the same time; None: as many as the cluster lets.

    Raises:
        UserError: a run or the resources would fail; nothing was submitted.
    """
    open_ones = [config for config in configs if look_at(config).finished is None]
    if not open_ones:
        return f"all {len(configs)} runs are finished"
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
