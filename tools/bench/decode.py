"""Measures one layer's attention of a decoding step: append a token, attend to the full cache. Prints Markdown tables.

    OMP_NUM_THREADS=1 python tools/bench/decode.py [--dtype bfloat16] [--qk-norm] [--only long short chunks]
        [--out decode.json]

Everything runs in one process, in turn, on one thread, and CPU time is taken: other users of the machine cost
all alike. Layers are cycled where a cache is small, so that none is met twice in a row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from common import BenchParser, print_table, seconds, write_results
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from megatron_mea.exported.attention_mea import MEAAttention, packed_attention_forward
from megatron_mea.exported.configuration_mea import MEAConfig

COLD_BYTES = 100e6
"""Of all caches that are cycled: three times the last-level cache of the machine in docs/decoding.md."""
PARTS = ("long", "short", "chunks")
CHUNKS = (1, 2, 3, 4, 6, 8, 16)
"""Tokens at a time."""

Ways = dict[str, Callable[[int], object]]
"""Ways of attending by name: functions of the layer's number."""


class Preallocated:
    """A static cache without its bookkeeping: new tokens overwrite the last positions."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.layers, self.keys, self.values = [], keys, values

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, with the new ones at the end; the signature is that of transformers' caches."""
        self.keys[:, :, -keys.shape[2] :], self.values[:, :, -keys.shape[2] :] = keys, values
        return self.keys, self.values


class Growing(Preallocated):
    """transformers' dynamic cache, which copies itself at every step; shortened again for the next measurement."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__(keys, values)
        self.layer = DynamicLayer()
        self.layer.lazy_initialization(keys, values)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        new = keys.shape[2]
        self.layer.keys, self.layer.values = self.keys[:, :, :-new], self.values[:, :, :-new]
        return self.layer.update(keys, values)


@dataclass(kw_only=True)
class Case:
    """One layer's attention of `tokens` new tokens to a cache of `length`, which they end."""

    heads: int
    composites: int
    dim: int
    components: int
    batch: int
    length: int
    tokens: int = 1
    dtype: torch.dtype = torch.float32
    qk_norm: bool = False
    element_size: int = field(init=False)

    def __post_init__(self) -> None:
        self.element_size = torch.empty(0, dtype=self.dtype).element_size()

    def plain_bytes(self) -> int:
        """Bytes of the composite heads' cache."""
        return 2 * self.batch * self.length * self.composites * self.dim * self.element_size

    def mea_bytes(self) -> int:
        """Bytes of the component heads' cache, with the scalars of `qk_norm`."""
        scalars = self.qk_norm * self.composites * self.batch * self.length * 4
        return 2 * self.batch * self.length * self.components * self.dim * self.element_size + scalars

    def multiplications(self) -> int:
        """Multiplications of the products with the component heads' cache."""
        return 2 * self.batch * self.tokens * self.length * self.heads * self.components * self.dim

    @torch.inference_mode()
    def ways(self) -> Ways:
        """The ways of attending, each with as many layers' caches as `COLD_BYTES` asks for."""
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
        for combination in (module.hlc_k, module.hlc_v):
            torch.nn.init.normal_(combination.weight, std=self.components**-0.5)

        count = max(1, min(6, int(COLD_BYTES / self.mea_bytes())))

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=self.dtype) * 0.5

        def caches(*, kind: type, heads: int, dim: int, scalars: int = 0) -> list[Preallocated]:
            shape = (self.batch, heads, self.length)
            return [
                kind(torch.cat((random(*shape, dim), scalar_bits(heads, scalars)), -1), random(*shape, dim))
                for _ in range(count)
            ]

        def scalar_bits(heads: int, scalars: int) -> torch.Tensor:
            """Float32 scalars of `qk_norm` as the cache stores them: a 16-bit one holds each in two places."""
            values = torch.rand(self.batch, heads, self.length, scalars) + 0.5
            if self.dtype in (torch.float16, torch.bfloat16):
                return values.view(self.dtype)
            return values.to(self.dtype)

        scale = (torch.rand(self.batch, self.composites, self.tokens) + 0.5) if self.qk_norm else None
        query = random(self.batch, self.heads, self.tokens, self.dim)
        key, value = (random(self.batch, self.composites, self.tokens, self.dim) for _ in range(2))
        component_key, component_value = (random(self.batch, self.components, self.tokens, self.dim) for _ in range(2))
        mask = None
        if self.tokens > 1:
            mask = torch.ones(self.tokens, self.length, dtype=torch.bool).tril(self.length - self.tokens)
            mask = mask.expand(self.batch, 1, -1, -1)

        plain = caches(kind=Preallocated, heads=self.composites, dim=self.dim)
        plain_growing = caches(kind=Growing, heads=self.composites, dim=self.dim)
        mea, mea_growing = (
            caches(kind=kind, heads=1, dim=self.components * self.dim, scalars=self.composites if self.qk_norm else 0)
            for kind in (Preallocated, Growing)
        )

        def attend(
            query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, key_scale: torch.Tensor | None = None
        ) -> torch.Tensor:
            return packed_attention_forward(
                module, query, keys, values, attention_mask=mask, scaling=module.scaling, key_scale=key_scale
            )[0]

        def best(layer: int) -> object:
            keys, values = plain[layer % count].update(key, value, layer_idx=0)
            return attend(query, keys, values)

        def stock(layer: int) -> object:
            keys, values = plain_growing[layer % count].update(key, value, layer_idx=0)
            return sdpa_attention_forward(module, query, keys, values, attention_mask=mask, scaling=module.scaling)

        def through_cache(cache: Preallocated) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            return module._update_cache(component_key, component_value, scale, cache=cache)

        def composed(layer: int) -> object:
            keys, values, scales = through_cache(mea[layer % count])
            keys, values = module.hlc_k(keys), module.hlc_v(values)
            if scales is not None:
                keys = (keys * scales[..., None]).to(self.dtype)
            return attend(query, keys, values)

        def absorbed(layer: int, *, layers: list[Preallocated] = mea) -> object:
            keys, values, scales = through_cache(layers[layer % count])
            wide_query, keys, values, mix = module._absorb(query, keys, values)
            return module._combine_output(attend(wide_query, keys, values, key_scale=scales), mix)

        return {
            "plain, best": best,
            "plain, transformers": stock,
            "composed": composed,
            "absorbed": absorbed,
            "absorbed, growing": partial(absorbed, layers=mea_growing),
        }


@torch.inference_mode()
def measure(*, ways: Ways, rounds: int, budget: float) -> dict[str, float]:
    """Median CPU milliseconds of each way, in turn, short ones several times in a row.

    Args:
        budget: seconds after which no round begins, but the first three do.
    """
    repeats = {}
    for name, way in ways.items():
        way(0)
        repeats[name] = 1 + int(3e-3 / max(seconds(partial(way, 1), "cpu"), 1e-5))

    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    begin = time.monotonic()
    for turn in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            for repeat in range(repeats[name]):
                way(turn + repeat)
            milliseconds[name].append((time.process_time() - start) / repeats[name] * 1e3)

        if turn >= 2 and time.monotonic() - begin > budget:
            break

    return {name: statistics.median(values) for name, values in milliseconds.items()}


def machine_limits(dtype: torch.dtype) -> tuple[float, float]:
    """(giga-multiplications a second of a skinny product, gigabytes a second read), on one thread."""
    rows, keys = torch.randn(32, 256, dtype=dtype), torch.randn(256, 1 << 12, dtype=dtype)
    long = torch.randn(1 << 27 if dtype == torch.float32 else 1 << 28, dtype=torch.float32)
    ms = measure(ways={"product": lambda _: rows @ keys, "read": lambda _: long.sum()}, rounds=5, budget=10)
    return 32 * 256 * (1 << 12) / ms["product"] / 1e6, long.numel() * 4 / ms["read"] / 1e6


def main() -> None:
    parser = BenchParser(__doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--qk-norm", action="store_true")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 64], metavar=("H", "h", "d"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--budget", type=float, default=8, help="seconds a row")
    args = parser.parse(rounds=9, parts=PARTS)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype, (heads, composites, dim) = getattr(torch, args.dtype), args.heads
    products, read = machine_limits(dtype)
    capability = torch.backends.cpu.get_cpu_capability()
    results: list[dict[str, Any]] = []

    def measured_row(*, part: str, components: int, batch: int, length: int, tokens: int = 1) -> dict[str, Any]:
        """A row of the table `part`, which is added to the results."""
        case = Case(
            heads=heads,
            composites=composites,
            dim=dim,
            components=components,
            batch=batch,
            length=length,
            tokens=tokens,
            dtype=dtype,
            qk_norm=args.qk_norm,
        )
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
            "ms": measure(ways=case.ways(), rounds=args.rounds, budget=args.budget),
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
                    row = measured_row(part="long", components=components, batch=batch, length=length)
                    ms = row["ms"]
                    best = ms["plain, best"]
                    ratios = [ms["composed"] / best, ms["absorbed"] / best]
                    ratios.append(ms["absorbed, growing"] / ms["plain, transformers"])
                    cells = [str(components), str(batch), str(length)]
                    cells += [f"{row[key] / 1e6:.1f}" for key in ("plain_bytes", "mea_bytes")]
                    cells += [f"{value:.2f}" for value in ms.values()]
                    cells += [f"{row[key]:.2f}" for key in ("limit_by_products_ms", "limit_by_traffic_ms")]
                    rows.append(cells + [f"{ratio:.2f}" for ratio in ratios])

        columns = ["h'", "batch", "context", "plain MB", "MEA MB", *(f"{name}, ms" for name in ms)]
        columns += ["limit by products, ms", "limit by traffic, ms"]
        columns += ["composed / best plain", "absorbed / best plain", "absorbed, growing / transformers"]
        print_table(columns, rows)

    if "short" in args.only:
        rows = []
        for components in (composites // 2, composites // 4):
            for batch, length in ((1, 16), (1, 64), (1, 256), (1, 1024), (8, 16), (8, 64)):
                ms = measured_row(part="short", components=components, batch=batch, length=length)["ms"]
                cells = [str(components), str(batch), str(length)]
                cells += [f"{ms[name]:.3f}" for name in ("composed", "absorbed")]
                rows.append([*cells, f"{ms['absorbed'] / ms['composed']:.2f}"])

        print_table(["h'", "batch", "context", "composed, ms", "absorbed, ms", "absorbed / composed"], rows)

    if "chunks" in args.only:
        rows = []
        for components in (composites // 2, composites // 4):
            for length in (1024, 8192):
                cells = [str(components), str(length)]
                for tokens in CHUNKS:
                    row = measured_row(part="chunks", components=components, batch=1, length=length, tokens=tokens)
                    cells.append(f"{row['ms']['absorbed'] / row['ms']['composed']:.2f}")

                rows.append(cells)

        print_table(["h'", "context", *(f"{tokens} tokens" for tokens in CHUNKS)], rows)

    settings = {"H/h/d": args.heads, "dtype": args.dtype, "qk_norm": args.qk_norm, "rounds": args.rounds}
    speeds = {"capability": capability, "giga_multiplications_a_second": products, "gb_read_a_second": read}
    write_results(args.out, settings | speeds | {"results": results})


if __name__ == "__main__":
    main()
