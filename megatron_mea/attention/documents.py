"""Attention inside documents: causal, and never across a border of documents that share a window.

The position ids say it all: a document begins where they are zero. On a CPU each document is attended to by itself,
which was measured at half the time of a masked whole (forward and backward). On a GPU it is FlexAttention, whose mask
is made of blocks and from position ids alone, so that nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, H, seq, d), (batch, h, seq, d), (batch, h, seq, d) -> (batch, H, seq, d), where h divides H."""


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Every token attends to itself and to all before it: an `Attend`."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


def visible_tokens(position_ids: torch.Tensor, document_mask: bool) -> torch.Tensor:
    """Which tokens each one attends to, where scores are made explicitly: (batch or 1, 1, seq, seq), true or false."""
    seq = position_ids.shape[1]
    mask = torch.ones(seq, seq, dtype=torch.bool, device=position_ids.device).tril()[None, None]
    if not document_mask:
        return mask
    document = (position_ids == 0).cumsum(1)
    return mask & (document[:, None, :, None] == document[:, None, None, :])


def within_documents(position_ids: torch.Tensor) -> Attend:
    """Attention for windows whose documents begin where `position_ids` (batch, seq) are zero."""
    return _blocks(position_ids, compiled=True) if position_ids.is_cuda else OneByOne(position_ids)


class OneByOne:
    """An `Attend`, a document after the other."""

    def __init__(self, position_ids: torch.Tensor) -> None:
        seq = position_ids.shape[1]
        self._spans = []
        for row in position_ids:
            starts = (row == 0).nonzero().flatten().tolist()
            # A window may begin inside a document.
            starts = starts if starts[:1] == [0] else [0, *starts]
            self._spans.append(list(zip(starts, [*starts[1:], seq], strict=True)))

    # Documents of other lengths would be another graph.
    @torch.compiler.disable
    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows = []
        for row, documents in enumerate(self._spans):
            one = slice(row, row + 1)
            parts = [causal(*(x[one, :, start:stop] for x in (query, key, value))) for start, stop in documents]
            rows.append(torch.cat(parts, dim=2))
        return torch.cat(rows)


def _blocks(position_ids: torch.Tensor, compiled: bool) -> Attend:
    """As `OneByOne`, by FlexAttention; not compiled it is for tests alone."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, seq = position_ids.shape
    document = (position_ids == 0).cumsum(1)

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (document[b, q] == document[b, k])

    # Without compilation the mask of blocks is made by way of a dense one.
    mask = create_block_mask(visible, batch, None, seq, seq, device=position_ids.device, _compile=compiled)
    flex = _compiled_flex_attention() if compiled else flex_attention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return flex(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])

    return attend


@cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
