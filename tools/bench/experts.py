"""Measures a mixture of experts beside a dense feed-forward of equal active FLOPs, forward and backward.

    OMP_NUM_THREADS=1 python tools/bench/experts.py [--device cuda] [--rounds N] [--out experts.json]

Each of k experts out of E is as wide as a k-th of the dense feed-forward. `layer` is the feed-forward alone, `step` a
decoder of two blocks with loss. CPU time of one thread (on a GPU events of the device, bfloat16), in turn; medians of
the ratios to the dense one of the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from common import BenchParser, device_name, in_turn, median_ratio, print_header, print_row, seconds, write_results

from megatron_mea.config.load import parse_model
from megatron_mea.config.schema import Model
from megatron_mea.model.decoder import MLP, Decoder
from megatron_mea.model.moe import MoE, RouterLosses
from megatron_mea.parallel.parameter import init_parameters

SIZES = {
    "cpu": {"hidden_size": 512, "num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 256},
    "cuda": {"hidden_size": 2048, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
}
"""On the GPU those of Qwen3-30B-A3B."""
TOKENS = (2048, 8192)
SEQ = 2048


def models(device: str) -> dict[str, Model]:
    """The settings of the dense and of the routed model."""
    sizes = SIZES[device]
    width = sizes["num_experts_per_tok"] * sizes["moe_intermediate_size"]
    shared = {"vocab_size": 1024, "num_hidden_layers": 2, "attention_variant": "plain", "intermediate_size": width}
    shared |= {"hidden_size": sizes["hidden_size"]}
    return {"dense": parse_model(shared), "experts": parse_model(shared | sizes)}


def layer_step(model: Model, *, tokens: int, device: str) -> Callable[[], None]:
    """Forward and backward of a feed-forward."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layer = MoE(model, 0, losses=RouterLosses(balance="sequence", balance_coef=0.001)) if model.num_experts else None
    layer = layer or MLP(model, 0)
    init_parameters(layer, 1)
    layer.to(device, dtype)
    x = torch.randn(tokens // SEQ, SEQ, model.hidden_size, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(x)

    def step() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(upstream)

    return step


def decoder_step(model: Model, *, tokens: int, device: str) -> Callable[[], None]:
    """Forward and backward of a decoder with its loss."""
    losses = RouterLosses(balance="sequence", balance_coef=0.001)
    decoder = Decoder(model, router_losses=losses)
    init_parameters(decoder, 1)
    decoder.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    ids = torch.randint(0, model.vocab_size, (tokens // SEQ, SEQ), device=device)
    positions = torch.arange(SEQ, device=device).expand_as(ids)

    def step() -> None:
        decoder.zero_grad()
        decoder(ids, positions, ids).backward()

    return step


def main() -> None:
    arguments = BenchParser(__doc__).parse(devices=SIZES, rounds=5)
    device, rows = arguments.device, []
    print_header(["what", "tokens", "dense, ms", "experts, ms", "experts / dense"])
    for name, build in (("layer", layer_step), ("step", decoder_step)):
        for tokens in TOKENS:
            steps = {kind: build(model, tokens=tokens, device=device) for kind, model in models(device).items()}
            for warm_up in steps.values():
                warm_up()

            times = in_turn({kind: partial(seconds, step, device) for kind, step in steps.items()}, arguments.rounds)
            ratio = median_ratio(times["experts"], times["dense"])
            rows.append({"what": name, "tokens": tokens, "seconds": times, "ratio": ratio})
            medians = (f"{1e3 * statistics.median(times[kind]):.0f}" for kind in ("dense", "experts"))
            print_row([name, f"{tokens:,}", *medians, f"{ratio:.2f}"])

    write_results(arguments.out, {"device": device_name(device), "sizes": SIZES[device], "rows": rows})


if __name__ == "__main__":
    main()
