"""Compares ways of compressing a pretrained model by its cross-entropy at equal cache:

    python tools/bench/compress.py MODEL --out FILE.json --calibration PREFIX --validation PREFIX [--tokens N]

MODEL is what `compress` takes. Rows are written to FILE.json as they come; the same command resumes where it stopped.
docs/compression.md has results. At the end a table of the losses is printed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import BenchParser, facts, print_header, print_row

from megatron_mea.compression.budget import allocate_heads
from megatron_mea.compression.calibrate import CALIBRATION_TOKENS, calibration_windows, head_moments
from megatron_mea.compression.changes import forward_changes
from megatron_mea.compression.compressed_model import CompressedModel, Factoriser
from megatron_mea.compression.head_choice import measure_costs
from megatron_mea.compression.source_model import SourceModel, open_source_model
from megatron_mea.data.corpora import IGNORE_INDEX
from megatron_mea.data.windows import Windows
from megatron_mea.huggingface.model_folder import ModelFolder

METHODS = ("weights", "weights, aligned", "outputs", "outputs, aligned")


class Results:
    """Rows by name, on disk as soon as they are there."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = json.loads(file.read_text()) if file.is_file() else {"facts": facts()}

    def row(self, name: str, compute: Callable[[], Any]) -> Any:
        """The value of a row, which is computed, timed and written where the file lacks it."""
        if name not in self.rows:
            begin = time.process_time()
            value = compute()
            self.rows[name] = {"value": value, "cpu_seconds": round(time.process_time() - begin, 1)}
            self.file.write_text(json.dumps(self.rows, indent=1) + "\n")
            print(name, json.dumps(self.rows[name]), flush=True)

        return self.rows[name]["value"]


def cross_entropy(model: SourceModel | CompressedModel, windows: Windows) -> float:
    """Mean cross-entropy (nats a token) of all windows, computed a layer at a time."""
    total, count = 0.0, 0
    for batch in windows:
        losses = forward_changes(source_model=model, batch=batch, document_mask=windows.document_mask).losses()
        total += losses[None]
        count += int((batch.targets != IGNORE_INDEX).sum())

    return total / count


def even_head_counts(source_model: SourceModel, ratio: float) -> list[int]:
    """Heads of every layer at this ratio without any measurement: as even as can be, fewer in the middle layers."""
    layers, heads = source_model.model.num_hidden_layers, source_model.model.num_key_value_heads
    budget = int(ratio * layers * heads + 1e-9)
    more, fewer = -(-budget // layers), budget // layers
    with_more = budget - fewer * layers
    outer = set(range(with_more // 2)) | set(range(layers - (with_more - with_more // 2), layers))
    return [more if layer in outer else fewer for layer in range(layers)]


def main() -> None:
    parser = BenchParser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="of the validation data (default: 8192)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.67, 0.5, 0.34])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(arguments.out)
    with open_source_model(ModelFolder.locate(arguments.model), arguments.out) as source_model:
        validation = calibration_windows(
            source_model=source_model, path=arguments.validation, where="--validation", tokens=arguments.tokens
        )
        calibration = calibration_windows(
            source_model=source_model, path=arguments.calibration, where="--calibration", tokens=CALIBRATION_TOKENS
        )
        unchanged = results.row("unchanged", lambda: cross_entropy(source_model, validation))
        heads = source_model.model.component_heads

        @cache
        def moments() -> Any:
            all_layers = set(range(source_model.model.num_hidden_layers))
            return head_moments(source_model=source_model, windows=calibration, layers=all_layers)

        @cache
        def factoriser(method: str) -> Factoriser:
            return Factoriser(
                source_model=source_model,
                moments=moments() if method.startswith("outputs") else None,
                aligned=method.endswith(", aligned"),
            )

        def loss(method: str, counts: list[int]) -> float:
            model = CompressedModel(source_model=source_model, heads=counts, factoriser=factoriser(method))
            return cross_entropy(model, validation)

        def add_rows(name: str, method: str, counts: list[int]) -> None:
            results.row(f"{name} | heads", lambda: counts)
            results.row(f"{name} | loss", lambda: loss(method, counts))

        for ratio in sorted(arguments.ratios):
            for method in METHODS:
                add_rows(name=f"{ratio:.0%} {method}", method=method, counts=even_head_counts(source_model, ratio))

        options = [list(range(1, count + 1)) for count in heads]
        for method in ("outputs", "outputs, aligned"):
            costs = results.row(
                f"costs {method}",
                lambda method=method: measure_costs(
                    source_model=source_model,
                    factoriser=factoriser(method),
                    options=options,
                    calibration=arguments.calibration,
                ),
            )
            # Keys of JSON are strings.
            costs = [{int(count): cost for count, cost in layer.items()} for layer in costs]
            for ratio in arguments.ratios:
                counts = allocate_heads(costs, int(ratio * sum(heads) + 1e-9))
                add_rows(name=f"{ratio:.0%} {method}, auto", method=method, counts=counts)

        ratios = [f"{ratio:.0%}" for ratio in arguments.ratios]
        print()
        print_header(["nats a token", *ratios])
        print_row(["unchanged", *[f"{unchanged:.3f}"] * len(ratios)])
        for method in (*METHODS, "outputs, auto", "outputs, aligned, auto"):
            print_row([method, *(f"{results.rows[f'{ratio} {method} | loss']['value']:.3f}" for ratio in ratios)])


if __name__ == "__main__":
    main()
