"""The `submit` verb: everything that can be checked before a job waits in a queue for hours, then sbatch."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_mea.checkpoint.lease import holder
from megatron_mea.cluster import slurm
from megatron_mea.cluster.script import Site, render
from megatron_mea.config import Config, dump_config
from megatron_mea.config.layout import Layout, check_layout
from megatron_mea.errors import Problem, RunError, UserError
from megatron_mea.outputs import output_place, written
from megatron_mea.training.before import look_at, open_data
from megatron_mea.training.ranks import Ranks

OURS = {
    **{"--nodes": "--nodes", "-N": "--nodes", "--time": "--time", "-t": "--time", "--requeue": "--chain"},
    **dict.fromkeys(("--ntasks", "-n", "--ntasks-per-node", "--gpus", "-G", "--gpus-per-node"), "--gpus-per-node"),
    **dict.fromkeys(("--gpus-per-task", "--gres", "--ntasks-per-gpu"), "--gpus-per-node"),
    **{"--output": "nothing: the log lies in the run folder", "-o": "nothing: the log lies in the run folder"},
    **{"--open-mode": "nothing", "--no-requeue": "--chain", "--array": "the verb sweep", "-a": "the verb sweep"},
    **{"--chdir": "nothing: cd there and submit", "-D": "nothing: cd there and submit"},
    **{"--no-kill": "nothing: training needs all its nodes", "-k": "nothing: training needs all its nodes"},
}
"""Options of sbatch that this package sets, and what to use instead."""

_DISK = 2e8
"""Bytes a second that a node writes at least, where no checkpoint has been timed yet."""
_EARLY = 60
"""Seconds by which SLURM may send a signal earlier than it was asked to (man sbatch)."""
_FLOPS = 1e14
"""A second and rank that are reached at least, where no step has been timed yet: a quarter of what an H100 should."""
_LEAST = 5.0
"""Seconds that a step, or a save, is taken to last at least."""
_ALIVE = 90.0
"""Seconds after its last heartbeat for which a run counts as one that goes on."""


@dataclass(frozen=True)
class Resources:
    """What a job asks for.

    Args:
        time: as SLURM writes it.
        chain: jobs in a row, each going on where the one before it has stopped; 1: one job that requeues itself.
        options: of sbatch, as the user gave them.
    """

    nodes: int
    gpus_per_node: int
    time: str
    chain: int = 1
    options: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


def submit(config: Config, resources: Resources, dry_run: bool) -> str:
    """Checks, and submits; returns what to print: the job and how to follow it, or with `dry_run` the script.

    Raises:
        UserError: anything that would fail in the queue or afterwards; nothing was written or submitted.
    """
    layout, step, warnings = check_run(config, resources)
    site = Site.read()
    state = Path(config.run.dir).resolve() / "slurm"
    path = state / "train.sbatch"
    options, more = check_resources([config], resources, site, needs_scheduler=not dry_run)
    script = render(
        "train.sbatch",
        site,
        options,
        {
            **header([config], resources, path, "%j.log"),
            "RUN_DIR": str(state.parent),
            "CONFIG": str(state / "config.yaml"),
            "STEPS": config.steps,
        },
    )
    warned = [f"warning: {line}" for line in [*warnings, *more]]
    if dry_run:
        return "\n".join([script, *(f"# {line}" for line in warned)])
    expected = slurm.check_script(script)
    with files_of_jobs([config], path, script) as jobs:
        for _ in range(resources.chain):
            jobs.append(slurm.submit(str(path), after=jobs[-1] if jobs else None))
            note_jobs(config, jobs)
    return "\n".join(_told(jobs, config, resources, layout, step, path, expected, warned))


def check_run(config: Config, resources: Resources) -> tuple[Layout, int, list[str]]:
    """What `train` would check: layout, data, tokenizer, weights, space; returns the step it begins at, and warnings.

    Raises:
        UserError: the resources contradict themselves, or the run cannot start, is finished, or is being trained.
    """
    if problems := list(_contradictions(resources, None)):
        raise UserError.of(problems)
    world = resources.world_size
    layout, before = check_layout(config, world), look_at(config)
    if before.finished is not None:
        found = f"{config.run.dir}, finished at step {before.finished}"
        raise UserError("run.dir", found, "a run with steps to do", "raise training.steps to go on")
    if other := _who_trains(Path(config.run.dir)):
        raise UserError("run.dir", f"{config.run.dir}, which {other} trains", "a run that nobody trains now")
    data = open_data(config, layout, before)

    # It imports torch.
    from megatron_mea.training.inputs import open_inputs

    warnings = open_inputs(config, Ranks(0, world, 0, "", 1), layout, before, data).warnings
    if resources.gpus_per_node % layout.tensor:
        warnings.append(
            f"the {layout.tensor} ranks of a tensor group (parallel.tensor_model_parallel_size) do not share a node of "
            f"{resources.gpus_per_node}: every layer would wait for the network"
        )
    return layout, before.source[0] if before.source else 0, warnings


def check_resources(
    configs: Sequence[Config], resources: Resources, site: Site, needs_scheduler: bool
) -> tuple[list[str], list[str]]:
    """Options of sbatch for a script that trains these runs, and warnings.

    Args:
        configs: of the runs that the script trains.
        needs_scheduler: False: without one (for a look at the script) what only it knows is left out.

    Raises:
        UserError: the resources contradict themselves, the runs or the cluster.
    """
    partitions = {}
    if problem := slurm.problem():
        if needs_scheduler:
            raise UserError("environment", problem, "a login node of a SLURM cluster whose controller is UP")
    else:
        partitions = slurm.partitions()
        _check_jobs(configs)
    given = list(resources.options)
    wanted = (slurm.option([*site.options, *given], "--partition", "-p") or "").split(",")
    allowed = [one for one in partitions.values() if one.name in wanted or (wanted == [""] and one.is_default)]
    partition = allowed[0] if allowed else None
    lead = _longest_lead(configs, resources)
    problems = [
        *(problem for one in allowed or [None] for problem in _contradictions(resources, one)),
        *_signal_problems(lead, resources),
    ]
    if problems:
        raise UserError.of(problems)
    options, gpus, warnings = [], resources.gpus_per_node, []
    if (slurm.seconds(resources.time) or 0) < 2 * (lead + _EARLY):
        warnings.append(f"--time {resources.time} is short: the run is told to save {lead} to {lead + _EARLY} s before")
    if partition is None or partition.gpus:
        options.append(f"--gpus-per-node={gpus}")
    else:
        warnings.append(f"partition {partition.name} schedules no GPUs: {gpus} tasks on each of its nodes, exclusively")
    own = any(slurm.option(given, *names) for names in (("--cpus-per-task", "-c"), ("--cpus-per-gpu",)))
    if not own and (cpus := site.cpus_per_task or _cpus_per_task(gpus, partition)):
        options.append(f"--cpus-per-task={cpus}")
    if partition is not None and (not partition.gpus or gpus >= partition.gpus):
        options.append("--exclusive")
    options.append("--requeue" if resources.chain == 1 else "--no-requeue")
    return [*options, *site.options, *_in_lines(given)], warnings


def _check_jobs(configs: Sequence[Config]) -> None:
    """Raises UserError where a job that was submitted for one of the runs, alone or in a sweep, waits or runs."""
    living = {job.id: job for job in slurm.waiting_or_running()}
    for config in configs:
        path = _jobs_file(config)
        for name in path.read_text().split() if path.is_file() else ():
            if job := living.get(name):
                found = f"{config.run.dir}, for which job {job.id} is {job.state}"
                raise UserError("run.dir", found, "a run without a job", f"wait for it, or scancel {job.id}")


def note_jobs(config: Config, jobs: Sequence[str]) -> None:
    """Leaves the numbers of the jobs that were submitted for a run, for the next `submit`."""
    path = _jobs_file(config)
    with written(path):
        path.write_text("\n".join(jobs) + "\n")


def _jobs_file(config: Config) -> Path:
    return Path(config.run.dir) / "slurm" / "jobs"


def header(configs: Sequence[Config], resources: Resources, script: Path, log: str) -> dict[str, Any]:
    """What the templates have in common; one script for all these runs, in the folder of their logs."""
    return {
        "NAME": f"mea-{script.parents[1].name}",
        "NODES": resources.nodes,
        "TASKS": resources.gpus_per_node,
        "TIME": resources.time,
        # sbatch replaces %j and its like.
        "LOG": f"{str(script.parent).replace('%', '%%')}/{log}",
        "FOLDER": str(Path.cwd()),
        "LEAD": _longest_lead(configs, resources),
        "SUBMISSION": time.strftime("%Y%m%d-%H%M%S"),
        "REQUEUE": "yes" if resources.chain == 1 else "no",
    }


@contextmanager
def files_of_jobs(configs: Sequence[Config], path: Path, script: str) -> Iterator[list[str]]:
    """Writes the script and the resolved configurations, as they are now: a job may wait for days.

    Yields a list for the numbers of the jobs. Where the block fails before there is one, all is as it was before.

    Raises:
        RunError: a file cannot be written; or what the block raises, with the jobs that were submitted before.
    """
    files = {config_of_jobs(config): dump_config(config) for config in configs} | {path: script}
    before = {file: file.read_bytes() if file.is_file() else None for file in files}
    jobs: list[str] = []
    with ExitStack() as places:
        for file in files:
            places.enter_context(output_place(file, folder=False))
        try:
            for file, text in files.items():
                with written(file):
                    file.write_text(text, encoding="utf-8")
            yield jobs
        except BaseException as error:
            if jobs and isinstance(error, RunError):
                raise RunError(f"{error}; submitted before: job {', '.join(jobs)}") from None
            for file, content in [] if jobs else before.items():
                if content is None:
                    file.unlink(missing_ok=True)
                else:
                    file.write_bytes(content)
            raise


def config_of_jobs(config: Config) -> Path:
    """The file in the run folder that its jobs train."""
    return Path(config.run.dir) / "slurm" / "config.yaml"


def signal_lead(config: Config, resources: Resources) -> int:
    """Seconds before the limit at which a run must be told to save.

    Twice what a step, a validation where there is one, and a save take: of this run's last attempt, else estimated.
    """
    # They import torch.
    from megatron_mea.cluster.plan import make_plan
    from megatron_mea.training.inputs import checkpoint_bytes

    beat = _heartbeat(Path(config.run.dir)) or {}
    save = beat.get("save_seconds") or checkpoint_bytes(config.model) / (_DISK * resources.nodes)
    if beat.get("tokens_per_second"):
        step = config.tokens_per_step / beat["tokens_per_second"]
    else:
        flops = make_plan(config, resources.world_size).flops.total * config.tokens_per_step
        step = flops / (_FLOPS * resources.world_size)
    # A validation is the forward pass, a third of a step, of as many global batches.
    validation = config.evaluation.batches * step / 3 if config.data.validation else 0.0
    return math.ceil(20 + 2 * (max(save, _LEAST) + max(step + validation, _LEAST)))


def _longest_lead(configs: Sequence[Config], resources: Resources) -> int:
    return max(signal_lead(config, resources) for config in configs)


def _contradictions(resources: Resources, partition: slurm.Partition | None) -> Iterator[Problem]:
    for key in ("nodes", "gpus_per_node", "chain"):
        if getattr(resources, key) < 1:
            yield Problem(f"--{key.replace('_', '-')}", getattr(resources, key), "at least 1")
    for word in resources.options:
        name = word.partition("=")[0] if word.startswith("--") else word[:2]
        if word.startswith("-") and name in OURS:
            yield Problem(f"-- {word}", "an option that `submit` sets", OURS[name])
    limit = slurm.seconds(resources.time)
    if not limit:
        yield Problem("--time", resources.time, "SLURM's M, M:S, H:M:S, D-H, D-H:M or D-H:M:S, above zero")
    elif partition is not None and partition.limit is not None and limit > partition.limit:
        longest = f"at most {timedelta(seconds=partition.limit)} (H:M:S), the limit of partition {partition.name}"
        yield Problem("--time", resources.time, longest, "a shorter time: the run goes on by itself")
    if partition is not None:
        if resources.nodes > partition.nodes:
            yield Problem("--nodes", resources.nodes, f"at most {partition.nodes}, all of partition {partition.name}")
        if partition.gpus and resources.gpus_per_node > partition.gpus:
            yield Problem("--gpus-per-node", resources.gpus_per_node, f"at most {partition.gpus}")


def _signal_problems(needed: int, resources: Resources) -> Iterator[Problem]:
    lead = needed
    if (given := slurm.option(resources.options, "--signal")) is not None:
        sender, _, seconds = given.partition("@")
        if sender != "B:USR2" or not seconds.isdecimal():
            yield Problem("-- --signal", given, "B:USR2@SECONDS: the script forwards USR2 to the ranks")
            return
        lead = int(seconds)
    if lead < needed:
        allowed = f"at least {needed} s before the limit: twice a step, a validation and a save, and 20 s"
        yield Problem("-- --signal", f"{lead} s", allowed)
    limit = slurm.seconds(resources.time)
    if limit and limit <= lead:
        yield Problem("--time", resources.time, f"more than {lead} s: the run is told to save so long before")


def _in_lines(options: Sequence[str]) -> Iterator[str]:
    """The user's options, a line each, quoted: `--qos high` in one line."""
    line: list[str] = []
    for word in options:
        if word.startswith("-") and line:
            yield shlex.join(line)
            line = []
        line.append(word)
    if line:
        yield shlex.join(line)


def _cpus_per_task(gpus: int, partition: slurm.Partition | None) -> int | None:
    if partition is None:
        return None
    return max(1, partition.cpus // (partition.gpus or gpus))


def _who_trains(run_dir: Path) -> str | None:
    """The process that has the run folder, unless it says that it has ended or has not been heard of for a while."""
    beat = _heartbeat(run_dir)
    if not beat or time.time() - (run_dir / "heartbeat.json").stat().st_mtime > _ALIVE:
        return None
    return holder(run_dir)


def _heartbeat(run_dir: Path) -> dict[str, Any] | None:
    try:
        return json.loads((run_dir / "heartbeat.json").read_text())
    except (OSError, ValueError):
        return None


def _told(
    jobs: Sequence[str],
    config: Config,
    resources: Resources,
    layout: Layout,
    step: int,
    path: Path,
    expected: str,
    warnings: Sequence[str],
) -> Iterator[str]:
    run, first = path.parents[1], jobs[0]
    for before, job in zip([None, *jobs], jobs, strict=False):
        yield f"Submitted batch job {job}" + (f", after {before}" if before else "")
    yield from warnings
    yield (
        f"  world size    {resources.world_size} = {resources.nodes} node(s) x {resources.gpus_per_node}: tensor "
        f"{layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
    )
    yield f"  run folder    {run}"
    yield f"  begins        {f'at step {step}, the newest checkpoint' if step else 'anew'}, of {config.steps}"
    yield f"  log           {path.parent / f'{first}.log'}"
    yield f"  script        {path}"
    yield f"  scheduler     {expected}"
    yield f"  follow        tail -F {path.parent / f'{first}.log'}"
    yield f"  state         squeue --job {','.join(jobs)}; cat {run / 'heartbeat.json'}"
    yield f"  save, requeue scancel --batch --signal=USR2 {first}"
    yield f"  save, stop    scancel --batch --signal=USR1 {first}"
    yield f"  cancel        scancel {' '.join(reversed(jobs))}"
