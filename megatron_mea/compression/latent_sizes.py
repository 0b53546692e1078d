"""How many numbers of keys and of values each layer caches, of a budget for the whole cache.

Every layer is fitted by itself at a few sizes, on the source model's hidden states. What of its attention's output is
lost at each size is a curve; what its smallest size costs at the model's predictions is measured, and scales the curve.
Then the sizes are those with the least sum of costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_mea.compression.calibrate import embed_windows
from megatron_mea.compression.changes import forward_changes, plan_passes
from megatron_mea.compression.latent_fit import LayerFit
from megatron_mea.compression.latent_model import LatentDims, LatentModel, latent_settings
from megatron_mea.compression.partial_fit import PartialFit
from megatron_mea.compression.source_model import SourceModel
from megatron_mea.config.schema import Model
from megatron_mea.data.windows import Windows
from megatron_mea.errors import UserError
from megatron_mea.progress import progress_bar

KEY_SHARES = (0.6, 0.5, 0.7)
"""Parts of a layer's numbers that its keys may get; sizes are chosen with the first, as if it were best everywhere."""

_MIN_SIZE = 3
"""A pair of keys and one number of values."""


def check_ratio(model: Model, ratio: float, *, name: str) -> None:
    """Raises UserError where the model caches fewer numbers than the ratio allows, or every layer needs more."""
    full = 2 * model.num_key_value_heads * model.head_dim * model.num_hidden_layers
    cached = 2 * sum(model.component_heads) * model.head_dim
    if ratio * full > cached:
        smaller = math.floor(10_000 * cached / full) / 10_000
        raise UserError(where="--cache-ratio", got=ratio, expected=f"at most {smaller}: that is the cache of {name}")

    least = _MIN_SIZE * model.num_hidden_layers / full
    if ratio < least:
        larger = math.ceil(10_000 * least) / 10_000
        expected = f"at least {larger}: a layer caches a pair of keys and one number of values"
        raise UserError(where="--cache-ratio", got=ratio, expected=expected)


def split_dims(model: Model, total: int, *, key_share: float = KEY_SHARES[0]) -> LatentDims:
    """Numbers of keys and of values of a layer that caches `total` numbers, of which keys get pairs."""
    composite = model.num_key_value_heads * model.head_dim
    keys = min(2 * round(key_share * total / 2), composite)
    values = min(max(total - keys, 1), composite)
    # What one side cannot use the other gets.
    return min(max((total - values) // 2 * 2, 2), composite), values


def even_sizes(model: Model, ratio: float) -> list[int]:
    """The same size for all layers: the ratio to all composite heads, to within one number."""
    return [max(round(2 * ratio * model.num_key_value_heads * model.head_dim), _MIN_SIZE)] * model.num_hidden_layers


@torch.no_grad()
def chosen_sizes(
    *,
    source_model: SourceModel,
    ratio: float,
    windows: Windows,
    open_probes: Callable[[int], Windows],
    folder: Path,
    request: dict[str, object],
) -> list[int]:
    """The number of cached numbers of every layer with the least sum of measured costs.

    Args:
        windows: calibration tokens, on which layers are fitted.
        open_probes: the windows, so many a batch, on which the cost of each layer's smallest size is measured.
        folder: keeps what is measured, for the same call after an interruption.
    """
    model, device = source_model.model, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    totals = _fitted_totals(model, ratio)
    partial = PartialFit(folder=folder, request=request)
    if partial.result is not None:
        return partial.result["sizes"]

    states = partial.streams.get("source", [])
    if not states:
        embedded = embed_windows(source_model=source_model, windows=windows, device=device)
        states = [hidden_states.cpu() for _, hidden_states in embedded]

    with progress_bar(total=model.num_hidden_layers, desc="sizes: losses", unit="layer") as bar:
        bar.update(len(partial.layers))
        for layer in range(len(partial.layers), model.num_hidden_layers):
            fit = LayerFit(source_model=source_model, layer=layer, windows=windows, device=device)
            moments, before = fit.moments(states), list(states)
            targets = fit.move(fit.source, states)
            fitted = [
                fit.fit(split_dims(model, total), moments=moments, states=before, targets=targets) for total in totals
            ]
            errors = [latent.error for latent in fitted]
            partial.add(fitted[0].tensors, {"source": states}, {"counts": fitted[0].counts, "errors": errors})
            bar.update()

    divergences = _divergences(source_model=source_model, open_probes=open_probes, partial=partial, size=totals[0])
    full = 2 * model.num_key_value_heads * model.head_dim
    costs = [
        _cost_curve(divergence, errors=note["errors"], totals=totals, full=full)
        for divergence, note in zip(divergences, partial.layers, strict=True)
    ]
    budget = round(ratio * full) * model.num_hidden_layers
    sizes = [totals[0] + more for more in allocate(costs, budget - totals[0] * len(costs))]
    partial.finish({"sizes": sizes, "divergences": divergences})
    return sizes


def _fitted_totals(model: Model, ratio: float) -> list[int]:
    """Numbers that a layer is fitted with, ascending; none gets less than the first."""
    full = 2 * model.num_key_value_heads * model.head_dim
    return sorted({max(round(part * full), _MIN_SIZE) for part in (ratio / 2, 0.75 * ratio, ratio, (1 + ratio) / 2)})


def _divergences(
    *, source_model: SourceModel, open_probes: Callable[[int], Windows], partial: PartialFit, size: int
) -> list[float]:
    """Sum of KL(source model || source model with this layer at its smallest size), by layer."""
    model = source_model.model
    changes = [(layer, size) for layer in range(model.num_hidden_layers)]
    settings = latent_settings(
        model,
        dims=[split_dims(model, size)] * len(changes),
        counts=[layer["counts"] for layer in partial.layers],
    )
    smallest = LatentModel(source_model=source_model, model=settings, partial=partial)
    totals = [0.0] * len(changes)
    batch_size, groups = plan_passes(source_model, changes)
    windows = open_probes(batch_size)
    with progress_bar(total=len(windows) * len(groups) * (len(changes) + 1), desc="sizes: costs", unit="layer") as bar:
        for batch in windows:
            for group in groups:
                costs = forward_changes(
                    source_model=source_model,
                    change_layer=lambda _: smallest,
                    changes=group,
                    batch=batch,
                    document_mask=windows.document_mask,
                    progress=bar,
                ).divergences()
                for (layer, _), cost in costs.items():
                    totals[layer] += cost

    return totals


def _cost_curve(divergence: float, *, errors: Sequence[float], totals: Sequence[int], full: int) -> np.ndarray:
    """Costs of a layer by its cached numbers from `totals[0]` to `full`, through those of the fitted sizes."""
    sizes = np.arange(totals[0], full + 1)
    curve = np.exp(np.interp(sizes, totals, np.log(np.maximum(errors, 1e-12))))
    # All numbers lose nothing, and what is known of the way there is that it falls.
    beyond = sizes > totals[-1]
    curve[beyond] *= (full - sizes[beyond]) / (full - totals[-1])
    return divergence * curve / curve[0]


def allocate(costs: Sequence[np.ndarray], budget: int) -> list[int]:
    """How many of `budget` units each layer gets, so that the sum of costs is least.

    Costs count by their lower convex hull, for which taking the largest gains first is exact.

    Args:
        costs: of each layer, by its number of units from 0 on.
    """
    gains = np.full((len(costs), max(map(len, costs)) - 1), -np.inf)
    for row, curve in zip(gains, costs, strict=True):
        hull = _convex_hull(curve)
        row[: len(curve) - 1] = hull[:-1] - hull[1:]

    order = np.argsort(-gains, axis=None, kind="stable")[: max(budget, 0)]
    return np.bincount(order // gains.shape[1], minlength=len(costs)).tolist()


def _convex_hull(curve: np.ndarray) -> np.ndarray:
    """The largest convex function of the index that is nowhere above the curve."""
    corners: list[int] = []
    for index in range(len(curve)):
        while len(corners) > 1:
            first, last = corners[-2:]
            if (curve[last] - curve[first]) * (index - first) < (curve[index] - curve[first]) * (last - first):
                break
            corners.pop()
        corners.append(index)

    return np.interp(np.arange(len(curve)), corners, curve[corners])
