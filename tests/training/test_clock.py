"""The clock that stands still while the process is stopped."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from megatron_mea.training import clock as module
from megatron_mea.training.clock import TICK_SECONDS, AwakeClock


@given(st.lists(st.one_of(st.floats(0, 1), st.floats(3, 1e6)), max_size=50))
def test_time_without_readings_is_left_out(gaps):
    """Gaps of up to a second are those of a busy machine."""
    now, time = [5.0], module.time
    module.time = SimpleNamespace(monotonic=lambda: now[0])
    try:
        clock = AwakeClock()
        previous = clock()
        for gap in gaps:
            now[0] += gap
            assert clock() >= previous
            previous = clock()

        awake = sum(gap for gap in gaps if gap <= 1)
        assert abs(clock() - awake) < 1e-3
        assert clock.stops == sum(gap >= 3 for gap in gaps)
    finally:
        module.time = time


def test_a_thread_that_reads_it_in_time_sees_no_stop():
    assert TICK_SECONDS < module._STOP_SECONDS / 2
