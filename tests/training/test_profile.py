"""`logging.profile`: traces of the configured steps."""

from __future__ import annotations

import gzip
import json

import pytest
from support import runs

from megatron_mea.config.schema import Profile
from megatron_mea.errors import RunError
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


@pytest.mark.parametrize(("first", "last"), [(3, 6), (4, 5)])
def test_what_is_left_of_the_steps_is_recorded(tmp_path, first, last):
    """A run that resumes among the configured steps, or is asked to stop."""
    profiler = Profiler(settings=Profile(start=3, steps=4), run_dir=tmp_path, rank=1)
    traces = []
    for step in range(first - (first == 3), last + 1):
        profiler.start_step(step)
        traces.append(profiler.end_step(step, last=step == last))

    assert traces[:-1] == [None] * (len(traces) - 1)
    assert traces[-1].name == f"steps_{first:08d}-{last:08d}_rank_1.json.gz"


def test_nothing_is_recorded_elsewhere_and_a_disk_that_refuses_is_named(tmp_path):
    for profiler in (
        Profiler(settings=None, run_dir=tmp_path, rank=0),
        Profiler(settings=Profile(start=1, steps=1), run_dir=tmp_path, rank=None),
    ):
        profiler.start_step(1)
        assert profiler.end_step(1, last=True) is None

    assert not list(tmp_path.iterdir())
    (tmp_path / "profile").write_text("")
    profiler = Profiler(settings=Profile(start=1, steps=1), run_dir=tmp_path, rank=0)
    profiler.start_step(1)
    with pytest.raises(RunError, match="profile"):
        profiler.end_step(1, last=False)
