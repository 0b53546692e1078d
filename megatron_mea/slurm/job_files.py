"""Files that jobs leave in the folders of their runs: job scripts, their configurations, and the ids of jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_mea.config import Config, dump_config
from megatron_mea.errors import RunError, UserError
from megatron_mea.outputs import disk_errors, reserve_output, restored_on_failure, write_file, write_files
from megatron_mea.run_folder import RunFolder
from megatron_mea.slurm import scheduler


def check_jobs(configs: Sequence[Config]) -> None:
    """Raises UserError where a job that was submitted for one of the runs, alone or in a sweep, waits or runs."""
    jobs = {job.id: job for job in scheduler.pending_or_running_jobs()}
    for config in configs:
        path = RunFolder(config.run.dir).job_ids
        for job_id in path.read_text().split() if path.is_file() else ():
            if job := jobs.get(job_id):
                got = f"{config.run.dir}, for which job {job.id} is {job.state}"
                raise UserError(
                    where="run.dir", got=got, expected="a run without a job", hint=f"wait for it, or scancel {job.id}"
                )


def record_jobs(config: Config, job_ids: Sequence[str]) -> None:
    """Writes the ids of the jobs that were submitted for a run into its folder, for the next `submit` to read."""
    path = RunFolder(config.run.dir).job_ids
    with disk_errors(path):
        write_file(path, "\n".join(job_ids) + "\n")


@contextmanager
def job_files(*, configs: Sequence[Config], path: Path, script: str) -> Iterator[list[str]]:
    """Writes the script and the resolved configurations, as they are now: a job may wait for days.

    Yields a list, to which the block appends the id of every job that it submits. Where the block fails before there
    is one, the files are restored.

    Raises:
        RunError: a file cannot be written; or the block raised it, with the jobs that were submitted before.
    """
    texts = {RunFolder(config.run.dir).job_config: dump_config(config) for config in configs} | {path: script}
    job_ids: list[str] = []
    failure: BaseException | None = None
    with ExitStack() as outputs:
        for file in texts:
            outputs.enter_context(reserve_output(file, folder=False))

        outputs.enter_context(disk_errors(path))
        outputs.enter_context(restored_on_failure(texts))
        write_files(texts)
        try:
            yield job_ids
        except BaseException as error:
            # The jobs that were submitted need their files.
            if not job_ids:
                raise
            failure = error

    if isinstance(failure, RunError):
        raise RunError(f"{failure}; submitted before: job {', '.join(job_ids)}") from None
    if failure is not None:
        raise failure
