"""Causal attention, and inside documents: never across a border of documents that share a window.

A document begins where position ids are zero. On a CPU there is one call of attention per document, which was measured
at half the time of one masked call for the window (forward and backward). On a GPU it is FlexAttention, with a block
mask computed from position ids on the device, so that nothing waits for the host.

Over a context group queries are those of this rank's tokens, and keys and values those of all tokens: FlexAttention on
a GPU, with documents and without, whose block mask compiles; torch's own bias for the last queries does not, and takes
queries x keys in float32 on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import accumulate

import torch

from megatron_mea.attention.causal import causal_attention
from megatron_mea.parallel.grid import NO_CP, ContextGroup

AttentionFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""query (batch, H, seq / c, d), key and value (batch, h, seq, d) -> (batch, H, seq / c, d), where h divides H."""


def visible_tokens_mask(position_ids: torch.Tensor, *, document_mask: bool, cp: ContextGroup = NO_CP) -> torch.Tensor:
    """Boolean mask (batch or 1, 1, query, key) of visible tokens: causal, and inside documents if `document_mask`."""
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    mask = (cp.shard(index, dim=0)[:, None] >= index)[None, None]
    if document_mask:
        document = (position_ids == 0).cumsum(1)
        mask = mask & (cp.shard(document, dim=1)[:, None, :, None] == document[:, None, None, :])

    return mask


def visible_pairs(position_ids: torch.Tensor, *, document_mask: bool, cp_size: int) -> torch.Tensor:
    """Pairs of a query and a key that it sees, the work of attention: (batch, seq) -> (cp_size, batch)

    By rank of a context group of `cp_size`, for its queries, and sequence.
    """
    seq = position_ids.shape[1]
    index = torch.arange(seq, device=position_ids.device).expand_as(position_ids)
    starts = torch.where(position_ids == 0, index, 0).cummax(1).values if document_mask else 0
    visible_keys = index - starts + 1
    chunks = [ContextGroup(size=cp_size, rank=rank).chunks(seq) for rank in range(cp_size)]
    return torch.stack([sum(visible_keys[:, chunk].sum(1) for chunk in rank_chunks) for rank_chunks in chunks])


def attention_function(position_ids: torch.Tensor, *, document_mask: bool, cp: ContextGroup = NO_CP) -> AttentionFn:
    """Causal attention, with `document_mask` inside documents, which begin where `position_ids` (batch, seq) are 0."""
    if position_ids.is_cuda and (document_mask or cp.size > 1):
        return _flex_attention(position_ids, document_mask=document_mask, cp=cp, compiled=True)
    if document_mask:
        return PerDocumentAttention(position_ids, cp)

    return causal_attention if cp.size == 1 else partial(_chunked_causal_attention, cp=cp)


def _chunked_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, cp: ContextGroup
) -> torch.Tensor:
    """An `AttentionFn` with a call for each chunk of this rank's queries."""
    chunks = cp.chunks(key.shape[2])
    outputs = [
        causal_attention(chunk_query, key[:, :, : chunk.stop], value[:, :, : chunk.stop])
        for chunk_query, chunk in zip(query.chunk(len(chunks), dim=2), chunks, strict=True)
    ]
    return torch.cat(outputs, dim=2)


class PerDocumentAttention:
    """An `AttentionFn` that calls `causal_attention` for one document after the other.

    Over a context group there is a call for each document in each of this rank's chunks, whose keys are those of the
    document up to the end of the chunk.
    """

    def __init__(self, position_ids: torch.Tensor, cp: ContextGroup = NO_CP) -> None:
        seq = position_ids.shape[1]
        chunks = cp.chunks(seq)
        # Where each chunk lies among this rank's tokens.
        offsets = list(accumulate((chunk.stop - chunk.start for chunk in chunks), initial=0))
        self._calls: list[list[tuple[slice, slice]]] = []
        for row in position_ids:
            starts = (row == 0).nonzero().flatten().tolist()
            # A window may begin inside a document.
            starts = starts if starts[:1] == [0] else [0, *starts]
            calls = []
            for chunk, offset in zip(chunks, offsets, strict=False):
                for start, stop in zip(starts, [*starts[1:], seq], strict=True):
                    first, last = max(start, chunk.start), min(stop, chunk.stop)
                    if first < last:
                        queries = slice(offset + first - chunk.start, offset + last - chunk.start)
                        calls.append((queries, slice(start, last)))

            self._calls.append(calls)

    # Compiled, every set of document lengths would be another graph.
    @torch.compiler.disable
    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        outputs = []
        for row, calls in enumerate(self._calls):
            q, k, v = (heads[row : row + 1] for heads in (query, key, value))
            document_outputs = [
                causal_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys]) for queries, keys in calls
            ]
            outputs.append(torch.cat(document_outputs, dim=2))

        return torch.cat(outputs)


def _flex_attention(
    position_ids: torch.Tensor, *, document_mask: bool, cp: ContextGroup = NO_CP, compiled: bool
) -> AttentionFn:
    """The same attention as one FlexAttention call; uncompiled only in tests."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, seq = position_ids.shape
    document = (position_ids == 0).cumsum(1)
    # Tensors, so that no rank or window compiles another kernel.
    query_positions = cp.shard(torch.arange(seq, device=position_ids.device), dim=0)

    def visible(  # noqa: PLR0917 - torch passes by position
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        if cp.size > 1:
            q = query_positions[q]
        is_earlier = q >= k
        return is_earlier & (document[b, q] == document[b, k]) if document_mask else is_earlier

    # Without compilation the block mask is computed from a dense one.
    mask = create_block_mask(
        visible,
        batch if document_mask else None,
        None,
        len(query_positions),
        seq,
        device=position_ids.device,
        _compile=compiled,
    )
    flex = _compiled_flex_attention() if compiled else flex_attention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return flex(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])

    return attend


@cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
