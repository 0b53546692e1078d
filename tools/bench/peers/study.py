"""What the peers ask of the source model: moments of layers' inputs, Fisher information, and the loss with theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_mea.attention.document_mask import attention_function
from megatron_mea.compression.calibrate import embed_windows
from megatron_mea.compression.source_model import SourceModel
from megatron_mea.data.corpora import IGNORE_INDEX, Batch
from megatron_mea.data.windows import Windows
from megatron_mea.exported.rotary_mea import rotary_cos_sin
from megatron_mea.model.decoder import HEAD, Decoder, StageLayers
from megatron_mea.model.layerwise import load_layer
from megatron_mea.progress import progress_bar

from .layers import PeerAttention, PeerLayer, with_bias_column


@torch.no_grad()
def input_moments(*, source_model: SourceModel, windows: Windows) -> list[torch.Tensor]:
    """E[x x^T], (D, D) in float64, of the inputs of each layer's projections; D has a 1 where there are biases."""
    model, moments = source_model.model, []
    states = list(_embedded(source_model, windows))
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

    In memory are one layer, and the hidden states of all tokens before each layer.

    Returns:
        of keys and of values, by layer: k, v, k, v, ...
    """
    states = [[hidden.detach() for _, hidden in _embedded(source_model, windows)]]
    positions = [torch.from_numpy(batch.position_ids) for batch in windows]
    layers = range(source_model.model.num_hidden_layers)
    for index in progress_bar(layers, desc="fisher, forward", unit="layer"):
        decoder = _load_block(source_model, index, windows)
        with torch.no_grad():
            states.append([decoder.forward_hidden(*of) for of in zip(states[-1], positions, strict=True)])

    head, gradients = load_layer(config=source_model.model, layer=HEAD, read=source_model.read), []
    for hidden, position, batch in zip(states.pop(), positions, windows, strict=True):
        targets = torch.from_numpy(batch.targets)
        hidden.requires_grad_()
        loss = head.loss(head.forward_hidden(hidden, position), targets) / (targets != IGNORE_INDEX).sum()
        gradients.extend(torch.autograd.grad(loss, hidden))

    information: list[float] = []
    for index in progress_bar(reversed(layers), desc="fisher, backward", unit="layer", total=len(layers)):
        decoder = _load_block(source_model, index, windows)
        attention = decoder.blocks[0].self_attn
        weights = [attention.key_projection.weight, attention.value_projection.weight]
        squares = [torch.zeros_like(weight.requires_grad_()) for weight in weights]
        for window, hidden in enumerate(states.pop()):
            hidden.requires_grad_()
            output = decoder.forward_hidden(hidden, positions[window])
            gradients[window], *of_weights = torch.autograd.grad(output, [hidden, *weights], gradients[window])
            for square, gradient in zip(squares, of_weights, strict=True):
                square += gradient.square()

        information = [(square / len(windows)).sqrt().mean().item() for square in squares] + information

    return information


@torch.no_grad()
def peer_cross_entropy(*, source_model: SourceModel, layers: Sequence[PeerLayer], windows: Windows) -> float:
    """Mean cross-entropy (nats a token) with a peer's keys and values in all layers, of which one is in memory."""
    states = list(_embedded(source_model, windows))
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


def _embedded(source_model: SourceModel, windows: Windows) -> Iterator[tuple[Batch, torch.Tensor]]:
    return embed_windows(source_model=source_model, windows=windows, device=torch.device("cpu"))


def _load_block(source_model: SourceModel, index: int, windows: Windows) -> Decoder:
    return load_layer(
        config=source_model.model,
        layer=StageLayers(blocks=range(index, index + 1)),
        read=source_model.read,
        document_mask=windows.document_mask,
    )
