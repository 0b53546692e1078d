"""Resources that a job requests, checked against the cluster and the layouts of its runs."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from megatron_mea.config import Config
from megatron_mea.errors import Problem, UserError
from megatron_mea.run_folder import RunFolder
from megatron_mea.slurm import scheduler
from megatron_mea.slurm.job_files import check_jobs
from megatron_mea.slurm.script import Site
from megatron_mea.training.startup import checkpoint_bytes

_ASSUMED_DISK_BYTES_PER_SECOND = 2e8
"""Bandwidth of a node at least, where no checkpoint has been timed yet."""
_SIGNAL_EARLY_SECONDS = 60
"""Seconds by which SLURM may send a signal earlier than it was asked to (man sbatch)."""
_ASSUMED_FLOPS_PER_SECOND = 1e14
"""Speed of a rank at least, where no step has been timed yet: a quarter of what an H100 should reach."""
_MIN_SECONDS = 5.0
"""Seconds that a step, or a save, is taken to last at least."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Nodes, GPUs and time that a job requests.

    Args:
        time: limit in SLURM's notation, such as 1-12:00:00, that `scheduler.parse_time` reads.
        chain: number of jobs, each resuming where the one before has stopped; 1: one job that requeues itself.
        options: for sbatch, as the user gave them; none of `scheduler.RESERVED_OPTIONS`.
    """

    nodes: int
    gpus_per_node: int
    time: str
    chain: int = 1
    options: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Ranks of the job, one on each GPU."""
        return self.nodes * self.gpus_per_node


def check_resources(
    *, configs: Sequence[Config], resources: Resources, site: Site, needs_scheduler: bool
) -> tuple[list[str], list[str]]:
    """Options of sbatch for a script that trains these runs, and warnings.

    Args:
        configs: of the runs that the script trains.
        needs_scheduler: False (for a dry run): where there is no scheduler its checks and options are left out.

    Raises:
        UserError: the resources contradict themselves, the runs or the cluster.
    """
    partitions = {}
    if problem := scheduler.unavailable_reason():
        if needs_scheduler:
            raise UserError(
                where="environment", got=problem, expected="a login node of a SLURM cluster whose controller is UP"
            )
    else:
        partitions = scheduler.partitions()
        check_jobs(configs)

    user_options = list(resources.options)
    names = (scheduler.option_value([*site.options, *user_options], "--partition", "-p") or "").split(",")
    candidates = [
        partition
        for partition in partitions.values()
        if partition.name in names or (names == [""] and partition.is_default)
    ]
    partition = candidates[0] if candidates else None
    lead = longest_signal_lead(configs, resources)
    problems = [
        *(problem for candidate in candidates for problem in _partition_problems(resources, candidate)),
        *_signal_problems(lead, resources),
    ]
    if problems:
        raise UserError.from_problems(problems)

    options, gpus, warnings = [], resources.gpus_per_node, []
    earliest = lead + _SIGNAL_EARLY_SECONDS
    if (scheduler.parse_time(resources.time) or 0) < 2 * earliest:
        warnings.append(f"--time {resources.time} is short: the run is told to save {lead} to {earliest} s before")

    if partition is None or partition.gpus:
        options.append(f"--gpus-per-node={gpus}")
    else:
        warnings.append(f"partition {partition.name} schedules no GPUs: {gpus} tasks on each of its nodes, exclusively")

    user_sets_cpus = any(
        scheduler.option_value(user_options, *spellings)
        for spellings in (("--cpus-per-task", "-c"), ("--cpus-per-gpu",))
    )
    if not user_sets_cpus and (cpus := site.cpus_per_task or _cpus_per_task(gpus, partition)):
        options.append(f"--cpus-per-task={cpus}")
    if partition is not None and (not partition.gpus or gpus >= partition.gpus):
        options.append("--exclusive")

    options.append("--requeue" if resources.chain == 1 else "--no-requeue")
    return [*options, *site.options, *_option_lines(user_options)], warnings


def _partition_problems(resources: Resources, partition: scheduler.Partition) -> Iterator[Problem]:
    seconds = scheduler.parse_time(resources.time)
    if seconds and partition.time_limit is not None and seconds > partition.time_limit:
        limit = timedelta(seconds=partition.time_limit)
        yield Problem(
            where="--time",
            got=resources.time,
            expected=f"at most {limit} (H:M:S), the limit of partition {partition.name}",
            hint="a shorter time: the run goes on by itself",
        )

    if resources.nodes > partition.nodes:
        expected = f"at most {partition.nodes}, all of partition {partition.name}"
        yield Problem(where="--nodes", got=resources.nodes, expected=expected)
    if partition.gpus and resources.gpus_per_node > partition.gpus:
        yield Problem(where="--gpus-per-node", got=resources.gpus_per_node, expected=f"at most {partition.gpus}")


def signal_lead(config: Config, resources: Resources) -> int:
    """Seconds before the limit at which a run must be told to save.

    Twice as long as a step, a validation where there is one, and a save take, as this run's last attempt has timed or
    else as estimated, and 20 seconds.
    """
    # It imports torch.
    from megatron_mea.plan.plan import make_plan

    heartbeat = RunFolder(config.run.dir).read_heartbeat() or {}
    save_seconds = _measured(heartbeat, "save_seconds") or checkpoint_bytes(config.model) / (
        _ASSUMED_DISK_BYTES_PER_SECOND * resources.nodes
    )
    if rate := _measured(heartbeat, "tokens_per_second"):
        step_seconds = config.tokens_per_step / rate
    else:
        flops = make_plan(config, world_size=resources.world_size).flops.total * config.tokens_per_step
        step_seconds = flops / (_ASSUMED_FLOPS_PER_SECOND * resources.world_size)

    # A validation is the forward pass, a third of a step, of as many global batches.
    validation_seconds = config.evaluation.batches * step_seconds / 3 if config.data.validation else 0.0
    return math.ceil(20 + 2 * (max(save_seconds, _MIN_SECONDS) + max(step_seconds + validation_seconds, _MIN_SECONDS)))


def _measured(heartbeat: dict[str, Any], key: str) -> float | None:
    """A number of a heartbeat; None where it is missing, or no run would measure it."""
    value = heartbeat.get(key)
    return value if type(value) in (int, float) and 1e-6 <= value <= 1e12 else None


def longest_signal_lead(configs: Sequence[Config], resources: Resources) -> int:
    """`signal_lead` of the run that needs most."""
    return max(signal_lead(config, resources) for config in configs)


def _signal_problems(min_lead: int, resources: Resources) -> Iterator[Problem]:
    """Problems of a `--signal` of the user's and of the time limit, where a run needs `min_lead` seconds to save."""
    lead = min_lead
    if (signal := scheduler.option_value(resources.options, "--signal")) is not None:
        receiver_and_name, _, seconds = signal.partition("@")
        if receiver_and_name != "B:USR2" or not seconds.isdecimal():
            yield Problem(
                where="-- --signal", got=signal, expected="B:USR2@SECONDS: the script forwards USR2 to the ranks"
            )
            return
        lead = int(seconds)

    if lead < min_lead:
        expected = f"at least {min_lead} s before the limit: twice a step, a validation and a save, and 20 s"
        yield Problem(where="-- --signal", got=f"{lead} s", expected=expected)

    time_limit = scheduler.parse_time(resources.time)
    if time_limit and time_limit <= lead:
        yield Problem(
            where="--time", got=resources.time, expected=f"more than {lead} s: the run is told to save so long before"
        )


def _option_lines(words: Sequence[str]) -> Iterator[str]:
    """The user's options, a line each, quoted: `--qos high` in one line."""
    line: list[str] = []
    for word in words:
        if word.startswith("-") and line:
            yield shlex.join(line)
            line = []
        line.append(word)

    if line:
        yield shlex.join(line)


def _cpus_per_task(gpus: int, partition: scheduler.Partition | None) -> int | None:
    """CPUs of a node for each of its GPUs, or for each of `gpus` tasks where it has none; None: not known."""
    if partition is None:
        return None

    return max(1, partition.cpus // (partition.gpus or gpus))
