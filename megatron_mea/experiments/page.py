"""The page of a report: one file without a script, a font or an image from elsewhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_mea.experiments.results import Difference, Result, best_rate, cautions
from megatron_mea.experiments.stability import RULES
from megatron_mea.model.decoder import parameter_specs

_TEMPLATES = Environment(
    loader=PackageLoader("megatron_mea", "experiments"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class Table:
    """Cells by row, escaped where they are not markup already; `best` marks rows."""

    names: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: Sequence[bool] = ()


def render(
    *,
    results: Sequence[Result],
    differences: Sequence[Difference],
    tokens: Sequence[float],
    figures: dict[str, tuple[str, bytes]],
    notes: Sequence[str],
) -> str:
    """The full page as HTML.

    Args:
        tokens: at which the fits are extrapolated.
        figures: {name: (caption, PNG)}
        notes: remarks on missing figures.
    """
    schedules = {(result.run.config.schedule.kind, result.run.config.schedule.warmup_steps) for result in results}
    return _TEMPLATES.get_template("page.html.jinja").render(
        title=f"{len(results)} runs of {len({result.run.variant for result in results})} variants",
        sizes=_format_sizes(results),
        schedule=", ".join(f"{kind} after {steps:,} steps of warm-up" for kind, steps in sorted(schedules)),
        cautions=cautions([result.run for result in results]),
        variants=_variants_table(results),
        stability=_stability_table(results),
        rules=RULES,
        differences=_differences_table(differences),
        runs=_runs_table(results, tokens),
        figures=[(caption, base64.b64encode(png).decode()) for caption, png in figures.values()],
        notes=notes,
    )


def _format_sizes(results: Sequence[Result]) -> str:
    """The number of parameters of the models and of tokens of the runs, as text."""
    counts = []
    for model in {result.run.variant: result.run.config.model for result in results}.values():
        specs = parameter_specs(model).values()
        inner = (spec for spec in specs if spec.component not in ("embedding", "lm_head"))
        counts.append(sum(math.prod(spec.global_shape) for spec in inner))

    tokens = [result.run.config.steps * result.run.config.tokens_per_step for result in results]
    return f"{_format_range(counts)} parameters beside embedding and head; {_format_range(tokens)} tokens a run"


def _format_range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _variants_table(results: Sequence[Result]) -> Table:
    rows = []
    for variant in dict.fromkeys(result.run.variant for result in results):
        variant_results = [result for result in results if result.run.variant == variant]
        complete = [result.run for result in variant_results if result.run.is_complete]
        unstable_rates = {result.run.lr for result in variant_results if not result.verdict.stable}
        stable = [result.run.lr for result in variant_results if result.run.lr not in unstable_rates]
        best = next((result for result in variant_results if result.best), None)
        rate = best_rate(results, variant)
        rows.append(
            [
                variant,
                f"{max(stable):g}" if stable else "none",
                f"{best.run.lr:g}" if best else "none",
                _format_asymptote(best) if best else "",
                f"{rate:g}" if rate is not None else "none",
                _format_mean([run.final_validation for run in complete if run.lr == rate]),
                _format_mean([run.final_loss for run in complete if run.lr == rate]),
            ]
        )

    lowest = "rate of the lowest final loss"
    names = ["variant", "largest stable rate", "rate of the lowest L0", "L0", lowest, "validation loss", "loss"]
    return Table(names, rows)


def _stability_table(results: Sequence[Result]) -> Table:
    rates = sorted({result.run.lr for result in results})
    rows = []
    for variant in dict.fromkeys(result.run.variant for result in results):
        row = [variant]
        for rate in rates:
            variant_results = [result for result in results if (result.run.variant, result.run.lr) == (variant, rate)]
            row.append(Markup(" ").join(_format_verdict(result) for result in variant_results))
        rows.append(row)

    return Table(["variant", *(f"{rate:g}" for rate in rates)], rows)


def _format_verdict(result: Result) -> Markup:
    kind = result.verdict.kind
    state = (
        "" if result.run.is_complete or kind == "diverged" else " (failed)" if result.run.failed else " (unfinished)"
    )
    span = Markup('<span class="{}" title="{}">{}</span>{}')
    return span.format(kind, result.verdict.detail, kind, state)


def _differences_table(differences: Sequence[Difference]) -> Table:
    rows = []
    for difference in differences:
        interval = difference.interval
        rows.append(
            [
                difference.variant,
                difference.baseline,
                difference.rates,
                difference.metric,
                f"{difference.mean:+.4f}",
                f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else "one seed",
                ", ".join(f"{value:+.4f}" for value in difference.values),
            ]
        )

    return Table(["variant", "less", "learning rate", "of the", "mean difference", "95 % (t)", "seeds"], rows)


def _runs_table(results: Sequence[Result], tokens: Sequence[float]) -> Table:
    names = ["variant", "rate", "seed", "steps", "verdict", "L0", "alpha", "Dc", "loss", "validation loss"]
    names += [f"loss at {count:.3g} tokens" for count in tokens] + ["remarks"]
    rows = []
    for result in results:
        run, fit = result.run, result.fit
        done = int(run.steps[-1]) if len(run.steps) else 0
        no_fit = result.no_fit_reason and f"no fit: {result.no_fit_reason}"
        averaged = f"each row is the mean of {run.averaged} logged ones" if run.averaged > 1 else ""
        remarks = (result.verdict.detail, no_fit, result.caution, averaged, run.failed)
        rows.append(
            [
                run.variant,
                f"{run.lr:g}",
                str(run.seed),
                f"{done:,} of {run.config.steps:,}",
                _format_verdict(result),
                _format_asymptote(result),
                f"{fit.alpha:.3f}" if fit else "",
                f"{fit.critical_tokens:.3g}" if fit else "",
                f"{run.final_loss:.4f}" if done else "",
                _format_mean([run.final_validation]),
                *(_format_prediction(result, count) for count in tokens),
                "; ".join(filter(None, remarks)),
            ]
        )

    return Table(names, rows, best=[result.best for result in results])


def _format_asymptote(result: Result) -> str:
    if result.fit is None:
        return "not identified" if len(result.run.loss) else ""
    low, high = result.fit.asymptote_interval()
    return f"{result.fit.asymptote:.3f} [{low:.3f}, {high:.3f}]"


def _format_prediction(result: Result, tokens: float) -> str:
    if result.fit is None:
        return ""
    low, high = result.fit.predict_interval(tokens)
    return f"{float(result.fit.predict(tokens)):.3f} [{low:.3f}, {high:.3f}]"


def _format_mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""

    mean = sum(known) / len(known)
    spread = (sum((value - mean) ** 2 for value in known) / max(len(known) - 1, 1)) ** 0.5
    return f"{mean:.4f}" + (f" ± {spread:.4f} ({len(known)})" if len(known) > 1 else "")
