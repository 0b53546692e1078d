"""The `import` verb: from a Hugging Face folder to a checkpoint."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_mea.checkpoint.folder import GENERATION, TOKENIZER, CheckpointMetadata, publish, seal
from megatron_mea.checkpoint.tensors import write_tensors
from megatron_mea.config.load import parse_config, parse_model
from megatron_mea.config.schema import Data, Model
from megatron_mea.config.variants import VARIANTS, combining_variant, extending_variants
from megatron_mea.data.tokenizer import copy_tokenizer, load_tokenizer, num_rows
from megatron_mea.errors import RunError, UserError, did_you_mean
from megatron_mea.huggingface.config_keys import STOCK_MODEL_TYPES
from megatron_mea.huggingface.model_folder import CheckpointFolder, HFFolder, ModelFolder, StoredTensors
from megatron_mea.model.decoder import parameter_shapes, parameter_specs
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

_VARIANT = "--variant"
_SPARE_BYTES = 1 << 26
"""Space for a checkpoint beyond its tensors: the tokenizer of some vocabularies takes tens of megabytes."""


def import_model(source: HFFolder, out: str | Path, *, variant: str | None = None) -> str:
    """Writes the weights of a Hugging Face folder as a checkpoint of step 0, in float32 and without moments.

    The folder is untrusted: safetensors alone are read, and no code of it is run. At most a chunk of one tensor is in
    memory.

    Args:
        source: a Llama, Mistral, Qwen2 or Qwen3, or an export of ours.
        out: must not exist or be empty; it appears when everything is written.
        variant: of the checkpoint; None: `mea_no_norm`, or that of an export of ours. Parameters that the source lacks
            start as the identity (combinations) or as 1 (gains of the head norm).

    Returns:
        A message for the user: what was written, and the settings to train from it.

    Raises:
        UserError: the folder is not supported, in whatever way; `out` is not free, or its disk is too small.
        RunError: the disk fails.
    """
    out = Path(out)
    check_free_folder(out)
    model, warnings = import_settings(source, variant)
    stored = source.tensors()
    warnings += _import_warnings(source=source, stored=stored, model=model)
    dtypes = ", ".join(sorted({entry.dtype for entry in stored.entries.values()}))
    # The name alone: an export of the checkpoint shows it.
    origin = f"imported from {source.folder.resolve().name} ({source.config_json.model_type}, {dtypes}); no moments"
    with reserve_output(out, folder=True), disk_errors(out), scratch_folder(out) as scratch:
        count = sum(map(math.prod, parameter_shapes(model).values()))
        require_space(out, 4 * count + _SPARE_BYTES)
        for warning in warnings:
            note(f"warning: {warning}")

        folder = scratch / "checkpoint"
        try:
            _write_checkpoint(stored=stored, folder=folder, out=out, model=model, origin=origin)
        except RuntimeError as error:
            # A full disk reaches torch as a RuntimeError, whose first line is the reason.
            reason = str(error).partition("\n")[0]
            raise RunError(f"{out} cannot be written: {reason}") from error

        publish(folder, out)

    return (
        f"wrote {out}: step 0, {count:,} parameters in float32, variant {model.attention_variant}\n"
        f"{init_from_instructions(model, out)}"
    )


def as_checkpoint(model: ModelFolder, folder: Path) -> CheckpointFolder:
    """The checkpoint of a MODEL; that of a Hugging Face folder is its import, written to `folder`.

    Raises:
        UserError, RunError: as `import_model`.
    """
    if isinstance(model, CheckpointFolder):
        return model

    import_model(model, folder)
    return CheckpointFolder(folder)


def import_settings(source: HFFolder, variant: str | None = None) -> tuple[Model, list[str]]:
    """The `model` section of the import, in the requested variant, and warnings.

    Raises:
        UserError: it cannot be imported, or not as that variant.
    """
    source_model = source.settings()
    own_variant = source_model.attention_variant
    if variant is None:
        variant = own_variant
        if source.config_json.model_type in STOCK_MODEL_TYPES:
            variant = combining_variant(own_variant)

    allowed = extending_variants(own_variant)
    if variant not in allowed:
        hint = "" if variant in VARIANTS else did_you_mean(variant, allowed)
        if not hint and allowed != extending_variants("plain"):
            hint = f"{source.folder} is of the variant {own_variant}, which another one would drop parameters of"
        raise UserError(where=_VARIANT, got=variant, expected=", ".join(allowed), hint=hint)

    model = parse_model(source_model.model_dump(mode="json") | {"attention_variant": variant})
    if model.has_head_norm and not source_model.has_head_norm:
        return model, [
            f"{variant} normalises the output of every head, which {source.folder} does not: "
            "the logits are other ones until training has made up for it"
        ]

    return model, []


def _import_warnings(*, source: HFFolder, stored: StoredTensors, model: Model) -> list[str]:
    """Warnings about a folder that can be imported, its tokenizer included.

    Raises:
        UserError: there is a tokenizer, or generation settings, and they do not load.
    """
    folder, warnings = source.folder, list(source.warnings)
    if source.config_json.has_remote_code:
        kind = source.config_json.model_type
        warnings.append(f"{folder} brings code of its own (auto_map), which is not run: imported as a {kind}")

    source.generation_config()
    if any("F64" in entry.dtype for entry in stored.entries.values()):
        warnings.append(f"{folder} is in float64, and is rounded to float32")
    if source.tokenizer is None:
        return [*warnings, f"{folder} has no tokenizer, so neither has the checkpoint: `generate` will refuse it"]

    num_ids = num_rows(source.load_tokenizer())
    if num_ids > model.vocab_size:
        warnings.append(
            f"the tokenizer has {num_ids} ids, and the model only {model.vocab_size}: a run that begins from it gets "
            "rows for the others"
        )

    return warnings


def _write_checkpoint(*, stored: StoredTensors, folder: Path, out: Path, model: Model, origin: str) -> None:
    source = stored.source
    specs = parameter_specs(model)
    shapes = {name: spec.global_shape for name, spec in specs.items()}
    total = 4 * sum(map(math.prod, shapes.values()))
    with progress_bar(total=total, desc="import", unit="B", unit_scale=True) as bar:

        def read(name: str, *, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
            bar.update(4 * math.prod(shape))
            if name in stored.entries:
                return stored.read_tensor(name, offsets=offsets, shape=shape)

            # A combination or a gain: small, so always one chunk, and its start is not random.
            return specs[name].initialize(shape, torch.Generator())

        write_tensors(folder=folder, shapes=shapes, read=read)

    tokenizer = "none" if source.tokenizer is None else str(source.tokenizer)
    if source.tokenizer is not None:
        copy_tokenizer(source.tokenizer, folder / TOKENIZER)

    if (source.folder / GENERATION).is_file():
        shutil.copy(source.folder / GENERATION, folder)

    # The window that `evaluate` uses for a Hugging Face folder.
    data = {"tokenizer": tokenizer, "train": [], "seq_length": min(model.max_position_embeddings, 2048)}
    config = parse_config({"model": model.model_dump(), "data": data, "run": {"dir": str(out)}}, needs_data=False)
    CheckpointMetadata(
        step=0,
        samples=0,
        tokens=0,
        config=config.model_dump(mode="json"),
        data=[],
        layout={},
        versions=versions(),
        validation_loss=None,
        origin=origin,
    ).write(folder)
    seal(folder)


def init_from_instructions(model: Model, out: Path) -> str:
    """The YAML that begins a run with a checkpoint: the tokenizer, the `model` section without defaults, `init_from`.

    The vocabulary has a row for every id of the tokenizer, which may have more of them than the checkpoint.
    """
    data: dict[str, Any] = {}
    if (out / TOKENIZER).is_dir():
        tokenizer = load_tokenizer(out / TOKENIZER, str(out))
        model = model.model_copy(update={"vocab_size": max(model.vocab_size, num_rows(tokenizer))})
        data["tokenizer"] = str(out / TOKENIZER)
    if model.max_position_embeddings < Data.model_fields["seq_length"].default:
        data["seq_length"] = model.max_position_embeddings

    default = parse_model({})
    fields = {key: value for key, value in model.model_dump(mode="json").items() if value != getattr(default, key)}
    tree = {"data": data, "model": fields, "run": {"init_from": str(out)}}
    settings = {key: section for key, section in tree.items() if section}
    text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=100).rstrip()
    return f"begin a run from it with these settings:\n{text}"
