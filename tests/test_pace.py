"""Slow ranks: which ones count as slow, and when they are named."""

from __future__ import annotations

import socket
import statistics
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from hypothesis import given
from hypothesis import strategies as st

from megatron_mea.training import pace as pace_module
from megatron_mea.training.pace import Pace, find_outliers

SECONDS = st.floats(0, 10, allow_nan=False)


@pytest.mark.parametrize(
    ("seconds", "stages", "expected"),
    [
        ([1, 1, 1, 1.3], [0] * 4, {3: 1.3}),
        ([1, 1, 1, 1.2], [0] * 4, {}),
        ([2, 2, 1, 2, 2], [0] * 5, {}),
        # Another stage holds other layers.
        ([1, 1, 1, 3, 3, 3], [0, 0, 0, 1, 1, 1], {}),
        ([1, 1, 2, 3, 3, 3], [0, 0, 0, 1, 1, 1], {2: 2.0}),
        ([1, 3, 1, 3, 1, 6], [0, 1, 0, 1, 0, 1], {5: 2.0}),
        # Alone, and a difference that says nothing.
        ([5], [0], {}),
        ([0.001, 0.001, 0.005], [0] * 3, {}),
        # Nothing was measured.
        ([0, 0, 0], [0] * 3, {}),
    ],
)
def test_outliers(seconds, stages, expected):
    assert find_outliers(list(map(float, seconds)), stages) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(0.001, 10), st.integers(0, 2)), min_size=1, max_size=12))
def test_a_stage_is_compared_with_itself(ranks):
    seconds, stages = [each for each, _ in ranks], [stage for _, stage in ranks]
    found = find_outliers(seconds, stages)
    for stage in set(stages):
        members = [rank for rank, other in enumerate(stages) if other == stage]
        own = [seconds[rank] for rank in members]
        alone = find_outliers(own, [0] * len(members))
        assert {rank: found[rank] for rank in members if rank in found} == {members[i]: r for i, r in alone.items()}
        # Never half of them, and the slowest first.
        assert len(alone) <= len(members) / 2
        assert all(own[i] > statistics.median(own) for i in alone)
        assert not alone or max(own) == own[max(alone, key=alone.get)]


@given(st.floats(0.001, 10), st.integers(1, 8), st.floats(1.0, 1.2))
def test_ranks_that_are_much_alike_are_no_outliers(seconds, count, ratio):
    assert find_outliers([seconds] * count + [seconds * ratio] * count, [0] * 2 * count) == {}


def measure(stages: list[int], slow: list[bool], training: list[bool]) -> tuple[list[dict], list[list[str]]]:
    """A report after each turn, in which rank 1 is slow or not, and the model is in training or not."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    # A machine that has other things to do makes everybody slow: the clock is ours.
    clock = [0.0]
    pace_module.time = SimpleNamespace(perf_counter=lambda: clock[0])

    def run(seconds):
        clock[0] += seconds
        return seconds

    model = SimpleNamespace(training=True, run=run)
    passes = []
    pace = Pace(model, SimpleNamespace(pipeline_rank=stages[rank]), torch.device("cpu"), lambda: passes.append(rank))
    reports = []
    for is_slow, model.training in zip(slow, training, strict=True):
        wanted = 0.1 if is_slow and rank == 1 else 0.02
        assert [model.run(wanted) for _ in range(2)] == [wanted] * 2
        reports.append(pace.report())
    return [scalars for scalars, _ in reports], [lines for _, lines in reports]


def measure_all() -> list:
    turns = [True, True, True, False, True, True, True]
    return [
        measure([0, 0, 0], turns, [True] * 7),
        measure([0, 1, 1], [True, True], [True] * 2),
        measure([0, 1, 0], [True, True], [True] * 2),
        measure([0, 0, 0], [True, True], [False] * 2),
    ]


def test_a_slow_rank_is_named_once_it_is_slow_twice():
    one_stage, two_stages, other_stage, evaluating = zip(*run_distributed(measure_all, 3), strict=True)
    # All ranks find the same.
    assert one_stage[0] == one_stage[1] == one_stage[2]
    scalars, lines = one_stage[0]
    assert [len(each) for each in lines] == [0, 1, 0, 0, 0, 1, 0]
    host = socket.gethostname()
    slow = f"rank 1 on {host} takes 5.00 times the median for a forward pass (0.1 s): a slow GPU or node"
    assert lines[1] == lines[5] == [slow]
    spread = dict(zip(("min", "median", "max"), (0.02, 0.02, 0.1), strict=True))
    assert scalars[0] == pytest.approx({f"forward_seconds_{name}": seconds for name, seconds in spread.items()})
    assert [len(each) for each in two_stages[0][1]] == [0, 1]
    assert [len(each) for each in other_stage[0][1]] == [0, 0]
    assert set(evaluating[0][0][0].values()) == {0.0}
