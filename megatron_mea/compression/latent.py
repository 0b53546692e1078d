"""`compress --method latent`: the general head combination of a trained model, layer after layer in closed form.

Two streams of hidden states of the calibration tokens run through the layers, one layer in memory: the source model's,
and the compressed model's own, on which every layer is fitted. Keys follow from the moments of each frequency
(latent_keys.py), values from those of attended values (latent_values.py); then `o_proj` is refitted by least squares,
so that the compressed layer gives the outputs which the source model's layer gives on its own states.

How many numbers each layer caches is chosen before, by measured costs (latent_sizes.py). All that is found lies in a
folder beside OUT, from which the same command goes on.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_mea.compression.calibrate import embed_windows
from megatron_mea.compression.latent_fit import LayerFit
from megatron_mea.compression.latent_model import LatentDims, LatentModel, latent_settings
from megatron_mea.compression.partial_fit import PartialFit
from megatron_mea.compression.source_model import SourceModel
from megatron_mea.data.windows import Windows
from megatron_mea.progress import progress_bar


@torch.no_grad()
def fit_latent_model(
    *,
    source_model: SourceModel,
    dims: list[LatentDims],
    reconstruction_steps: int,
    windows: Windows,
    folder: Path,
    request: dict[str, object],
) -> LatentModel:
    """Fits all layers.

    Args:
        dims: numbers of keys and values that each layer caches.
        reconstruction_steps: steps of Adam on every layer, after the closed forms.
        windows: calibration tokens.
        folder: keeps what is fitted, for the same call after an interruption.
        request: whatever else the result depends on.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    partial = PartialFit(folder=folder, request=request | {"dims": [list(layer) for layer in dims]})
    if partial.layers:
        streams = partial.streams()
    else:
        embedded = embed_windows(source_model=source_model, windows=windows, device=device)
        states = [hidden_states.cpu() for _, hidden_states in embedded]
        streams = {"source": states, "own": list(states)}

    with progress_bar(total=len(dims), desc="latent", unit="layer") as bar:
        bar.update(len(partial.layers))
        for layer in range(len(partial.layers), len(dims)):
            fit = LayerFit(source_model=source_model, layer=layer, windows=windows, device=device)
            targets = fit.move(fit.source, streams["source"])
            fitted_on = {"states": streams["own"], "targets": targets}
            latent = fit.fit(dims[layer], moments=fit.moments(streams["own"]), **fitted_on)
            if reconstruction_steps:
                latent = fit.reconstruct(latent, steps=reconstruction_steps, **fitted_on)

            fit.move(fit.build(latent), streams["own"])
            partial.add(latent.tensors, streams, {"counts": latent.counts, "error": latent.error})
            bar.update()

    model = latent_settings(source_model.model, dims=dims, counts=[layer["counts"] for layer in partial.layers])
    return LatentModel(source_model=source_model, model=model, partial=partial)


def summary(latent_model: LatentModel) -> str:
    """For the user: sizes, and what is lost."""
    model = latent_model.model
    errors = [layer["error"] for layer in latent_model.partial.layers]
    dims = zip(model.key_latent_dims, model.value_latent_dims, strict=True)
    sizes = ", ".join(f"{keys}+{values}" for keys, values in dims)
    lines = [
        latent_model.description,
        f"keys + values of each layer: {sizes}",
        f"lost of the mean square of attention's outputs: {sum(errors) / len(errors):.2%}, "
        f"{max(errors):.2%} in the worst layer",
    ]
    if model.qk_norm:
        lines.append("with qk_norm the cache also holds a number for every composite head and token")

    return "\n".join(lines)
