"""The page of a report: one file without a script, a font or an image from elsewhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape

from megatron_mea.experiments.results import Difference, Result, best_rate, cautions
from megatron_mea.experiments.stability import RULES
from megatron_mea.model.decoder import parameter_specs

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8884; text-align: left; white-space: nowrap; }
tr.best td { font-weight: 600; }
.stable { color: #1b7f3b; } .spiked { color: #b36b00; } .diverged, .collapsed { color: #c0262d; }
figure { margin: 1rem 0; display: inline-block; max-width: 100%; }
img { max-width: 100%; height: auto; background: #fff; }
.note { font-size: .85rem; }
@media (prefers-color-scheme: dark) { .stable { color: #59d68a; } .spiked { color: #f0b254; }
  .diverged, .collapsed { color: #ff7b80; } }
"""


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
    schedule = ", ".join(f"{kind} after {steps:,} steps of warm-up" for kind, steps in sorted(schedules))
    title = f"{len(results)} runs of {len({result.run.variant for result in results})} variants"
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{_format_sizes(results)}; schedule: {schedule}. In brackets are 95&nbsp;% intervals; losses are in nats a "
        "token.</p>",
        *(f"<p>{escape(caution)}</p>" for caution in cautions([result.run for result in results])),
        "<h2>Variants</h2>",
        _variants_table(results),
        "<h2>Stability</h2>",
        _stability_table(results),
        *(f'<p class="note">{escape(rule)}</p>' for rule in RULES),
        "<h2>Differences, paired by seed</h2>",
        _differences_table(differences),
        "<h2>Runs</h2>",
        _runs_table(results, tokens),
        '<p class="note">L(D) = (D<sub>c</sub> / D)<sup>&alpha;</sup> + L<sub>0</sub> (arXiv 2601.19611, eq. 35) is '
        "fitted by least squares to the losses after warm-up. Intervals are of a bootstrap that draws residuals in "
        "blocks of neighbouring steps: they know the noise of the losses, not what another seed would change, nor "
        "whether the law holds beyond the run.</p>",
        "<h2>Figures</h2>",
        *(_format_figure(caption, png) for caption, png in figures.values()),
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}'
    icon = '<link rel="icon" href="data:,">'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</title>{icon}<style>{_STYLE}</style></head>\n'
        f"<body>{''.join(part + chr(10) for part in parts)}</body></html>\n"
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


def _variants_table(results: Sequence[Result]) -> str:
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
    return _table(names, rows) + (
        '<p class="note">Losses are of the rate with the lowest final loss: means over its seeds, &plusmn; their '
        "standard deviation; the loss is that of the last tenth of a run.</p>"
    )


def _stability_table(results: Sequence[Result]) -> str:
    rates = sorted({result.run.lr for result in results})
    rows = []
    for variant in dict.fromkeys(result.run.variant for result in results):
        row = [escape(variant)]
        for rate in rates:
            variant_results = [result for result in results if (result.run.variant, result.run.lr) == (variant, rate)]
            row.append(" ".join(_format_verdict(result) for result in variant_results))
        rows.append(row)

    return _table(names=["variant", *(f"{rate:g}" for rate in rates)], rows=rows, escaped=True)


def _format_verdict(result: Result) -> str:
    kind = result.verdict.kind
    state = (
        "" if result.run.is_complete or kind == "diverged" else " (failed)" if result.run.failed else " (unfinished)"
    )
    return f'<span class="{kind}" title="{escape(result.verdict.detail)}">{kind}</span>{state}'


def _differences_table(differences: Sequence[Difference]) -> str:
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

    if not rows:
        return "<p>None: no whole run of plain attention, at a stable rate, shares a seed with another variant's.</p>"

    names = ["variant", "less", "learning rate", "of the", "mean difference", "95 % (t)", "seeds"]
    return _table(names, rows) + (
        '<p class="note">Below zero the first is better. Pairs share a seed: the same batches, and the same start of '
        "what both have.</p>"
    )


def _runs_table(results: Sequence[Result], tokens: Sequence[float]) -> str:
    names = ["variant", "rate", "seed", "steps", "verdict", "L0", "alpha", "Dc", "loss", "validation loss"]
    names += [f"loss at {count:.3g} tokens" for count in tokens] + ["remarks"]
    rows, best = [], []
    for result in results:
        run, fit = result.run, result.fit
        done = int(run.steps[-1]) if len(run.steps) else 0
        no_fit = result.no_fit_reason and f"no fit: {result.no_fit_reason}"
        averaged = f"each row is the mean of {run.averaged} logged ones" if run.averaged > 1 else ""
        remarks = (result.verdict.detail, no_fit, result.caution, averaged, run.failed)
        rows.append(
            [
                escape(run.variant),
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
                escape("; ".join(filter(None, remarks))),
            ]
        )
        best.append(result.best)

    return _table(names=names, rows=rows, escaped=True, marked=best)


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


def _table(
    names: Sequence[str], rows: Sequence[Sequence[str]], *, escaped: bool = False, marked: Sequence[bool] = ()
) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = ""
    for index, row in enumerate(rows):
        best = ' class="best"' if index < len(marked) and marked[index] else ""
        body += f"<tr{best}>" + "".join(f"<td>{cell if escaped else escape(cell)}</td>" for cell in row) + "</tr>\n"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _format_figure(caption: str, png: bytes) -> str:
    source = base64.b64encode(png).decode()
    caption = escape(caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{source}">'
    return f'<figure>{image}<figcaption class="note">{caption}</figcaption></figure>'
