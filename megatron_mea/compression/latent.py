"""`compress --method latent`: the general head combination of a trained model, layer after layer in closed form.

Two streams of hidden states of the calibration tokens run through the layers, one layer in memory: the source model's,
and the compressed model's own, on which every layer is fitted. Keys follow from the moments of each frequency
(key_factors.py), values from those of attended values (value_factors.py); then `o_proj` is refitted by least squares,
so that the compressed layer gives the outputs which the source model's layer gives on its own states.

How many numbers each layer caches is chosen before, by measured costs (latent_sizes.py). All that is found lies in a
folder beside OUT, from which the same command goes on.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch

from megatron_mea.checkpoint.folder import OVERHEAD_BYTES
from megatron_mea.compression.calibrate import (
    CALIBRATION,
    CALIBRATION_TOKENS,
    calibration_windows,
    embed_windows,
    warn_of_few_tokens,
    window_length,
)
from megatron_mea.compression.latent_fit import LayerFit
from megatron_mea.compression.latent_model import LatentModel, latent_settings
from megatron_mea.compression.latent_sizes import KEY_SHARES, check_ratio, chosen_sizes, even_sizes, split_dims
from megatron_mea.compression.partial_fit import PartialFit
from megatron_mea.compression.source_model import SourceModel, open_source_model, read_model
from megatron_mea.compression.write_compressed import write_compressed
from megatron_mea.data.corpora import corpus_digest
from megatron_mea.data.indexed import open_readers
from megatron_mea.data.windows import Windows
from megatron_mea.huggingface.model_folder import ModelFolder
from megatron_mea.outputs import disk_errors, require_space, reserve_output, resumable_folder
from megatron_mea.progress import progress_bar
from megatron_mea.versions import versions

_SIZING_TOKENS, _PROBE_TOKENS = 8192, 2048
"""Calibration tokens on which each layer is fitted at several sizes, and on which its smallest size is measured."""
_BATCH_TOKENS = 2048
"""Tokens of a batch of them, of which one is in memory: also those of a step of reconstruction."""


def compress_to_latent(
    model: ModelFolder, out: Path, *, ratio: float, equal_sizes: bool, calibration: str, reconstruction_steps: int
) -> str:
    """`compress` with `--method latent`; what an interrupted call has fitted lies in OUT.part, and is used again.

    Args:
        equal_sizes: all layers get the same numbers, in place of those with the least sum of costs.
        reconstruction_steps: steps of Adam on every layer, after the closed forms.
    """
    settings = read_model(model)
    check_ratio(settings, ratio, name=str(model.path))
    open_readers([calibration], CALIBRATION)
    with (
        reserve_output(out, folder=True),
        disk_errors(out),
        open_source_model(model, out) as source_model,
    ):
        window = window_length(source_model)

        def calibration_data(tokens: int, batch: int) -> Windows:
            return calibration_windows(
                source_model=source_model, path=calibration, where=CALIBRATION, tokens=tokens, batch=batch
            )

        batch = max(1, _BATCH_TOKENS // window)
        windows = calibration_data(CALIBRATION_TOKENS, batch)
        # `o_proj` has as many unknowns a row.
        warn_of_few_tokens(windows, calibration, outputs=settings.num_attention_heads * settings.head_dim)
        hidden_bytes = 8 * windows.tokens * settings.hidden_size
        parameter_bytes = 4 * sum(map(math.prod, source_model.stored.shapes.values()))
        require_space(out, 2 * parameter_bytes + 3 * hidden_bytes + OVERHEAD_BYTES)
        request: dict[str, object] = {
            "weights": source_model.fingerprint,
            "tokens_digest": corpus_digest(windows.readers[0], borders=windows.document_mask),
            "tokens": windows.tokens,
            "window": window,
            "ratio": ratio,
            "versions": versions(),
        }
        with resumable_folder(out) as part:
            if equal_sizes:
                sizes = even_sizes(settings, ratio)
            else:
                sizes = chosen_sizes(
                    source_model=source_model,
                    ratio=ratio,
                    windows=calibration_data(_SIZING_TOKENS, batch),
                    open_probes=partial(calibration_data, _PROBE_TOKENS),
                    folder=part / "sizes",
                    request=request,
                )

            latent_model = _fit_layers(
                source_model=source_model,
                sizes=sizes,
                reconstruction_steps=reconstruction_steps,
                windows=windows,
                folder=part / "layers",
                request=request | {"reconstruction_steps": reconstruction_steps},
            )
            notes = write_compressed(latent_model, out, model=model, tokenizer=source_model.checkpoint.tokenizer)
        return "\n".join([f"wrote {out}: {_summary(latent_model)}", *notes])


@torch.no_grad()
def _fit_layers(
    *,
    source_model: SourceModel,
    sizes: list[int],
    reconstruction_steps: int,
    windows: Windows,
    folder: Path,
    request: dict[str, object],
) -> LatentModel:
    """Fits one layer after the other, each on the states that those before it give.

    Args:
        sizes: numbers that each layer caches; how many are keys is what loses least of its attention's outputs.
        reconstruction_steps: steps of Adam on every layer, after the closed forms.
        windows: calibration tokens.
        folder: keeps what is fitted, for the same call after an interruption.
        request: whatever else the result depends on.
    """
    model, device = source_model.model, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fitted = PartialFit(folder=folder, request=request | {"sizes": sizes})
    streams = fitted.streams
    if not streams:
        embedded = embed_windows(source_model=source_model, windows=windows, device=device)
        states = [hidden_states.cpu() for _, hidden_states in embedded]
        streams = {"source": states, "own": list(states)}

    with progress_bar(total=len(sizes), desc="latent", unit="layer") as bar:
        bar.update(len(fitted.layers))
        for layer in range(len(fitted.layers), len(sizes)):
            fit = LayerFit(source_model=source_model, layer=layer, windows=windows, device=device)
            targets = fit.move(fit.source, streams["source"])
            fitted_on = {"states": streams["own"], "targets": targets}
            moments = fit.moments(streams["own"])
            splits = {split_dims(model, sizes[layer], key_share=share) for share in KEY_SHARES}
            latent = min(
                (fit.fit(dims, moments=moments, **fitted_on) for dims in sorted(splits)),
                key=lambda candidate: candidate.error,
            )
            if reconstruction_steps:
                latent = fit.reconstruct(latent, steps=reconstruction_steps, **fitted_on)

            fit.move(fit.build(latent), streams["own"])
            fitted.add(latent.tensors, streams, {"counts": latent.counts, "dims": latent.dims, "error": latent.error})
            bar.update()

    dims, counts = ([layer[key] for layer in fitted.layers] for key in ("dims", "counts"))
    settings = latent_settings(model, dims=dims, counts=counts)
    return LatentModel(source_model=source_model, model=settings, partial=fitted)


def _summary(latent_model: LatentModel) -> str:
    """For the user: sizes, and what is lost."""
    model = latent_model.model
    errors = [layer["error"] for layer in latent_model.partial.layers]
    dims = zip(model.key_latent_dims, model.value_latent_dims, strict=True)
    sizes = ", ".join(f"{keys}+{values}" for keys, values in dims)
    lines = [
        latent_model.description,
        f"keys + values of each layer: {sizes}",
        f"lost of the mean square of attention's outputs on the calibration tokens: {sum(errors) / len(errors):.2%}, "
        f"{max(errors):.2%} in the worst layer",
    ]
    if model.qk_norm:
        lines.append("with qk_norm the cache also holds a number for every composite head and token")

    return "\n".join(lines)
