"""The `submit` verb: everything that can be checked before a job waits in a queue for hours, then sbatch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_mea.checkpoint.lease import lease_holder
from megatron_mea.config import Config
from megatron_mea.config.layout import check_layout
from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.errors import UserError
from megatron_mea.run_folder import RunFolder
from megatron_mea.slurm import scheduler
from megatron_mea.slurm.job_files import job_files, record_jobs
from megatron_mea.slurm.resources import (
    Resources,
    check_resources,
    longest_signal_lead,
)
from megatron_mea.slurm.script import Site, render
from megatron_mea.training.rank_env import RankEnv
from megatron_mea.training.startup import open_corpora, open_run_inputs, read_run_state

_MIN_TOKENS_ACROSS_NODES = 5000
"""Below so many of a context rank gathering 8 of 32 heads at 50 GB/s takes longer than attention at 500 TFLOP/s."""
_HEARTBEAT_TIMEOUT = 90.0
"""Seconds after its last heartbeat for which a run counts as being trained."""


def submit(*, config: Config, resources: Resources, dry_run: bool) -> str:
    """Checks a run and submits its job; returns the text to print: how to follow it, or with `dry_run` the script.

    Raises:
        UserError: anything that would fail in the queue or afterwards; nothing was written or submitted.
    """
    dims, step, warnings = check_run(config, resources)
    site = Site.read()
    run = RunFolder(Path(config.run.dir).resolve())
    options, resource_warnings = check_resources(
        configs=[config], resources=resources, site=site, needs_scheduler=not dry_run
    )
    script = render(
        name=run.job_script.name,
        site=site,
        options=options,
        values={
            **template_values(configs=[config], resources=resources, script=run.job_script, log="%j.log"),
            "RUN_DIR": str(run.path),
            "CONFIG": str(run.job_config),
            "STEPS": config.steps,
        },
    )

    warning_lines = [f"warning: {warning}" for warning in [*warnings, *resource_warnings]]
    if dry_run:
        return "\n".join([script, *(f"# {line}" for line in warning_lines)])

    schedule = scheduler.check_script(script)
    with job_files(configs=[config], path=run.job_script, script=script) as jobs:
        for _ in range(resources.chain):
            jobs.append(scheduler.submit(str(run.job_script), after=jobs[-1] if jobs else None))
            record_jobs(config, jobs)

    return "\n".join(
        _summary(
            jobs=jobs,
            config=config,
            resources=resources,
            dims=dims,
            step=step,
            run=run,
            schedule=schedule,
            warning_lines=warning_lines,
        )
    )


def check_run(config: Config, resources: Resources) -> tuple[ParallelDims, int, list[str]]:
    """Checks what `train` would: layout, data, tokenizer, weights, space.

    Returns:
        The layout, the step at which the run would begin, and warnings.

    Raises:
        UserError: the run cannot start, is finished, or is being trained.
    """
    dims, state = check_layout(config, resources.world_size), read_run_state(config)
    if state.finished_step is not None:
        got = f"{config.run.dir}, finished at step {state.finished_step}"
        raise UserError(
            where="run.dir", got=got, expected="a run with steps to do", hint="raise training.steps to go on"
        )

    if process := _training_process(RunFolder(config.run.dir)):
        raise UserError(
            where="run.dir", got=f"{config.run.dir}, which {process} trains", expected="a run that nobody trains now"
        )

    data = open_corpora(config=config, dims=dims, state=state)
    rank_env = RankEnv(rank=0, world_size=resources.world_size, local_rank=0, master_address="", master_port=1)
    inputs = open_run_inputs(config=config, rank_env=rank_env, dims=dims, state=state, data=data)

    warnings = inputs.warnings
    if resources.gpus_per_node % dims.tp:
        warnings.append(
            f"the {dims.tp} ranks of a tensor group (parallel.tensor_model_parallel_size) do not share a node of "
            f"{resources.gpus_per_node}: every layer would wait for the network"
        )
    elif (
        dims.cp > 1
        and resources.gpus_per_node % (dims.tp * dims.cp)
        and config.data.seq_length // dims.cp < _MIN_TOKENS_ACROSS_NODES
    ):
        warnings.append(
            f"the {dims.tp * dims.cp} ranks that share a sequence (parallel.context_parallel_size x "
            f"parallel.tensor_model_parallel_size) do not share a node of {resources.gpus_per_node}: with "
            f"{config.data.seq_length // dims.cp:,} tokens a rank, gathering keys and values over the network "
            "takes longer than attention (docs/long-context.md)"
        )

    return dims, state.resume_checkpoint[0] if state.resume_checkpoint else 0, warnings


def template_values(*, configs: Sequence[Config], resources: Resources, script: Path, log: str) -> dict[str, Any]:
    """Values by placeholder that train.sbatch and sweep.sbatch share.

    Args:
        configs: of the runs that the script trains.
        script: its path; logs are written beside it.
        log: name of the log in sbatch's notation, such as %j.log.
    """
    return {
        "NAME": f"mea-{script.parents[1].name}",
        "NODES": resources.nodes,
        "TASKS": resources.gpus_per_node,
        "TIME": resources.time,
        # sbatch replaces %j and its like.
        "LOG": f"{str(script.parent).replace('%', '%%')}/{log}",
        "FOLDER": str(Path.cwd()),
        "LEAD": longest_signal_lead(configs, resources),
        "SUBMISSION": time.strftime("%Y%m%d-%H%M%S"),
        "REQUEUE": "yes" if resources.chain == 1 else "no",
    }


def _training_process(run: RunFolder) -> str | None:
    """The process that trains in the run folder, None where it has ended or has had no heartbeat for a while."""
    if not run.read_heartbeat() or time.time() - run.heartbeat.stat().st_mtime > _HEARTBEAT_TIMEOUT:
        return None

    return lease_holder(run.path)


def _summary(
    *,
    jobs: Sequence[str],
    config: Config,
    resources: Resources,
    dims: ParallelDims,
    step: int,
    run: RunFolder,
    schedule: str,
    warning_lines: Sequence[str],
) -> Iterator[str]:
    """Lines to print after a submission.

    Args:
        jobs: their ids, in the order of the chain.
        step: at which the run begins.
        schedule: answer of sbatch on when and where the job would start.
    """
    first_job, log = jobs[0], run.slurm / f"{jobs[0]}.log"
    for previous, job in zip([None, *jobs], jobs, strict=False):
        yield f"Submitted batch job {job}" + (f", after {previous}" if previous else "")

    yield from warning_lines
    yield f"  world size    {resources.world_size} = {resources.nodes} node(s) x {resources.gpus_per_node}: {dims}"
    yield f"  run folder    {run.path}"
    yield f"  begins        {f'at step {step}, the newest checkpoint' if step else 'anew'}, of {config.steps}"
    yield f"  log           {log}"
    yield f"  script        {run.job_script}"
    yield f"  scheduler     {schedule}"
    yield f"  follow        tail -F {log}"
    yield f"  state         squeue --job {','.join(jobs)}; cat {run.heartbeat}"
    yield f"  save, requeue scancel --batch --signal=USR2 {first_job}"
    yield f"  save, stop    scancel --batch --signal=USR1 {first_job}"
    yield f"  cancel        scancel {' '.join(reversed(jobs))}"
