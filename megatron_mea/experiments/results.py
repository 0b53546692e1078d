"""What the runs of a report say together: fits, verdicts, the best rate of each variant, differences to plain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import t as student

from megatron_mea.experiments.fit import FEWEST_ROWS, Fit, fit_curve
from megatron_mea.experiments.runs import Run
from megatron_mea.experiments.stability import Verdict, judge
from megatron_mea.training.schedule import learning_rate

BASELINES = {"mea": ("plain", "plain_norm", "mea_no_norm"), "plain": ()}
"""What a variant is compared with, where that is not plain attention alone: MEA also with what is but a part of it."""
_SWEPT = ("model.attention_variant", "optimizer.lr", "training.seed", "run.dir")


@dataclass(frozen=True)
class Result:
    """One run, judged.

    Args:
        fit: None where its constants are not identified; `no_fit` then says why.
        caution: what the fit does not know of, where there is such a thing.
        best: the stable run with the lowest L_0 of its variant (the lowest final loss, where no run has an L_0).
    """

    run: Run
    verdict: Verdict
    fit: Fit | None
    no_fit: str
    caution: str = ""
    best: bool = False


@dataclass(frozen=True)
class Difference:
    """A variant less a baseline over the same seeds: mean of the differences (nats) and its 95 % t interval."""

    variant: str
    baseline: str
    what: str
    rates: str
    values: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def interval(self) -> tuple[float, float] | None:
        count = len(self.values)
        if count < 2:
            return None
        half = float(student.ppf(0.975, count - 1) * self.values.std(ddof=1) / np.sqrt(count))
        return self.mean - half, self.mean + half


def evaluate_runs(runs: Sequence[Run]) -> list[Result]:
    """In the order of the runs."""
    verdicts = judge(runs)
    results = [Result(run, verdict, *_fit(run, verdict)) for run, verdict in zip(runs, verdicts, strict=True)]
    best = [_best(results, variant) for variant in {run.variant for run in runs}]
    return [replace(each, best=any(each is one for one in best)) for each in results]


def cautions(runs: Sequence[Run]) -> list[str]:
    """What makes runs hard to compare: settings that differ beside variant, rate and seed, and runs that are one."""

    def settings(run: Run) -> dict[str, Any]:
        model = run.config.model
        sections = run.config.model_copy(
            update={"model": model.model_copy(update={"num_component_heads": model.component_heads})}
        ).model_dump()
        return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}

    each = [settings(run) for run in runs]
    differ = [key for key in each[0] if key not in _SWEPT and any(one[key] != each[0][key] for one in each)]
    found = [f"Not the same in all runs, so that differences may be theirs: {', '.join(differ)}."] if differ else []
    counts = Counter((run.variant, run.lr, run.seed) for run in runs)
    twice = [f"{variant} {lr:g} seed {seed}" for (variant, lr, seed), count in counts.items() if count > 1]
    return found + ([f"More than one run, of which differences take the last: {', '.join(twice)}."] if twice else [])


def differences(results: Sequence[Result]) -> list[Difference]:
    """Of every variant to its baselines: at each one's best rate, and to plain at every rate that both have."""
    best = {each.run.variant: best_rate(results, each.run.variant) for each in results}
    found = []
    for variant, rate in best.items():
        for baseline in BASELINES.get(variant, ("plain",)):
            theirs = best.get(baseline)
            pairs = [(f"best of each: {rate:g}, {theirs:g}", rate, theirs)] if rate and theirs else []
            if baseline == "plain":
                shared = sorted(_rates(results, variant) & _rates(results, baseline))
                pairs += [(f"{each:g}", each, each) for each in shared if not each == rate == theirs]
            for rates, mine, other in pairs if variant != baseline else []:
                for what in ("validation loss", "loss of the last tenth"):
                    own, control = _finals(results, variant, mine, what), _finals(results, baseline, other, what)
                    if seeds := sorted(own.keys() & control.keys()):
                        values = np.array([own[seed] - control[seed] for seed in seeds])
                        found.append(Difference(variant, baseline, what, rates, values))
    return found


def _rates(results: Sequence[Result], variant: str) -> set[float]:
    return {each.run.lr for each in results if each.run.variant == variant}


def best_rate(results: Sequence[Result], variant: str) -> float | None:
    """The rate, stable with every seed, whose mean final loss is the lowest; None where no run is whole and stable."""
    means = {}
    for rate in _rates(results, variant):
        own = [each for each in results if (each.run.variant, each.run.lr) == (variant, rate)]
        whole = [each.run for each in own if each.run.is_whole]
        # A seed that diverged counts, though its run is not whole.
        ended = [each.verdict for each in own if each.run.is_whole or each.verdict.kind == "diverged"]
        if whole and all(verdict.stable for verdict in ended):
            finals = [run.final_validation for run in whole]
            losses = [run.final_loss for run in whole] if None in finals else finals
            means[rate] = float(np.mean(losses))
    return min(means, key=means.get) if means else None


def _finals(results: Sequence[Result], variant: str, rate: float, what: str) -> dict[int, float]:
    own = [each.run for each in results if each.run.variant == variant and each.run.lr == rate and each.run.is_whole]
    found = {run.seed: run.final_validation if what == "validation loss" else run.final_loss for run in own}
    return {seed: value for seed, value in found.items() if value is not None}


def _best(results: Sequence[Result], variant: str) -> Result | None:
    stable = [each for each in results if each.run.variant == variant and each.verdict.stable]
    fitted = [each for each in stable if each.fit is not None]
    if fitted:
        return min(fitted, key=lambda each: each.fit.asymptote)
    return min(stable, key=lambda each: each.run.final_loss, default=None)


def _fit(run: Run, verdict: Verdict) -> tuple[Fit | None, str, str]:
    """The fit, why there is none, and a caution."""
    if verdict.kind == "diverged":
        return None, "it diverged", ""
    warm = run.steps > run.config.schedule.warmup_steps
    fit = fit_curve(run.tokens[warm], run.loss[warm])
    if fit is None:
        return None, f"{warm.sum()} rows after warm-up are too few ({FEWEST_ROWS} at least)", ""
    if fit.problem:
        return None, fit.problem, ""
    first, last = (learning_rate(run.config, int(step)) for step in (run.steps[warm][0], run.steps[-1]))
    decays = not np.isclose(first, last)
    return fit, "", "the rate falls during the run, of which eq. 35 knows nothing" if decays else ""
