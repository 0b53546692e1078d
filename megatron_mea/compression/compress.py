"""The `compress` verb: replaces key and value heads of a trained model by fewer component heads and combinations."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_mea.checkpoint.folder import GENERATION, OVERHEAD_BYTES, TOKENIZER, CheckpointMetadata, publish, seal
from megatron_mea.checkpoint.tensors import write_tensors
from megatron_mea.compression.budget import AUTO, allocate_heads, parse_layers
from megatron_mea.compression.calibrate import CALIBRATION_TOKENS, calibration_windows, head_moments
from megatron_mea.compression.compressed_model import CompressedModel, Factoriser
from megatron_mea.compression.latent import LatentModel, compress_to_latent
from megatron_mea.compression.sensitivity import losses_of_changes, plan_passes
from megatron_mea.compression.source_model import SourceModel, open_source_model, read_model
from megatron_mea.config.schema import Model
from megatron_mea.data.corpora import IGNORE_INDEX, corpus_digest
from megatron_mea.data.indexed import open_readers
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
METHOD = "--method"
AUTO_TOKENS = 2048
"""Tokens on which the choice of heads measures the cost of compressing each layer."""


def compress(
    model: ModelFolder,
    out: str | Path,
    *,
    heads: str | None = None,
    ratio: float | None = None,
    layers: str | None = None,
    calibration: str | None = None,
    method: str | None = None,
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

    Returns:
        A summary for the user.

    Raises:
        UserError: any of these cannot be done; nothing is written.
    """
    out = Path(out)
    check_free_folder(out)
    method = method or ("svd" if calibration is None else "outputs")
    _check_method(method, calibration=calibration, heads=heads, ratio=ratio, layers=layers)
    if method == "latent":
        return _compress_to_latent(model, out, ratio=ratio, calibration=calibration)

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

    for option, value in ((HEADS, heads), (LAYERS, layers)):
        if value is not None:
            expected = f"{RATIO} alone with {METHOD} latent, which has no component heads"
            raise UserError(where=option, got=value, expected=expected)
    if ratio is None:
        raise UserError(where=RATIO, got="nothing", expected=f"the size of the cache, for {METHOD} latent")


def _compress_to_latent(model: ModelFolder, out: Path, *, ratio: float, calibration: str) -> str:
    """`compress` with `--method latent`; what an interrupted call has fitted lies in OUT.part, and is used again."""
    settings = read_model(model)
    if settings.hlc_form == "latent":
        raise UserError(where="MODEL", got=f"{model.path}, with hlc_form: latent", expected="a model of heads")

    open_readers([calibration], CALIBRATION)
    with reserve_output(out, folder=True), disk_errors(out), open_source_model(model, out) as source_model:
        windows = calibration_windows(
            source_model=source_model, path=calibration, where=CALIBRATION, tokens=CALIBRATION_TOKENS
        )
        hidden_bytes = 8 * windows.tokens * settings.hidden_size
        parameter_bytes = 4 * sum(map(math.prod, source_model.stored.shapes.values()))
        require_space(out, 2 * parameter_bytes + 2 * hidden_bytes + OVERHEAD_BYTES)
        request = {
            "weights": source_model.fingerprint,
            "tokens_digest": corpus_digest(windows.readers[0], borders=windows.document_mask),
            "tokens": windows.tokens,
            "ratio": ratio,
        }
        part = Path(f"{out}.part")
        compressed = compress_to_latent(
            source_model=source_model, ratio=ratio, windows=windows, folder=part, request=request
        )
        notes = _write(compressed, out, model=model, tokenizer=source_model.checkpoint.tokenizer)
        shutil.rmtree(part)
        return "\n".join([f"wrote {out}: {compressed.summary()}", *notes])


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
        layers = "full" if ratio is None else AUTO

    if ratio is not None:
        choosable = parse_layers("full" if layers == AUTO else layers, len(component_heads))
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
        if _budget(model, ratio) < least:
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
        if len(numbers) != len(component_heads) or layers != "full":
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


def _budget(model: Model, ratio: float) -> int:
    """Component heads that all layers together may have."""
    # Not a head less because 0.1 has no exact binary form.
    return math.floor(ratio * model.num_key_value_heads * model.num_hidden_layers + 1e-9)


def _parse_heads(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(where=HEADS, got=text, expected="a number, or one for every layer, as 4,4,2,2") from None


def choose_heads(
    *,
    source_model: SourceModel,
    factoriser: Factoriser,
    options: list[list[int]],
    ratio: float,
    calibration: str | None,
) -> list[int]:
    """The number of component heads of every layer with the least predicted cost at that size of the cache."""
    if calibration is None:
        costs = [
            {heads: factoriser.lost(layer, heads) if heads < max(layer_options) else 0.0 for heads in layer_options}
            for layer, layer_options in enumerate(progress_bar(options, desc="heads of each layer", unit="layer"))
        ]
    else:
        costs = measure_costs(
            source_model=source_model, factoriser=factoriser, options=options, calibration=calibration
        )

    chosen = allocate_heads(costs, _budget(source_model.model, ratio))
    assert chosen is not None
    return chosen


def measure_costs(
    *, source_model: SourceModel, factoriser: Factoriser, options: list[list[int]], calibration: str
) -> list[dict[int, float]]:
    """Rise of the cross-entropy (nats a token of calibration data) by layer and number of heads, a layer at a time."""
    changes = [(layer, heads) for layer, layer_options in enumerate(options) for heads in layer_options[:-1]]
    batch_size, groups = plan_passes(source_model, changes)
    windows = calibration_windows(
        source_model=source_model, path=calibration, where=CALIBRATION, batch=batch_size, tokens=AUTO_TOKENS
    )
    costs = [dict.fromkeys(layer_options, 0.0) for layer_options in options]
    count = 0
    total = len(windows) * len(groups) * (source_model.model.num_hidden_layers + 1)
    with progress_bar(total=total, desc="heads of each layer", unit="layer") as bar:
        for batch in windows:
            count += int((batch.targets != IGNORE_INDEX).sum())
            for group in groups:
                losses = losses_of_changes(
                    source_model=source_model,
                    factoriser=factoriser,
                    changes=group,
                    batch=batch,
                    document_mask=windows.document_mask,
                    progress=bar,
                )
                for layer, heads in group:
                    costs[layer][heads] += losses[layer, heads] - losses[None]

    return [
        _remove_gains({heads: cost / max(count, 1) for heads, cost in layer_costs.items()}) for layer_costs in costs
    ]


def _remove_gains(costs: dict[int, float]) -> dict[int, float]:
    """Costs that are at least 0 and do not fall with fewer heads: on so few tokens a gain is chance."""
    worst, corrected = 0.0, {}
    for heads in sorted(costs, reverse=True):
        corrected[heads] = worst = max(worst, costs[heads])

    return corrected


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
