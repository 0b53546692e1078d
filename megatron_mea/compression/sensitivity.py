"""The `sensitivity` verb: the cross-entropy with a single layer compressed, for every layer."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mea.compression.calibrate import calibration_windows, window_length
from megatron_mea.compression.changes import Change, ChangeLayer, forward_changes, plan_passes
from megatron_mea.compression.compressed_model import Factoriser, compressible_layers, with_one_layer_changed
from megatron_mea.compression.source_model import SourceModel, open_source_model, read_model
from megatron_mea.data.corpora import IGNORE_INDEX, corpus_digest
from megatron_mea.data.indexed import open_readers
from megatron_mea.data.windows import Windows
from megatron_mea.errors import UserError
from megatron_mea.huggingface.model_folder import ModelFolder
from megatron_mea.inputs import read_json_object
from megatron_mea.outputs import disk_errors, print_and_write, reserve_output, write_file
from megatron_mea.progress import progress_bar


def sensitivity(*, model: ModelFolder, heads: int, data: str, out: str | Path, aligned: bool) -> None:
    """Compresses one layer at a time; prints a table, and writes the cross-entropy of each as JSON and as a plot.

    Progress is saved in `OUT.part`, from which the same command resumes.

    Args:
        heads: component heads of the layer that is compressed.
        data: PREFIX
        out: FILE.json; the plot is FILE.png.
        aligned: as in `compress`.

    Raises:
        UserError: the model or the data cannot be used, or `out` cannot be written.
        RunError: the disk fails.
    """
    out = Path(out)
    plot, progress_file = out.with_suffix(".png"), Path(f"{out}.part")
    outputs = reserve_output(out, folder=False), reserve_output(plot, folder=False)
    layers = compressible_layers(model=read_model(model), name=str(model.path), heads=heads, where="--component-heads")
    open_readers([data], "--data")
    with outputs[0], outputs[1]:
        with disk_errors(out), open_source_model(model, out) as source_model:
            batch_size, groups = plan_passes(source_model, [(layer, heads) for layer in layers])
            windows = calibration_windows(source_model=source_model, path=data, where="--data", batch=batch_size)
            request = {
                "model": str(model.path),
                "data": data,
                "component_heads": heads,
                "aligned": aligned,
                "weights": source_model.fingerprint,
                "tokens_digest": corpus_digest(windows.readers[0], borders=windows.document_mask),
                "window": window_length(source_model),
                "passes": len(windows),
            }
            measured = _measure_layers(
                source_model=source_model,
                change_layer=with_one_layer_changed(
                    Factoriser(source_model=source_model, moments=None, aligned=aligned)
                ),
                groups=groups,
                windows=windows,
                progress_file=progress_file,
                request=request,
            )

            result = request | _result(source_model=source_model, heads=heads, layers=layers, measured=measured)
        print_and_write(_table(result, plot), {plot: draw_plot(result), out: json.dumps(result, indent=1) + "\n"})
        with disk_errors(progress_file):
            progress_file.unlink(missing_ok=True)


def _measure_layers(
    *,
    source_model: SourceModel,
    change_layer: ChangeLayer,
    groups: Sequence[Sequence[Change]],
    windows: Windows,
    progress_file: Path,
    request: dict[str, Any],
) -> dict[str, Any]:
    """Sums the cross-entropy of every change over all windows, and resumes from `progress_file` if it fits `request`.

    Returns:
        {"done": passes, "targets": number of tokens, "sums": {layer, or "none" for the source model: nats}}
    """
    names = {"none", *(str(layer) for changes in groups for layer, _ in changes)}
    measured = _read_progress(progress_file, request=request, names=names, passes=len(windows))
    steps = len(groups) * (source_model.model.num_hidden_layers + 1)
    with progress_bar(total=len(windows) * steps, desc="sensitivity", unit="layer") as bar:
        bar.update(measured["done"] * steps)
        for index in range(measured["done"], len(windows)):
            batch, losses = windows[index], {}
            for changes in groups:
                losses |= forward_changes(
                    source_model=source_model,
                    change_layer=change_layer,
                    changes=changes,
                    batch=batch,
                    document_mask=windows.document_mask,
                    progress=bar,
                ).losses()

            for change, loss in losses.items():
                key = "none" if change is None else str(change[0])
                measured["sums"][key] = measured["sums"].get(key, 0.0) + loss

            measured["targets"] += int((batch.targets != IGNORE_INDEX).sum())
            measured["done"] = index + 1

            write_file(progress_file, json.dumps({"asked": request} | measured))

    return measured


def _read_progress(file: Path, *, request: dict[str, Any], names: set[str], passes: int) -> dict[str, Any]:
    """What an interrupted call has measured; nothing where the file is none of this request."""
    nothing: dict[str, Any] = {"done": 0, "targets": 0, "sums": {}}
    try:
        saved = read_json_object(file)
        if saved.pop("asked") != request or saved.keys() != nothing.keys():
            return nothing

        done, targets, sums = saved["done"], saved["targets"], saved["sums"]
        is_sound = type(done) is type(targets) is int and 0 < done <= passes and targets >= 0 and sums.keys() == names
        return saved if is_sound and all(type(total) is float for total in sums.values()) else nothing
    except (OSError, ValueError, KeyError, AttributeError):
        return nothing


def _result(*, source_model: SourceModel, heads: int, layers: list[int], measured: dict[str, Any]) -> dict[str, Any]:
    if not measured["targets"]:
        raise UserError(where="--data", got="documents of one token", expected="a token to predict")

    losses = {key: total / measured["targets"] for key, total in measured["sums"].items()}
    rows = [
        {
            "layer": layer + 1,
            "component_heads_before": source_model.model.component_heads[layer],
            "cross_entropy": losses[str(layer)],
            "difference": losses[str(layer)] - losses["none"],
        }
        for layer in layers
    ]
    return {"tokens": measured["targets"], "cross_entropy": losses["none"], "layers": rows}


def _table(result: dict[str, Any], plot: Path) -> str:
    lines = [f"layer  cross-entropy  difference   (unchanged: {result['cross_entropy']:.4f})"]
    lines += [
        f"{row['layer']:5d}  {row['cross_entropy']:13.4f}  {row['difference']:+10.4f}" for row in result["layers"]
    ]
    return "\n".join([*lines, f"plot: {plot}"])


def draw_plot(result: dict[str, Any]) -> bytes:
    """A PNG with the rise of the cross-entropy by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar([row["layer"] for row in result["layers"]], [row["difference"] for row in result["layers"]])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("the layer that is compressed, counted from 1")
    axes.set_ylabel("rise of the cross-entropy (nats a token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"{result['component_heads']} component heads, {result['tokens']:,} tokens")
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    return png.getvalue()
