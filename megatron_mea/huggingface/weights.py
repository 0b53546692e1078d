"""Weights of a checkpoint or a Hugging Face folder, read in chunks, with which `run.init_from` begins a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_mea.checkpoint.folder import CheckpointMetadata, find_corruption
from megatron_mea.checkpoint.tensors import Fragment, read_fragments, row_chunks, weight_shapes
from megatron_mea.config.load import parse_config
from megatron_mea.config.schema import Model
from megatron_mea.config.variants import VARIANTS
from megatron_mea.errors import Problem, UserError
from megatron_mea.huggingface.hf_config import read_hf_config
from megatron_mea.huggingface.locate import INIT_FROM, is_hf_folder, named_checkpoint
from megatron_mea.huggingface.safetensors_reader import (
    check_tensors,
    fill_fragments,
    scan_model,
)
from megatron_mea.model.decoder import parameter_shapes

_MUST_MATCH = (
    *("attention_variant", "num_attention_heads", "num_key_value_heads", "num_component_heads", "head_dim"),
    *("hlc_mixes", "qk_norm", "attention_bias", "tie_word_embeddings", "head_norm_affine"),
    *(key for variant in VARIANTS.values() for key in variant.own_keys),
)
"""Settings that must be equal for weights of equal shapes to mean the same."""
_ROWS_BYTES = 1 << 28
_WARN_IF_CHANGED = ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "head_norm_eps")
"""Settings that a user may change on purpose: a difference is a warning."""


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model that lies in a folder.

    Args:
        model: its settings.
        shapes: of its tensors, by exported name.
        read: fills fragments of its tensors; no collective.
        folder: the checkpoint (the newest one of a run folder), or the Hugging Face folder.
        files: the file of each tensor, where each has one.
        warnings: lines to print: what of a config.json was left out and may matter.
    """

    model: Model
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[Iterable[Fragment]], None]
    folder: Path
    files: Mapping[str, Path] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightSource:
    """Weights that a run begins with.

    Args:
        warnings: lines to print: settings that differ from those that the weights were trained with.
        stored: the model with these weights.
    """

    warnings: list[str]
    stored: StoredModel


def open_stored_model(path: Path, key: str, *, rank: int = 0, world_size: int = 1) -> StoredModel:
    """Opens a checkpoint, the newest one of a run folder, or a Hugging Face folder.

    No code from a folder is run. Of the tensors only shapes are read yet; of a checkpoint each of `world_size` callers
    verifies the checksums of its share of the files, and of those that all of them read here.

    Args:
        key: the configuration key that named the folder, for messages.

    Raises:
        UserError: nothing of the kind stands there, or it is damaged.
    """
    if is_hf_folder(path):
        hf_config = read_hf_config(path, key)
        model = hf_config.model
        tensors = scan_model(path=path, where=key, num_layers=model.num_hidden_layers, tied=model.tie_word_embeddings)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return StoredModel(
            model=model,
            shapes=shapes,
            read=partial(fill_fragments, tensors),
            folder=path,
            files={name: tensor.file for name, tensor in tensors.items()},
            warnings=hf_config.warnings,
        )

    folder = named_checkpoint(path, key)
    if problem := find_corruption(folder=folder, rank=rank, world_size=world_size):
        raise UserError(
            where=key, got=f"{folder}: {problem}", expected="a whole checkpoint", hint="use an older one of the run"
        )

    return StoredModel(
        model=read_model_settings(folder, key),
        shapes=weight_shapes(folder),
        read=partial(read_fragments, folder),
        folder=folder,
    )


def read_model_settings(path: Path, key: str) -> Model:
    """Reads the settings of the model that `open_stored_model` would open, and verifies nothing.

    Raises:
        UserError: nothing of the kind stands there.
    """
    if is_hf_folder(path):
        return read_hf_config(path, key).model

    return parse_config(CheckpointMetadata.read(named_checkpoint(path, key)).config, needs_data=False).model


def open_weights(path: Path, model: Model, *, rank: int = 0, world_size: int = 1) -> WeightSource:
    """Opens the weights of a folder, as `open_stored_model` does, for a model of these settings.

    Where the model has a larger vocabulary, the rows that it adds are the mean of the stored ones.

    Raises:
        UserError: nothing of the kind stands there, it is damaged, or a name, a shape or a setting does not fit.
    """
    stored = open_stored_model(path=path, key=INIT_FROM, rank=rank, world_size=world_size)
    settings, stored_settings = _effective_settings(model), _effective_settings(stored.model)
    differing = [key for key in settings if key in stored_settings and stored_settings[key] != settings[key]]
    problems = [
        Problem(where=f"model.{key}", got=settings[key], expected=f"{stored_settings[key]}, as in {INIT_FROM} = {path}")
        for key in differing
        if key in _MUST_MATCH
    ]
    # A smaller vocabulary would drop tokens, and is refused by the shapes.
    vocab_size = min(model.vocab_size, stored.model.vocab_size)
    problems += check_tensors(
        path=path,
        where=INIT_FROM,
        shapes=stored.shapes,
        expected=parameter_shapes(model.model_copy(update={"vocab_size": vocab_size})),
        expected_by="the section `model`",
    )
    if problems:
        raise UserError.from_problems(problems)

    warnings = [*stored.warnings] + [
        f"model.{key} is {settings[key]}, and {stored_settings[key]} in {path}"
        for key in differing
        if key in _WARN_IF_CHANGED
    ]
    if vocab_size < model.vocab_size:
        warnings.append(
            f"model.vocab_size is {model.vocab_size}, and {vocab_size} in {path}: the rows that are added to the "
            f"embeddings, {model.vocab_size - vocab_size}, are the mean of the others"
        )
        stored = replace(stored, read=partial(_read_with_added_rows, stored))

    return WeightSource(warnings, stored)


def _read_with_added_rows(stored: StoredModel, fragments: Iterable[Fragment]) -> None:
    """Fills fragments of which the vocabulary may be larger than the stored one, with the mean row beyond it."""
    fragments = list(fragments)
    stored.read(replace(fragment, global_shape=stored.shapes[fragment.name]) for fragment in fragments)
    for fragment in fragments:
        num_rows = stored.shapes[fragment.name][0]
        if fragment.global_shape[0] == num_rows:
            continue

        mean = _mean_row(stored, fragment.name)
        for (first_row, *columns), view in fragment.chunks():
            added = view[max(0, num_rows - first_row) :]
            # shape: (rows, columns) from (columns,)
            added.copy_(mean[columns[0] : columns[0] + added.shape[1]].expand_as(added))


def _mean_row(stored: StoredModel, name: str) -> torch.Tensor:
    """Mean (columns,) of the rows of a stored matrix, of which a part is in memory at a time."""
    shape = stored.shapes[name]
    total = torch.zeros(shape[1], dtype=torch.float64)
    for offsets, size in row_chunks(shape, _ROWS_BYTES // 4):
        rows = torch.empty(size)
        part = Fragment(
            name=name, global_shape=shape, global_offset=offsets, local_shape=size, start=0, values=rows.view(-1)
        )
        stored.read([part])
        total += rows.double().sum(0)

    return (total / shape[0]).float()


def _effective_settings(model: Model) -> dict[str, Any]:
    """The settings in `_MUST_MATCH` and `_WARN_IF_CHANGED` that affect this model, normalised for comparison."""
    fields = model.model_dump(mode="json")
    fields |= {"num_component_heads": model.component_heads, "rope_parameters": model.rope_parameters}
    effective = {
        **dict.fromkeys(model.variant.ignored_keys, False),
        "num_component_heads": model.has_hlc,
        "max_position_embeddings": model.rope_parameters["rope_type"] == "dynamic",
    }
    return {key: fields[key] for key in (*_MUST_MATCH, *_WARN_IF_CHANGED) if effective.get(key, True)}
