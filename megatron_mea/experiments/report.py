"""The `report` verb: what runs say together, as a page, a table and figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_mea.experiments import figures
from megatron_mea.experiments.heads import read_heads
from megatron_mea.experiments.page import render
from megatron_mea.experiments.results import Result, differences, evaluate_runs
from megatron_mea.experiments.runs import Run
from megatron_mea.outputs import output_place, written

COLUMNS = ("variant", "lr", "seed", "L0", "L0_low", "L0_high", "alpha", "stable", "best")


def report(runs: Sequence[Run], out: str, tokens: Sequence[float] = ()) -> str:
    """Writes the page `out`, and beside it OUT.csv, OUT-curves.csv and a PNG a figure; returns what to print.

    Args:
        out: FILE.html
        tokens: counts at which the fits are extrapolated.

    Raises:
        UserError: `out` cannot be written; nothing was written.
    """
    page = Path(out)
    results = evaluate_runs(runs)
    drawn, notes = _figures(results)
    files: dict[Path, bytes] = {page.with_name(f"{page.stem}-{name}.png"): png for name, (_, png) in drawn.items()}
    files[page.with_name(f"{page.stem}-curves.csv")] = _curves(results).encode()
    files[page.with_suffix(".csv")] = _table(results).encode()
    files[page] = render(results, differences(results), tokens, drawn, notes).encode()
    with ExitStack() as places:
        # The page first: it is what the user named.
        for path in reversed(files):
            places.enter_context(output_place(path, folder=False))
        for path, content in files.items():
            with written(path):
                scratch = path.with_name(f".{path.name}.tmp")
                scratch.write_bytes(content)
                scratch.replace(path)
    stable = sum(each.verdict.stable for each in results)
    fitted = sum(each.fit is not None for each in results)
    return (
        f"wrote {page} and {len(files) - 1} files beside it: {len(results)} runs, {stable} stable, {fitted} with an "
        "identified fit"
    )


def _figures(results: Sequence[Result]) -> tuple[dict[str, tuple[str, bytes]], list[str]]:
    """PNG by name, with what it shows; and what is missing."""
    drawn, notes = {"rates": ("Final loss over the learning rate. " + figures.MARKS, figures.rates(results))}, []
    for variant in dict.fromkeys(each.run.variant for each in results):
        caption = f"{variant}: loss, smoothed; dotted the fit; marks: validation loss at the end. Below: gradient norm."
        drawn[f"curves-{variant}"] = (caption, figures.curves(results, variant))
        own = [each for each in results if each.run.variant == variant]
        shown = next((each for each in own if each.best), own[0])
        heads = read_heads(shown.run.dir)
        which = f"{variant}, rate {shown.run.lr:g}, seed {shown.run.seed}"
        for kind, png in figures.combinations(heads).items():
            drawn[f"{kind}-{variant}"] = (f"{which}: {kind} over training.", png)
        if (png := figures.outputs(heads)) is not None:
            drawn[f"heads-{variant}"] = (f"{which}: root mean square of each head's output, before the head norm.", png)
        else:
            notes.append(f"{which}: no records of heads, which training makes at validations with logging.tensorboard.")
    return drawn, notes


def _table(results: Sequence[Result]) -> str:
    """A row a run; numbers of a fit that is not identified are left out."""
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(COLUMNS)
    for each in results:
        fit = each.fit
        constants = [fit.asymptote, *fit.interval(), fit.alpha] if fit else [""] * 4
        flags = [str(flag).lower() for flag in (each.verdict.stable, each.best)]
        rows.writerow([each.run.variant, each.run.lr, each.run.seed, *constants, *flags])
    return stream.getvalue()


def _curves(results: Sequence[Result]) -> str:
    """A row a logged step."""
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(("variant", "lr", "seed", "step", "tokens", "loss", "grad_norm", "validation_loss"))
    for each in results:
        run = each.run
        validation = dict(run.validation.tolist())
        for step, tokens, loss, norm in zip(run.steps, run.tokens, run.loss, run.grad_norm, strict=True):
            numbers = f"{loss:.5g}", f"{norm:.4g}", validation.get(tokens, "")
            rows.writerow((run.variant, run.lr, run.seed, int(step), int(tokens), *numbers))
    return stream.getvalue()
