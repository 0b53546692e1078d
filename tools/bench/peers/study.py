"""What the peers ask of the source model: moments of layers' inputs, Fisher information, and the loss with theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mea.attention.document_mask import attention_function
from megatron_mea.compression.calibrate import embed_windows
from megatron_mea.compression.source_model import SourceModel
from megatron_mea.data.corpora import IGNORE_INDEX
from megatron_mea.data.windows import Windows
from megatron_mea.exported.rotary_mea import rotary_cos_sin
from megatron_mea.model.decoder import HEAD, StageLayers, all_layers
from megatron_mea.model.layerwise import load_layer
from megatron_mea.progress import progress_bar

from .layers import PeerAttention, PeerLayer, with_bias_column


@torch.no_grad()
def input_moments(*, source_model: SourceModel, windows: Windows) -> list[torch.Tensor]:
    """E[x x^T], (D, D) in float64, of the inputs of each layer's projections; D has a 1 where there are biases."""
    model, moments = source_model.model, []
    states = [(batch, hidden) for batch, hidden in _embedded(source_model, windows)]
    for index in progress_bar(range(model.num_hidden_layers), desc="moments", unit="layer"):
        decoder = _load_block(source_model, index, windows)
        width = model.hidden_size + int(model.attention_bias)
        total, count = torch.zeros(width, width, dtype=torch.float64), 0
        for position, (batch, hidden) in enumerate(states):
            normed = decoder.blocks[0].input_layernorm(hidden).flatten(0, 1)
            inputs = with_bias_column(normed, has_bias=model.attention_bias).double()
            total += inputs.mT @ inputs
            count += len(inputs)
            states[position] = batch, decoder.forward_hidden(hidden, torch.from_numpy(batch.position_ids))

        moments.append(total / count)

    return moments


def fisher_information(*, source_model: SourceModel, windows: Windows) -> list[float]:
    """Root of the mean square of the gradients of each batch's mean loss, averaged over the elements of a projection.

    The whole model is in memory, and its activations for a batch.

    Returns:
        of keys and of values, by layer: k, v, k, v, ...
    """
    decoder = load_layer(
        config=source_model.model,
        layer=all_layers(source_model.model),
        read=source_model.read,
        document_mask=windows.document_mask,
    )
    weights = [
        projection.weight.requires_grad_()
        for block in decoder.blocks
        for projection in (block.self_attn.key_projection, block.self_attn.value_projection)
    ]
    squares = [torch.zeros_like(weight) for weight in weights]
    for batch in progress_bar(windows, desc="fisher", unit="batch"):
        ids, positions, targets = map(torch.from_numpy, (batch.input_ids, batch.position_ids, batch.targets))
        loss = decoder(ids, positions, targets) / (targets != IGNORE_INDEX).sum()
        for square, gradient in zip(squares, torch.autograd.grad(loss, weights), strict=True):
            square += gradient.square()

    return [(square / len(windows)).sqrt().mean().item() for square in squares]


@torch.no_grad()
def peer_cross_entropy(*, source_model: SourceModel, layers: Sequence[PeerLayer], windows: Windows) -> float:
    """Mean cross-entropy (nats a token) with a peer's keys and values in all layers, of which one is in memory."""
    states = [(batch, hidden) for batch, hidden in _embedded(source_model, windows)]
    for index, layer in enumerate(progress_bar(layers, desc="loss", unit="layer")):
        (block,) = _load_block(source_model, index, windows).blocks
        block.self_attn = PeerAttention(block.self_attn, layer)
        for position, (batch, hidden) in enumerate(states):
            positions = torch.from_numpy(batch.position_ids)
            cos, sin = rotary_cos_sin(config=source_model.model, position_ids=positions, dtype=hidden.dtype)
            attend = attention_function(positions, document_mask=windows.document_mask)
            states[position] = batch, block(hidden, cos=cos[:, None], sin=sin[:, None], attend=attend)

    head, total, count = load_layer(config=source_model.model, layer=HEAD, read=source_model.read), 0.0, 0
    for batch, hidden in states:
        targets = torch.from_numpy(batch.targets)
        total += head.loss(head.forward_hidden(hidden, torch.from_numpy(batch.position_ids)), targets).item()
        count += int((targets != IGNORE_INDEX).sum())

    return total / count


def _embedded(source_model: SourceModel, windows: Windows):
    return embed_windows(source_model=source_model, windows=windows, device=torch.device("cpu"))


def _load_block(source_model: SourceModel, index: int, windows: Windows):
    return load_layer(
        config=source_model.model,
        layer=StageLayers(blocks=range(index, index + 1)),
        read=source_model.read,
        document_mask=windows.document_mask,
    )
