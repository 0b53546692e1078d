"""Whether a run was stable: rules on its rows, the same for every run of a report, and said on its page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mea.experiments.runs import Run

WINDOW, FEWEST = 50, 20
"""Rows before one that it is compared with, at most and at least."""
DEVIATIONS, NATS = 10.0, 0.1
RISE = 0.5
SHARE = 2 / 3
RULES = (
    f"A loss spikes where it lies above the median of the {WINDOW} rows before it ({FEWEST} at least) by "
    f"{DEVIATIONS:g} of their robust standard deviations (1.4826 x the median of the absolute differences of "
    f"neighbours, by the square root of 2) and by {NATS:g} nats. Rows are the logged steps: what happens between them "
    "(logging.interval) is not seen.",
    f"A run diverges where a loss or gradient is not finite, or where its last tenth lies more than {RISE:g} nats "
    "above its lowest tenth.",
    f"A rate above a variant's best one collapses where the loss ends below that of a uniform guess (the logarithm of "
    f"the vocabulary) by less than {SHARE:.0%} of what it does at the best rate of all.",
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


def judge(runs: Sequence[Run]) -> list[Verdict]:
    """A verdict a run; runs are judged beside one another."""
    found = [_judge_alone(run) for run in runs]
    sound = [run for run, verdict in zip(runs, found, strict=True) if verdict.kind in ("stable", "spiked")]
    for index, run in enumerate(runs):
        if run not in sound:
            continue
        own = min((other for other in sound if other.variant == run.variant), key=lambda other: other.final_loss)
        best = min(sound, key=lambda other: other.final_loss)
        # Not from the first row, which may be long after the start.
        gained, possible = (math.log(each.config.model.vocab_size) - each.final_loss for each in (run, best))
        if run.is_whole and run.lr > own.lr and gained < SHARE * possible:
            found[index] = Verdict(
                "collapsed", f"{gained:.2f} nats below a uniform guess, {possible:.2f} at the best rate"
            )
    return found


def spikes(loss: np.ndarray) -> list[int]:
    """The rows at which the loss spikes: the first of each."""
    found: list[int] = []
    for row in range(FEWEST, len(loss)):
        before = loss[max(0, row - WINDOW) : row]
        median = np.median(before)
        # A falling loss is no noise: differences of neighbours, which are sqrt(2) times as wide.
        deviation = 1.4826 * np.median(np.abs(np.diff(before))) / np.sqrt(2)
        if loss[row] > median + max(DEVIATIONS * deviation, NATS) and not (found and row - found[-1] < WINDOW):
            found.append(row)
    return found


def _judge_alone(run: Run) -> Verdict:
    if run.diverged:
        return Verdict("diverged", run.diverged)
    if not len(run.loss):
        return Verdict("unknown")
    if not np.isfinite(run.loss).all():
        return Verdict("diverged", "a loss that is not finite")
    tenth = max(1, len(run.loss) // 10)
    smooth = np.convolve(run.loss, np.ones(tenth) / tenth, "valid")
    rise = smooth[-1] - smooth.min()
    if rise > RISE:
        step = int(run.steps[smooth.argmin() + tenth - 1])
        return Verdict("diverged", f"ends {rise:.2f} nats above its lowest, at step {step}")
    if rows := spikes(run.loss):
        steps = ", ".join(str(int(run.steps[row])) for row in rows[:5])
        return Verdict("spiked", f"at step {steps}" + (f" and {len(rows) - 5} more" if len(rows) > 5 else ""))
    return Verdict("stable", "" if len(run.loss) > FEWEST else "too few rows to see spikes")
