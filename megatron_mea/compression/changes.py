"""Measures the costs of compressing single layers: passes over a model's layers, of which one is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class ChangedStates:
    """The last hidden states of a batch with one layer changed, for every change, and those of the unchanged model.

    Attributes:
        head: the layer that gives logits.
        hidden: (batch, seq, hidden), behind the final norm, by change; by None of the unchanged model.
        targets: (batch, seq)
    """

    head: Decoder
    hidden: dict[Change | None, torch.Tensor]
    targets: torch.Tensor

    @torch.no_grad()
    def losses(self) -> dict[Change | None, float]:
        """The summed cross-entropy (nats) by change, and by None of the unchanged model."""
        losses: dict[Change | None, float] = dict.fromkeys(self.hidden, 0.0)
        for rows in self._chunks():
            for change, hidden_states in self.hidden.items():
                losses[change] += self.head.loss(hidden_states[rows], self.targets[rows]).item()

        return losses

    @torch.no_grad()
    def divergences(self) -> dict[Change, float]:
        """The summed KL(unchanged || changed) of the predictions (nats) by change.

        It needs far fewer tokens than the difference of two cross-entropies, which has the noise of the text in it and
        is below it for a single layer.
        """
        divergences = dict.fromkeys((change for change in self.hidden if change is not None), 0.0)
        for rows in self._chunks():
            unchanged, targets = self._logits(self.hidden[None][rows]), self.targets[rows].flatten()
            for change in divergences:
                changed = self._logits(self.hidden[change][rows])
                total = kl_divergence_sum(changed, unchanged, targets, temperature=1.0, tp=NO_TP)
                divergences[change] += total.item()

        return divergences

    def _chunks(self) -> Iterator[slice]:
        """Windows of which the logits are in memory at once."""
        count = max(_MAX_LOGITS // (self.head.config.vocab_size * self.targets.shape[1]), 1)
        return (slice(start, start + count) for start in range(0, len(self.targets), count))

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # shape: (batch, seq, vocabulary) -> (tokens, vocabulary)
        return self.head.logits(hidden_states).float().flatten(0, 1)


@torch.no_grad()
def forward_changes(
    *,
    source_model: LayeredModel,
    change_layer: ChangeLayer | None = None,
    changes: Sequence[Change] = (),
    batch: Batch,
    document_mask: bool,
    progress: object = None,
) -> ChangedStates:
    """Runs a batch through the model, and through the model with each of the changes.

    One pass over the layers, of which one is in memory: the hidden states before a changed layer are those of the
    unchanged model, and behind it every change has its own.

    Args:
        progress: a progress bar, which is moved by one with every layer.
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

    head = load(source_model, head_layer)
    for change, hidden_states in hidden.items():
        hidden[change] = head.forward_hidden(hidden_states, positions)

    return ChangedStates(head=head, hidden=hidden, targets=torch.from_numpy(batch.targets).to(device))
