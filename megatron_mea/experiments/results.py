"""The results over all runs of a report: fits, verdicts, the best rate of each variant, differences to plain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from megatron_mea.config.variants import compared_variant
from megatron_mea.experiments.fit import MIN_ROWS, Fit, fit_curve
from megatron_mea.experiments.runs import RunRecord
from megatron_mea.experiments.stability import Verdict, judge
from megatron_mea.training.schedule import learning_rate

_SWEPT_KEYS = ("model.attention_variant", "model.hlc_form", "optimizer.lr", "training.seed", "run.dir")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run with its verdict and its fit.

    Args:
        fit: None where its constants are not identified; `no_fit_reason` then says why.
        caution: why the fit may not hold beyond the run; empty where nothing speaks against it.
        best: the stable run with the lowest L_0 of its variant (the lowest final loss, where no run has an L_0).
    """

    run: RunRecord
    verdict: Verdict
    fit: Fit | None
    no_fit_reason: str
    caution: str = ""
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A variant less a baseline over the same seeds.

    Args:
        metric: what is compared, for people.
        rates: the learning rates of both, for people.
        values: (seeds,) differences, in nats.
    """

    variant: str
    baseline: str
    metric: str
    rates: str
    values: np.ndarray

    @property
    def mean(self) -> float:
        """Mean difference (nats)."""
        return float(self.values.mean())

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % t interval of the mean (nats); None for a single seed."""
        count = len(self.values)
        if count < 2:
            return None

        half = float(student_t.ppf(0.975, count - 1) * self.values.std(ddof=1) / np.sqrt(count))
        return self.mean - half, self.mean + half


def evaluate_runs(runs: Sequence[RunRecord]) -> list[Result]:
    """Judges and fits all runs, and marks the best one of each variant; in the order of the runs."""
    verdicts = judge(runs)
    results = []
    for run, verdict in zip(runs, verdicts, strict=True):
        fit, no_fit_reason, caution = _fit_run(run, verdict)
        results.append(Result(run=run, verdict=verdict, fit=fit, no_fit_reason=no_fit_reason, caution=caution))

    best = [_best_result(results, variant) for variant in {run.variant for run in runs}]
    return [replace(result, best=any(result is winner for winner in best)) for result in results]


def cautions(runs: Sequence[RunRecord]) -> list[str]:
    """Lists what makes runs hard to compare: settings that differ beside variant, rate and seed, and repeated runs."""

    def settings(run: RunRecord) -> dict[str, Any]:
        model = run.config.model
        sections = run.config.model_copy(
            update={"model": model.model_copy(update={"num_component_heads": model.component_heads})}
        ).model_dump()
        return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}

    run_settings = [settings(run) for run in runs]
    first = run_settings[0]
    differing = [
        key for key in first if key not in _SWEPT_KEYS and any(other[key] != first[key] for other in run_settings)
    ]
    lines = []
    if differing:
        lines.append(f"Not the same in all runs, so that differences may be theirs: {', '.join(differing)}.")

    counts = Counter((run.variant, run.lr, run.seed) for run in runs)
    repeated = [f"{variant} {lr:g} seed {seed}" for (variant, lr, seed), count in counts.items() if count > 1]
    if repeated:
        lines.append(f"More than one run, of which differences take the last: {', '.join(repeated)}.")

    return lines


def differences(results: Sequence[Result]) -> list[Difference]:
    """Compares every variant with its baselines at the best rate of either, and with plain at every rate of both."""
    best = {result.run.variant: best_rate(results, result.run.variant) for result in results}
    compared = []
    for variant, rate in best.items():
        for baseline in compared_variant(variant).baselines:
            baseline_rate = best.get(baseline)
            pairs = []
            if rate and baseline_rate:
                pairs.append((f"best of each: {rate:g}, {baseline_rate:g}", rate, baseline_rate))
            if baseline == "plain":
                shared_rates = sorted(_learning_rates(results, variant) & _learning_rates(results, baseline))
                pairs += [
                    (f"{shared:g}", shared, shared) for shared in shared_rates if not shared == rate == baseline_rate
                ]

            for label, variant_rate, other_rate in pairs:
                for metric in ("validation loss", "loss of the last tenth"):
                    losses = _final_losses(results=results, variant=variant, rate=variant_rate, metric=metric)
                    baseline_losses = _final_losses(results=results, variant=baseline, rate=other_rate, metric=metric)
                    if seeds := sorted(losses.keys() & baseline_losses.keys()):
                        values = np.array([losses[seed] - baseline_losses[seed] for seed in seeds])
                        compared.append(
                            Difference(variant=variant, baseline=baseline, metric=metric, rates=label, values=values)
                        )

    return compared


def _learning_rates(results: Sequence[Result], variant: str) -> set[float]:
    return {result.run.lr for result in results if result.run.variant == variant}


def best_rate(results: Sequence[Result], variant: str) -> float | None:
    """The rate, stable with every seed, whose mean final loss is the lowest; None without a complete, stable run."""
    means = {}
    for rate in _learning_rates(results, variant):
        at_rate = [result for result in results if (result.run.variant, result.run.lr) == (variant, rate)]
        complete = [result.run for result in at_rate if result.run.is_complete]
        # A seed that diverged counts, though its run is not complete.
        ended = [result.verdict for result in at_rate if result.run.is_complete or result.verdict.kind == "diverged"]
        if complete and all(verdict.stable for verdict in ended):
            finals = [run.final_validation for run in complete]
            losses = [run.final_loss for run in complete] if None in finals else finals
            means[rate] = float(np.mean(losses))

    return min(means, key=means.get) if means else None


def _final_losses(*, results: Sequence[Result], variant: str, rate: float, metric: str) -> dict[int, float]:
    """{seed: loss (nats)} of the complete runs of a variant at a rate."""
    at_rate = [result.run for result in results if (result.run.variant, result.run.lr) == (variant, rate)]
    runs = [run for run in at_rate if run.is_complete]
    losses = {run.seed: run.final_validation if metric == "validation loss" else run.final_loss for run in runs}
    return {seed: value for seed, value in losses.items() if value is not None}


def _best_result(results: Sequence[Result], variant: str) -> Result | None:
    stable = [result for result in results if result.run.variant == variant and result.verdict.stable]
    fitted = [result for result in stable if result.fit is not None]
    if fitted:
        return min(fitted, key=lambda result: result.fit.asymptote)
    return min(stable, key=lambda result: result.run.final_loss, default=None)


def _fit_run(run: RunRecord, verdict: Verdict) -> tuple[Fit | None, str, str]:
    """The fit (or None), why there is none, and a caution about it."""
    if verdict.kind == "diverged":
        return None, "it diverged", ""

    warm = run.steps > run.config.schedule.warmup_steps
    fit = fit_curve(run.tokens[warm], run.loss[warm])
    if fit is None:
        return None, f"{warm.sum()} rows after warm-up are too few ({MIN_ROWS} at least)", ""
    if fit.problem:
        return None, fit.problem, ""

    first, last = (learning_rate(run.config, int(step)) for step in (run.steps[warm][0], run.steps[-1]))
    decays = not np.isclose(first, last)
    return fit, "", "the rate falls during the run, of which eq. 35 knows nothing" if decays else ""
