"""A callback that warns of experts that no token chooses."""

from __future__ import annotations

import torch

from megatron_mea.training.callbacks import Callback, TrainedStep
from megatron_mea.training.router_totals import RouterTotals

_MIN_EXPECTED = 100
"""Mean tokens of an expert over which they are counted at least: with fewer, none is no news."""


class DeadExperts(Callback):
    """Warns once of each expert that got no token between rows of the metrics, by layer and number."""

    def __init__(self, routers: RouterTotals) -> None:
        self._routers, self._reported = routers, set[tuple[int, int]]()
        self._counts = torch.zeros_like(routers.counts)

    def on_update(self, trained: TrainedStep) -> None:
        self._counts = self._counts.to(self._routers.counts.device) + self._routers.counts

    def on_log(self, trained: TrainedStep) -> list[str]:
        if self._counts.double().mean() < _MIN_EXPECTED:
            return []

        counts, self._counts = self._counts, torch.zeros_like(self._counts)
        dead = {(self._routers.layers[row], expert) for row, expert in (counts == 0).nonzero().tolist()}
        new, self._reported = sorted(dead - self._reported), self._reported | dead
        by_layer: dict[int, list[int]] = {}
        for layer, expert in new:
            by_layer.setdefault(layer, []).append(expert)

        tokens = int(counts[0].sum()) // self._routers.top_k
        return [
            f"no token of {tokens:,} chose expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts))} of layer "
            f"{layer}: raise model.router_aux_loss_coef, or look at training.balance"
            for layer, experts in by_layer.items()
        ]
