"""Decides whether a run was stable, by rules on its rows that are the same for every run and printed on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mea.experiments.runs import RunRecord

WINDOW, MIN_ROWS_BEFORE = 50, 20
"""A row is compared with the rows before it: at most, and at least, this many."""
MIN_DEVIATIONS, MIN_NATS = 10.0, 0.1
MAX_RISE = 0.5
MIN_GAIN_SHARE = 2 / 3
_CHUNK = 1 << 12
"""Rows whose windows are in memory at a time."""
RULES = (
    f"A loss spikes where it lies above the median of the {WINDOW} rows before it ({MIN_ROWS_BEFORE} at least) by "
    f"{MIN_DEVIATIONS:g} of their robust standard deviations (1.4826 x the median of the absolute differences of "
    f"neighbours, by the square root of 2) and by {MIN_NATS:g} nats. Rows are the logged steps: what happens between "
    "them (logging.interval) is not seen.",
    f"A run diverges where a loss or gradient is not finite, or where its last tenth lies more than {MAX_RISE:g} nats "
    "above its lowest tenth.",
    f"A rate above a variant's best one collapses where the loss ends below that of a uniform guess (the logarithm of "
    f"the vocabulary) by less than {MIN_GAIN_SHARE:.0%} of what it does at the best rate of all.",
    "Stable is a run without any of these; of one that has no row yet nothing is known.",
)


@dataclass(frozen=True)
class Verdict:
    """`kind`: stable, spiked, diverged, collapsed, or unknown where there is no loss; `detail` says where."""

    kind: str
    detail: str = ""

    @property
    def stable(self) -> bool:
        return self.kind == "stable"


def judge(runs: Sequence[RunRecord]) -> list[Verdict]:
    """A verdict a run, in order; a collapse is judged against the other runs."""
    verdicts = [_judge_run(run) for run in runs]
    sound = [run for run, verdict in zip(runs, verdicts, strict=True) if verdict.kind in ("stable", "spiked")]
    for index, run in enumerate(runs):
        if run not in sound:
            continue
        same_variant = [other for other in sound if other.variant == run.variant]
        best_of_variant = min(same_variant, key=lambda other: other.final_loss)
        best = min(sound, key=lambda other: other.final_loss)
        # Not from the first row, which may be long after the start.
        gained, possible = (math.log(record.config.model.vocab_size) - record.final_loss for record in (run, best))
        if run.is_complete and run.lr > best_of_variant.lr and gained < MIN_GAIN_SHARE * possible:
            verdicts[index] = Verdict(
                "collapsed", f"{gained:.2f} nats below a uniform guess, {possible:.2f} at the best rate"
            )

    return verdicts


def find_spikes(loss: np.ndarray) -> list[int]:
    """The row at which each spike of the loss (rows,) begins."""
    high = [row for row in range(MIN_ROWS_BEFORE, min(WINDOW, len(loss))) if loss[row] > _spike_threshold(loss[:row])]
    for first in range(WINDOW, len(loss), _CHUNK):
        rows = loss[first : first + _CHUNK]
        before = np.lib.stride_tricks.sliding_window_view(loss[first - WINDOW :][: len(rows) + WINDOW - 1], WINDOW)
        high += (first + np.flatnonzero(rows > _spike_threshold(before))).tolist()

    spikes: list[int] = []
    for row in high:
        if not (spikes and row - spikes[-1] < WINDOW):
            spikes.append(row)

    return spikes


def _spike_threshold(before: np.ndarray) -> np.ndarray:
    """The loss above which a row spikes, from those before it (..., rows)."""
    # A falling loss is no noise: differences of neighbours, which are sqrt(2) times as wide.
    deviation = 1.4826 * np.median(np.abs(np.diff(before)), axis=-1) / np.sqrt(2)
    return np.median(before, axis=-1) + np.maximum(MIN_DEVIATIONS * deviation, MIN_NATS)


def _judge_run(run: RunRecord) -> Verdict:
    if run.diverged:
        return Verdict("diverged", run.diverged)
    if not len(run.loss):
        return Verdict("unknown")
    if not np.isfinite(run.loss).all():
        return Verdict("diverged", "a loss that is not finite")

    tenth = max(1, len(run.loss) // 10)
    sums = np.cumsum(np.concatenate([[0.0], run.loss]))
    smoothed = (sums[tenth:] - sums[:-tenth]) / tenth
    rise = smoothed[-1] - smoothed.min()
    if rise > MAX_RISE:
        step = int(run.steps[smoothed.argmin() + tenth - 1])
        return Verdict("diverged", f"ends {rise:.2f} nats above its lowest, at step {step}")

    if rows := find_spikes(run.loss):
        steps = ", ".join(str(int(run.steps[row])) for row in rows[:5])
        return Verdict("spiked", f"at step {steps}" + (f" and {len(rows) - 5} more" if len(rows) > 5 else ""))

    return Verdict("stable", "" if len(run.loss) > MIN_ROWS_BEFORE else "too few rows to see spikes")
