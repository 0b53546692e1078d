"""Talking-Heads attention (arXiv 2003.02436; MEA paper eq. 7-9): heads exchange logits and weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from megatron_mea.parallel.parameter import declare


class TalkingHeads(nn.Module):
    """L_j = sum_i logits_mix[i, j] S_i, A_j = softmax(L_j), B_j = sum_i weights_mix[i, j] A_i; both (H, H), the
    identity at the start.

    A weight of one head needs the logits of all: no kernel that does without the matrices of scores can compute it, and
    a tensor group cannot share it.
    """

    def __init__(self, name: str, num_heads: int) -> None:
        super().__init__()
        self.mixes = nn.ParameterList(
            declare(f"{name}.{which}.weight", (num_heads, num_heads), "hlc", lambda shape, _: torch.eye(shape[0]))
            for which in ("logits_mix", "weights_mix")
        )

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attend: Callable) -> torch.Tensor:
        """(batch, H, seq, d), (batch, h, seq, d), (batch, h, seq, d) -> (batch, H, seq, d), by `talking`."""
        return attend(query, key, value, *self.mixes)


def talking(visible: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Attention of talking heads to what is `visible`, (batch or 1, 1, seq, seq)."""
    return partial(_talk, visible)


def _talk(
    visible: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    logits_mix: torch.Tensor,
    weights_mix: torch.Tensor,
) -> torch.Tensor:
    batch, heads, seq, dim = query.shape
    groups = key.shape[1]
    # shape: (batch, h, H / h seq, d) @ (batch, h, d, seq) -> (batch, H, seq, seq)
    logits = (query.reshape(batch, groups, -1, dim) @ key.transpose(2, 3)).view(batch, heads, seq, seq)
    mixed = _mix(logits / math.sqrt(dim), logits_mix).masked_fill(~visible, -math.inf)
    accurate = torch.promote_types(mixed.dtype, torch.float32)
    weights = _mix(mixed.softmax(-1, dtype=accurate).to(value.dtype), weights_mix)
    # shape: (batch, h, H / h seq, seq) @ (batch, h, seq, d) -> (batch, H, seq, d)
    return (weights.view(batch, groups, -1, seq) @ value).view(batch, heads, seq, dim)


def _mix(scores: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """(batch, H, seq, seq), (H, H) -> (batch, H, seq, seq)"""
    # Not by broadcasting, which would keep a transposed copy of the scores for the backward pass.
    # shape: (batch, H, H) @ (batch, H, seq seq) -> (batch, H, seq seq)
    return (mix.t().expand(len(scores), -1, -1) @ scores.flatten(2)).view_as(scores)
