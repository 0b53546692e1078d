"""Attention inside documents: causal, and never across a border of documents that share a window.

A document begins where position ids are zero. On a CPU there is one call of attention per document, which was measured
at half the time of one masked call for the window (forward and backward). On a GPU it is FlexAttention, with a block
mask computed from position ids on the device, so that nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

AttentionFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""query (batch, H, seq, d), key and value (batch, h, seq, d) -> (batch, H, seq, d), where h divides H."""


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of every token to itself and to all tokens before it; an `AttentionFn`."""
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_grouped)


def visible_tokens_mask(position_ids: torch.Tensor, *, document_mask: bool) -> torch.Tensor:
    """Boolean mask (batch or 1, 1, query, key) of visible tokens: causal, and inside documents if `document_mask`."""
    seq = position_ids.shape[1]
    mask = torch.ones(seq, seq, dtype=torch.bool, device=position_ids.device).tril()[None, None]
    if not document_mask:
        return mask

    document = (position_ids == 0).cumsum(1)
    return mask & (document[:, None, :, None] == document[:, None, None, :])


def document_attention(position_ids: torch.Tensor) -> AttentionFn:
    """Causal attention inside documents, which begin where `position_ids` (batch, seq) are zero."""
    return (
        _flex_document_attention(position_ids, compiled=True)
        if position_ids.is_cuda
        else PerDocumentAttention(position_ids)
    )


class PerDocumentAttention:
    """An `AttentionFn` that calls `causal_attention` for one document after the other."""

    def __init__(self, position_ids: torch.Tensor) -> None:
        seq = position_ids.shape[1]
        self._document_bounds = []
        for row in position_ids:
            starts = (row == 0).nonzero().flatten().tolist()
            # A window may begin inside a document.
            starts = starts if starts[:1] == [0] else [0, *starts]
            self._document_bounds.append(list(zip(starts, [*starts[1:], seq], strict=True)))

    # Compiled, every set of document lengths would be another graph.
    @torch.compiler.disable
    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        outputs = []
        for row, documents in enumerate(self._document_bounds):
            q, k, v = (heads[row : row + 1] for heads in (query, key, value))
            document_outputs = [
                causal_attention(q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop])
                for start, stop in documents
            ]
            outputs.append(torch.cat(document_outputs, dim=2))

        return torch.cat(outputs)


def _flex_document_attention(position_ids: torch.Tensor, *, compiled: bool) -> AttentionFn:
    """The attention of `PerDocumentAttention` as one FlexAttention call; uncompiled only in tests."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, seq = position_ids.shape
    document = (position_ids == 0).cumsum(1)

    def visible(  # noqa: PLR0917 - torch passes by position
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        return (q >= k) & (document[b, q] == document[b, k])

    # Without compilation the block mask is computed from a dense one.
    mask = create_block_mask(visible, batch, None, seq, seq, device=position_ids.device, _compile=compiled)
    flex = _compiled_flex_attention() if compiled else flex_attention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return flex(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])

    return attend


@cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
