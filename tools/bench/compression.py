"""What the ways of compressing cost a pretrained model, at equal cache:

    python tools/bench/compression.py MODEL --out FILE.json --calibration PREFIX --validation PREFIX [--tokens N]

MODEL is what `compress` takes. Rows are kept in FILE.json as they come, and the same command goes on where it stopped.
docs/compression.md has results. At the end a table of the losses is printed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from local_ranks import facts

from megatron_mea.compression.budget import best_heads
from megatron_mea.compression.calibrate import TOKENS, head_moments, open_data
from megatron_mea.compression.compress import measured_costs
from megatron_mea.compression.origin import Origin, open_origin
from megatron_mea.compression.sensitivity import losses_of_changes
from megatron_mea.compression.virtual import Compressed, Factoriser
from megatron_mea.data.corpora import IGNORE


class Results:
    """Rows by name, on disk as soon as they are there."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = json.loads(file.read_text()) if file.is_file() else {"facts": facts()}

    def row(self, name: str, make: Callable[[], object]) -> object:
        if name not in self.rows:
            began = time.process_time()
            value = make()
            self.rows[name] = {"value": value, "cpu_seconds": round(time.process_time() - began, 1)}
            self.file.write_text(json.dumps(self.rows, indent=1) + "\n")
            print(name, json.dumps(self.rows[name]), flush=True)
        return self.rows[name]["value"]


def cross_entropy(model: Origin | Compressed, windows: object) -> float:
    """nats a token, a layer at a time."""
    total, count = 0.0, 0
    for batch in windows:
        total += losses_of_changes(model, None, (), batch, windows.document_mask)[None]
        count += int((batch.targets != IGNORE).sum())
    return total / count


def by_hand(origin: Origin, ratio: float) -> list[int]:
    """Without any measurement: evenly, and where that does not come out, the middle layers get one head less."""
    layers, heads = origin.model.num_hidden_layers, origin.model.num_key_value_heads
    budget = int(ratio * layers * heads + 1e-9)
    more, fewer = -(-budget // layers), budget // layers
    plenty = budget - fewer * layers
    spared = set(range(plenty // 2)) | set(range(layers - (plenty - plenty // 2), layers))
    return [more if layer in spared else fewer for layer in range(layers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="of the validation data (default: 8192)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.67, 0.5, 0.34])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(arguments.out)
    with open_origin(arguments.model, arguments.out) as origin:
        windows = open_data(origin, arguments.validation, "--validation", tokens=arguments.tokens)
        seen = open_data(origin, arguments.calibration, "--calibration", tokens=TOKENS)
        unchanged = results.row("unchanged", lambda: cross_entropy(origin, windows))
        moments = None

        def measured() -> dict:
            nonlocal moments
            if moments is None:
                moments = head_moments(origin, seen, set(range(origin.model.num_hidden_layers)))
            return moments

        methods = {
            "weights": lambda: Factoriser(origin, None, False),
            "weights, aligned": lambda: Factoriser(origin, None, True),
            "outputs": lambda: Factoriser(origin, measured(), False),
            "outputs, aligned": lambda: Factoriser(origin, measured(), True),
        }
        heads = origin.model.component_heads
        factorisers: dict[str, Factoriser] = {}

        def factoriser(method: str) -> Factoriser:
            if method not in factorisers:
                factorisers[method] = methods[method]()
            return factorisers[method]

        def loss(method: str, counts: list[int]) -> float:
            return cross_entropy(Compressed(origin, counts, factoriser(method)), windows)

        for ratio in sorted(arguments.ratios):
            for method in methods:
                counts = by_hand(origin, ratio)
                name = f"{ratio:.0%} {method}"
                results.row(f"{name} | heads", lambda counts=counts: counts)
                results.row(f"{name} | loss", lambda method=method, counts=counts: loss(method, counts))
        options = [list(range(1, had + 1)) for had in heads]
        for method in ("outputs", "outputs, aligned"):
            key = f"costs {method}"
            costs = results.row(
                key, lambda method=method: measured_costs(origin, factoriser(method), options, arguments.calibration)
            )
            costs = [{int(number): cost for number, cost in one.items()} for one in costs]
            for ratio in arguments.ratios:
                counts = best_heads(costs, int(ratio * sum(heads) + 1e-9))
                name = f"{ratio:.0%} {method}, auto"
                results.row(f"{name} | heads", lambda counts=counts: counts)
                results.row(f"{name} | loss", lambda method=method, counts=counts: loss(method, counts))
        cells = [f"{ratio:.0%}" for ratio in arguments.ratios]
        print(f"\n| nats a token | {' | '.join(cells)} |\n| --- |{' --- |' * len(cells)}")
        print(f"| unchanged |{f' {unchanged:.3f} |' * len(cells)}")
        for method in (*methods, "outputs, auto", "outputs, aligned, auto"):
            losses = [results.rows[f"{ratio} {method} | loss"]["value"] for ratio in cells]
            print(f"| {method} | {' | '.join(f'{each:.3f}' for each in losses)} |")


if __name__ == "__main__":
    main()
