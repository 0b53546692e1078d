"""The compressed model: settings and named tensors, each made when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from megatron_mea.compression.align import align
from megatron_mea.compression.factorise import VirtualHeads, factorise
from megatron_mea.compression.origin import SIDES, Origin
from megatron_mea.config.load import parse_model
from megatron_mea.config.schema import Model
from megatron_mea.errors import UserError

VARIANTS = {"plain": "mea_no_norm", "plain_norm": "mea", "mea": "mea", "mea_no_norm": "mea_no_norm"}
"""Of the compressed model, by the original's."""
Moments = Mapping[tuple[int, str], torch.Tensor]
"""S = E[y y^T], (h d, h d), of the composite heads of a layer (counted from 0) and side."""

_ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.(\w+)\.(weight|bias)")


class Factoriser:
    """Virtual heads of a model's layers, made once each.

    Args:
        moments: of real tokens; None: those of white inputs, W W^T, as in the paper.
        aligned: turn heads towards one another first; the keys of a model with `qk_norm` stay as they are, since a
            norm with a gain for each feature follows.
    """

    def __init__(self, origin: Origin, moments: Moments | None, aligned: bool) -> None:
        self.origin, self.moments, self.aligned = origin, moments, aligned
        self._made: dict[tuple[int, str, int], VirtualHeads] = {}

    def heads(self, layer: int, side: str, rank: int) -> VirtualHeads:
        key = layer, side, rank
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]

    def lost(self, layer: int, rank: int) -> float:
        """The parts of keys and values that are lost, each of 1, together."""
        return sum(self.heads(layer, side, rank).lost for side in SIDES)

    def _make(self, layer: int, side: str, rank: int) -> VirtualHeads:
        model = self.origin.model
        if self.moments is None:
            rows = self.origin.composites(layer, side).flatten(0, 1)
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
        """A parameter by its name, in float32."""
        match = _ATTENTION.fullmatch(name)
        if match is None:
            return self.origin.read(name)
        layer, which, kind = int(match[1]), match[2], match[3]
        if not self.changed[layer]:
            return self._unchanged(layer, which, name)
        if which in ("k_proj", "v_proj"):
            return self._projection(layer, which[0], kind).float()
        if which in ("hlc_k", "hlc_v"):
            return self._virtual(layer, which[-1]).combination.float()
        if which == "q_proj" and (turns := self._virtual(layer, "k").turns) is not None:
            return self._turned_queries(self.origin.read(name).double(), turns).float()
        if which in ("o_proj", "head_norm") and (turns := self._virtual(layer, "v").turns) is not None:
            if which == "head_norm":
                # The gains are in `o_proj`, since they belong to features that are turned now.
                return torch.ones(self.model.head_dim)
            return self._turned_outputs(layer, self.origin.read(name).double(), turns).float()
        return self.origin.read(name)

    def _virtual(self, layer: int, side: str) -> VirtualHeads:
        return self.factoriser.heads(layer, side, self.heads[layer])

    def _unchanged(self, layer: int, which: str, name: str) -> torch.Tensor:
        side, model = which[-1], self.origin.model
        mixed = {"k": model.mixes_keys, "v": model.mixes_values}
        if which.startswith("hlc_") and not mixed[side]:
            return torch.eye(model.num_key_value_heads)
        return self.origin.read(name)

    def _projection(self, layer: int, side: str, kind: str) -> torch.Tensor:
        composites = self.origin.composites(layer, side).flatten(0, 1)
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


def compressible(origin: Origin, heads: int, where: str) -> list[int]:
    """The layers (counted from 0) with more component heads than that.

    Raises:
        UserError: none; or the variant has no key and value heads to combine.
    """
    check_variant(origin)
    had = origin.model.component_heads
    found = [layer for layer, before in enumerate(had) if before > heads]
    if heads < 1 or not found:
        raise UserError(where, heads, f"1 to {max(had) - 1}: {origin.folder} has {max(had)} component heads a layer")
    return found


def check_variant(origin: Origin) -> None:
    variant = origin.model.attention_variant
    if variant not in VARIANTS:
        raise UserError("MODEL", f"{origin.folder}, of the variant {variant}", f"one of {', '.join(VARIANTS)}")


def _settings(model: Model, heads: list[int]) -> Model:
    fields = model.model_dump(mode="json") | {
        "attention_variant": VARIANTS[model.attention_variant],
        "num_component_heads": heads[0] if len(set(heads)) == 1 else heads,
        "hlc_mixes": "both",
    }
    return parse_model(fields)
