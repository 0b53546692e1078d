"""Statistics of all routers over a step: how often experts were chosen, and how balanced they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_mea.errors import UserError
from megatron_mea.model.decoder import Decoder
from megatron_mea.model.moe import MoE, Router


class RouterTotals:
    """Sums the statistics of all routers over ranks, micro-batches and pipeline stages.

    They are one vector, which the engine reduces with the losses of a step. Counts stay exact in float64.

    Args:
        model: this rank's part.
        sequences: of a global batch.
        device: of this rank.

    Attributes:
        layers: those that have experts, counted from 0.
        top_k: experts of a token.
        counts: (routed layers, experts) int64: how often each expert was chosen in the last step.
    """

    def __init__(self, model: Decoder, *, sequences: int, device: torch.device) -> None:
        config = model.config
        self.layers, self._num_experts, self._sequences = config.routed_layers, config.num_experts, sequences
        self.top_k = config.num_experts_per_tok
        self._tp_size, self._device = model.tp.size, device
        self._routers: dict[int, Router] = {
            int(layer): block.mlp.gate for layer, block in model.layers.items() if isinstance(block.mlp, MoE)
        }
        self.counts = torch.zeros(len(self.layers), self._num_experts, dtype=torch.int64)

    @property
    def size(self) -> int:
        """Elements of the vector; 0 for a dense model."""
        return len(self.layers) * (self._num_experts + 1)

    def pop_local(self) -> torch.Tensor:
        """This rank's statistics since the last call, (size,) float64; zero for layers of other stages."""
        rows = torch.zeros(len(self.layers), self._num_experts + 1, dtype=torch.float64, device=self._device)
        for row, layer in zip(rows, self.layers, strict=True):
            stats = self._routers[layer].stats if layer in self._routers else None
            if stats is not None and stats.counts is not None:
                row[:-1], row[-1] = stats.counts, stats.balance_loss
                stats.counts = stats.balance_loss = None

        return rows.flatten()

    def end_step(self, totals: torch.Tensor) -> torch.Tensor:
        """Takes the vector summed over all ranks, for the next step's balance loss too.

        Returns:
            (routed layers + 1,) what `fields` names, for the engine's one copy to the host; empty for a dense model.
        """
        if not self.layers:
            return totals

        # Every rank of a tensor group has routed the same tokens.
        rows = (totals / self._tp_size).view(len(self.layers), -1)
        self._set_counts(rows[:, :-1].round().long())
        load = rows[:, :-1].amax(1) / rows[:, :-1].mean(1)
        return torch.cat([load, rows[:, -1:].mean(0) / self._sequences])

    @staticmethod
    def fields(values: Sequence[float]) -> dict[str, float | list[float]]:
        """Names the values of `end_step`.

        Returns:
            `balance_loss`, the mean of the layers, 1 where experts are balanced, and `expert_load`, the tokens of the
            fullest expert over the mean, for each routed layer; empty for a dense model.
        """
        *load_by_layer, balance_loss = values or [0.0]
        return {"balance_loss": balance_loss, "expert_load": load_by_layer} if load_by_layer else {}

    def state(self) -> dict[str, list[int]]:
        """The counts of the last step by layer, as meta.json holds them; empty for a dense model."""
        return {str(layer): counts for layer, counts in zip(self.layers, self.counts.tolist(), strict=True)}

    def load_state(self, state: Mapping[str, list[int]]) -> None:
        """Restores what `state` returned; of a dense model nothing.

        Raises:
            UserError: it is that of another model.
        """
        rows = [state.get(str(layer), []) for layer in self.layers]
        if any(len(row) != self._num_experts or min(row) < 0 or not 0 < sum(row) < 1 << 62 for row in rows):
            expected = f"{self._num_experts} counts for each of the layers {', '.join(map(str, self.layers))}"
            raise UserError(
                where="meta.json, expert_counts", got=f"those of layers {', '.join(state)}", expected=expected
            )
        if rows:
            self._set_counts(torch.tensor(rows, device=self._device))

    def _set_counts(self, counts: torch.Tensor) -> None:
        self.counts = counts
        for layer_counts, layer in zip(counts, self.layers, strict=True):
            if layer in self._routers:
                self._routers[layer].stats.previous_counts = layer_counts
