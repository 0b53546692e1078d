"""How many component heads each layer of a compressed model gets, of a budget for the whole cache."""

from __future__ import annotations

import math

from megatron_mea.compression.budget import allocate_heads
from megatron_mea.compression.calibrate import CALIBRATION, calibration_windows
from megatron_mea.compression.changes import forward_changes, plan_passes
from megatron_mea.compression.compressed_model import Factoriser, with_one_layer_changed
from megatron_mea.compression.source_model import SourceModel
from megatron_mea.config.schema import Model
from megatron_mea.data.corpora import IGNORE_INDEX
from megatron_mea.progress import progress_bar

CHOICE_TOKENS = 2048
"""Tokens on which the cost of compressing each layer is measured."""


def head_budget(model: Model, ratio: float) -> int:
    """Component heads that all layers together may have."""
    # Not a head less because 0.1 has no exact binary form.
    return math.floor(ratio * model.num_key_value_heads * model.num_hidden_layers + 1e-9)


def choose_heads(
    *,
    source_model: SourceModel,
    factoriser: Factoriser,
    options: list[list[int]],
    ratio: float,
    calibration: str | None,
) -> list[int]:
    """The number of component heads of every layer with the least predicted cost at that size of the cache."""
    if calibration is None:
        costs = [
            {heads: factoriser.lost(layer, heads) if heads < max(layer_options) else 0.0 for heads in layer_options}
            for layer, layer_options in enumerate(progress_bar(options, desc="heads of each layer", unit="layer"))
        ]
    else:
        costs = measure_costs(
            source_model=source_model, factoriser=factoriser, options=options, calibration=calibration
        )

    chosen = allocate_heads(costs, head_budget(source_model.model, ratio))
    assert chosen is not None
    return chosen


def measure_costs(
    *, source_model: SourceModel, factoriser: Factoriser, options: list[list[int]], calibration: str
) -> list[dict[int, float]]:
    """Rise of the cross-entropy (nats a token of calibration data) by layer and number of heads, a layer at a time."""
    changes = [(layer, heads) for layer, layer_options in enumerate(options) for heads in layer_options[:-1]]
    batch_size, groups = plan_passes(source_model, changes)
    windows = calibration_windows(
        source_model=source_model, path=calibration, where=CALIBRATION, batch=batch_size, tokens=CHOICE_TOKENS
    )
    costs = [dict.fromkeys(layer_options, 0.0) for layer_options in options]
    count = 0
    total = len(windows) * len(groups) * (source_model.model.num_hidden_layers + 1)
    with progress_bar(total=total, desc="heads of each layer", unit="layer") as bar:
        for batch in windows:
            count += int((batch.targets != IGNORE_INDEX).sum())
            for group in groups:
                losses = forward_changes(
                    source_model=source_model,
                    change_layer=with_one_layer_changed(factoriser),
                    changes=group,
                    batch=batch,
                    document_mask=windows.document_mask,
                    progress=bar,
                ).losses()
                for layer, heads in group:
                    costs[layer][heads] += losses[layer, heads] - losses[None]

    return [
        _remove_gains({heads: cost / max(count, 1) for heads, cost in layer_costs.items()}) for layer_costs in costs
    ]


def _remove_gains(costs: dict[int, float]) -> dict[int, float]:
    """Costs that are at least 0 and do not fall with fewer heads: on so few tokens a gain is chance."""
    worst, corrected = 0.0, {}
    for heads in sorted(costs, reverse=True):
        corrected[heads] = worst = max(worst, costs[heads])

    return corrected
