"""The figures of a report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megatron_mea.config.variants import compared_variant
from megatron_mea.experiments.read_head_stats import HeadHistory
from megatron_mea.experiments.results import Result

_MARKERS = {"stable": "o", "spiked": "^", "collapsed": "v", "diverged": "X"}
MARKER_LEGEND = "Circle: stable, triangle up: spiked, triangle down: collapsed, cross: diverged."
_MAX_LAYERS = 4
_MAX_POINTS = 10_000
"""Of a curve: matplotlib refuses to draw a noisy one of a million."""


def draw_curves(results: Sequence[Result], variant: str) -> bytes:
    """PNG of one variant: smoothed losses (nats) over tokens, a line a run, with the fits; gradient norms below."""
    variant_results = [result for result in results if result.run.variant == variant and len(result.run.loss)]
    rates = sorted({result.run.lr for result in variant_results})
    shades = matplotlib.colormaps["viridis"](np.linspace(0.9, 0.0, len(rates)))
    figure = Figure((5, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1.2), sharex=True)
    for result in variant_results:
        color, run = shades[rates.index(result.run.lr)], result.run
        labelled = [line.get_label() for line in upper.get_lines()]
        label = f"{run.lr:g}" if f"{run.lr:g}" not in labelled else None
        tokens, loss = _smooth(run.tokens, run.loss)
        upper.plot(tokens, loss, color=color, lw=1.2, label=label)
        lower.plot(*_smooth(run.tokens, run.grad_norm), color=color, lw=1)
        if result.fit is not None:
            after = run.tokens[run.steps > run.config.schedule.warmup_steps]
            after = after[:: max(1, len(after) // _MAX_POINTS)]
            upper.plot(after, result.fit.predict(after), color=color, lw=1, ls=":")
        if len(run.validation):
            upper.plot(*run.validation[-1], marker=_MARKERS[result.verdict.kind], color=color, ms=6, mec="white")

    upper.set(xscale="log", ylabel="loss (nats)", title=variant)
    lower.set(xscale="log", yscale="log", xlabel="tokens", ylabel="gradient norm")
    if variant_results:
        upper.legend(title="learning rate", fontsize=8, title_fontsize=8)

    return _png(figure)


def draw_experts(results: Sequence[Result], variant: str) -> bytes | None:
    """PNG of one variant's routers: the fullest expert of any layer over the mean, and the balance loss, over tokens.

    None where no run has experts.
    """
    runs = [result.run for result in results if result.run.variant == variant and result.run.config.model.num_experts]
    if not any(len(run.loss) for run in runs):
        return None

    figure = Figure((5, 4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for run in runs:
        label = f"rate {run.lr:g}, seed {run.seed}"
        upper.plot(*_smooth(run.tokens, run.expert_load), lw=1.2, label=label)
        lower.plot(*_smooth(run.tokens, run.balance_loss), lw=1.2)

    upper.set(xscale="log", ylabel="fullest expert / mean", title=variant)
    lower.set(xscale="log", xlabel="tokens", ylabel="balance loss")
    upper.legend(fontsize=8)
    return _png(figure)


def draw_rates(results: Sequence[Result]) -> bytes:
    """PNG of the final loss (nats) of complete runs over the learning rate: a line through each variant's means."""
    figure = Figure((5, 4), layout="constrained")
    axes = figure.subplots()
    results = [result for result in results if result.run.is_complete]
    for variant in dict.fromkeys(result.run.variant for result in results):
        variant_results = [result for result in results if result.run.variant == variant]
        points = [(result.run.lr, _final_loss(result)) for result in variant_results]
        means = [(lr, np.mean([y for x, y in points if x == lr])) for lr in sorted({x for x, _ in points})]
        row = compared_variant(variant)
        axes.plot(*zip(*means, strict=True), color=row.color, ls=row.line_style, lw=1.3, label=variant)
        for (x, y), result in zip(points, variant_results, strict=True):
            axes.plot(x, y, marker=_MARKERS[result.verdict.kind], color=row.color, ms=5, mec="white", mew=0.5)

    validated = all(len(result.run.validation) for result in results)
    axes.set(xscale="log", xlabel="learning rate", ylabel=f"final {'validation ' if validated else ''}loss (nats)")
    if results:
        axes.legend(fontsize=8)

    return _png(figure)


def draw_combinations(history: HeadHistory) -> dict[str, bytes]:
    """PNGs by kind of matrix (hlc_k, logits_mix, ...): heat maps at the first, the middle and the last record."""
    kinds: dict[str, list[str]] = {}
    for parameter in sorted(history.matrices, key=_layer_of):
        kinds.setdefault(parameter.rpartition(".")[2], []).append(parameter)

    images = {}
    for kind, parameters in kinds.items():
        parameters = _evenly_spaced(parameters)
        last = len(history.steps) - 1
        times = sorted({0, last // 2, last})
        figure = Figure((5, 1.7 * len(parameters)), layout="constrained")
        grid = figure.subplots(len(parameters), len(times), squeeze=False)
        largest = max(np.abs(history.matrices[parameter]).max() for parameter in parameters)
        for row, parameter in zip(grid, parameters, strict=True):
            for axes, time in zip(row, times, strict=True):
                matrix = history.matrices[parameter][time]
                # Latent numbers are many times as many as heads.
                aspect = "auto" if len(matrix) > matrix.shape[1] else "equal"
                image = axes.imshow(matrix, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect=aspect)
                axes.set_title(f"layer {_layer_of(parameter)}, step {history.steps[time]}", fontsize=8)
                axes.set(xticks=[], yticks=[])

        figure.colorbar(image, ax=grid, shrink=0.8)
        figure.supxlabel("to head", fontsize=8)
        figure.supylabel("from head, or cached number", fontsize=8)
        images[kind] = _png(figure)

    return images


def draw_head_outputs(history: HeadHistory) -> bytes | None:
    """PNG of the RMS of each head's output over training, for at most four layers; None where nothing was recorded."""
    layers = _evenly_spaced(sorted(history.outputs, key=_layer_of))
    if not layers:
        return None

    figure = Figure((5, 1.5 * len(layers) + 0.6), layout="constrained")
    grid = figure.subplots(len(layers), 1, sharex=True, squeeze=False)
    for axes, layer in zip(grid[:, 0], layers, strict=True):
        axes.plot(history.steps, history.outputs[layer], lw=1, marker=".", ms=3)
        axes.set(yscale="log")
        axes.set_title(f"layer {_layer_of(layer)}", fontsize=8)

    grid[-1, 0].set_xlabel("step")
    figure.supylabel("RMS of each head's output", fontsize=9)
    return _png(figure)


def _final_loss(result: Result) -> float:
    return result.run.final_loss if result.run.final_validation is None else result.run.final_validation


def _smooth(tokens: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moving averages (rows - width + 1,) of both, over a window of a fortieth of the rows; many are averaged first."""
    size = -(-len(values) // _MAX_POINTS)
    if size > 1:
        # As in a fit, the first rows that fill no group are left out.
        tokens, values = (column[len(column) % size :].reshape(-1, size).mean(1) for column in (tokens, values))

    width = max(1, len(values) // 40)
    kernel = np.ones(width) / width
    return np.convolve(tokens, kernel, "valid"), np.convolve(values, kernel, "valid")


def _evenly_spaced(names: list[str]) -> list[str]:
    """At most `_MAX_LAYERS` of the names, evenly spaced, the first and the last among them."""
    if len(names) <= _MAX_LAYERS:
        return names
    return [names[round(i * (len(names) - 1) / (_MAX_LAYERS - 1))] for i in range(_MAX_LAYERS)]


def _layer_of(name: str) -> int:
    return int(name.split(".")[1])


def _png(figure: Figure) -> bytes:
    stream: Any = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120, metadata={"Software": None})
    return stream.getvalue()
