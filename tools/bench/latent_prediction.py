"""Compares the eigenvalues that a latent layer drops with the rise of the model's divergence, a layer at a time:

    OMP_NUM_THREADS=1 python tools/bench/latent_prediction.py MODEL --calibration PREFIX --out found.json
        [--layers 3 10 17 24] [--figure prediction.png]

Keys alone, or values alone, of one layer are cut down to a few sizes near all numbers, in closed form and without the
least squares of `o_proj`; the divergence KL(unchanged || changed) is measured on calibration text. To first order it
is proportional to what is dropped: on logarithmic axes a line of slope 1 for each layer. Prints the slopes between the
smallest and the largest change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import BenchParser, print_header, print_row
from compress import Results

from megatron_mea.compression.calibrate import calibration_windows, embed_windows
from megatron_mea.compression.changes import forward_changes
from megatron_mea.compression.latent_fit import LatentLayer, LayerFit
from megatron_mea.compression.latent_model import LatentDims, latent_settings
from megatron_mea.compression.source_model import SourceModel, open_source_model
from megatron_mea.config.schema import Model
from megatron_mea.data.windows import Windows
from megatron_mea.huggingface.model_folder import ModelFolder

MOMENT_TOKENS, MEASURED_TOKENS = 8192, 2048
PARTS = (0.95, 0.9, 0.8, 0.7, 0.6)
"""Of the numbers of keys, or of values, that are kept."""


@dataclass(kw_only=True)
class ChangedLayer:
    """The source model with one latent layer."""

    source_model: SourceModel
    model: Model
    latent: LatentLayer

    def read(self, name: str) -> torch.Tensor:
        """A full parameter in float32."""
        tensor = self.latent.tensors.get(name)
        return self.source_model.read(name) if tensor is None else tensor


def measure_layer(fit: LayerFit, *, states: list[torch.Tensor], probes: Windows) -> list[Any]:
    """Rows {side, part, dropped, divergence} of a layer."""
    source_model, moments = fit.source_model, fit.moments(states)
    model, targets = source_model.model, fit.move(fit.source, list(states))
    full = model.num_key_value_heads * model.head_dim
    tokens = sum(part.shape[0] * part.shape[1] for part in states)
    rows, changed = [], {}
    for side in ("keys", "values"):
        for part in PARTS:
            dims: LatentDims = (2 * round(part * full / 2), full) if side == "keys" else (full, round(part * full))
            keys, values = fit.factorise(moments, dims)
            # A moment of keys is weighted by one of queries: both are sums over tokens.
            dropped = keys.lost / tokens**2 if side == "keys" else values.lost / tokens
            latent = fit.fit(dims, moments=moments, states=states, targets=targets)
            tensors = {name: tensor for name, tensor in latent.tensors.items() if "o_proj" not in name}
            layers = model.num_hidden_layers
            settings = latent_settings(model, dims=[dims] * layers, counts=[latent.counts] * layers)
            change = fit.layer, len(rows)
            changed[change] = ChangedLayer(
                source_model=source_model, model=settings, latent=replace(latent, tensors=tensors)
            )
            rows.append({"side": side, "part": part, "dropped": dropped})

    for batch in probes:
        divergences = forward_changes(
            source_model=source_model,
            change_layer=changed.__getitem__,
            changes=list(changed),
            batch=batch,
            document_mask=probes.document_mask,
        ).divergences()
        for (_, index), divergence in divergences.items():
            rows[index]["divergence"] = rows[index].get("divergence", 0.0) + divergence / probes.tokens

    return rows


def slope(rows: list[Any]) -> float:
    """Of the logarithms, between the smallest and the largest change of one side."""
    first, *_, last = rows
    change = math.log(last["dropped"] / first["dropped"])
    return math.log(last["divergence"] / first["divergence"]) / change


def draw_figure(results: dict[str, Any], file: Path) -> None:
    """Draws divergence over dropped eigenvalues, keys and values beside one another, a line a layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, side in zip(figure.subplots(1, 2), ("keys", "values"), strict=True):
        for name, row in results.items():
            if name.startswith("layer"):
                points = [(point["dropped"], point["divergence"]) for point in row["value"] if point["side"] == side]
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axes.set(xscale="log", yscale="log", title=side, xlabel="sum of the eigenvalues dropped")
        axes.set_ylabel("divergence of the predictions (nats a token)")
        axes.grid(visible=True, which="both", linewidth=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = BenchParser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 10, 17, 24], help="counted from 1")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    results = Results(arguments.out)
    with open_source_model(ModelFolder.locate(arguments.model), arguments.out) as source_model:
        windows, probes = (
            calibration_windows(
                source_model=source_model, path=arguments.calibration, where="--calibration", tokens=tokens, batch=1
            )
            for tokens in (MOMENT_TOKENS, MEASURED_TOKENS)
        )
        device = torch.device("cpu")
        states = [hidden for _, hidden in embed_windows(source_model=source_model, windows=windows, device=device)]
        for layer in range(max(arguments.layers)):
            fit = LayerFit(source_model=source_model, layer=layer, windows=windows, device=device)
            if layer + 1 in arguments.layers:
                results.row(f"layer {layer + 1}", lambda fit=fit: measure_layer(fit, states=states, probes=probes))

            fit.move(fit.source, states)

    print_header(["layer", "slope of keys", "of values"])
    for name, row in results.rows.items():
        if name.startswith("layer"):
            sides = [[point for point in row["value"] if point["side"] == side] for side in ("keys", "values")]
            print_row([name.split()[1], *(f"{slope(points):.2f}" for points in sides)])

    if arguments.figure is not None:
        draw_figure(results.rows, arguments.figure)


if __name__ == "__main__":
    main()
