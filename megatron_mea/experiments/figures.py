"""The figures of a report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megatron_mea.experiments.heads import Heads
from megatron_mea.experiments.results import Result

COLORS = {
    "plain": "#444444",
    "plain_norm": "#8c6bb1",
    "mea": "#d95f02",
    "mea_no_norm": "#1b9e77",
    "differential": "#1f78b4",
    "talking_heads": "#b8860b",
}
_MARKS = {"stable": "o", "spiked": "^", "collapsed": "v", "diverged": "X"}
MARKS = "Circle: stable, triangle up: spiked, triangle down: collapsed, cross: diverged."
_MOST_LAYERS = 4


def curves(results: Sequence[Result], variant: str) -> bytes:
    """Smoothed loss of one variant at every rate, with the fits, and gradient norms below."""
    own = [each for each in results if each.run.variant == variant and len(each.run.loss)]
    rates = sorted({each.run.lr for each in own})
    shades = matplotlib.colormaps["viridis"](np.linspace(0.9, 0.0, len(rates)))
    figure = Figure((5, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1.2), sharex=True)
    for each in own:
        color, run = shades[rates.index(each.run.lr)], each.run
        seen = [line.get_label() for line in upper.get_lines()]
        label = f"{run.lr:g}" if f"{run.lr:g}" not in seen else None
        tokens, loss = _smooth(run.tokens, run.loss)
        upper.plot(tokens, loss, color=color, lw=1.2, label=label)
        lower.plot(*_smooth(run.tokens, run.grad_norm), color=color, lw=1)
        if each.fit is not None:
            after = run.tokens[run.steps > run.config.schedule.warmup_steps]
            upper.plot(after, each.fit.at(after), color=color, lw=1, ls=":")
        if len(run.validation):
            upper.plot(*run.validation[-1], marker=_MARKS[each.verdict.kind], color=color, ms=6, mec="white")
    upper.set(xscale="log", ylabel="loss (nats)", title=variant)
    lower.set(xscale="log", yscale="log", xlabel="tokens", ylabel="gradient norm")
    if own:
        upper.legend(title="learning rate", fontsize=8, title_fontsize=8)
    return _png(figure)


def rates(results: Sequence[Result]) -> bytes:
    """Final loss of whole runs over the learning rate, a line a variant: the mean of the seeds, and each of them."""
    figure = Figure((5, 4), layout="constrained")
    axes = figure.subplots()
    results = [each for each in results if each.run.is_whole]
    for variant in dict.fromkeys(each.run.variant for each in results):
        own = [each for each in results if each.run.variant == variant]
        points = [(each.run.lr, _final(each)) for each in own]
        means = [(lr, np.mean([y for x, y in points if x == lr])) for lr in sorted({x for x, _ in points})]
        color = COLORS.get(variant)
        axes.plot(*zip(*means, strict=True), color=color, lw=1.3, label=variant)
        for (x, y), each in zip(points, own, strict=True):
            axes.plot(x, y, marker=_MARKS[each.verdict.kind], color=color, ms=5, mec="white", mew=0.5)
    validated = all(len(each.run.validation) for each in results)
    axes.set(xscale="log", xlabel="learning rate", ylabel=f"final {'validation ' if validated else ''}loss (nats)")
    if results:
        axes.legend(fontsize=8)
    return _png(figure)


def combinations(heads: Heads) -> dict[str, bytes]:
    """Heat maps of the matrices at the first, the middle and the last record, by kind (hlc_k, logits_mix, ...)."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(heads.matrices, key=_layer_of):
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    found = {}
    for kind, names in kinds.items():
        names = _some(names)
        times = sorted({0, (len(heads.matrices[names[0]][0]) - 1) // 2, len(heads.matrices[names[0]][0]) - 1})
        figure = Figure((5, 1.7 * len(names)), layout="constrained")
        grid = figure.subplots(len(names), len(times), squeeze=False)
        largest = max(np.abs(matrix).max() for name in names for matrix in heads.matrices[name][1])
        for row, name in zip(grid, names, strict=True):
            steps, matrices = heads.matrices[name]
            for axes, time in zip(row, times, strict=True):
                image = axes.imshow(matrices[time], cmap="RdBu_r", vmin=-largest, vmax=largest)
                axes.set_title(f"layer {_layer_of(name)}, step {steps[time]}", fontsize=8)
                axes.set(xticks=[], yticks=[])
        figure.colorbar(image, ax=grid, shrink=0.8)
        figure.supxlabel("to head", fontsize=8)
        figure.supylabel("from head", fontsize=8)
        found[kind] = _png(figure)
    return found


def outputs(heads: Heads) -> bytes | None:
    """RMS of each head's output over training, of some layers."""
    names = _some(sorted(heads.outputs, key=_layer_of))
    if not names:
        return None
    figure = Figure((5, 1.5 * len(names) + 0.6), layout="constrained")
    grid = figure.subplots(len(names), 1, sharex=True, squeeze=False)
    for axes, name in zip(grid[:, 0], names, strict=True):
        axes.plot(*heads.outputs[name], lw=1, marker=".", ms=3)
        axes.set(yscale="log")
        axes.set_title(f"layer {_layer_of(name)}", fontsize=8)
    grid[-1, 0].set_xlabel("step")
    figure.supylabel("RMS of each head's output", fontsize=9)
    return _png(figure)


def _final(result: Result) -> float:
    return result.run.final_loss if result.run.final_validation is None else result.run.final_validation


def _smooth(tokens: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows of a fortieth of the rows."""
    width = max(1, len(values) // 40)
    kernel = np.ones(width) / width
    return np.convolve(tokens, kernel, "valid"), np.convolve(values, kernel, "valid")


def _some(names: list[str]) -> list[str]:
    """Evenly spread ones, the first and the last among them."""
    if len(names) <= _MOST_LAYERS:
        return names
    return [names[round(i * (len(names) - 1) / (_MOST_LAYERS - 1))] for i in range(_MOST_LAYERS)]


def _layer_of(name: str) -> int:
    return int(name.split(".")[1])


def _png(figure: Figure) -> bytes:
    stream: Any = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120, metadata={"Software": None})
    return stream.getvalue()
