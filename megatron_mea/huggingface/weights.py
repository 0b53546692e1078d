"""Weights alone, out of a checkpoint or a Hugging Face folder, read in pieces: what `run.init_from` begins with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mea.checkpoint.folder import Meta, damage
from megatron_mea.checkpoint.tensors import Fragment, read_fragments, weight_shapes
from megatron_mea.config.load import parse_config
from megatron_mea.config.schema import Model
from megatron_mea.errors import Problem, UserError
from megatron_mea.huggingface.description import read_description
from megatron_mea.huggingface.place import INIT_FROM, is_hugging_face, named_checkpoint
from megatron_mea.huggingface.stored import check_names, read_stored, stored_tensors, without_tied_head
from megatron_mea.model.decoder import parameter_shapes

_SAME = (
    *("attention_variant", "num_attention_heads", "num_key_value_heads", "num_component_heads", "head_dim"),
    *("hlc_mixes", "qk_norm", "attention_bias", "tie_word_embeddings", "head_norm_affine"),
)
"""Settings that say what the weights mean, which equal shapes do not."""
_TOLD = ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "head_norm_eps")
"""Settings that somebody may mean to change when training goes on: a warning."""


@dataclass(frozen=True)
class WeightSource:
    """Weights that a run begins with.

    Args:
        warnings: lines to print: settings that are other than those that the weights were trained with.
        read: fills fragments of the master weights; for every rank by itself.
    """

    warnings: list[str]
    read: Callable[[Iterable[Fragment]], None]


@dataclass(frozen=True)
class StoredModel:
    """A model that lies in a folder.

    Args:
        model: its settings.
        shapes: of its tensors, by exported name.
        read: fills fragments of them; for every rank by itself.
        folder: the checkpoint, where a run folder was named; or the Hugging Face folder.
    """

    model: Model
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[Iterable[Fragment]], None]
    folder: Path


def open_stored(path: Path, key: str, rank: int = 0, world_size: int = 1) -> StoredModel:
    """A checkpoint, a run's newest one, or a Hugging Face folder.

    No code from a folder is run, and nothing but shapes is read yet, apart from a checkpoint's checksums, of which
    each of `world_size` callers verifies its share, and that of what all of them read here.

    Args:
        key: the one that named the folder, for messages.

    Raises:
        UserError: nothing of the kind stands there, or it is damaged.
    """
    if is_hugging_face(path):
        model = stored_settings(path, key)
        found = without_tied_head(path, key, stored_tensors(path, key), model.tie_word_embeddings)
        shapes = {name: one.shape for name, one in found.items()}
        return StoredModel(model, shapes, partial(read_stored, found), path)
    folder = named_checkpoint(path, key)
    if problem := damage(folder, rank, world_size):
        raise UserError(key, f"{folder}: {problem}", "a whole checkpoint", "use an older one of the run")
    return StoredModel(stored_settings(folder, key), weight_shapes(folder), partial(read_fragments, folder), folder)


def stored_settings(path: Path, key: str) -> Model:
    """The settings alone of what `open_stored` opens; nothing is verified.

    Raises:
        UserError: nothing of the kind stands there.
    """
    if is_hugging_face(path):
        return read_description(path, key).model
    return parse_config(Meta.read(named_checkpoint(path, key)).config, needs_data=False).model


def open_weights(path: Path, model: Model, rank: int = 0, world_size: int = 1) -> WeightSource:
    """The weights of a folder, as `open_stored` opens it, for a model of these settings.

    Raises:
        UserError: nothing of the kind stands there, it is damaged, or a name, a shape or a setting does not fit.
    """
    stored = open_stored(path, INIT_FROM, rank, world_size)
    ours, settings = _described(model), _described(stored.model)
    other = [key for key in ours if key in settings and settings[key] != ours[key]]
    problems = [
        Problem(f"model.{key}", ours[key], f"{settings[key]}, as in {INIT_FROM} = {path}")
        for key in other
        if key in _SAME
    ]
    problems += check_names(path, INIT_FROM, stored.shapes, parameter_shapes(model), "the section `model`")
    if problems:
        raise UserError.of(problems)
    told = [key for key in other if key in _TOLD]
    return WeightSource([f"model.{key} is {ours[key]}, and {settings[key]} in {path}" for key in told], stored.read)


def _described(model: Model) -> dict[str, Any]:
    """Those of the settings above that have an effect, as a config.json of transformers 5 describes them."""
    fields = model.model_dump(mode="json")
    fields |= {"num_component_heads": model.component_heads, "rope_parameters": model.rope_parameters}
    effective = {
        "hlc_mixes": model.has_hlc,
        "num_component_heads": model.has_hlc,
        "head_norm_affine": model.has_head_norm,
        "head_norm_eps": model.has_head_norm,
        "max_position_embeddings": model.rope_parameters["rope_type"] == "dynamic",
    }
    return {key: fields[key] for key in (*_SAME, *_TOLD) if effective.get(key, True)}
