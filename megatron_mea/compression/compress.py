"""The `compress` verb: replaces key and value heads of a trained model by fewer component heads and combinations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from megatron_mea.checkpoint.folder import OVERHEAD_BYTES
from megatron_mea.compression.budget import AUTO, FULL, parse_layers
from megatron_mea.compression.calibrate import CALIBRATION_TOKENS, calibration_windows, head_moments, warn_of_few_tokens
from megatron_mea.compression.compressed_model import CompressedModel, Factoriser
from megatron_mea.compression.head_choice import choose_heads, head_budget
from megatron_mea.compression.latent import compress_to_latent
from megatron_mea.compression.source_model import SourceModel, open_source_model, read_model
from megatron_mea.compression.write_compressed import write_compressed
from megatron_mea.config.schema import Model
from megatron_mea.data.indexed import open_readers
from megatron_mea.errors import UserError
from megatron_mea.huggingface.model_folder import ModelFolder
from megatron_mea.outputs import (
    check_free_folder,
    disk_errors,
    require_space,
    reserve_output,
)
from megatron_mea.printing import note

HEADS, RATIO, LAYERS, CALIBRATION = "--component-heads", "--cache-ratio", "--layers", "--calibration"
METHOD, STEPS = "--method", "--reconstruction-steps"


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
        return compress_to_latent(
            model,
            out,
            ratio=ratio,
            equal_sizes=layers == FULL,
            calibration=calibration,
            reconstruction_steps=reconstruction_steps or 0,
        )

    aligned = method == "aligned"
    options = _head_options(model=read_model(model), name=str(model.path), heads=heads, ratio=ratio, layers=layers)
    if calibration is not None:
        open_readers([calibration], CALIBRATION)
    elif aligned:
        reason = f"aligning without {CALIBRATION} weighs all inputs alike, and has made a pretrained model worse"
        note(f"warning: {reason} (docs/compression.md)")

    with reserve_output(out, folder=True), disk_errors(out), open_source_model(model, out) as source_model:
        windows, tokenizer = None, source_model.checkpoint.tokenizer
        if calibration is not None:
            windows = calibration_windows(
                source_model=source_model, path=calibration, where=CALIBRATION, tokens=CALIBRATION_TOKENS
            )
            outputs = source_model.model.num_key_value_heads * source_model.model.head_dim
            warn_of_few_tokens(windows, calibration, outputs=outputs)

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
        notes = write_compressed(compressed, out, model=model, tokenizer=tokenizer)
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


def _changed_layers(source_model: SourceModel, options: list[list[int]]) -> set[int]:
    """The layers (counted from 0) that may get another number of component heads."""
    component_heads = source_model.model.component_heads
    return {layer for layer, layer_options in enumerate(options) if layer_options != [component_heads[layer]]}


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
