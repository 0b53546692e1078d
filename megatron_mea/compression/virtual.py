"""The compressed model: settings and named tensors, each made when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from megatron_mea.compression.align import align
from megatron_mea.compression.factorise import VirtualHeads, factorise
from megatron_mea.compression.origin import SIDES, VARIANTS, Origin
from megatron_mea.config.load import parse_model
from megatron_mea.config.schema import Model
from megatron_mea.errors import UserError

Moments = Mapping[tuple[int, str], torch.Tensor]
"""S = E[y y^T], (h d, h d), of the composite heads of a layer (counted from 0) and side."""

_KEPT = 1 << 31
"""Bytes of them; a model of many key heads has more, and those of a layer are asked for one after the other."""
_ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.(\w+)\.(weight|bias)")


class Factoriser:
    """Virtual heads of a model's layers; those made last are kept.

    Args:
        moments: of real tokens; None: those of white inputs, W W^T, as in the paper.
        aligned: turn heads towards one another first; the keys of a model with `qk_norm` stay as they are, since a
            norm with a gain for each feature follows.
    """

    def __init__(self, origin: Origin, moments: Moments | None, aligned: bool) -> None:
        self.origin, self.moments, self.aligned = origin, moments, aligned
        self._made: dict[tuple[int, str, int], VirtualHeads] = {}
        self._lost: dict[tuple[int, str, int], float] = {}

    def heads(self, layer: int, side: str, rank: int) -> VirtualHeads:
        key = layer, side, rank
        if key not in self._made:
            made = self._made[key] = self._make(*key)
            self._lost[key] = made.lost
            while len(self._made) > 1 and sum(8 * one.selection.numel() for one in self._made.values()) > _KEPT:
                del self._made[next(iter(self._made))]
        return self._made[key]

    def lost(self, layer: int, rank: int) -> float:
        """The parts of keys and values that are lost, each of 1, together."""
        for side in SIDES:
            if (layer, side, rank) not in self._lost:
                self.heads(layer, side, rank)
        return sum(self._lost[layer, side, rank] for side in SIDES)

    def _make(self, layer: int, side: str, rank: int) -> VirtualHeads:
        model = self.origin.model
        if self.moments is None:
            rows = self.origin.composites(layer, side)
            moment = rows @ rows.T
        else:
            moment = self.moments[layer, side]
        normed = side == "k" and model.qk_norm
        if not self.aligned or normed:
            return factorise(moment, model.num_key_value_heads, rank, equal_heads=normed)
        turn = "rotary" if side == "k" else "orthogonal" if model.has_head_norm else "any"
        return align(moment, model.num_key_value_heads, rank, turn)


class Compressed:
    """
    Args:
        heads: component heads of every layer; a layer that keeps its number stays as it is.

    Attributes:
        model: the settings.
    """

    def __init__(self, origin: Origin, heads: Sequence[int], factoriser: Factoriser) -> None:
        self.origin, self.heads, self.factoriser = origin, list(heads), factoriser
        self.changed = [new != old for new, old in zip(heads, origin.model.component_heads, strict=True)]
        self.model = _settings(origin.model, self.heads)

    def read(self, name: str) -> torch.Tensor:
        """A parameter, whole and in float32."""
        found = self._made(name)
        return self.origin.read(name) if found is None else found.float()

    def read_piece(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        found = self._made(name)
        if found is None:
            return self.origin.read_piece(name, offsets, shape)
        return found[tuple(slice(at, at + size) for at, size in zip(offsets, shape, strict=True))].float()

    def _made(self, name: str) -> torch.Tensor | None:
        """A parameter that is not the original's; None where it is."""
        match = _ATTENTION.fullmatch(name)
        if match is None:
            return None
        layer, which, kind = int(match[1]), match[2], match[3]
        if not self.changed[layer]:
            return self._identity(which)
        if which in ("k_proj", "v_proj"):
            return self._projection(layer, which[0], kind)
        if which in ("hlc_k", "hlc_v"):
            return self._virtual(layer, which[-1]).combination
        if which == "q_proj" and (turns := self._virtual(layer, "k").turns) is not None:
            return self._turned_queries(self.origin.read(name).double(), turns)
        if which in ("o_proj", "head_norm") and (turns := self._virtual(layer, "v").turns) is not None:
            if which == "head_norm":
                # The gains are in `o_proj`, since they belong to features that are turned now.
                return torch.ones(self.model.head_dim)
            return self._turned_outputs(layer, self.origin.read(name).double(), turns)
        return None

    def _virtual(self, layer: int, side: str) -> VirtualHeads:
        return self.factoriser.heads(layer, side, self.heads[layer])

    def _identity(self, which: str) -> torch.Tensor | None:
        """What combines the heads of an unchanged layer, where nothing has."""
        model = self.origin.model
        if {"hlc_k": model.mixes_keys, "hlc_v": model.mixes_values}.get(which, True):
            return None
        return torch.eye(model.num_key_value_heads)

    def _projection(self, layer: int, side: str, kind: str) -> torch.Tensor:
        composites = self.origin.composites(layer, side)
        found = self._virtual(layer, side).selection @ composites
        if kind == "bias":
            return found[:, -1]
        return found[:, : self.model.hidden_size]

    def _turned_queries(self, projection: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """q . T k = T^T q . k, for the queries (H d, hidden) or their bias (H d,) of each key head"""
        heads = projection.view(len(turns), -1, self.model.head_dim, *projection.shape[1:])
        return torch.einsum("hab,hqa...->hqb...", turns, heads).reshape(projection.shape)

    def _turned_outputs(self, layer: int, projection: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """W_O diag(gains) T, of (hidden, H d)"""
        heads = projection.view(len(projection), len(turns), -1, self.model.head_dim)
        if self.model.has_head_norm and self.model.head_norm_affine:
            heads = heads * self.origin.read(f"model.layers.{layer}.self_attn.head_norm.weight").double()
        return torch.einsum("ohqa,hab->ohqb", heads, turns).reshape(projection.shape)


def compressible(model: Model, name: str, heads: int, where: str) -> list[int]:
    """The layers (counted from 0) with more component heads than that.

    Raises:
        UserError: there are none.
    """
    had = model.component_heads
    found = [layer for layer, before in enumerate(had) if before > heads]
    if heads < 1 or not found:
        allowed = f"1 to {max(had) - 1}" if max(had) > 1 else "a model with more than one component head"
        raise UserError(where, heads, f"{allowed}: {name} has {max(had)} in a layer")
    return found


def _settings(model: Model, heads: list[int]) -> Model:
    fields = model.model_dump(mode="json") | {
        "attention_variant": VARIANTS[model.attention_variant],
        "num_component_heads": heads[0] if len(set(heads)) == 1 else heads,
        "hlc_mixes": "both",
    }
    return parse_model(fields)
