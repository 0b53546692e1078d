"""`logging.profile`: traces of the configured steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from support import runs
from support.steps import trained

from megatron_mea.config.schema import Profile
from megatron_mea.errors import RunError
from megatron_mea.run_folder import RunFolder
from megatron_mea.training.profile import Profiler


def count_steps(path) -> int:
    """The steps that a trace shows: forward passes of an embedding, with two micro-batches a step."""
    with gzip.open(path) as stream:
        events = json.load(stream)["traceEvents"]
    return sum(event.get("name") == "aten::embedding" for event in events) / 2


@pytest.mark.slow
def test_a_run_writes_a_trace_of_the_configured_steps(tiny, tmp_path):
    tiny.write_config(config := tmp_path / "tiny.yaml")
    output = runs.train(config, "run", "logging.profile={start: 2, steps: 2}", "data.validation=[]")
    (trace,) = (tmp_path / "run/profile").iterdir()
    assert trace.name == "steps_00000002-00000003_rank_0.json.gz"
    assert f"wrote a trace: {trace}" in output
    assert count_steps(trace) == 2


def new_profiler(*, settings: Profile | None, tmp_path: Path, rank: int | None = 0) -> tuple[Profiler, list[str]]:
    """A profiler, and the lines that it prints."""
    lines: list[str] = []
    folder = RunFolder(tmp_path)
    return Profiler(settings=settings, folder=folder, rank=rank, watchdog=MagicMock(), log=lines.append), lines


@pytest.mark.parametrize(("first", "last"), [(3, 6), (4, 5)])
def test_what_is_left_of_the_steps_is_recorded(tmp_path, first, last):
    """A run that resumes among the configured steps, or is asked to stop."""
    profiler, lines = new_profiler(settings=Profile(start=3, steps=4), tmp_path=tmp_path, rank=1)
    for step in range(first - (first == 3), last + 1):
        assert not lines
        profiler.on_step_begin(step)
        profiler.on_update(trained(step, last=step == last))

    trace = tmp_path / f"profile/steps_{first:08d}-{last:08d}_rank_1.json.gz"
    assert lines == [f"wrote a trace: {trace}"]
    assert trace.is_file()


def test_nothing_is_recorded_elsewhere_and_a_disk_that_refuses_is_named(tmp_path):
    for settings, rank in ((None, 0), (Profile(start=1, steps=1), None)):
        profiler, lines = new_profiler(settings=settings, tmp_path=tmp_path, rank=rank)
        profiler.on_step_begin(1)
        profiler.on_update(trained(1, last=True))
        assert not lines

    assert not list(tmp_path.iterdir())
    (tmp_path / "profile").write_text("")
    profiler, _ = new_profiler(settings=Profile(start=1, steps=1), tmp_path=tmp_path)
    profiler.on_step_begin(1)
    with pytest.raises(RunError, match="profile"):
        profiler.on_update(trained(1))
