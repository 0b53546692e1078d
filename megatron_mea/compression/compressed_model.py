"""The compressed model: settings and named tensors, each computed when it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch

from megatron_mea.compression.factorise import VirtualHeads, factorise
from megatron_mea.compression.procrustes import align_heads
from megatron_mea.compression.source_model import SIDES, SourceModel
from megatron_mea.config.load import parse_model
from megatron_mea.config.schema import Model
from megatron_mea.config.variants import combining_variant
from megatron_mea.errors import UserError

HeadMoments = Mapping[tuple[int, str], torch.Tensor]
"""S = E[y y^T], (h d, h d), of the composite heads' outputs y, by layer (counted from 0) and side."""

_MAX_CACHED_BYTES = 1 << 31
"""Bytes of cached virtual heads: a model of many key heads has more, and reads those of a layer one after the other."""
_ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.(\w+)\.(weight|bias)")


class Factoriser:
    """Computes the virtual heads of a model's layers, and caches the latest ones.

    Args:
        moments: of real tokens; None: those of white inputs, W W^T, as in the paper.
        aligned: rotate heads towards one another first; the keys of a model with `qk_norm` stay as they are, since a
            norm with a gain for each feature follows.
    """

    def __init__(self, *, source_model: SourceModel, moments: HeadMoments | None, aligned: bool) -> None:
        self.source_model, self.moments, self.aligned = source_model, moments, aligned
        self._cache: dict[tuple[int, str, int], VirtualHeads] = {}
        self._lost: dict[tuple[int, str, int], float] = {}

    def virtual_heads(self, *, layer: int, side: str, rank: int) -> VirtualHeads:
        """The virtual heads of a layer (counted from 0) and side, with `rank` component heads."""
        key = layer, side, rank
        if key not in self._cache:
            virtual_heads = self._cache[key] = self._factorise(layer=layer, side=side, rank=rank)
            self._lost[key] = virtual_heads.lost
            while len(self._cache) > 1 and self._cached_bytes() > _MAX_CACHED_BYTES:
                del self._cache[next(iter(self._cache))]

        return self._cache[key]

    def lost(self, layer: int, rank: int) -> float:
        """The lost parts of the mean squares of keys and of values, each from 0 to 1, added."""
        for side in SIDES:
            if (layer, side, rank) not in self._lost:
                self.virtual_heads(layer=layer, side=side, rank=rank)

        return sum(self._lost[layer, side, rank] for side in SIDES)

    def _cached_bytes(self) -> int:
        return sum(8 * cached.selection.numel() for cached in self._cache.values())

    def _factorise(self, *, layer: int, side: str, rank: int) -> VirtualHeads:
        """Factorises the moments of a layer and side, after rotation where that is asked for and possible."""
        model = self.source_model.model
        if self.moments is None:
            projection = self.source_model.composite_projection(layer, side)
            moment = projection @ projection.T
        else:
            moment = self.moments[layer, side]

        normed = side == "k" and model.qk_norm
        if not self.aligned or normed:
            return factorise(moment, num_heads=model.num_key_value_heads, rank=rank, equal_heads=normed)

        rotation = "rotary" if side == "k" else "orthogonal" if model.has_head_norm else "any"
        return align_heads(moment, num_heads=model.num_key_value_heads, rank=rank, rotation=rotation)


class CompressedModel:
    """A source model with fewer component heads, whose parameters are computed when they are read.

    Args:
        heads: component heads of every layer; a layer that keeps its number stays as it is.

    Attributes:
        model: the settings.
    """

    def __init__(self, *, source_model: SourceModel, heads: Sequence[int], factoriser: Factoriser) -> None:
        self.source_model, self.heads, self.factoriser = source_model, list(heads), factoriser
        self.changed = [new != old for new, old in zip(heads, source_model.model.component_heads, strict=True)]
        self.model = _compressed_settings(source_model.model, self.heads)

    @property
    def description(self) -> str:
        """How small the cache is."""
        total = self.model.num_key_value_heads * self.model.num_hidden_layers
        return f"compressed to {sum(self.heads)} of {total} key/value heads"

    def read(self, name: str) -> torch.Tensor:
        """A full parameter in float32."""
        changed = self._changed_parameter(name)
        return self.source_model.read(name) if changed is None else changed.float()

    def read_piece(self, *, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """A box of a parameter in float32."""
        changed = self._changed_parameter(name)
        if changed is None:
            return self.source_model.stored.read_tensor(name, offsets=offsets, shape=shape)

        return changed[tuple(slice(offset, offset + size) for offset, size in zip(offsets, shape, strict=True))].float()

    def _changed_parameter(self, name: str) -> torch.Tensor | None:
        """The full parameter where compression changes or adds it; None where it is the source model's."""
        match = _ATTENTION.fullmatch(name)
        if match is None:
            return None

        layer, module, parameter = int(match[1]), match[2], match[3]
        if not self.changed[layer]:
            return self._identity(module)
        if module in ("k_proj", "v_proj"):
            return self._projection(layer=layer, side=module[0], parameter=parameter)
        if module in ("hlc_k", "hlc_v"):
            return self._virtual_heads(layer, module[-1]).combination
        if module == "q_proj" and (rotations := self._virtual_heads(layer, "k").rotations) is not None:
            return self._rotated_queries(self.source_model.read(name).double(), rotations)

        if module in ("o_proj", "head_norm") and (rotations := self._virtual_heads(layer, "v").rotations) is not None:
            if module == "head_norm":
                # The gains are folded into `o_proj`, since they belong to the features before rotation.
                return torch.ones(self.model.head_dim)
            return self._rotated_outputs(
                layer=layer, projection=self.source_model.read(name).double(), rotations=rotations
            )

        return None

    def _virtual_heads(self, layer: int, side: str) -> VirtualHeads:
        return self.factoriser.virtual_heads(layer=layer, side=side, rank=self.heads[layer])

    def _identity(self, module: str) -> torch.Tensor | None:
        """The identity as combination of an unchanged layer's heads; None where the source model has one, or no HLC."""
        model = self.source_model.model
        if {"hlc_k": model.mixes_keys, "hlc_v": model.mixes_values}.get(module, True):
            return None
        return torch.eye(model.num_key_value_heads)

    def _projection(self, *, layer: int, side: str, parameter: str) -> torch.Tensor:
        composites = self.source_model.composite_projection(layer, side)
        projection = self._virtual_heads(layer, side).selection @ composites
        if parameter == "bias":
            return projection[:, -1]
        return projection[:, : self.model.hidden_size]

    def _rotated_queries(self, projection: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
        """Multiplies each query head by the T^T of its key head, since q . T k = T^T q . k.

        Args:
            projection: `q_proj` (H d, hidden), or its bias (H d,).
            rotations: (h, d, d)
        """
        heads = projection.view(len(rotations), -1, self.model.head_dim, *projection.shape[1:])
        return torch.einsum("hab,hqa...->hqb...", rotations, heads).reshape(projection.shape)

    def _rotated_outputs(self, *, layer: int, projection: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
        """W_O diag(gains) T, with the gains of the head norm.

        Args:
            projection: `o_proj`, W_O (hidden, H d).
            rotations: T of each value head (h, d, d).
        """
        heads = projection.view(len(projection), len(rotations), -1, self.model.head_dim)
        if self.model.has_head_norm and self.model.head_norm_affine:
            heads = heads * self.source_model.read(f"model.layers.{layer}.self_attn.head_norm.weight").double()
        return torch.einsum("ohqa,hab->ohqb", heads, rotations).reshape(projection.shape)


def with_one_layer_changed(factoriser: Factoriser) -> Callable[[tuple[int, int]], CompressedModel]:
    """Gives the model in which a layer, counted from 0, has that number of component heads."""

    def change_layer(change: tuple[int, int]) -> CompressedModel:
        heads = list(factoriser.source_model.model.component_heads)
        heads[change[0]] = change[1]
        return CompressedModel(source_model=factoriser.source_model, heads=heads, factoriser=factoriser)

    return change_layer


def compressible_layers(*, model: Model, name: str, heads: int, where: str) -> list[int]:
    """The layers (counted from 0) with more than `heads` component heads.

    Raises:
        UserError: there are none.
    """
    component_heads = model.component_heads
    layers = [layer for layer, before in enumerate(component_heads) if before > heads]
    if heads < 1 or not layers:
        allowed = (
            f"1 to {max(component_heads) - 1}"
            if max(component_heads) > 1
            else "a model with more than one component head"
        )
        raise UserError(where=where, got=heads, expected=f"{allowed}: {name} has {max(component_heads)} in a layer")
    return layers


def _compressed_settings(model: Model, heads: list[int]) -> Model:
    fields = model.model_dump(mode="json") | {
        "attention_variant": combining_variant(model.attention_variant),
        "num_component_heads": heads[0] if len(set(heads)) == 1 else heads,
        "hlc_mixes": "both",
    }
    return parse_model(fields)
