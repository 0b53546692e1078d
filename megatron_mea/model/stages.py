"""Which layers each pipeline stage holds: contiguous parts of the decoder's flat list, balanced by parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mea.config.schema import Model
from megatron_mea.model.decoder import Decoder


def pipeline_stages(config: Model, count: int) -> list[range]:
    """The layers of each of `count` stages, for `Decoder(stage=...)`; at most num_hidden_layers of them.

    Embedding and head stay with a block: DeepSpeed's norm fails on a rank none of whose parameters it counts, such as a
    later tensor rank with a norm and a tied matrix alone.
    """
    embedding, *blocks, head = layer_sizes(config)
    blocks[0] += embedding
    blocks[-1] += head
    last = len(blocks) + 1
    parts = balance(blocks, count)
    return [
        range(part.start + 1 if part.start else 0, last + 1 if part.stop == len(blocks) else part.stop + 1)
        for part in parts
    ]


def layer_sizes(config: Model) -> list[int]:
    """Number of parameters of every layer; a tied matrix counts at both ends, which hold a copy each."""
    with torch.device("meta"):
        layers = Decoder(config).layers
    return [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]


def balance(sizes: Sequence[int], count: int) -> list[range]:
    """Cuts a list into `count` parts, none of them empty, so that the largest part is as small as can be.

    Among such cuts it takes one with a small sum of squares, so that the other parts are even too.
    """
    # best[end] = (largest part, sum of squares, parts) for the first `end` items, of one part more in each round
    best = {end: (sum(sizes[:end]), sum(sizes[:end]) ** 2, [range(end)]) for end in range(1, len(sizes) + 1)}
    for _ in range(count - 1):
        longer = {}
        for end in range(1, len(sizes) + 1):
            candidates = []
            for start, (largest, squares, parts) in best.items():
                if start < end:
                    part = sum(sizes[start:end])
                    cut = [*parts, range(start, end)]
                    candidates.append((max(largest, part), squares + part**2, cut))
            if candidates:
                longer[end] = min(candidates, key=lambda candidate: candidate[:2])
        best = longer
    return best[len(sizes)][2]
