"""What a model's heads put out on real tokens: a pass over its layers, one of them in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_mea.compression.origin import SIDES, Origin
from megatron_mea.compression.virtual import Moments
from megatron_mea.data.corpora import Batch
from megatron_mea.data.windows import Windows, open_windows
from megatron_mea.model.decoder import Decoder
from megatron_mea.model.layerwise import one_layer
from megatron_mea.progress import progress_bar

TOKENS = 16_384
"""That a calibration looks at: the moments of a few hundred outputs are known well from far fewer."""
_BATCH = 4


def open_data(origin: Origin, path: str, where: str, batch: int = _BATCH, tokens: int = 0) -> Windows:
    """Windows as long as in training, documents masked as in training; as `evaluate` takes them.

    Raises:
        UserError: the data cannot be read, or is not of this model's vocabulary.
    """
    mask = origin.source.config.data.document_mask
    return open_windows([path], where, window_of(origin), batch, origin.model.vocab_size, mask, tokens)


def window_of(origin: Origin) -> int:
    """Tokens that the model sees at once, as it did in training."""
    return origin.source.config.data.seq_length


@torch.no_grad()
def head_moments(origin: Origin, windows: Windows, layers: set[int]) -> Moments:
    """E[y y^T] of the composite heads' outputs of those layers (counted from 0), in float64."""
    moments = {}
    last = max(layers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden = [x.cpu() for _, x in embedded(origin, windows, device)]
    for index in progress_bar(range(last + 1), desc="calibrate", unit="layer"):
        layer = one_layer(origin.model, index + 1, origin.read, document_mask=windows.document_mask).to(device)
        sums = {}
        if index in layers:
            sums = _observe(origin, index, layer, device)
        for place, batch in enumerate(windows):
            positions = torch.from_numpy(batch.position_ids).to(device)
            hidden[place] = layer.run(hidden[place].to(device), positions).cpu()
        count = sum(x.shape[0] * x.shape[1] for x in hidden)
        moments |= {(index, side): total.cpu() / count for side, total in sums.items()}
    return moments


def embedded(origin: Origin, windows: Windows, device: torch.device) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Every batch and its hidden states (batch, seq, hidden) before the first block."""
    embedding = one_layer(origin.model, 0, origin.read).to(device)
    for batch in windows:
        positions = torch.from_numpy(batch.position_ids).to(device)
        yield batch, embedding.run(torch.from_numpy(batch.input_ids).to(device), positions)


def _observe(origin: Origin, index: int, layer: Decoder, device: torch.device) -> dict[str, torch.Tensor]:
    """Sums over the tokens of y y^T by side, which grow when the layer runs."""
    attention = layer.layers[0].self_attn
    sums = {}
    for side in SIDES:
        rows = origin.composites(index, side)
        sums[side] = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
        weight = rows[:, : origin.model.hidden_size].float().to(device)
        bias = rows[:, -1].float().to(device) if origin.model.attention_bias else None

        def see(_: torch.nn.Module, inputs: tuple, total=sums[side], weight=weight, bias=bias) -> None:
            outputs = torch.nn.functional.linear(inputs[0], weight, bias).flatten(0, 1).double()
            total += outputs.mT @ outputs

        attention.register_forward_pre_hook(see)
    return sums
