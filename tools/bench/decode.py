"""Measures one layer's attention of a decoding step: append a token, attend to the whole cache. Prints Markdown tables.

    OMP_NUM_THREADS=1 python tools/bench/decode.py [--dtype bfloat16] [--qk-norm] [--only long short chunks]
        [--out decode.json]

Everything runs in one process, in turn, on one thread, and CPU time is taken: other users of the machine cost
all alike. Layers are cycled where a cache is small, so that none is met twice in a row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from local_ranks import facts
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from megatron_mea.huggingface.configuration_mea import MEAConfig
from megatron_mea.huggingface.modeling_mea import MEAAttention, packed_attention_forward

COLD = 100e6  # bytes of caches that are met in turn: three times this machine's last-level cache


class Preallocated:
    """What a static cache does, without the bookkeeping: the tokens overwrite the last places."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.layers, self.keys, self.values = [], keys, values

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[:, :, -keys.shape[2] :], self.values[:, :, -keys.shape[2] :] = keys, values
        return self.keys, self.values


class Growing(Preallocated):
    """transformers' dynamic cache, which copies itself at every step; shortened again for the next measurement."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__(keys, values)
        self.layer = DynamicLayer()
        self.layer.lazy_initialization(keys, values)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        old = keys.shape[2]
        self.layer.keys, self.layer.values = self.keys[:, :, :-old], self.values[:, :, :-old]
        return self.layer.update(keys, values)


@dataclass
class Case:
    heads: int
    composites: int
    dim: int
    components: int
    batch: int
    length: int
    tokens: int = 1
    dtype: torch.dtype = torch.float32
    qk_norm: bool = False
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = torch.empty(0, dtype=self.dtype).element_size()

    def plain_bytes(self) -> int:
        return 2 * self.batch * self.length * self.composites * self.dim * self.size

    def mea_bytes(self) -> int:
        scalars = self.qk_norm * self.composites * self.batch * self.length * 4
        return 2 * self.batch * self.length * self.components * self.dim * self.size + scalars

    def multiplications(self) -> int:
        """Of the products with the cache as it is stored."""
        return 2 * self.batch * self.tokens * self.length * self.heads * self.components * self.dim

    @torch.inference_mode()
    def ways(self) -> dict[str, Callable[[int], object]]:
        """A function of the layer's number for each way of attending."""
        config = MEAConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=self.heads,
            num_key_value_heads=self.composites,
            num_component_heads=self.components,
            head_dim=self.dim,
            qk_norm=self.qk_norm,
            attn_implementation="sdpa",
        )
        module = MEAAttention(config, 0).to(self.dtype).eval()
        for mix in (module.hlc_k, module.hlc_v):
            torch.nn.init.normal_(mix.weight, std=self.components**-0.5)
        count = max(1, min(6, int(COLD / self.mea_bytes())))

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=self.dtype) * 0.5

        def caches(kind: type, heads: int, dim: int, scalars: int = 0) -> list[Preallocated]:
            shape = (self.batch, heads, self.length)
            return [
                kind(torch.cat((random(*shape, dim), bits(heads, scalars)), -1), random(*shape, dim))
                for _ in range(count)
            ]

        def bits(heads: int, scalars: int) -> torch.Tensor:
            ones = torch.rand(self.batch, heads, self.length, scalars) + 0.5
            if self.dtype in (torch.float16, torch.bfloat16):
                return ones.view(self.dtype)
            return ones.to(self.dtype)

        scale = (torch.rand(self.batch, self.composites, self.tokens) + 0.5) if self.qk_norm else None
        query = random(self.batch, self.heads, self.tokens, self.dim)
        key, value = (random(self.batch, self.composites, self.tokens, self.dim) for _ in range(2))
        part_k, part_v = (random(self.batch, self.components, self.tokens, self.dim) for _ in range(2))
        mask = None
        if self.tokens > 1:
            mask = torch.ones(self.tokens, self.length, dtype=torch.bool).tril(self.length - self.tokens)
            mask = mask.expand(self.batch, 1, -1, -1)
        plain = caches(Preallocated, self.composites, self.dim)
        grown = caches(Growing, self.composites, self.dim)
        packed = [self.components * self.dim, self.composites if self.qk_norm else 0]
        mea, mea_grown = caches(Preallocated, 1, *packed), caches(Growing, 1, *packed)

        def best(layer: int) -> object:
            keys, values = plain[layer % count].update(key, value, 0)
            return packed_attention_forward(module, query, keys, values, mask, module.scaling)

        def stock(layer: int) -> object:
            keys, values = grown[layer % count].update(key, value, 0)
            return sdpa_attention_forward(module, query, keys, values, mask, scaling=module.scaling)

        def composed(layer: int) -> object:
            keys, values, scales = module._through_cache(mea[layer % count], part_k, part_v, scale)
            keys, values = module.hlc_k(keys), module.hlc_v(values)
            if scales is not None:
                keys = (keys * scales[..., None]).to(self.dtype)
            return packed_attention_forward(module, query, keys, values, mask, module.scaling)

        def absorbed(layer: int, among: list[Preallocated] = mea) -> object:
            keys, values, scales = module._through_cache(among[layer % count], part_k, part_v, scale)
            wide, keys, values, mix = module._absorb(query, keys, values)
            output, _ = packed_attention_forward(module, wide, keys, values, mask, module.scaling, scales)
            return module._resolve(output, mix)

        return {
            "plain, best": best,
            "plain, transformers": stock,
            "composed": composed,
            "absorbed": absorbed,
            "absorbed, growing": lambda layer: absorbed(layer, mea_grown),
        }


@torch.inference_mode()
def measure(ways: dict[str, Callable[[int], object]], rounds: int, budget: float) -> dict[str, float]:
    """Median CPU milliseconds of each way, taken in turn; short ones several times in a row."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    repeats = {}
    for name, way in ways.items():
        way(0)
        start = time.process_time()
        way(1)
        repeats[name] = 1 + int(3e-3 / max(time.process_time() - start, 1e-5))
    begin = time.monotonic()
    for turn in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            for repeat in range(repeats[name]):
                way(turn + repeat)
            spent[name].append((time.process_time() - start) / repeats[name] * 1e3)
        if turn >= 2 and time.monotonic() - begin > budget:
            break
    return {name: statistics.median(values) for name, values in spent.items()}


def machine(dtype: torch.dtype) -> tuple[float, float]:
    """(giga-multiplications a second of a skinny product, gigabytes a second read), on one thread."""
    rows, keys = torch.randn(32, 256, dtype=dtype), torch.randn(256, 1 << 12, dtype=dtype)
    long = torch.randn(1 << 27 if dtype == torch.float32 else 1 << 28, dtype=torch.float32)
    found = measure({"product": lambda _: rows @ keys, "read": lambda _: long.sum()}, 5, 10)
    return 32 * 256 * (1 << 12) / found["product"] / 1e6, long.numel() * 4 / found["read"] / 1e6


def table(columns: list[str], rows: list[list[str]]) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--qk-norm", action="store_true")
    parser.add_argument("--only", nargs="+", choices=["long", "short", "chunks"], default=["long", "short", "chunks"])
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 64], metavar=("H", "h", "d"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget", type=float, default=8, help="seconds a row")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype, (heads, composites, dim) = getattr(torch, args.dtype), args.heads
    fixed = {"dtype": dtype, "qk_norm": args.qk_norm}

    products, read = machine(dtype)
    capability = torch.backends.cpu.get_cpu_capability()
    results: list[dict[str, Any]] = []

    def measured(part: str, components: int, batch: int, length: int, tokens: int = 1) -> dict[str, Any]:
        case = Case(heads, composites, dim, components, batch, length, tokens, **fixed)
        row = {
            "table": part,
            "components": components,
            "batch": batch,
            "context": length,
            "tokens": tokens,
            "plain_bytes": case.plain_bytes(),
            "mea_bytes": case.mea_bytes(),
            "limit_by_products_ms": case.multiplications() / products / 1e6,
            "limit_by_traffic_ms": case.mea_bytes() / read / 1e6,
            "ms": measure(case.ways(), args.rounds, args.budget),
        }
        results.append(row)
        return row

    print(f"H/h/d {heads}/{composites}/{dim}, {args.dtype}, {capability}, ", end="")
    print(f"{products:.0f} G multiplications/s, {read:.1f} GB/s read, torch {torch.__version__}")
    if "long" in args.only:
        rows = []
        for components in (composites // 2, composites // 4):
            for batch in (1, 8):
                for length in args.lengths:
                    row = measured("long", components, batch, length)
                    ms = row["ms"]
                    base = ms["plain, best"]
                    sides = [f"{value:.2f}" for value in ms.values()]
                    ratios = [ms["composed"] / base, ms["absorbed"] / base]
                    ratios.append(ms["absorbed, growing"] / ms["plain, transformers"])
                    cells = [f"{row[f'{kind}_bytes'] / 1e6:.1f}" for kind in ("plain", "mea")]
                    limits = [f"{row[f'limit_by_{what}_ms']:.2f}" for what in ("products", "traffic")]
                    shape = [str(components), str(batch), str(length)]
                    rows.append(shape + cells + sides + limits + [f"{ratio:.2f}" for ratio in ratios])
        names = [f"{name}, ms" for name in ms]
        head = ["h'", "batch", "context", "plain MB", "MEA MB", *names, "limit by products, ms", "limit by traffic, ms"]
        ratios = ["composed / best plain", "absorbed / best plain", "absorbed, growing / transformers"]
        table([*head, *ratios], rows)
    if "short" in args.only:
        rows = []
        for components in (composites // 2, composites // 4):
            for batch, length in ((1, 16), (1, 64), (1, 256), (1, 1024), (8, 16), (8, 64)):
                ms = measured("short", components, batch, length)["ms"]
                shown = [f"{ms[name]:.3f}" for name in ("composed", "absorbed")]
                ratio = f"{ms['absorbed'] / ms['composed']:.2f}"
                rows.append([str(components), str(batch), str(length), *shown, ratio])
        table(["h'", "batch", "context", "composed, ms", "absorbed, ms", "absorbed / composed"], rows)
    if "chunks" in args.only:
        rows = []
        for components in (composites // 2, composites // 4):
            for length in (1024, 8192):
                row = [str(components), str(length)]
                for tokens in (1, 2, 3, 4, 6, 8, 16):
                    ms = measured("chunks", components, 1, length, tokens)["ms"]
                    row.append(f"{ms['absorbed'] / ms['composed']:.2f}")
                rows.append(row)
        table(["h'", "context", *(f"{n} tokens" for n in (1, 2, 3, 4, 6, 8, 16))], rows)
    if args.out:
        asked = {"H/h/d": args.heads, "dtype": args.dtype, "qk_norm": args.qk_norm, "rounds": args.rounds}
        speeds = {"capability": capability, "giga_multiplications_a_second": products, "gb_read_a_second": read}
        args.out.write_text(json.dumps(facts() | asked | speeds | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
