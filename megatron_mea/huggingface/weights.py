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
_TOLD = ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "head_norm_eps")
"""Settings that somebody may mean to change when training goes on: a warning."""
_LIKE_OURS = ("mea", "llama", "mistral", "qwen2", "qwen3")
"""Hugging Face models that compute what we do: our exports, and what our variant `plain` is."""
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
    other = [key for key in ours if key in settings and settings[key] != ours[key]]
    allowed = {key: f"{settings[key]}, as in {_KEY} = {path}" for key in other if key in _SAME}
    problems = [Problem(f"model.{key}", ours[key], theirs) for key, theirs in allowed.items()]
    if problems := [*problems, *_misfits(path, shapes, parameter_shapes(model))]:
        raise UserError.of(problems)
    told = [key for key in other if key in _TOLD]
    return WeightSource([f"model.{key} is {ours[key]}, and {settings[key]} in {path}" for key in told], read)


def _described(model: Model) -> dict[str, Any]:
    """Those of the settings above that have an effect, as a config.json of transformers 5 describes them."""
    fields = model.model_dump(mode="json")
    fields |= {"num_component_heads": model.component_heads, "rope_parameters": model.rope_parameters}
    effective = {
        "hlc_mixes": model.has_hlc,
        "head_norm_affine": model.has_head_norm,
        "head_norm_eps": model.has_head_norm,
        "max_position_embeddings": model.rope_parameters["rope_type"] == "dynamic",
    }
    return {key: fields[key] for key in (*_SAME, *_TOLD) if effective.get(key, True)}


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
    """Our names and values of what a config.json says; what it leaves out is the default of its model_type."""
    from transformers import CONFIG_MAPPING

    from megatron_mea.huggingface.configuration_mea import MEAConfig

    try:
        description = json.loads((path / "config.json").read_text())
        kind = description["model_type"]
        if kind not in _LIKE_OURS:
            raise UserError(_KEY, f"{path}, of model_type {kind}", ", ".join(_LIKE_OURS))
        config = (MEAConfig if kind == "mea" else CONFIG_MAPPING[kind]).from_dict(description)
    except UserError:
        raise
    except Exception as error:
        # transformers checks types and values, each with an exception of its own.
        raise UserError(_KEY, f"{path}/config.json, unreadable ({error})", "a Hugging Face folder") from None
    found = {key: getattr(config, key) for key in (*_SAME, *_TOLD) if hasattr(config, key)}
    # What transformers 4 called it is kept beside the new name.
    found["rope_parameters"] = {key: value for key, value in config.rope_parameters.items() if key != "type"}
    if kind == "mea":
        return found
    if getattr(config, "sliding_window", None) or config.hidden_act != "silu":
        raise UserError(_KEY, f"{path}, with a sliding window or another activation than silu", "full attention, silu")
    # Qwen's biases and norms are fixed; their names and shapes tell.
    found.pop("attention_bias", None)
    found["attention_variant"] = "plain"
    found["head_dim"] = found.get("head_dim") or config.hidden_size // config.num_attention_heads
    return found


def _files_of(path: Path) -> Iterator[tuple[str, tuple[Path, tuple[int, ...]]]]:
    """(name, (file, shape)) of every tensor in the safetensors that transformers would load."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    files = [single]
    if not single.is_file():
        if not index.is_file():
            allowed = f"{single.name}, or {index.name} and the files that it names"
            raise UserError(_KEY, f"{path} without {single.name}", allowed)
        try:
            files = sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(_KEY, f"{index}, unreadable ({error})", "an index of safetensors") from None
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
