"""`logging.profile`: traces of the steps that were asked for."""

from __future__ import annotations

import gzip
import json

import pytest
import runs

from megatron_mea.config.schema import Profile
from megatron_mea.errors import RunError
from megatron_mea.training.profile import Profiler


def steps_in(path) -> int:
    """How many forward passes of an embedding a trace shows, two micro-batches a step."""
    with gzip.open(path) as stream:
        events = json.load(stream)["traceEvents"]
    return sum(event.get("name") == "aten::embedding" for event in events) / 2


def test_a_run_writes_a_trace_of_the_steps_asked_for(tiny, tmp_path):
    tiny.write_config(config := tmp_path / "tiny.yaml")
    output = runs.train(config, "run", "logging.profile={start: 2, steps: 2}", "data.validation=[]")
    (trace,) = (tmp_path / "run/profile").iterdir()
    assert trace.name == "steps_00000002-00000003_rank_0.json.gz"
    assert f"wrote a trace: {trace}" in output
    assert steps_in(trace) == 2


@pytest.mark.parametrize(("first", "last"), [(3, 6), (4, 5)])
def test_what_is_left_of_the_steps_is_recorded(tmp_path, first, last):
    """A run that resumes inside of them, or is asked to stop."""
    profiler = Profiler(Profile(start=3, steps=4), tmp_path, 1)
    written = []
    for step in range(first - (first == 3), last + 1):
        profiler.before(step)
        written.append(profiler.after(step, last=step == last))
    assert written[:-1] == [None] * (len(written) - 1)
    assert written[-1].name == f"steps_{first:08d}-{last:08d}_rank_1.json.gz"


def test_nothing_is_recorded_elsewhere_and_a_disk_that_refuses_is_named(tmp_path):
    for profiler in (Profiler(None, tmp_path, 0), Profiler(Profile(start=1, steps=1), tmp_path, None)):
        profiler.before(1)
        assert profiler.after(1, last=True) is None
    assert not list(tmp_path.iterdir())
    (tmp_path / "profile").write_text("")
    profiler = Profiler(Profile(start=1, steps=1), tmp_path, 0)
    profiler.before(1)
    with pytest.raises(RunError, match="profile"):
        profiler.after(1, last=False)
