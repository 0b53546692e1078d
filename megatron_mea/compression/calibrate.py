"""Second moments of a model's key and value heads on real tokens: a pass over its layers, one of them in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_mea.compression.compressed_model import HeadMoments
from megatron_mea.compression.source_model import SIDES, SourceModel
from megatron_mea.data.corpora import Batch
from megatron_mea.data.windows import Windows, open_windows
from megatron_mea.model.decoder import EMBEDDING, Decoder, StageLayers
from megatron_mea.model.layerwise import load_layer
from megatron_mea.printing import note
from megatron_mea.progress import progress_bar

CALIBRATION = "--calibration"
CALIBRATION_TOKENS = 16_384
"""Tokens that a calibration reads: the moments of a few hundred outputs are known well from far fewer."""
_BATCH_SIZE = 4


def calibration_windows(
    *, source_model: SourceModel, path: str, where: str, batch: int = _BATCH_SIZE, tokens: int = 0
) -> Windows:
    """Windows of a corpus as `evaluate` reads them: as long as in training, with documents masked as in training.

    Raises:
        UserError: the data cannot be read, or is not of this model's vocabulary.
    """
    mask = source_model.checkpoint.config.data.document_mask
    return open_windows(
        paths=[path],
        where=where,
        window=window_length(source_model),
        batch=batch,
        vocab_size=source_model.model.vocab_size,
        document_mask=mask,
        tokens=tokens,
    )


def warn_of_few_tokens(windows: Windows, path: str, *, outputs: int) -> None:
    """Warns where there are fewer calibration tokens than outputs of a layer's heads."""
    if windows.tokens < outputs:
        shortage = f"{path} has {windows.tokens} tokens for the {outputs} outputs of a layer's heads"
        note(f"warning: {shortage}: what it does not show is lost")


def window_length(source_model: SourceModel) -> int:
    """Tokens of a window: as many as in training."""
    return source_model.checkpoint.config.data.seq_length


@torch.no_grad()
def head_moments(*, source_model: SourceModel, windows: Windows, layers: set[int]) -> HeadMoments:
    """E[y y^T], (h d, h d) in float64, of the composite heads' outputs y, by layer (counted from 0) and side."""
    moments = {}
    last = max(layers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embedded = embed_windows(source_model=source_model, windows=windows, device=device)
    hidden = [hidden_states.cpu() for _, hidden_states in embedded]
    decoder = None
    for layer in progress_bar(range(last + 1), desc="calibrate", unit="layer"):
        # Freed before the next layer takes its memory.
        del decoder
        decoder = load_layer(
            config=source_model.model,
            layer=StageLayers(blocks=range(layer, layer + 1)),
            read=source_model.read,
            document_mask=windows.document_mask,
        ).to(device)

        sums = {}
        if layer in layers:
            sums = _watch_outputs(source_model=source_model, layer=layer, decoder=decoder, device=device)

        for index, batch in enumerate(windows):
            positions = torch.from_numpy(batch.position_ids).to(device)
            hidden[index] = decoder.forward_hidden(hidden[index].to(device), positions).cpu()

        count = sum(hidden_states.shape[0] * hidden_states.shape[1] for hidden_states in hidden)
        moments |= {(layer, side): total.cpu() / count for side, total in sums.items()}

    return moments


def embed_windows(
    *, source_model: SourceModel, windows: Windows, device: torch.device
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Yields every batch and its hidden states (batch, seq, hidden) before the first block."""
    embedding = load_layer(config=source_model.model, layer=EMBEDDING, read=source_model.read).to(device)
    for batch in windows:
        positions = torch.from_numpy(batch.position_ids).to(device)
        yield batch, embedding.forward_hidden(torch.from_numpy(batch.input_ids).to(device), positions)


def _watch_outputs(
    *, source_model: SourceModel, layer: int, decoder: Decoder, device: torch.device
) -> dict[str, torch.Tensor]:
    """Hooks a layer, so that it adds the sum over tokens of y y^T to the returned tensors, by side, when it runs."""
    attention = decoder.blocks[0].self_attn
    sums = {}
    for side in SIDES:
        composites = source_model.composite_projection(layer, side)
        sums[side] = torch.zeros(len(composites), len(composites), dtype=torch.float64, device=device)
        weight = composites[:, : source_model.model.hidden_size].float().to(device)
        bias = composites[:, -1].float().to(device) if source_model.model.attention_bias else None

        def accumulate(_: torch.nn.Module, inputs: tuple, *, total=sums[side], weight=weight, bias=bias) -> None:
            outputs = torch.nn.functional.linear(inputs[0], weight, bias).flatten(0, 1).double()
            total += outputs.mT @ outputs

        attention.register_forward_pre_hook(accumulate)

    return sums
