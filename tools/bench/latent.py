"""Compares ways of making a pretrained model's cache smaller, the published ones beside ours, at equal cache:

    OMP_NUM_THREADS=1 python tools/bench/latent.py MODEL --calibration PREFIX --validation PREFIX --out found.json
        [--ratios 0.67 0.5 0.34] [--methods palu care transmla latent ...]
    python tools/bench/latent.py --out found.json --table [--figure loss.png]

MODEL is what `compress` takes, without a norm of heads or of keys. A row has the cross-entropy, the bytes of the cache,
and the time of one layer's attention of a step of decoding as a ratio to the uncompressed model's, taken in turn with
it: CPU time of one thread, the median of the rounds' ratios. Rows are written to found.json as they come; the same
command resumes where it stopped. docs/compression.md has results, tools/bench/peers the papers' formulas.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from common import BenchParser, in_turn, median_ratio, print_header, print_row, seconds
from compress import Results, cross_entropy
from peers.care import adjusted_ranks, care_energies, care_layer
from peers.decoding import Step, exported_step, peer_step, uncompressed_step
from peers.layers import PeerLayer
from peers.palu import palu_layer, proportional_ranks
from peers.study import fisher_information, input_moments, peer_cross_entropy
from peers.transmla import transmla_layer

from megatron_mea.compression.calibrate import CALIBRATION_TOKENS, calibration_windows
from megatron_mea.compression.compress import compress
from megatron_mea.compression.head_choice import CHOICE_TOKENS
from megatron_mea.compression.source_model import SourceModel, open_source_model
from megatron_mea.config.schema import Model
from megatron_mea.data.windows import Windows
from megatron_mea.errors import UserError
from megatron_mea.huggingface.model_folder import ModelFolder
from megatron_mea.printing import note
from megatron_mea.progress import progress_bar

FISHER_TOKENS = 8192
LENGTHS = (1024, 4096, 16384)
"""Tokens in the cache of the step of decoding that is timed."""
ROUNDS = 9
MIN_SECONDS = 0.02
"""Of a round of the timing, for each of the two."""
TIMED_LAYERS = 6
"""Layers whose attention is timed one after the other: at even distances, in order of what they cache."""
SPREADS = (1.0, 1.25, 1.5, 2.0)
"""Bounds of CARE's ranks that are tried: of the even rank, divided and multiplied by these."""
OURS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "outputs": {"method": "outputs"},
    "aligned": {"method": "aligned"},
    "latent-even": {"method": "latent", "layers": "full"},
    "latent": {"method": "latent"},
    "latent-reconstructed": {"method": "latent", "reconstruction_steps": 120},
}
"""Options of `compress` by method."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The source model, its texts, and what the peers ask of it, each measured once.

    Args:
        calibration: PREFIX.
    """

    source_model: SourceModel
    calibration: str
    results: Results

    def windows(self, tokens: int) -> Windows:
        """Windows of the calibration text, one a batch."""
        return calibration_windows(
            source_model=self.source_model, path=self.calibration, where="--calibration", tokens=tokens, batch=1
        )

    @property
    def model(self) -> Model:
        """The settings of the source model."""
        return self.source_model.model

    @cached_property
    def projections(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Projections (h d, D) in float64 to the composite key and value heads of each layer."""
        layers = range(self.model.num_hidden_layers)
        return [tuple(self.source_model.composite_projection(layer, side) for side in ("k", "v")) for layer in layers]

    @cached_property
    def moments(self) -> list[torch.Tensor]:
        """E[x x^T], (D, D), of the inputs of each layer's projections."""
        return input_moments(source_model=self.source_model, windows=self.windows(CALIBRATION_TOKENS))

    @cached_property
    def fisher(self) -> list[float]:
        """Fisher information of the projections of keys and of values, by layer: k, v, k, v, ..."""
        return self.results.row(
            "fisher", lambda: fisher_information(source_model=self.source_model, windows=self.windows(FISHER_TOKENS))
        )

    def calibration_loss(self, layers: Sequence[PeerLayer], choice: str) -> float:
        """Nats a token with a peer's layers on `CHOICE_TOKENS` of the calibration text, to choose its settings by."""
        loss = peer_cross_entropy(source_model=self.source_model, layers=layers, windows=self.windows(CHOICE_TOKENS))
        note(f"{choice}: {loss:.3f} with {sum(layer.cached for layer in layers):,} numbers, on calibration text")
        return loss

    def layers(self, build: Callable[..., PeerLayer], **by_layer: Sequence[int]) -> list[PeerLayer]:
        """A peer's layers, built of projections, moments, and arguments of which there is one for each layer."""
        return [
            build(*self.projections[layer], self.moments[layer], **{name: of[layer] for name, of in by_layer.items()})
            for layer in range(self.model.num_hidden_layers)
        ]


def cached_numbers(model: Model, ratio: float) -> int:
    """Cached numbers of a layer and token at this ratio to all composite heads."""
    return round(ratio * 2 * model.num_key_value_heads * model.head_dim)


def even_ranks(study: Study, cached: int) -> dict[str, list[int]]:
    """Half of the numbers for keys and half for values, in all layers."""
    layers = study.model.num_hidden_layers
    return {"key_rank": [cached // 2] * layers, "value_rank": [cached - cached // 2] * layers}


def palu(study: Study, cached: int) -> list[PeerLayer]:
    """Palu with one group of all heads and ranks by Fisher information."""
    full = len(study.projections[0][0])
    ranks = proportional_ranks(study.fisher, budget=cached * study.model.num_hidden_layers, largest=full)
    return study.layers(palu_layer, key_rank=ranks[::2], value_rank=ranks[1::2])


def low_rank(study: Study, cached: int) -> list[PeerLayer]:
    """Even ranks of all heads together: Palu without Fisher information, CARE with uniform ranks, SVD-LLM."""
    return study.layers(palu_layer, **even_ranks(study, cached))


def palu_heads(study: Study, cached: int) -> list[PeerLayer]:
    """Palu with each head by itself and even ranks."""
    groups = [study.model.num_key_value_heads] * study.model.num_hidden_layers
    return study.layers(palu_layer, groups=groups, **even_ranks(study, cached))


def care(study: Study, cached: int) -> list[PeerLayer]:
    """CARE with the bounds of its adjusted ranks that lose least on calibration text."""
    key_energies, value_energies = (
        [care_energies(weights[side], moment) for weights, moment in zip(study.projections, study.moments, strict=True)]
        for side in range(2)
    )
    key_budget, value_budget = (sum(ranks) for ranks in even_ranks(study, cached).values())

    def build(spread: float) -> list[PeerLayer]:
        return study.layers(
            care_layer,
            key_rank=adjusted_ranks(key_energies, budget=key_budget, spread=spread),
            value_rank=adjusted_ranks(value_energies, budget=value_budget, spread=spread),
        )

    losses = {spread: study.calibration_loss(build(spread), f"ranks within {spread:g}") for spread in SPREADS}
    return build(min(losses, key=losses.__getitem__))


def transmla(study: Study, cached: int) -> list[PeerLayer]:
    """TransMLA with the size of the shared key and the fold that lose least on calibration text."""
    dim, layers = study.model.head_dim, study.model.num_hidden_layers

    def build(rotary_dim: int, fold: int) -> list[PeerLayer]:
        arguments = {"head_dim": dim, "cached": cached, "rotary_dim": rotary_dim, "fold": fold}
        return study.layers(transmla_layer, **{name: [value] * layers for name, value in arguments.items()})

    losses: dict[tuple[int, int], float] = {}
    for rotary_dim in (dim, dim // 2):
        # As the authors' code searches: the fold doubles while that loses less.
        fold, least = dim // rotary_dim, math.inf
        while rotary_dim < cached and fold <= dim // 2:
            loss = study.calibration_loss(build(rotary_dim, fold), f"a key of {rotary_dim}, folds of {fold}")
            losses[rotary_dim, fold] = loss
            if loss > least:
                break
            fold, least = 2 * fold, loss

    return build(*min(losses, key=losses.__getitem__))


PEERS: dict[str, Callable[[Study, int], list[PeerLayer]]] = {
    "low-rank": low_rank,
    "palu": palu,
    "palu-heads": palu_heads,
    "care": care,
    "transmla": transmla,
}
METHODS = (*PEERS, *OURS)


def measure_peer(study: Study, *, method: str, ratio: float, validation: Windows) -> dict[str, Any]:
    """A row of a peer."""
    layers = PEERS[method](study, cached_numbers(study.model, ratio))
    loss = peer_cross_entropy(source_model=study.source_model, layers=layers, windows=validation)
    cached = [layer.cached for layer in layers]
    return _row(
        model=study.model,
        loss=loss,
        cached=cached,
        rebuilds_keys=layers[0].rebuilds_keys,
        step=lambda layer, length: peer_step(layers[layer], study.model, length=length),
    )


def measure_ours(study: Study, *, method: str, ratio: float, validation: Windows) -> dict[str, Any]:
    """A row of a method of `compress`, whose model lies beside the results until it is measured."""
    out = study.results.file.with_suffix(f".{method}-{ratio:g}")
    calibration = None if method == "svd" else study.calibration
    if not out.exists():
        note(compress(study.source_model.checkpoint, out, ratio=ratio, calibration=calibration, **OURS[method]))

    with open_source_model(ModelFolder.locate(out), out) as compressed:
        loss, model = cross_entropy(compressed, validation), compressed.model

    cached = [
        sum(model.component_width(layer, side) for side in ("k", "v")) for layer in range(model.num_hidden_layers)
    ]
    row = _row(
        model=study.model,
        loss=loss,
        cached=cached,
        rebuilds_keys=False,
        step=lambda layer, length: exported_step(model, layer=layer, length=length),
    )
    shutil.rmtree(out)
    return row


def _row(
    *, model: Model, loss: float, cached: list[int], rebuilds_keys: bool, step: Callable[[int, int], Step]
) -> dict[str, Any]:
    """What is written of a method: its loss, its cache, and the ratios of its decoding's time by length."""
    order = sorted(range(len(cached)), key=cached.__getitem__)
    count = min(TIMED_LAYERS, len(order))
    timed = [order[(2 * index + 1) * len(order) // (2 * count)] for index in range(count)]
    ratios = {}
    for length in LENGTHS:
        steps = [step(layer, length) for layer in timed]
        ratios[str(length)] = time_ratio(steps, [uncompressed_step(model, length=length) for _ in timed])

    return {
        "cross_entropy": loss,
        "cached": cached,
        "bytes_a_token": 2 * sum(cached),
        "rebuilds_keys": rebuilds_keys,
        "decode_time": ratios,
    }


@torch.inference_mode()
def time_ratio(steps: Sequence[Step], base: Sequence[Step]) -> float:
    """CPU time of some steps to that of others: the median of the rounds, each long enough for the clock."""

    def mean_seconds(part: Sequence[Step], repeats: int) -> float:
        return seconds(lambda: [step() for _ in range(repeats) for step in part], "cpu") / repeats

    works = {}
    for name, part in (("steps", steps), ("base", base)):
        mean_seconds(part, 1)
        repeats = 1 + int(MIN_SECONDS / max(mean_seconds(part, 1), 1e-5))
        works[name] = partial(mean_seconds, part, repeats)

    times = in_turn(works, ROUNDS)
    return median_ratio(times["steps"], times["base"])


def print_results(rows: dict[str, Any]) -> None:
    """Prints a Markdown table of all rows, in the order of the ratios and of the losses."""
    unchanged = rows["unchanged"]["value"]
    times = [f"time at {length:,}" for length in LENGTHS]
    print_header(["cache", "method", "nats a token", "rise", "bytes a token", "keys rebuilt", *times])
    full = f"{rows['uncompressed bytes']['value']:,}"
    print_row(["100 %", "*unchanged*", f"{unchanged:.3f}", "", full, "no", *["1"] * len(times)])
    for ratio, method, row in compared_rows(rows):
        print_row(
            [
                f"{ratio:.0%}".replace("%", " %"),
                method,
                f"{row['cross_entropy']:.3f}",
                f"{row['cross_entropy'] - unchanged:+.3f}",
                f"{row['bytes_a_token']:,}",
                "yes" if row["rebuilds_keys"] else "no",
                *(f"{row['decode_time'][str(length)]:.2f}" for length in LENGTHS),
            ]
        )


def compared_rows(rows: dict[str, Any]) -> list[tuple[float, str, dict[str, Any]]]:
    """(ratio, method, row) of all methods that were measured, larger caches and smaller losses first."""
    named = [(name.split(" | "), row["value"]) for name, row in rows.items() if " | " in name]
    compared = [(float(ratio), method, row) for (ratio, method), row in named]
    return sorted(compared, key=lambda item: (-item[0], item[2]["cross_entropy"]))


def draw_figure(rows: dict[str, Any], file: Path) -> None:
    """Draws the rise of the cross-entropy over the size of the cache, a line a method; the suffix names the format."""
    from matplotlib.figure import Figure

    unchanged, full = rows["unchanged"]["value"], rows["uncompressed bytes"]["value"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    compared = compared_rows(rows)
    for method in METHODS:
        points = [
            (100 * row["bytes_a_token"] / full, row["cross_entropy"] - unchanged)
            for _, name, row in compared
            if name == method
        ]
        if points:
            is_rebuilt = any(row["rebuilds_keys"] for _, name, row in compared if name == method)
            style = {"linestyle": "--" if is_rebuilt else "-", "linewidth": 2.5 if method.startswith("latent") else 1.2}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method, **style)

    axes.set(xlabel="cache (% of the unchanged model's)", ylabel="rise of the cross-entropy (nats a token)")
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(fontsize=8, title="dashed: keys are rebuilt at each step", title_fontsize=8)
    figure.savefig(file, dpi=120)


def check_model(model: Model, name: str) -> None:
    """Refuses variants for which the peers' papers say nothing, or whose cache has more than keys and values."""
    if model.qk_norm or model.has_head_norm or model.hlc_form == "latent":
        expected = "a model without qk_norm and head norm, whose keys and values are heads"
        raise UserError(where="MODEL", got=f"{name}, of the variant {model.attention_variant}", expected=expected)


def main() -> None:
    parser = BenchParser(__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration")
    parser.add_argument("--validation")
    parser.add_argument("--tokens", type=int, default=8192, help="of the validation data (default: 8192)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.67, 0.5, 0.34])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--table", action="store_true", help="print the table of --out, and measure nothing")
    parser.add_argument("--figure", type=Path, help="draw the losses of --out, as PNG or SVG")
    arguments = parser.parse_args()
    results = Results(arguments.out)
    if not arguments.table and arguments.figure is None:
        if None in (arguments.model, arguments.calibration, arguments.validation):
            parser.error("MODEL, --calibration and --validation are needed, unless --table or --figure is given")
        measure(results, arguments)

    if arguments.figure is not None:
        draw_figure(results.rows, arguments.figure)
    if arguments.table or arguments.figure is None:
        print_results(results.rows)


def measure(results: Results, arguments: Any) -> None:
    """Measures the rows that are asked for and not there."""
    torch.set_num_threads(1)
    with open_source_model(ModelFolder.locate(arguments.model), arguments.out) as source_model:
        check_model(source_model.model, arguments.model)
        study = Study(source_model=source_model, calibration=arguments.calibration, results=results)
        validation = calibration_windows(
            source_model=source_model, path=arguments.validation, where="--validation", tokens=arguments.tokens
        )
        model = source_model.model
        results.row("uncompressed bytes", lambda: 2 * cached_numbers(model, 1.0) * model.num_hidden_layers)
        results.row("unchanged", lambda: cross_entropy(source_model, validation))
        rows = [(ratio, method) for ratio in arguments.ratios for method in arguments.methods]
        for ratio, method in progress_bar(rows, desc="methods", unit="row"):
            measure_row = measure_peer if method in PEERS else measure_ours
            results.row(
                f"{ratio:g} | {method}",
                lambda row=measure_row, ratio=ratio, method=method: row(
                    study, method=method, ratio=ratio, validation=validation
                ),
            )


if __name__ == "__main__":
    main()
