"""Splitting layers over pipeline stages: contiguous parts of the model, balanced by number of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mea.config.schema import Model
from megatron_mea.model.decoder import Decoder, StageLayers, single_layers


def pipeline_stages(config: Model, count: int) -> list[StageLayers]:
    """Splits the layers over `count` stages, at most num_hidden_layers; each goes to `Decoder(stage=...)`.

    Embedding and head stay with a block: DeepSpeed's gradient norm fails on a rank that holds no parameter it counts,
    such as a tensor rank other than the first with only a norm and a tied matrix.
    """
    embedding, *blocks, head = layer_sizes(config)
    blocks[0] += embedding
    blocks[-1] += head
    return [
        StageLayers(embedding=part.start == 0, blocks=part, head=part.stop == len(blocks))
        for part in balanced_partition(blocks, count)
    ]


def layer_sizes(config: Model) -> list[int]:
    """Number of parameters of every layer; a tied matrix counts twice, in the embedding and in the head."""
    with torch.device("meta"):
        layers = [Decoder(config, stage=layer) for layer in single_layers(config)]

    return [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]


def balanced_partition(sizes: Sequence[int], count: int) -> list[range]:
    """Splits a list into `count` contiguous, non-empty parts, so that the largest sum of a part is minimal.

    Among such partitions it takes one with a small sum of squares, so that the other parts are even too.
    """
    # best[end] = (largest part, sum of squares, parts) of the first `end` items; each round adds one part
    best = {end: (sum(sizes[:end]), sum(sizes[:end]) ** 2, [range(end)]) for end in range(1, len(sizes) + 1)}

    for _ in range(count - 1):
        longer = {}
        for end in range(1, len(sizes) + 1):
            candidates = []
            for start, (largest, squares, parts) in best.items():
                if start < end:
                    part = sum(sizes[start:end])
                    candidates.append((max(largest, part), squares + part**2, [*parts, range(start, end)]))

            if candidates:
                longer[end] = min(candidates, key=lambda candidate: candidate[:2])

        best = longer

    return best[len(sizes)][2]
