"""What compressing one layer costs: the cross-entropy with every layer but one as it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_mea.compression.calibrate import open_data, window_of
from megatron_mea.compression.origin import Origin, open_origin, read_model
from megatron_mea.compression.virtual import Compressed, Factoriser, compressible
from megatron_mea.data.corpora import IGNORE, Batch, corpus_digest
from megatron_mea.data.indexed import open_readers
from megatron_mea.data.windows import Windows
from megatron_mea.errors import UserError
from megatron_mea.model.decoder import Decoder
from megatron_mea.model.layerwise import one_layer
from megatron_mea.outputs import output_place, written
from megatron_mea.progress import progress_bar

Change = tuple[int, int]
"""A layer, counted from 0, and its number of component heads."""
_LOGITS, _BYTES, _BATCH = 1 << 26, 1 << 31, 8


def sensitivity(model: str | Path, heads: int, data: str, out: str | Path, aligned: bool) -> str:
    """Compresses one layer at a time, and writes the cross-entropy of each as JSON, with a plot beside it.

    What is done is kept in `OUT.part`, from which the same command goes on.

    Args:
        heads: component heads of the layer that is compressed.
        data: PREFIX
        out: FILE.json; the plot is FILE.png.
        aligned: as in `compress`.

    Returns:
        A table for the user.

    Raises:
        UserError: the model or the data cannot be used, or `out` cannot be written.
    """
    out = Path(out)
    plot, part = out.with_suffix(".png"), Path(f"{out}.part")
    places = output_place(out, folder=False), output_place(plot, folder=False)
    layers = compressible(read_model(model), str(model), heads, "--component-heads")
    open_readers([data], "--data")
    with places[0], places[1], written(out), open_origin(model, out) as origin:
        at_once, groups = passes(origin, [(layer, heads) for layer in layers])
        windows = open_data(origin, data, "--data", at_once)
        asked = {
            "model": str(model),
            "data": data,
            "component_heads": heads,
            "aligned": aligned,
            "weights": origin.fingerprint,
            "tokens_digest": corpus_digest(windows.readers[0], windows.document_mask),
            "window": window_of(origin),
            "passes": len(windows),
        }
        found = _measure(origin, Factoriser(origin, None, aligned), groups, windows, part, asked)
        result = asked | _result(origin, heads, layers, found)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw(result, plot)
        part.unlink(missing_ok=True)
    return _table(result, plot)


def _measure(
    origin: Origin,
    factoriser: Factoriser,
    groups: Sequence[Sequence[Change]],
    windows: Windows,
    part: Path,
    asked: dict[str, Any],
) -> dict[str, Any]:
    """Sums over all data; {"done": passes, "targets": number, "sums": {layer, or "none": nats}}"""
    found: dict[str, Any] = {"done": 0, "targets": 0, "sums": {}}
    try:
        kept = json.loads(part.read_text(encoding="utf-8"))
        if kept.pop("asked") == asked:
            found = kept
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    steps = len(groups) * (origin.model.num_hidden_layers + 1)
    with progress_bar(total=len(windows) * steps, desc="sensitivity", unit="layer") as bar:
        bar.update(found["done"] * steps)
        for index in range(found["done"], len(windows)):
            batch, losses = windows[index], {}
            for changes in groups:
                losses |= losses_of_changes(origin, factoriser, changes, batch, windows.document_mask, bar)
            for change, loss in losses.items():
                key = "none" if change is None else str(change[0])
                found["sums"][key] = found["sums"].get(key, 0.0) + loss
            found["targets"] += int((batch.targets != IGNORE).sum())
            found["done"] = index + 1
            fresh = part.with_suffix(".new")
            fresh.write_text(json.dumps({"asked": asked} | found), encoding="utf-8")
            fresh.replace(part)
    return found


def _result(origin: Origin, heads: int, layers: list[int], found: dict[str, Any]) -> dict[str, Any]:
    if not found["targets"]:
        raise UserError("--data", "documents of one token", "a token to predict")
    losses = {key: total / found["targets"] for key, total in found["sums"].items()}
    rows = [
        {
            "layer": layer + 1,
            "component_heads_before": origin.model.component_heads[layer],
            "cross_entropy": losses[str(layer)],
            "difference": losses[str(layer)] - losses["none"],
        }
        for layer in layers
    ]
    return {"tokens": found["targets"], "cross_entropy": losses["none"], "layers": rows}


def _table(result: dict[str, Any], plot: Path) -> str:
    lines = [f"layer  cross-entropy  difference   (unchanged: {result['cross_entropy']:.4f})"]
    lines += [
        f"{row['layer']:5d}  {row['cross_entropy']:13.4f}  {row['difference']:+10.4f}" for row in result["layers"]
    ]
    return "\n".join([*lines, f"plot: {plot}"])


def draw(result: dict[str, Any], file: Path) -> None:
    """The differences by layer as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar([row["layer"] for row in result["layers"]], [row["difference"] for row in result["layers"]])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("the layer that is compressed, counted from 1")
    axes.set_ylabel("rise of the cross-entropy (nats a token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"{result['component_heads']} component heads, {result['tokens']:,} tokens")
    figure.savefig(file, dpi=120)


def passes(origin: Origin, changes: Sequence[Change]) -> tuple[int, list[Sequence[Change]]]:
    """How many windows a pass over the layers takes, and the changes of each, so that all hidden states fit in 2 GB."""
    size = 4 * origin.model.hidden_size * window_of(origin)
    most = max(_BYTES // size - 1, 1)
    at_once = min(max(_BYTES // (size * (len(changes) + 1)), 1), _BATCH)
    return at_once, [changes[first : first + most] for first in range(0, max(len(changes), 1), most)]


@torch.no_grad()
def losses_of_changes(
    origin: Origin,
    factoriser: Factoriser,
    changes: Sequence[Change],
    batch: Batch,
    document_mask: bool,
    done: object = None,
) -> dict[Change | None, float]:
    """The summed cross-entropy (nats) of a batch with one layer changed, for every change; None: with none.

    One pass over the layers, of which one is in memory: the hidden states before a changed layer are those of the
    unchanged model, and behind it every change has its own.

    Args:
        done: a progress bar, which is moved by one with every layer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    positions = torch.from_numpy(batch.position_ids).to(device)

    def made(model: Origin | Compressed, index: int) -> Decoder:
        return one_layer(model.model, index, model.read, document_mask=document_mask).to(device)

    count = origin.model.num_hidden_layers
    hidden: dict[Change | None, torch.Tensor] = {None: torch.from_numpy(batch.input_ids).to(device)}
    for index in range(count + 1):
        layer = made(origin, index)
        before = hidden[None]
        for change, x in hidden.items():
            hidden[change] = layer.run(x, positions)
        for changed, heads in changes:
            if changed == index - 1:
                every = list(origin.model.component_heads)
                every[changed] = heads
                altered = made(Compressed(origin, every, factoriser), index)
                hidden[changed, heads] = altered.run(before, positions)
        if done is not None:
            done.update()
    head = made(origin, count + 1)
    targets = torch.from_numpy(batch.targets).to(device)
    rows = max(_LOGITS // (origin.model.vocab_size * targets.shape[1]), 1)
    return {
        change: sum(
            head.loss(head.run(part, positions), wanted).item()
            for part, wanted in zip(x.split(rows), targets.split(rows), strict=True)
        )
        for change, x in hidden.items()
    }
