"""From a Hugging Face folder to a checkpoint: what `megatron-mea import` does."""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import GenerationConfig

from megatron_mea.checkpoint.folder import GENERATION, TOKENIZER, Meta, publish, seal
from megatron_mea.checkpoint.tensors import write_tensors
from megatron_mea.config.load import parse_config, parse_model
from megatron_mea.config.schema import Model
from megatron_mea.data.tokenizer import check_tokenizer_folder, copy_tokenizer, load_tokenizer
from megatron_mea.errors import RunError, UserError
from megatron_mea.huggingface.description import STOCK, Description, read_description
from megatron_mea.huggingface.place import check_hugging_face
from megatron_mea.huggingface.stored import Stored, check_names, read_piece, stored_tensors, without_tied_head
from megatron_mea.model.decoder import Decoder, parameter_shapes
from megatron_mea.outputs import check_free_folder, output_place, require_space
from megatron_mea.parallel.parameter import named_specs
from megatron_mea.progress import progress_bar
from megatron_mea.versions import versions

_SOURCE, _VARIANT = "HF_DIR", "--variant"
_GROWING = ("plain", "plain_norm", "mea", "mea_no_norm")
"""Variants that differ by parameters that another one may lack: they start so that nothing, or a norm alone, is new."""
_SPARE = 1 << 26
"""Bytes a checkpoint may need beyond its tensors: the tokenizer of some vocabularies takes tens of megabytes."""


def import_model(source: str | Path, out: str | Path, variant: str | None = None) -> str:
    """Writes the weights of a Hugging Face folder as a checkpoint of step 0, in float32 and without moments.

    The folder is untrusted: safetensors alone are read, and no code of it is run. Of the weights no more than a piece
    of a tensor is in memory.

    Args:
        source: a Llama, Mistral, Qwen2 or Qwen3, or an export of ours.
        out: must not exist or be empty; it appears when everything is written.
        variant: of the checkpoint; None: `mea_no_norm`, or that of an export of ours. What the source lacks starts
            as the identity (combinations) or as 1 (gains of the head norm).

    Returns:
        What was written, and the settings that train from it, for the user.

    Raises:
        UserError: the folder is not supported, in whatever way; `out` is not free, or its disk is too small.
        RunError: the disk fails.
    """
    source, out = Path(source), Path(out)
    check_free_folder(out)
    described, model, warnings = read_settings(source, variant)
    found = stored_tensors(source, _SOURCE)
    found = without_tied_head(source, _SOURCE, found, model.tie_word_embeddings)
    shapes = {name: one.shape for name, one in found.items()}
    if problems := check_names(source, _SOURCE, shapes, parameter_shapes(described.model), f"{source}/config.json"):
        raise UserError.of(problems)
    warnings += _about(source, described, model, found)
    types = ", ".join(sorted({one.dtype for one in found.values()}))
    # The name alone: an export of the checkpoint shows it.
    origin = f"imported from {source.resolve().name} ({described.kind}, {types}); no moments"
    with output_place(out, folder=True), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        count = sum(map(math.prod, parameter_shapes(model).values()))
        require_space(out, 4 * count + _SPARE)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        folder = Path(scratch) / "checkpoint"
        try:
            _write(source, folder, out, model, found, origin)
            publish(folder, out)
        except (OSError, RuntimeError) as error:
            # torch says of a full disk what the C++ below it says.
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
            raise RunError(f"{out} cannot be written: {reason}") from error
    return (
        f"wrote {out}: step 0, {count:,} parameters in float32, variant {model.attention_variant}\n"
        f"{how_to_begin(model, out)}"
    )


def read_settings(source: Path, variant: str | None = None) -> tuple[Description, Model, list[str]]:
    """What a Hugging Face folder describes, the `model` section of its import, and warnings about it.

    Raises:
        UserError: it is not supported, or has not that variant.
    """
    check_hugging_face(source)
    described = read_description(source, _SOURCE)
    return described, *_with_variant(source, described, variant)


def _with_variant(source: Path, described: Description, variant: str | None) -> tuple[Model, list[str]]:
    """The `model` section of the checkpoint, and warnings about it."""
    theirs = described.model
    if variant is None:
        variant = "mea_no_norm" if described.kind in STOCK else theirs.attention_variant
    others = {name: theirs.model_copy(update={"attention_variant": name}) for name in _GROWING}
    keeping = [
        name
        for name, other in others.items()
        if other.has_hlc >= theirs.has_hlc and other.has_head_norm >= theirs.has_head_norm
    ]
    if theirs.attention_variant not in _GROWING:
        keeping = [theirs.attention_variant]
    if variant not in keeping:
        mend = "" if keeping == list(_GROWING) else f"{source} is of the variant {theirs.attention_variant}, "
        mend += "which another one would drop parameters of" if mend else ""
        raise UserError(_VARIANT, variant, ", ".join(keeping), mend)
    model = parse_model(theirs.model_dump(mode="json") | {"attention_variant": variant})
    if model.has_head_norm and not theirs.has_head_norm:
        return model, [
            f"{variant} normalises the output of every head, which {source} does not: "
            "the logits are other ones until training has made up for it"
        ]
    return model, []


def _about(source: Path, described: Description, model: Model, found: dict[str, Stored]) -> list[str]:
    """Warnings about a folder that can be imported, its tokenizer included.

    Raises:
        UserError: there is a tokenizer, or generation settings, and they do not load.
    """
    told = []
    if described.own_code:
        told.append(f"{source} brings code of its own (auto_map), which is not run: imported as a {described.kind}")
    _check_generation(source)
    if any(one.dtype == "F64" for one in found.values()):
        told.append(f"{source} is in float64, and is rounded to float32")
    if not _has_tokenizer(source):
        return [*told, f"{source} has no tokenizer, so neither has the checkpoint: `generate` will refuse it"]
    size = len(load_tokenizer(source, _SOURCE))
    if size > model.vocab_size:
        told.append(f"the tokenizer has {size} ids, and the model only {model.vocab_size}")
    return told


def _check_generation(source: Path) -> None:
    file = source / GENERATION
    if file.is_file():
        try:
            GenerationConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except Exception as error:
            # transformers checks types and values, each with an exception of its own.
            reason = " ".join(str(error).split())
            raise UserError(_SOURCE, f"{file}, unreadable ({reason})", "generation settings, or no such file") from None


def _has_tokenizer(source: Path) -> bool:
    try:
        check_tokenizer_folder(source, _SOURCE)
    except UserError:
        return False
    return True


def _write(source: Path, folder: Path, out: Path, model: Model, found: dict[str, Stored], origin: str) -> None:
    with torch.device("meta"):
        specs = {name: parameter.spec for name, parameter in named_specs(Decoder(model)).items()}
    shapes = {name: spec.shape for name, spec in specs.items()}
    total = 4 * sum(map(math.prod, shapes.values()))
    with progress_bar(total=total, desc="import", unit="B", unit_scale=True) as bar:

        def read(name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
            bar.update(4 * math.prod(shape))
            if name in found:
                piece = read_piece(found, name, offsets, shape)
                # Without a copy, as `piece.isfinite()` makes.
                if not torch.stack(piece.aminmax()).isfinite().all():
                    said = f"{name} in {found[name].file}, with numbers that are not finite in float32"
                    raise UserError(_SOURCE, said, "finite numbers", "take the source from before it diverged")
                return piece
            # A combination or a gain: small, so always whole, and no random numbers enter it.
            return specs[name].initialize(shape, torch.Generator())

        write_tensors(folder, shapes, read)
    tokenizer = "none"
    if _has_tokenizer(source):
        tokenizer = str(source)
        _copy_tokenizer(source, folder / TOKENIZER)
    if (source / GENERATION).is_file():
        shutil.copy(source / GENERATION, folder)
    # As `evaluate` looks at a Hugging Face folder.
    data = {"tokenizer": tokenizer, "train": [], "seq_length": min(model.max_position_embeddings, 2048)}
    config = parse_config({"model": model.model_dump(), "data": data, "run": {"dir": str(out)}}, needs_data=False)
    Meta(0, 0, 0, config.model_dump(mode="json"), [], {}, versions(), None, origin).write(folder)
    seal(folder)


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer out of a model's folder, so that it loads as the same class without the config.json there."""
    copy_tokenizer(source, target)
    kind = type(load_tokenizer(source, _SOURCE))
    if type(load_tokenizer(target, _SOURCE)) is not kind:
        file = target / "tokenizer_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        file.write_text(json.dumps(config | {"tokenizer_class": kind.__name__}, indent=1), encoding="utf-8")
        load_tokenizer(target, _SOURCE)


def how_to_begin(model: Model, out: Path) -> str:
    """What a YAML needs to begin with the checkpoint: the `model` section without defaults, and `run.init_from`."""
    default = parse_model({})
    fields = {key: value for key, value in model.model_dump(mode="json").items() if value != getattr(default, key)}
    tree = {"model": fields, "run": {"init_from": str(out)}}
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100).rstrip()
    return f"begin a run from it with these settings:\n{text}"
