"""The `report` verb: a page, tables and figures about a set of runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from megatron_mea.errors import UserError
from megatron_mea.experiments import figures
from megatron_mea.experiments.page import render
from megatron_mea.experiments.read_head_stats import read_head_stats
from megatron_mea.experiments.results import Result, differences, evaluate_runs
from megatron_mea.experiments.runs import RunRecord
from megatron_mea.outputs import print_and_write, reserve_output
from megatron_mea.printing import show
from megatron_mea.run_folder import RunFolder

COLUMNS = ("variant", "lr", "seed", "L0", "L0_low", "L0_high", "alpha", "stable", "best")


def report(runs: Sequence[RunRecord], out: str, *, tokens: Sequence[float] = ()) -> None:
    """Prints a summary, and writes the page `out`, and beside it OUT.csv, OUT-curves.csv and a PNG a figure.

    Args:
        out: FILE.html
        tokens: counts at which the fits are extrapolated.

    Raises:
        UserError: `out` cannot be written; nothing was written.
        RunError: the disk fails; nothing was written.
    """
    with reserve_output(out, folder=False) as page:
        results = evaluate_runs(runs)
        figures_by_name, notes = _draw_figures(results)
        files: dict[Path, str | bytes] = {
            page.with_name(f"{page.stem}-{name}.png"): png for name, (_, png) in figures_by_name.items()
        }
        files[page.with_name(f"{page.stem}-curves.csv")] = _curves_csv(results)
        files[page.with_suffix(".csv")] = _results_csv(results)
        files[page] = render(
            results=results, differences=differences(results), tokens=tokens, figures=figures_by_name, notes=notes
        )

        stable = sum(result.verdict.stable for result in results)
        fitted = sum(result.fit is not None for result in results)
        print_and_write(f"{len(results)} runs, {stable} stable, {fitted} with an identified fit", files)

    show(f"wrote {page} and {len(files) - 1} files beside it")


def _draw_figures(results: Sequence[Result]) -> tuple[dict[str, tuple[str, bytes]], list[str]]:
    """{name: (caption, PNG)}, and notes about figures that are missing."""
    caption = "Final loss over the learning rate. " + figures.MARKER_LEGEND
    figures_by_name, notes = {"rates": (caption, figures.draw_rates(results))}, []
    for variant in dict.fromkeys(result.run.variant for result in results):
        caption = f"{variant}: loss, smoothed; dotted the fit; marks: validation loss at the end. Below: gradient norm."
        figures_by_name[f"curves-{variant}"] = (caption, figures.draw_curves(results, variant))

        if (png := figures.draw_experts(results, variant)) is not None:
            caption = f"{variant}: the fullest expert of any layer over its layer's mean. Below: balance loss."
            figures_by_name[f"experts-{variant}"] = (caption, png)

        variant_results = [result for result in results if result.run.variant == variant]
        shown = next((result for result in variant_results if result.best), variant_results[0])
        label = f"{variant}, rate {shown.run.lr:g}, seed {shown.run.seed}"
        try:
            history = read_head_stats(shown.run.dir)
        except OverflowError as error:
            notes.append(f"{label}: {error}.")
            continue
        except UserError as error:
            # The metrics, for which the page is read, are whole.
            notes.append(f"{label}: {error.problems[0].where}: {error.problems[0].got}.")
            continue

        for kind, png in figures.draw_combinations(history).items():
            figures_by_name[f"{kind}-{variant}"] = (f"{label}: {kind} over training.", png)

        if (png := figures.draw_head_outputs(history)) is not None:
            figures_by_name[f"heads-{variant}"] = (
                f"{label}: root mean square of each head's output, before the head norm.",
                png,
            )
        else:
            heads = RunFolder(shown.run.dir).heads.name
            notes.append(f"{label}: no records of heads ({heads}, a row a validation; older runs have none).")

    return figures_by_name, notes


def _results_csv(results: Sequence[Result]) -> str:
    """CSV text with a row a run; constants of a fit that is not identified are left out."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result in results:
        fit = result.fit
        constants = [fit.asymptote, *fit.asymptote_interval(), fit.alpha] if fit else [""] * 4
        flags = [str(flag).lower() for flag in (result.verdict.stable, result.best)]
        writer.writerow([result.run.variant, result.run.lr, result.run.seed, *constants, *flags])

    return stream.getvalue()


def _curves_csv(results: Sequence[Result]) -> str:
    """CSV text with a row a logged step of every run."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("variant", "lr", "seed", "step", "tokens", "loss", "grad_norm", "validation_loss"))
    for result in results:
        run = result.run
        validation = dict(run.validation.tolist())
        for step, tokens, loss, norm in zip(run.steps, run.tokens, run.loss, run.grad_norm, strict=True):
            numbers = f"{loss:.5g}", f"{norm:.4g}", validation.get(tokens, "")
            writer.writerow((run.variant, run.lr, run.seed, int(step), int(tokens), *numbers))

    return stream.getvalue()
