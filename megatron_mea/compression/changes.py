"""Measures the costs of compressing single layers: passes over a model's layers, of which one is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from megatron_mea.compression.calibrate import window_length
from megatron_mea.compression.source_model import SourceModel
from megatron_mea.config.schema import Model
from megatron_mea.data.corpora import Batch
from megatron_mea.model.decoder import Decoder, StageLayers, single_layers
from megatron_mea.model.layerwise import load_layer
from megatron_mea.parallel.grid import NO_TP
from megatron_mea.parallel.layers import kl_divergence_sum

Change = tuple[int, int]
"""A layer, counted from 0, and the size that it gets, such as a number of component heads."""
_MAX_LOGITS, _MAX_HIDDEN_BYTES, _MAX_BATCH_SIZE = 1 << 26, 1 << 31, 8


class LayeredModel(Protocol):
    """Settings and named tensors of a model."""

    model: Model

    def read(self, name: str) -> torch.Tensor:
        """A full parameter in float32."""
        ...


ChangeLayer = Callable[[Change], LayeredModel]
"""Gives the model in which one layer is changed."""


def plan_passes(source_model: SourceModel, changes: Sequence[Change]) -> tuple[int, list[Sequence[Change]]]:
    """Windows per pass over the layers, and the changes of each pass, so that all hidden states fit in 2 GB."""
    hidden_bytes = 4 * source_model.model.hidden_size * window_length(source_model)
    max_changes = max(_MAX_HIDDEN_BYTES // hidden_bytes - 1, 1)
    batch_size = min(max(_MAX_HIDDEN_BYTES // (hidden_bytes * (len(changes) + 1)), 1), _MAX_BATCH_SIZE)
    return batch_size, [changes[start : start + max_changes] for start in range(0, max(len(changes), 1), max_changes)]


@torch.no_grad()
def losses_of_changes(
    *,
    source_model: LayeredModel,
    change_layer: ChangeLayer | None = None,
    changes: Sequence[Change] = (),
    batch: Batch,
    document_mask: bool,
    progress: object = None,
) -> dict[Change | None, float]:
    """The summed cross-entropy (nats) of a batch by change, and by None for the unchanged model.

    Args:
        progress: a progress bar, which is moved by one with every layer.
    """
    head, hidden = _forward_changes(
        source_model=source_model,
        change_layer=change_layer,
        changes=changes,
        batch=batch,
        document_mask=document_mask,
        progress=progress,
    )
    targets = torch.from_numpy(batch.targets).to(hidden[None].device)
    rows = _rows_at_once(head, targets)
    return {
        change: sum(
            head.loss(head.forward_hidden(chunk, targets), chunk_targets).item()
            for chunk, chunk_targets in zip(hidden_states.split(rows), targets.split(rows), strict=True)
        )
        for change, hidden_states in hidden.items()
    }


@torch.no_grad()
def divergences_of_changes(
    *,
    source_model: LayeredModel,
    change_layer: ChangeLayer,
    changes: Sequence[Change],
    batch: Batch,
    document_mask: bool,
    progress: object = None,
) -> dict[Change, float]:
    """Sum over the tokens of a batch of KL(unchanged || changed) of the predictions (nats), by change.

    It needs far fewer tokens than the difference of two cross-entropies, which has the noise of the text in it and is
    below it for a single layer.

    Args:
        progress: a progress bar, which is moved by one with every layer.
    """
    head, hidden = _forward_changes(
        source_model=source_model,
        change_layer=change_layer,
        changes=changes,
        batch=batch,
        document_mask=document_mask,
        progress=progress,
    )
    targets = torch.from_numpy(batch.targets).to(hidden[None].device)

    def logits(hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
        for chunk in hidden_states.split(_rows_at_once(head, targets)):
            yield head.logits(head.forward_hidden(chunk, targets)).float().flatten(0, 1)

    totals = dict.fromkeys(changes, 0.0)
    for index, (unchanged, chunk) in enumerate(
        zip(logits(hidden.pop(None)), targets.split(_rows_at_once(head, targets)), strict=True)
    ):
        for change, hidden_states in hidden.items():
            rows = hidden_states.split(_rows_at_once(head, targets))[index]
            changed = head.logits(head.forward_hidden(rows, targets)).float().flatten(0, 1)
            totals[change] += kl_divergence_sum(changed, unchanged, chunk.flatten(), temperature=1.0, tp=NO_TP).item()

    return totals


def _rows_at_once(head: Decoder, targets: torch.Tensor) -> int:
    """Windows of which the logits are in memory at once."""
    return max(_MAX_LOGITS // (head.config.vocab_size * targets.shape[1]), 1)


def _forward_changes(
    *,
    source_model: LayeredModel,
    change_layer: ChangeLayer | None,
    changes: Sequence[Change],
    batch: Batch,
    document_mask: bool,
    progress: object,
) -> tuple[Decoder, dict[Change | None, torch.Tensor]]:
    """The model's head, and the hidden states (batch, seq, hidden) before it, by change and unchanged.

    One pass over the layers, of which one is in memory: the hidden states before a changed layer are those of the
    unchanged model, and behind it every change has its own.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    positions = torch.from_numpy(batch.position_ids).to(device)

    def load(model: LayeredModel, layer: StageLayers) -> Decoder:
        return load_layer(config=model.model, layer=layer, read=model.read, document_mask=document_mask).to(device)

    *layers, head_layer = single_layers(source_model.model)
    hidden: dict[Change | None, torch.Tensor] = {None: torch.from_numpy(batch.input_ids).to(device)}
    decoder = None
    for layer in layers:
        # Freed before the next layer takes its memory.
        del decoder
        decoder = load(source_model, layer)
        layer_input = hidden[None]
        for change, hidden_states in hidden.items():
            hidden[change] = decoder.forward_hidden(hidden_states, positions)

        for change in changes:
            if change[0] in layer.blocks:
                hidden[change] = load(change_layer(change), layer).forward_hidden(layer_input, positions)

        if progress is not None:
            progress.update()

    return load(source_model, head_layer), hidden
