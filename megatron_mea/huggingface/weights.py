"""Weights alone, out of a checkpoint or a Hugging Face folder, read in pieces: what `run.init_from` begins with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mea.checkpoint.folder import Meta, checkpoint_folder, damage
from megatron_mea.checkpoint.tensors import Fragment, read_fragments, weight_shapes
from megatron_mea.config.load import parse_config
from megatron_mea.config.schema import Model
from megatron_mea.errors import Problem, UserError
from megatron_mea.huggingface.description import read_description
from megatron_mea.huggingface.stored import check_names, read_stored, stored_tensors, without_tied_head
from megatron_mea.model.decoder import parameter_shapes

_SAME = (
    *("attention_variant", "num_attention_heads", "num_key_value_heads", "num_component_heads", "head_dim"),
    *("hlc_mixes", "qk_norm", "attention_bias", "tie_word_embeddings", "head_norm_affine"),
)
"""Settings that say what the weights mean, which equal shapes do not."""
_TOLD = ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "head_norm_eps")
"""Settings that somebody may mean to change when training goes on: a warning."""
_KEY = "run.init_from"


@dataclass(frozen=True)
class WeightSource:
    """Weights that a run begins with.

    Args:
        warnings: lines to print: settings that are other than those that the weights were trained with.
        read: fills fragments of the master weights; for every rank by itself.
    """

    warnings: list[str]
    read: Callable[[Iterable[Fragment]], None]


def open_weights(path: Path, model: Model, rank: int = 0, world_size: int = 1) -> WeightSource:
    """The weights of a checkpoint, of a run's newest one, or of a Hugging Face folder, for a model of these settings.

    No code from a folder is run, and nothing but shapes is read yet, apart from a checkpoint's checksums, of which
    each of `world_size` callers verifies its share, and that of what all of them read here.

    Raises:
        UserError: nothing of the kind stands there, it is damaged, or a name, a shape or a setting does not fit.
    """
    if (path / "config.json").is_file():
        theirs = read_description(path, _KEY).model
        found = without_tied_head(path, _KEY, stored_tensors(path, _KEY), theirs.tie_word_embeddings)
        shapes = {name: one.shape for name, one in found.items()}

        def read(fragments: Iterable[Fragment]) -> None:
            read_stored(found, fragments)
    else:
        folder = checkpoint_folder(path)
        if problem := damage(folder, rank, world_size):
            raise UserError(_KEY, f"{folder}: {problem}", "a whole checkpoint", "use an older one of the run")
        theirs = parse_config(Meta.read(folder).config, needs_data=False).model
        shapes = weight_shapes(folder)

        def read(fragments: Iterable[Fragment]) -> None:
            read_fragments(folder, fragments)

    ours, settings = _described(model), _described(theirs)
    other = [key for key in ours if key in settings and settings[key] != ours[key]]
    problems = [
        Problem(f"model.{key}", ours[key], f"{settings[key]}, as in {_KEY} = {path}") for key in other if key in _SAME
    ]
    problems += check_names(path, _KEY, shapes, parameter_shapes(model), "the section `model`")
    if problems:
        raise UserError.of(problems)
    told = [key for key in other if key in _TOLD]
    return WeightSource([f"model.{key} is {ours[key]}, and {settings[key]} in {path}" for key in told], read)


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
