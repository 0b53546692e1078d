"""Weights alone, out of a checkpoint or a Hugging Face folder, read in pieces: what `run.init_from` begins with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_mea.checkpoint.folder import Meta, checkpoint_folder, damage
from megatron_mea.checkpoint.tensors import Fragment, read_fragments, weight_shapes
from megatron_mea.config.load import parse_config
from megatron_mea.config.schema import Model
from megatron_mea.errors import Problem, UserError
from megatron_mea.model.decoder import parameter_shapes

_SAME = (
    *("attention_variant", "num_attention_heads", "num_key_value_heads", "num_component_heads", "head_dim"),
    *("hlc_mixes", "qk_norm", "attention_bias", "tie_word_embeddings", "head_norm_affine"),
)
"""Settings that say what the weights mean, which equal shapes do not."""
_TOLD = ("rope_parameters", "rms_norm_eps", "head_norm_eps")
"""Settings that somebody may mean to change when training goes on: a warning."""
_LIKE_OURS = ("mea", "llama", "mistral", "qwen2", "qwen3")
"""Hugging Face models that compute what we do, where names and shapes are the same."""
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
    each of `world_size` callers verifies its share.

    Raises:
        UserError: nothing of the kind stands there, it is damaged, or a name, a shape or a setting does not fit.
    """
    if (path / "config.json").is_file():
        settings, files = _settings_of(path), dict(_files_of(path))
        shapes = {name: shape for name, (_, shape) in files.items()}

        def read(fragments: Iterable[Fragment]) -> None:
            _read_safetensors(files, fragments)
    else:
        folder = checkpoint_folder(path)
        if problem := damage(folder, rank, world_size):
            raise UserError(_KEY, f"{folder}: {problem}", "a whole checkpoint", "use an older one of the run")
        settings, shapes = _described(parse_config(Meta.read(folder).config).model), weight_shapes(folder)

        def read(fragments: Iterable[Fragment]) -> None:
            read_fragments(folder, fragments)

    ours = _described(model)
    if problems := [*_other_settings(path, settings, ours), *_misfits(path, shapes, parameter_shapes(model))]:
        raise UserError.of(problems)
    told = [key for key in _TOLD if key in settings and settings[key] != ours[key]]
    return WeightSource([f"model.{key} is {ours[key]}, and {settings[key]} in {path}" for key in told], read)


def _described(model: Model) -> dict[str, Any]:
    """As a config.json of transformers 5 describes it."""
    fields = model.model_dump(mode="json")
    return fields | {"num_component_heads": model.component_heads, "rope_parameters": model.rope_parameters}


def _other_settings(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[Problem]:
    for key in _SAME:
        if key in theirs and theirs[key] != ours[key]:
            yield Problem(f"model.{key}", ours[key], f"{theirs[key]}, as in {_KEY} = {path}")


def _misfits(
    path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[Problem]:
    for name in expected:
        if name not in found:
            yield Problem(_KEY, f"{path} without {name}", f"{name} of shape {expected[name]}")
        elif found[name] != expected[name]:
            yield Problem(_KEY, f"{name} of shape {found[name]} in {path}", f"{expected[name]}, by the section `model`")
    for name in found.keys() - expected.keys():
        yield Problem(_KEY, f"{name} in {path}", "only what the section `model` describes")


def _settings_of(path: Path) -> dict[str, Any]:
    """Our names and values of what a config.json says."""
    try:
        config = json.loads((path / "config.json").read_text())
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(_KEY, f"{path}/config.json, unreadable ({error})", "a Hugging Face folder") from None
    if kind not in _LIKE_OURS:
        raise UserError(_KEY, f"{path}, of model_type {kind}", ", ".join(_LIKE_OURS))
    windows = config.get("sliding_window") and config.get("use_sliding_window", True)
    if kind != "mea" and (windows or config.get("hidden_act", "silu") != "silu"):
        raise UserError(_KEY, f"{path}, with a sliding window or another activation than silu", "full attention, silu")
    found = {key: config[key] for key in (*_SAME, *_TOLD) if key in config}
    # transformers 4 wrote the base beside the scaling.
    rope = {"rope_theta": config.get("rope_theta", 10000.0)} | (config.get("rope_scaling") or {})
    found.setdefault("rope_parameters", {"rope_type": rope.pop("type", "default")} | rope)
    found.setdefault("tie_word_embeddings", False)
    found.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    if kind != "mea":
        # Qwen's biases and norms are fixed; their names and shapes tell.
        found.pop("attention_bias", None)
        if "head_dim" not in config and "hidden_size" in config:
            found["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return found


def _files_of(path: Path) -> Iterator[tuple[str, tuple[Path, tuple[int, ...]]]]:
    """(name, (file, shape)) of every tensor in a folder's safetensors."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(_KEY, f"{path} without .safetensors", "a Hugging Face folder with its weights in safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                    yield name, (file, tuple(tensors.get_slice(name).get_shape()))
        except (OSError, SafetensorError) as error:
            raise UserError(_KEY, f"{file}, unreadable ({error})", "whole safetensors") from None


def _read_safetensors(files: Mapping[str, tuple[Path, tuple[int, ...]]], fragments: Iterable[Fragment]) -> None:
    for fragment in fragments:
        with safe_open(files[fragment.name][0], framework="pt") as tensors:
            whole = tensors.get_slice(fragment.name)
            for offsets, view in fragment.pieces():
                box = tuple(slice(first, first + size) for first, size in zip(offsets, view.shape, strict=True))
                view.copy_(whole[box])
