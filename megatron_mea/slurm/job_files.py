"""Files that jobs leave in the folders of their runs: job scripts, their configurations, and the ids of jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_mea.config import Config, dump_config
from megatron_mea.errors import RunError, UserError
from megatron_mea.outputs import disk_errors, reserve_output
from megatron_mea.slurm import scheduler


def check_jobs(configs: Sequence[Config]) -> None:
    """Raises UserError where a job that was submitted for one of the runs, alone or in a sweep, waits or runs."""
    jobs = {job.id: job for job in scheduler.pending_or_running_jobs()}
    for config in configs:
        path = _job_ids_path(config)
        for job_id in path.read_text().split() if path.is_file() else ():
            if job := jobs.get(job_id):
                got = f"{config.run.dir}, for which job {job.id} is {job.state}"
                raise UserError(
                    where="run.dir", got=got, expected="a run without a job", hint=f"wait for it, or scancel {job.id}"
                )


def record_jobs(config: Config, job_ids: Sequence[str]) -> None:
    """Writes the ids of the jobs that were submitted for a run into its folder, for the next `submit` to read."""
    path = _job_ids_path(config)
    with disk_errors(path):
        path.write_text("\n".join(job_ids) + "\n")


@contextmanager
def job_files(*, configs: Sequence[Config], path: Path, script: str) -> Iterator[list[str]]:
    """Writes the script and the resolved configurations, as they are now: a job may wait for days.

    Yields a list, to which the block appends the id of every job that it submits. Where the block fails before there
    is one, the files are restored.

    Raises:
        RunError: a file cannot be written; or the block raised it, with the jobs that were submitted before.
    """
    texts = {job_config_path(config): dump_config(config) for config in configs} | {path: script}
    earlier_contents = {file: file.read_bytes() if file.is_file() else None for file in texts}
    job_ids: list[str] = []
    with ExitStack() as reservations:
        for file in texts:
            reservations.enter_context(reserve_output(file, folder=False))

        try:
            for file, text in texts.items():
                with disk_errors(file):
                    file.write_text(text, encoding="utf-8")

            yield job_ids
        except BaseException as error:
            if job_ids and isinstance(error, RunError):
                raise RunError(f"{error}; submitted before: job {', '.join(job_ids)}") from None

            for file, content in [] if job_ids else earlier_contents.items():
                if content is None:
                    file.unlink(missing_ok=True)
                else:
                    file.write_bytes(content)
            raise


def job_config_path(config: Config) -> Path:
    """The configuration in the run folder that its jobs train with."""
    return Path(config.run.dir) / "slurm" / "config.yaml"


def _job_ids_path(config: Config) -> Path:
    return Path(config.run.dir) / "slurm" / "jobs"
