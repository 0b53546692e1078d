"""A model with `hlc_form: latent` whose changed parameters are those that a fit has found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_mea.compression.partial_fit import PartialFit
from megatron_mea.compression.source_model import SourceModel
from megatron_mea.config.load import parse_model
from megatron_mea.config.schema import Model
from megatron_mea.config.variants import combining_variant

LatentDims = tuple[int, int]
"""Numbers of keys and of values that a layer caches."""


def latent_settings(
    model: Model, *, dims: Sequence[LatentDims], counts: Sequence[Sequence[int]] | None = None
) -> Model:
    """The settings of the compressed model.

    Args:
        model: of the source model.
        dims: by layer.
        counts: pairs of each frequency, by layer.
    """
    keys, values = zip(*dims, strict=True)
    return parse_model(
        model.model_dump(mode="json")
        | {
            "attention_variant": combining_variant(model.attention_variant),
            "num_component_heads": model.num_key_value_heads,
            "hlc_form": "latent",
            "hlc_init": "block",
            "hlc_mixes": "both",
            "key_latent_dim": list(keys),
            "value_latent_dim": list(values),
            "key_frequencies": None if counts is None else [list(layer) for layer in counts],
        }
    )


@dataclass(frozen=True, kw_only=True)
class LatentModel:
    """A source model of which all layers have latent keys and values.

    Attributes:
        model: the settings.
        partial: has the changed parameters.
    """

    source_model: SourceModel
    model: Model
    partial: PartialFit

    def read(self, name: str) -> torch.Tensor:
        """A full parameter in float32."""
        changed = self.partial.read(name)
        return self.source_model.read(name) if changed is None else changed

    def read_piece(self, *, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """A box of a parameter in float32."""
        changed = self.partial.read(name)
        if changed is None:
            return self.source_model.stored.read_tensor(name, offsets=offsets, shape=shape)

        return changed[tuple(slice(offset, offset + size) for offset, size in zip(offsets, shape, strict=True))]

    @property
    def description(self) -> str:
        """How small the cache is."""
        cached = sum(self.model.key_latent_dims) + sum(self.model.value_latent_dims)
        total = 2 * self.model.num_key_value_heads * self.model.head_dim * self.model.num_hidden_layers
        return f"compressed to {cached:,} of {total:,} cached numbers a token"
