"""The `compress` verb: replaces key and value heads of a trained model by fewer component heads and combinations."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_mea.checkpoint.folder import GENERATION, OVERHEAD_BYTES, TOKENIZER, CheckpointMetadata, publish, seal
from megatron_mea.checkpoint.tensors import write_tensors
from megatron_mea.compression.budget import AUTO, FULL, parse_layers
from megatron_mea.compression.calibrate import CALIBRATION_TOKENS, calibration_windows, head_moments, window_length
from megatron_mea.compression.compressed_model import CompressedModel, Factoriser
from megatron_mea.compression.head_choice import choose_heads, head_budget
from megatron_mea.compression.latent import fit_latent_model, summary
from megatron_mea.compression.latent_model import LatentModel
from megatron_mea.compression.latent_sizes import chosen_dims, even_dims
from megatron_mea.compression.source_model import SourceModel, open_source_model, read_model
from megatron_mea.config.schema import Model
from megatron_mea.data.corpora import corpus_digest
from megatron_mea.data.indexed import open_readers
from megatron_mea.data.windows import Windows
from megatron_mea.errors import UserError
from megatron_mea.huggingface.export import export
from megatron_mea.huggingface.importing import init_from_instructions
from megatron_mea.huggingface.model_folder import CheckpointFolder, HFFolder, ModelFolder
from megatron_mea.model.decoder import parameter_shapes
from megatron_mea.outputs import (
    check_free_folder,
    disk_errors,
    require_space,
    reserve_output,
    scratch_folder,
)
from megatron_mea.printing import note
from megatron_mea.progress import progress_bar
from megatron_mea.versions import versions

HEADS, RATIO, LAYERS, CALIBRATION = "--component-heads", "--cache-ratio", "--layers", "--calibration"
METHOD, STEPS = "--method", "--reconstruction-steps"
SIZING_TOKENS, PROBE_TOKENS = 8192, 4096
"""Calibration tokens on which each layer is fitted at several sizes, and on which its smallest size is measured."""
BATCH_TOKENS = 2048
"""Tokens of a batch of them, of which one is in memory: also those of a step of reconstruction."""


def compress(
    model: ModelFolder,
    out: str | Path,
    *,
    heads: str | None = None,
    ratio: float | None = None,
    layers: str | None = None,
    calibration: str | None = None,
    method: str | None = None,
    reconstruction_steps: int | None = None,
) -> str:
    """Writes a model with fewer component heads or latent numbers, which computes nearly the same with less cache.

    At most one layer is in memory, besides the hidden states of the calibration tokens.

    Args:
        model: MODEL; a checkpoint or run gives a checkpoint, a Hugging Face folder a Hugging Face folder.
        out: must not exist or be empty.
        heads: component heads of the layers: a number, or one for every layer, separated by commas.
        ratio: of the cache to a model's with all composite heads, in place of `heads`; the number of heads of each
            layer is chosen.
        layers: as `parse_layers` reads it; `auto`, all that the ratio may choose among.
        calibration: PREFIX of tokens on which the head outputs are to lose least; None: factorise the weights (paper).
        method: one of `METHODS`. `svd` is the paper's, of the weights; `outputs` loses least of the heads' outputs on
            `calibration`; `aligned` rotates each head's features towards the others' first, which `q_proj` and
            `o_proj` undo; `latent` combines by frequency (latent.py). None: `outputs` with `calibration`, else `svd`.
        reconstruction_steps: steps of Adam on every layer, after the closed forms of `latent`.

    Returns:
        A summary for the user.

    Raises:
        UserError: any of these cannot be done; nothing is written.
    """
    out = Path(out)
    check_free_folder(out)
    method = method or ("svd" if calibration is None else "outputs")
    _check_method(method, calibration=calibration, heads=heads, ratio=ratio, layers=layers)
    if reconstruction_steps is not None and method != "latent":
        raise UserError(where=STEPS, got=reconstruction_steps, expected=f"{METHOD} latent")
    if method == "latent":
        return _compress_to_latent(
            model,
            out,
            ratio=ratio,
            layers=layers,
            calibration=calibration,
            reconstruction_steps=reconstruction_steps or 0,
        )

    aligned = method == "aligned"
    options = _head_options(model=read_model(model), name=str(model.path), heads=heads, ratio=ratio, layers=layers)
    if calibration is not None:
        open_readers([calibration], CALIBRATION)
    elif aligned:
        reason = f"--align without {CALIBRATION} weighs all inputs alike, and has made a pretrained model worse"
        note(f"warning: {reason} (docs/compression.md)")

    with reserve_output(out, folder=True), disk_errors(out), open_source_model(model, out) as source_model:
        windows, tokenizer = None, source_model.checkpoint.tokenizer
        if calibration is not None:
            windows = calibration_windows(
                source_model=source_model, path=calibration, where=CALIBRATION, tokens=CALIBRATION_TOKENS
            )
            outputs = source_model.model.num_key_value_heads * source_model.model.head_dim
            if windows.tokens < outputs:
                shortage = f"{calibration} has {windows.tokens} tokens for the {outputs} outputs of a layer's key heads"
                note(f"warning: {shortage}: what it does not show is lost")

        require_space(out, 4 * sum(map(math.prod, source_model.stored.shapes.values())) + OVERHEAD_BYTES)
        moments = None
        if windows is not None:
            changed = _changed_layers(source_model, options)
            moments = head_moments(source_model=source_model, windows=windows, layers=changed)

        factoriser = Factoriser(source_model=source_model, moments=moments, aligned=aligned)
        counts = [layer_options[0] for layer_options in options]
        if ratio is not None:
            counts = choose_heads(
                source_model=source_model, factoriser=factoriser, options=options, ratio=ratio, calibration=calibration
            )

        compressed = CompressedModel(source_model=source_model, heads=counts, factoriser=factoriser)
        notes = _write(compressed, out, model=model, tokenizer=tokenizer)
        return "\n".join([f"wrote {out}: {_summary(compressed)}", *notes])


def _check_method(
    method: str, *, calibration: str | None, heads: str | None, ratio: float | None, layers: str | None
) -> None:
    """Refuses options that a method cannot use, or lacks."""
    if calibration is None and method in ("outputs", "latent"):
        raise UserError(where=CALIBRATION, got="nothing", expected=f"PREFIX of prepared data, for {METHOD} {method}")
    if calibration is not None and method == "svd":
        raise UserError(where=CALIBRATION, got=calibration, expected=f"none with {METHOD} svd, which is of the weights")
    if method != "latent":
        return

    if heads is not None:
        raise UserError(where=HEADS, got=heads, expected=f"{RATIO} with {METHOD} latent, which has no component heads")
    if layers not in (None, AUTO, FULL):
        expected = f"{AUTO}, or {FULL} for the same size in all layers, with {METHOD} latent"
        raise UserError(where=LAYERS, got=layers, expected=expected)
    if ratio is None:
        raise UserError(where=RATIO, got="nothing", expected=f"the size of the cache, for {METHOD} latent")


def _compress_to_latent(
    model: ModelFolder, out: Path, *, ratio: float, layers: str | None, calibration: str, reconstruction_steps: int
) -> str:
    """`compress` with `--method latent`; what an interrupted call has fitted lies in OUT.part, and is used again."""
    settings = read_model(model)
    if settings.hlc_form == "latent":
        raise UserError(where="MODEL", got=f"{model.path}, with hlc_form: latent", expected="a model of heads")

    open_readers([calibration], CALIBRATION)
    with reserve_output(out, folder=True), disk_errors(out), open_source_model(model, out) as source_model:

        batch = max(1, BATCH_TOKENS // window_length(source_model))

        def calibration_data(tokens: int) -> Windows:
            return calibration_windows(
                source_model=source_model, path=calibration, where=CALIBRATION, tokens=tokens, batch=batch
            )

        windows = calibration_data(CALIBRATION_TOKENS)
        hidden_bytes = 8 * windows.tokens * settings.hidden_size
        parameter_bytes = 4 * sum(map(math.prod, source_model.stored.shapes.values()))
        require_space(out, 2 * parameter_bytes + 3 * hidden_bytes + OVERHEAD_BYTES)
        request: dict[str, object] = {
            "weights": source_model.fingerprint,
            "tokens_digest": corpus_digest(windows.readers[0], borders=windows.document_mask),
            "tokens": windows.tokens,
            "ratio": ratio,
        }
        part = Path(f"{out}.part")
        if layers == FULL:
            dims = even_dims(settings, ratio)
        else:
            dims = chosen_dims(
                source_model=source_model,
                ratio=ratio,
                windows=calibration_data(SIZING_TOKENS),
                probes=calibration_data(PROBE_TOKENS),
                folder=part / "sizes",
                request=request,
            )

        compressed = fit_latent_model(
            source_model=source_model,
            dims=dims,
            reconstruction_steps=reconstruction_steps,
            windows=windows,
            folder=part / "layers",
            request=request | {"reconstruction_steps": reconstruction_steps},
        )
        notes = _write(compressed, out, model=model, tokenizer=source_model.checkpoint.tokenizer)
        shutil.rmtree(part)
        return "\n".join([f"wrote {out}: {summary(compressed)}", *notes])


def _write(
    compressed: CompressedModel | LatentModel, out: Path, *, model: ModelFolder, tokenizer: Path | None
) -> list[str]:
    """Writes OUT, of the same kind as MODEL; returns notes for the user."""
    with scratch_folder(out) as scratch:
        checkpoint = scratch / "compressed"
        _write_checkpoint(compressed, checkpoint, tokenizer)
        if isinstance(model, HFFolder):
            _, *notes = export(CheckpointFolder(checkpoint), out, dtype=_stored_dtype(model)).splitlines()
            return notes

        publish(checkpoint, out)
        return [init_from_instructions(compressed.model, out)]


def _changed_layers(source_model: SourceModel, options: list[list[int]]) -> set[int]:
    """The layers (counted from 0) that may get another number of component heads."""
    component_heads = source_model.model.component_heads
    return {layer for layer, layer_options in enumerate(options) if layer_options != [component_heads[layer]]}


def _write_checkpoint(compressed: CompressedModel | LatentModel, folder: Path, tokenizer: Path | None) -> None:
    """Writes the compressed model as a checkpoint of step 0, without Adam's moments."""
    source_model, model = compressed.source_model, compressed.model
    shapes, checkpoint = parameter_shapes(model), source_model.checkpoint
    with progress_bar(total=4 * sum(map(math.prod, shapes.values())), desc="write", unit="B", unit_scale=True) as bar:

        def read(name: str, *, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
            bar.update(4 * math.prod(shape))
            return compressed.read_piece(name=name, offsets=offsets, shape=shape)

        write_tensors(folder=folder, shapes=shapes, read=read)

    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / TOKENIZER)
    if (checkpoint.folder / GENERATION).is_file():
        shutil.copy(checkpoint.folder / GENERATION, folder)

    config = checkpoint.config.model_copy(update={"model": model})
    meta = checkpoint.metadata
    base = meta.origin or f"{Path(source_model.name).name}, step {meta.step:,}"
    note = f"{compressed.description}: {base}"
    CheckpointMetadata(
        step=0,
        samples=0,
        tokens=0,
        config=config.model_dump(mode="json"),
        data=meta.data,
        layout={},
        versions=versions(),
        validation_loss=None,
        origin=note,
    ).write(folder)
    seal(folder)


def _stored_dtype(model: HFFolder) -> str:
    """The dtype of `export` that keeps a Hugging Face folder's own: bf16 where all of its tensors are, else fp32."""
    dtypes = {entry.dtype for entry in model.tensors().entries.values()}
    return "bf16" if dtypes == {"BF16"} else "fp32"


def _num_composite_heads(compressed: CompressedModel) -> int:
    """Composite heads of all layers together: the cache of an uncompressed model."""
    return compressed.model.num_key_value_heads * compressed.model.num_hidden_layers


def _head_options(
    *, model: Model, name: str, heads: str | None, ratio: float | None, layers: str | None
) -> list[list[int]]:
    """The numbers of component heads that each layer may get: a single one where there is nothing to choose.

    Raises:
        UserError: the options contradict one another, or a layer cannot have so many heads.
    """
    if heads is not None and ratio is not None:
        raise UserError(where=f"{HEADS}, {RATIO}", got="both", expected="one of them")

    component_heads = model.component_heads
    if layers is None:
        layers = FULL if ratio is None else AUTO

    if ratio is not None:
        choosable = parse_layers(FULL if layers == AUTO else layers, len(component_heads))
        if any(chosen is not None for chosen in choosable.values()):
            raise UserError(
                where=LAYERS, got=f"{layers} with {RATIO}", expected="layers alone: their numbers of heads are chosen"
            )

        options = [
            list(range(1, before + 1)) if layer in choosable else [before]
            for layer, before in enumerate(component_heads, start=1)
        ]
        least = sum(layer_options[0] for layer_options in options)
        total = model.num_key_value_heads * len(component_heads)
        if head_budget(model, ratio) < least:
            smallest = math.ceil(10_000 * least / total) / 10_000
            raise UserError(
                where=RATIO, got=ratio, expected=f"at least {smallest}: {least} of {total} heads cannot be done without"
            )

        return options

    if layers == AUTO:
        raise UserError(
            where=LAYERS, got=f"{AUTO} without {RATIO}", expected=f"{RATIO}, a budget to choose for, or other layers"
        )

    numbers = [] if heads is None else _parse_heads(heads)
    if len(numbers) > 1:
        if len(numbers) != len(component_heads) or layers != FULL:
            expected = f"one number, or one for each of the {len(component_heads)} layers and no {LAYERS}"
            raise UserError(where=HEADS, got=heads, expected=expected)
        chosen = dict(enumerate(numbers, start=1))
    else:
        chosen = parse_layers(layers, len(component_heads))
        if (None not in chosen.values()) == bool(numbers):
            got = heads if numbers else "nothing"
            expected = f"no {HEADS}, since {LAYERS} has every number" if numbers else f"a number, or {RATIO}"
            raise UserError(where=HEADS, got=got, expected=expected)

    for layer, number in chosen.items():
        before, key = component_heads[layer - 1], HEADS if number is None or len(numbers) > 1 else LAYERS
        number = numbers[0] if number is None else number
        if not 1 <= number <= before:
            raise UserError(
                where=key, got=number, expected=f"1 to {before}, the component heads of layer {layer} of {name}"
            )
        chosen[layer] = number

    return [[chosen.get(layer, before)] for layer, before in enumerate(component_heads, start=1)]


def _parse_heads(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(where=HEADS, got=text, expected="a number, or one for every layer, as 4,4,2,2") from None


def _summary(compressed: CompressedModel) -> str:
    cached, total = sum(compressed.heads), _num_composite_heads(compressed)
    layers = format_ranges(compressed.heads)
    lines = [f"{cached} of {total} key/value heads are cached ({cached / total:.1%}); in the layers {layers}"]

    factoriser = compressed.factoriser
    # Keys and values each lose a part between 0 and 1: the mean of both.
    lost = [
        factoriser.lost(layer, compressed.heads[layer]) / 2
        for layer, changed in enumerate(compressed.changed)
        if changed
    ]
    if lost:
        mean = sum(lost) / len(lost)
        lines.append(f"lost of the mean square of keys and values: {mean:.2%}, {max(lost):.2%} in the worst layer")

    if compressed.model.qk_norm:
        lines.append("with qk_norm the cache also holds a number for every composite head and token")

    return "\n".join(lines)


def format_ranges(heads: Sequence[int]) -> str:
    """Runs of equal numbers, layers counted from 1: `1-3: 4, 4-9: 2`"""
    parts, first = [], 1
    for layer in range(1, len(heads) + 1):
        if layer == len(heads) or heads[layer] != heads[layer - 1]:
            parts.append(f"{first}{f'-{layer}' if layer > first else ''}: {heads[layer - 1]}")
            first = layer + 1
    return ", ".join(parts)
