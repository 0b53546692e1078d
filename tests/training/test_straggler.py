"""Stragglers: which ranks count as slow, and when they are reported."""

from __future__ import annotations

import socket
import statistics
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.distributed import run_distributed

from megatron_mea.training import straggler
from megatron_mea.training.straggler import StragglerDetector, find_stragglers

SECONDS = st.floats(0, 10, allow_nan=False)


@pytest.mark.slow
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
        # A single rank, and a difference within the noise.
        ([5], [0], {}),
        ([0.001, 0.001, 0.005], [0] * 3, {}),
        # Nothing was measured.
        ([0, 0, 0], [0] * 3, {}),
    ],
)
def test_outliers(seconds, stages, expected):
    assert find_stragglers(list(map(float, seconds)), stages) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(0.001, 10), st.integers(0, 2)), min_size=1, max_size=12))
def test_a_stage_is_compared_with_itself(ranks):
    seconds, stages = [duration for duration, _ in ranks], [stage for _, stage in ranks]
    stragglers = find_stragglers(seconds, stages)
    for stage in set(stages):
        members = [rank for rank, other in enumerate(stages) if other == stage]
        stage_seconds = [seconds[rank] for rank in members]
        ratios = find_stragglers(stage_seconds, [0] * len(members))
        actual = {rank: stragglers[rank] for rank in members if rank in stragglers}
        assert actual == {members[index]: ratio for index, ratio in ratios.items()}

        # At most half of the stage, all above the median, and the slowest rank has the largest ratio.
        assert len(ratios) <= len(members) / 2
        assert all(stage_seconds[index] > statistics.median(stage_seconds) for index in ratios)
        assert not ratios or max(stage_seconds) == stage_seconds[max(ratios, key=ratios.get)]


@given(st.floats(0.001, 10), st.integers(1, 8), st.floats(1.0, 1.2))
def test_ranks_of_similar_speed_are_no_outliers(seconds, count, ratio):
    assert find_stragglers([seconds] * count + [seconds * ratio] * count, [0] * 2 * count) == {}


def measure(*, stages: list[int], slow: list[bool], training: list[bool]) -> tuple[list[dict], list[list[str]]]:
    """Scalars and lines of a report after each turn, in which rank 1 is slow or not, and the model trains or not.

    In one pass of each turn rank 1 is suspended.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo")

    rank = dist.get_rank()
    # A clock of the test's, since a busy machine makes every rank slow.
    now, clock = [0.0], SimpleNamespace(stops=0)
    straggler.time = SimpleNamespace(perf_counter=lambda: now[0])

    def forward_hidden(seconds):
        if model.suspended:
            now[0] += 1000
            clock.stops += 1

        now[0] += seconds
        return seconds

    model = SimpleNamespace(training=True, forward_hidden=forward_hidden)
    passes = []
    detector = StragglerDetector(
        model=model,
        grid=SimpleNamespace(pipeline_rank=stages[rank]),
        device=torch.device("cpu"),
        on_forward=lambda: passes.append(rank),
        clock=clock,
    )

    reports = []
    for is_slow, model.training in zip(slow, training, strict=True):
        seconds = 0.1 if is_slow and rank == 1 else 0.02
        for model.suspended in (False, rank == 1, False):
            assert model.forward_hidden(seconds) == seconds
        reports.append(detector.report())

    return [scalars for scalars, _ in reports], [lines for _, lines in reports]


def measure_all() -> list:
    turns = [True, True, True, False, True, True, True]
    return [
        measure(stages=[0, 0, 0], slow=turns, training=[True] * 7),
        measure(stages=[0, 1, 1], slow=[True, True], training=[True] * 2),
        measure(stages=[0, 1, 0], slow=[True, True], training=[True] * 2),
        measure(stages=[0, 0, 0], slow=[True, True], training=[False] * 2),
    ]


@pytest.mark.slow
def test_a_slow_rank_is_reported_when_it_is_slow_twice():
    one_stage, two_stages, other_stage, evaluating = zip(*run_distributed(measure_all, 3), strict=True)
    # All ranks have the same result.
    assert one_stage[0] == one_stage[1] == one_stage[2]
    scalars, lines = one_stage[0]
    assert [len(report) for report in lines] == [0, 1, 0, 0, 0, 1, 0]
    host = socket.gethostname()
    slow = f"rank 1 on {host} takes 5.00 times the median for a forward pass (0.1 s): a slow GPU or node"
    assert lines[1] == lines[5] == [slow]

    spread = dict(zip(("min", "median", "max"), (0.02, 0.02, 0.1), strict=True))
    assert scalars[0] == pytest.approx({f"forward_seconds_{name}": seconds for name, seconds in spread.items()})
    assert [len(report) for report in two_stages[0][1]] == [0, 1]
    assert [len(report) for report in other_stage[0][1]] == [0, 0]
    assert set(evaluating[0][0][0].values()) == {0.0}
