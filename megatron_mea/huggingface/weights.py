"""The weights with which `run.init_from` begins a run: compared with its settings, rows added for new tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_mea.checkpoint.tensors import Fragment, row_chunks
from megatron_mea.config.schema import EXPERT_KEYS, Model
from megatron_mea.config.variants import LATENT_KEYS, VARIANTS
from megatron_mea.errors import Problem, UserError
from megatron_mea.huggingface.model_folder import INIT_FROM, ModelFolder, StoredTensors
from megatron_mea.huggingface.safetensors_reader import check_tensors
from megatron_mea.model.decoder import parameter_shapes

_LAYER_KEYS = ("mlp_only_layers", "decoder_sparse_step")
"""Settings that say which layers have experts, each of them or both together."""
_MUST_MATCH = (
    "num_hidden_layers",
    *("attention_variant", "num_attention_heads", "num_key_value_heads", "num_component_heads", "head_dim"),
    *("hlc_mixes", "hlc_form", "key_latent_dim", "value_latent_dim", "key_frequencies"),
    *("qk_norm", "attention_bias", "tie_word_embeddings", "head_norm_affine"),
    *(key for variant in VARIANTS.values() for key in variant.own_keys),
    *("num_experts", *(key for key in EXPERT_KEYS if key not in _LAYER_KEYS)),
)
"""Settings that must be equal for weights of equal shapes to mean the same."""
_ROWS_BYTES = 1 << 28
_WARN_IF_CHANGED = ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "head_norm_eps")
"""Settings that a user may change on purpose: a difference is a warning."""


@dataclass(frozen=True)
class WeightSource:
    """Weights that a run begins with.

    Args:
        warnings: lines to print: settings that differ from those that the weights were trained with.
        stored: their tensors.
    """

    warnings: list[str]
    stored: StoredTensors


def open_weights(path: Path, model: Model, *, rank: int = 0, world_size: int = 1) -> WeightSource:
    """Opens the weights of a MODEL for a model of these settings; each of `world_size` callers verifies its share.

    Where the model has a larger vocabulary, the rows that it adds are the mean of the stored ones.

    Raises:
        UserError: nothing of the kind stands there, it is damaged, or a name, a shape or a setting does not fit.
    """
    source = ModelFolder.locate(path, INIT_FROM)
    stored, stored_model = source.tensors(rank=rank, world_size=world_size), source.settings()
    settings, stored_settings = _effective_settings(model), _effective_settings(stored_model)
    differing = list(_differing_keys(settings, stored_settings))
    problems = []
    for key in (key for key in differing if key in _MUST_MATCH):
        got, expected = _first_difference(settings[key], stored_settings[key])
        problems.append(Problem(where=f"model.{key}", got=got, expected=f"{expected}, as in {INIT_FROM} = {path}"))

    problems += _routed_layers_problems(model=model, stored_model=stored_model, path=path)
    if problems:
        # Names and shapes follow from these settings, and would only repeat them.
        raise UserError.from_problems(problems)

    # A smaller vocabulary would drop tokens, and is refused by the shapes.
    vocab_size = min(model.vocab_size, stored_model.vocab_size)
    if problems := check_tensors(
        path=path,
        where=INIT_FROM,
        shapes=stored.shapes,
        expected=parameter_shapes(model.model_copy(update={"vocab_size": vocab_size})),
        expected_by="the section `model`",
    ):
        raise UserError.from_problems(problems)

    warnings = [*source.warnings] + [
        f"model.{key} is {settings[key]}, and {stored_settings[key]} in {path}"
        for key in differing
        if key in _WARN_IF_CHANGED
    ]
    if vocab_size < model.vocab_size:
        warnings.append(
            f"model.vocab_size is {model.vocab_size}, and {vocab_size} in {path}: the rows that are added to the "
            f"embeddings, {model.vocab_size - vocab_size}, are the mean of the others"
        )
        stored = replace(stored, fill=partial(_fill_with_added_rows, stored))

    return WeightSource(warnings, stored)


def _differing_keys(settings: dict[str, Any], stored: dict[str, Any]) -> Iterator[str]:
    """The settings that both have and that differ, without those that differ because another one does."""
    differing = [key for key in settings if key in stored and stored[key] != settings[key]]
    for key in differing:
        is_one_a_layer = key in ("num_component_heads", *LATENT_KEYS)
        follows = (is_one_a_layer and "num_hidden_layers" in differing) or (
            key == "key_frequencies" and "key_latent_dim" in differing
        )
        if not follows:
            yield key


def _first_difference(value: Any, stored: Any) -> tuple[Any, Any]:
    """The values; of a list for each layer those of the first layer that differs, since all may fill a screen."""
    if not (isinstance(value, list) and isinstance(value[0], list)):
        return value, stored

    layer = next(layer for layer, counts in enumerate(value) if counts != stored[layer])
    return f"{value[layer]} in layer {layer}", stored[layer]


def _routed_layers_problems(*, model: Model, stored_model: Model, path: Path) -> Iterator[Problem]:
    """The layers of two models with experts that have some in one of them alone, of the layers that both have."""
    if not (model.num_experts and stored_model.num_experts):
        return

    layers = range(min(model.num_hidden_layers, stored_model.num_hidden_layers))
    routed, stored_routed = ([layer for layer in layers if each.is_routed(layer)] for each in (model, stored_model))
    if routed != stored_routed:
        yield Problem(
            where=", ".join(f"model.{key}" for key in _LAYER_KEYS),
            got=f"experts in the layers {routed}",
            expected=f"in {stored_routed}, as in {INIT_FROM} = {path}",
        )


def _fill_with_added_rows(stored: StoredTensors, fragments: Iterable[Fragment]) -> None:
    """Fills fragments of which the vocabulary may be larger than the stored one, with the mean row beyond it."""
    fragments = list(fragments)
    stored.fill(replace(fragment, global_shape=stored.shapes[fragment.name]) for fragment in fragments)
    for fragment in fragments:
        num_rows = stored.shapes[fragment.name][0]
        if fragment.global_shape[0] == num_rows:
            continue

        mean = _mean_row(stored, fragment.name)
        for (first_row, *columns), view in fragment.chunks():
            added = view[max(0, num_rows - first_row) :]
            # shape: (rows, columns) from (columns,)
            added.copy_(mean[columns[0] : columns[0] + added.shape[1]].expand_as(added))


def _mean_row(stored: StoredTensors, name: str) -> torch.Tensor:
    """Mean (columns,) of the rows of a stored matrix, of which a part is in memory at a time."""
    shape = stored.shapes[name]
    total = torch.zeros(shape[1], dtype=torch.float64)
    for offsets, size in row_chunks(shape, _ROWS_BYTES // 4):
        rows = Fragment.empty(name, shape, offsets=offsets, shape=size)
        stored.fill([rows])
        total += rows.values.view(size).double().sum(0)

    return (total / shape[0]).float()


def _effective_settings(model: Model) -> dict[str, Any]:
    """The settings in `_MUST_MATCH` and `_WARN_IF_CHANGED` that affect this model, normalised for comparison."""
    fields = model.model_dump(mode="json")
    fields |= {
        "num_component_heads": model.component_heads,
        "key_latent_dim": model.key_latent_dims,
        "value_latent_dim": model.value_latent_dims,
        "key_frequencies": model.pair_counts,
        "rope_parameters": model.rope_parameters,
    }
    effective = {
        **dict.fromkeys(LATENT_KEYS, model.hlc_form == "latent"),
        **dict.fromkeys(model.variant.ignored_keys, False),
        "num_component_heads": model.has_hlc,
        "max_position_embeddings": model.rope_parameters["rope_type"] == "dynamic",
    }
    return {key: fields[key] for key in (*_MUST_MATCH, *_WARN_IF_CHANGED) if effective.get(key, True)}
