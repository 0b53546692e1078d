"""Virtual heads for a trained model: what `megatron-mea compress` does."""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_mea.checkpoint.folder import GENERATION, SPARE, TOKENIZER, Meta, publish, seal
from megatron_mea.checkpoint.tensors import write_tensors
from megatron_mea.compression.budget import AUTO, best_heads, chosen_layers
from megatron_mea.compression.calibrate import TOKENS, head_moments, open_data
from megatron_mea.compression.origin import Origin, open_origin, read_model
from megatron_mea.compression.sensitivity import losses_of_changes, passes
from megatron_mea.compression.virtual import Compressed, Factoriser
from megatron_mea.config.schema import Model
from megatron_mea.data.corpora import IGNORE
from megatron_mea.data.indexed import open_readers
from megatron_mea.errors import UserError
from megatron_mea.huggingface.export import export
from megatron_mea.huggingface.importing import how_to_begin
from megatron_mea.huggingface.place import is_hugging_face
from megatron_mea.huggingface.stored import stored_tensors
from megatron_mea.model.decoder import parameter_shapes
from megatron_mea.outputs import check_free_folder, output_place, require_space, written
from megatron_mea.progress import progress_bar
from megatron_mea.versions import versions

HEADS, RATIO, LAYERS, CALIBRATION = "--component-heads", "--cache-ratio", "--layers", "--calibration"
AUTO_TOKENS = 2048
"""On which the choice of heads measures what each layer loses."""


def compress(
    model: str | Path,
    out: str | Path,
    heads: str | None = None,
    ratio: float | None = None,
    layers: str | None = None,
    calibration: str | None = None,
    aligned: bool = False,
) -> str:
    """Writes a model with fewer component heads, which computes nearly the same with a smaller cache.

    Layer by layer: no more than one is in memory, but for what the calibration tokens need.

    Args:
        model: MODEL; a checkpoint or run gives a checkpoint, a Hugging Face folder a Hugging Face folder.
        out: must not exist or be empty.
        heads: component heads of the layers, one number, or one for every layer, separated by commas.
        ratio: of the cache to a model's with all composite heads, in place of `heads`; the number of heads of each
            layer is chosen.
        layers: as `chosen_layers` reads it; `auto`, all that the ratio may choose among.
        calibration: PREFIX of tokens whose outputs are to lose least; None: the weights, as in the paper.
        aligned: turn each head's features towards the others' first; `q_proj` and `o_proj` take that back.

    Returns:
        What was done, for the user.

    Raises:
        UserError: any of these cannot be done; nothing is written.
    """
    out = Path(out)
    check_free_folder(out)
    options = _options(read_model(model), str(model), heads, ratio, layers)
    if calibration is not None:
        open_readers([calibration], CALIBRATION)
    elif aligned:
        said = f"--align without {CALIBRATION} weighs all inputs alike, and has made a pretrained model worse"
        print(f"warning: {said} (docs/compression.md)", file=sys.stderr, flush=True)
    with output_place(out, folder=True), written(out), open_origin(model, out) as origin:
        windows = None
        if calibration is not None:
            windows = open_data(origin, calibration, CALIBRATION, tokens=TOKENS)
            outputs = origin.model.num_key_value_heads * origin.model.head_dim
            if windows.tokens < outputs:
                found = f"{calibration} has {windows.tokens} tokens for the {outputs} outputs of a layer's key heads"
                print(f"warning: {found}: what it does not show is lost", file=sys.stderr, flush=True)
        require_space(out, 4 * sum(map(math.prod, origin.shapes.values())) + SPARE)
        moments = None if windows is None else head_moments(origin, windows, _changing(origin, options))
        factoriser = Factoriser(origin, moments, aligned)
        counts = [one[0] for one in options]
        if ratio is not None:
            counts = choose_heads(origin, factoriser, options, ratio, calibration)
        compressed = Compressed(origin, counts, factoriser)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            checkpoint = Path(scratch) / "compressed"
            _write(compressed, checkpoint)
            if is_hugging_face(model):
                _, *told = export(checkpoint, out, _dtype(Path(model))).splitlines()
            else:
                publish(checkpoint, out)
                told = [how_to_begin(compressed.model, out)]
        return "\n".join([f"wrote {out}: {_told(compressed)}", *told])


def _changing(origin: Origin, options: list[list[int]]) -> set[int]:
    before = origin.model.component_heads
    return {layer for layer, one in enumerate(options) if one != [before[layer]]}


def _write(compressed: Compressed, folder: Path) -> None:
    """The checkpoint of step 0, without moments."""
    origin, model = compressed.origin, compressed.model
    shapes, source = parameter_shapes(model), origin.source
    with progress_bar(total=4 * sum(map(math.prod, shapes.values())), desc="write", unit="B", unit_scale=True) as bar:

        def read(name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
            bar.update(4 * math.prod(shape))
            return compressed.read_piece(name, offsets, shape)

        write_tensors(folder, shapes, read)
    if source.tokenizer.is_dir():
        shutil.copytree(source.tokenizer, folder / TOKENIZER)
    if (source.folder / GENERATION).is_file():
        shutil.copy(source.folder / GENERATION, folder)
    config = source.config.model_copy(update={"model": model})
    meta, heads = source.meta, compressed.heads
    whence = meta.origin or f"{Path(origin.name).name}, step {meta.step:,}"
    note = f"compressed to {sum(heads)} of {_composites(compressed)} key/value heads: {whence}"
    Meta(0, 0, 0, config.model_dump(mode="json"), meta.data, {}, versions(), None, note).write(folder)
    seal(folder)


def _dtype(folder: Path) -> str:
    kinds = {one.dtype for one in stored_tensors(folder, str(folder)).values()}
    return "bf16" if kinds == {"BF16"} else "fp32"


def _composites(compressed: Compressed) -> int:
    return compressed.model.num_key_value_heads * compressed.model.num_hidden_layers


def _options(model: Model, name: str, heads: str | None, ratio: float | None, layers: str | None) -> list[list[int]]:
    """Of every layer the numbers of component heads it may get; one where there is nothing to choose."""
    if heads is not None and ratio is not None:
        raise UserError(f"{HEADS}, {RATIO}", "both", "one of them")
    before = model.component_heads
    if layers is None:
        layers = "full" if ratio is None else AUTO
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise UserError(RATIO, ratio, "above 0, and at most 1: all composite heads")
        free = chosen_layers("full" if layers == AUTO else layers, len(before))
        if any(own is not None for own in free.values()):
            raise UserError(LAYERS, f"{layers} with {RATIO}", "layers alone: their numbers of heads are chosen")
        options = [list(range(1, had + 1)) if layer in free else [had] for layer, had in enumerate(before, start=1)]
        least, total = sum(one[0] for one in options), model.num_key_value_heads * len(before)
        if _budget(model, ratio) < least:
            smallest = math.ceil(10_000 * least / total) / 10_000
            raise UserError(RATIO, ratio, f"at least {smallest}: {least} of {total} heads cannot be done without")
        return options
    if layers == AUTO:
        raise UserError(LAYERS, f"{AUTO} without {RATIO}", f"{RATIO}, a budget to choose for, or other layers")
    numbers = [] if heads is None else _numbers(heads)
    if len(numbers) > 1:
        if len(numbers) != len(before) or layers != "full":
            allowed = f"one number, or one for each of the {len(before)} layers and no {LAYERS}"
            raise UserError(HEADS, heads, allowed)
        own = dict(enumerate(numbers, start=1))
    else:
        own = chosen_layers(layers, len(before))
        if (None not in own.values()) == bool(numbers):
            found = heads if numbers else "nothing"
            allowed = f"no {HEADS}, since {LAYERS} has every number" if numbers else f"a number, or {RATIO}"
            raise UserError(HEADS, found, allowed)
    for layer, number in own.items():
        had, key = before[layer - 1], HEADS if number is None or len(numbers) > 1 else LAYERS
        number = numbers[0] if number is None else number
        if not 1 <= number <= had:
            raise UserError(key, number, f"1 to {had}, the component heads of layer {layer} of {name}")
        own[layer] = number
    return [[own.get(layer, had)] for layer, had in enumerate(before, start=1)]


def _budget(model: Model, ratio: float) -> int:
    """Component heads in all layers together."""
    # Not a head less because 0.1 has no exact binary form.
    return math.floor(ratio * model.num_key_value_heads * model.num_hidden_layers + 1e-9)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(HEADS, text, "a number, or one for every layer, as 4,4,2,2") from None


def choose_heads(
    origin: Origin, factoriser: Factoriser, options: list[list[int]], ratio: float, calibration: str | None
) -> list[int]:
    """The heads of every layer that are predicted to cost least at that size of the cache."""
    if calibration is None:
        costs = [
            {heads: factoriser.lost(layer, heads) if heads < max(one) else 0.0 for heads in one}
            for layer, one in enumerate(progress_bar(options, desc="heads of each layer", unit="layer"))
        ]
    else:
        costs = measured_costs(origin, factoriser, options, calibration)
    chosen = best_heads(costs, _budget(origin.model, ratio))
    assert chosen is not None
    return chosen


def measured_costs(
    origin: Origin, factoriser: Factoriser, options: list[list[int]], calibration: str
) -> list[dict[int, float]]:
    """What each number of heads costs in each layer alone, in nats a token of calibration data."""
    at_once, groups = passes(origin, [(layer, heads) for layer, one in enumerate(options) for heads in one[:-1]])
    windows = open_data(origin, calibration, CALIBRATION, at_once, AUTO_TOKENS)
    costs = [dict.fromkeys(one, 0.0) for one in options]
    count = 0
    total = len(windows) * len(groups) * (origin.model.num_hidden_layers + 1)
    with progress_bar(total=total, desc="heads of each layer", unit="layer") as bar:
        for batch in windows:
            count += int((batch.targets != IGNORE).sum())
            for changes in groups:
                losses = losses_of_changes(origin, factoriser, changes, batch, windows.document_mask, bar)
                for layer, heads in changes:
                    costs[layer][heads] += losses[layer, heads] - losses[None]
    return [_never_better({heads: cost / max(count, 1) for heads, cost in one.items()}) for one in costs]


def _never_better(costs: dict[int, float]) -> dict[int, float]:
    """Fewer heads that seem to help do so by chance, on so few tokens."""
    worst, found = 0.0, {}
    for heads in sorted(costs, reverse=True):
        found[heads] = worst = max(worst, costs[heads])
    return found


def _told(compressed: Compressed) -> str:
    left, total = sum(compressed.heads), _composites(compressed)
    lines = [
        f"{left} of {total} key/value heads are cached ({left / total:.1%}); in the layers {ranges(compressed.heads)}"
    ]
    factoriser = compressed.factoriser
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


def ranges(heads: Sequence[int]) -> str:
    """Runs of equal numbers, layers counted from 1: `1-3: 4, 4-9: 2`"""
    parts, first = [], 1
    for layer in range(1, len(heads) + 1):
        if layer == len(heads) or heads[layer] != heads[layer - 1]:
            parts.append(f"{first}{f'-{layer}' if layer > first else ''}: {heads[layer - 1]}")
            first = layer + 1
    return ", ".join(parts)
