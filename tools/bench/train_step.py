"""Measures a training step (forward, loss, backward, AdamW) of our decoder and of its peers, in turn in one process.

    OMP_NUM_THREADS=1 python tools/bench/train_step.py --peers plain mea transformers litgpt megatron --out step.json
    python tools/bench/train_step.py --device cuda --shape 1b --batch 8 --seq 4096 --peers plain mea --compile plain mea

CPU time of one thread, so that other users of the machine cost all alike; on a GPU events of the device, in bfloat16.
A ratio is the median over the rounds of a peer's step to the first peer's of the same round, with its bootstrap
interval. Peers that are not installed are named and left out: `pip install --no-deps litgpt==0.5.13 lightning
lightning-utilities torchmetrics pytorch-lightning`, `pip install --no-deps megatron-core==0.16.1`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from local_ranks import facts
from torch import nn

from megatron_mea.attention.hlc import HeadProjection
from megatron_mea.cluster.plan import make_plan
from megatron_mea.config import Config
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.parameter import initialize

SHAPES = {
    "58m": (512, 1536, 8, 8, 4, 64, 32000),
    "1b": (2048, 8192, 16, 32, 8, 64, 128256),
    # A block alone, as good as.
    "58m-block": (512, 1536, 1, 8, 4, 64, 64),
    "1b-block": (2048, 8192, 1, 32, 8, 64, 64),
}
"""hidden, feed-forward, layers, query heads, key/value heads, head_dim, vocabulary."""
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOPs a second, by the vendor's data sheet."""

Loss = Callable[[], torch.Tensor]


class Bench:
    def __init__(self, shape: str, batch: int, seq: int, device: str) -> None:
        sizes = SHAPES[shape]
        self.hidden, self.inner, self.layers, self.heads, self.kv, self.dim, self.vocab = sizes
        self.seq, self.device = seq, torch.device(device)
        ids = torch.randint(0, self.vocab, (batch, seq + 1), generator=torch.Generator().manual_seed(0))
        self.inputs, self.targets = (each.contiguous().to(device) for each in (ids[:, :-1], ids[:, 1:]))
        self.positions = torch.arange(seq, device=device).expand(batch, seq).contiguous()

    def mean_loss(self, logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), self.targets.flatten())

    def config(self, variant: str, components: int | None = None) -> Config:
        model = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv,
            "num_component_heads": components,
            "head_dim": self.dim,
            "attention_variant": variant,
            "max_position_embeddings": self.seq,
        }
        batch = len(self.inputs)
        training = {"steps": 10, "global_batch_size": batch, "micro_batch_size": batch}
        data = {"tokenizer": "none", "train": [], "seq_length": self.seq, "document_mask": False}
        return Config.model_validate(
            {
                "model": model,
                "training": training,
                "data": data,
                "schedule": {"warmup_steps": 1},
                "run": {"dir": "none"},
            }
        )

    def ours(
        self, variant: str, form: str | None = None, components: int | None = None, compiled: bool = False
    ) -> tuple[nn.Module, Loss]:
        model = Decoder(self.config(variant, components).model, compiled=compiled)
        initialize(model, 0)
        for module in model.modules():
            if form and isinstance(module, HeadProjection):
                module.form = lambda tokens: form
        return model, lambda: model(self.inputs, self.positions, self.targets) / self.targets.numel()

    def transformers(self) -> tuple[nn.Module, Loss]:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv,
            head_dim=self.dim,
            max_position_embeddings=self.seq,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
        model = LlamaForCausalLM(config)
        return model, lambda: self.mean_loss(model(input_ids=self.inputs).logits)

    def litgpt(self) -> tuple[nn.Module, Loss]:
        from litgpt.config import Config as LitConfig
        from litgpt.model import GPT

        config = LitConfig(
            name="bench",
            block_size=self.seq,
            n_layer=self.layers,
            n_head=self.heads,
            n_query_groups=self.kv,
            n_embd=self.hidden,
            head_size=self.dim,
            vocab_size=self.vocab,
            padded_vocab_size=self.vocab,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=self.inner,
        )
        with self.device:
            model = GPT(config)
        return model, lambda: self.mean_loss(model(self.inputs))

    def megatron(self) -> tuple[nn.Module, Loss]:
        """megatron-core's local layers; without a GPU two of its functions must be told so."""
        if self.device.type == "cpu":
            import megatron.core.tensor_parallel.random as random

            torch.cuda.current_device = lambda: torch.device("cpu")
            random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        backend = "gloo" if self.device.type == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
        from megatron.core import parallel_state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.transformer_config import TransformerConfig

        parallel_state.initialize_model_parallel(1, 1)
        if self.device.type == "cuda":
            model_parallel_cuda_manual_seed(0)
        bf16 = self.device.type == "cuda"
        config = TransformerConfig(
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_query_groups=self.kv,
            kv_channels=self.dim,
            ffn_hidden_size=self.inner,
            use_cpu_initialization=not bf16,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=F.silu,
            normalization="RMSNorm",
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            gradient_accumulation_fusion=False,
        )
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=self.vocab,
            max_sequence_length=self.seq,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        mask = torch.ones(self.seq, self.seq, dtype=torch.bool, device=self.device).triu(1)[None, None]
        return model, lambda: model(self.inputs, self.positions, mask, labels=self.targets).mean()

    def peers(self) -> dict[str, Callable[[], tuple[nn.Module, Loss]]]:
        return {
            "plain": partial(self.ours, "plain"),
            "plain again": partial(self.ours, "plain"),
            "plain_norm": partial(self.ours, "plain_norm"),
            "mea": partial(self.ours, "mea"),
            "mea folded": partial(self.ours, "mea", "folded"),
            "mea combined": partial(self.ours, "mea", "combined"),
            "mea half": partial(self.ours, "mea", None, self.kv // 2),
            "mea_no_norm": partial(self.ours, "mea_no_norm"),
            "transformers": self.transformers,
            "litgpt": self.litgpt,
            "megatron": self.megatron,
        }


def step_of(model: nn.Module, loss: Loss, device: torch.device) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        begin = time.process_time()
        step()
        return time.process_time() - begin
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % percentile bootstrap of the median."""
    generator = np.random.default_rng(0)
    drawn = generator.choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=["plain", "mea", "transformers", "litgpt", "megatron"])
    parser.add_argument("--compile", nargs="*", default=[], metavar="PEER", help="compiled as well")
    parser.add_argument("--shape", choices=SHAPES, default="58m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    bench = Bench(arguments.shape, arguments.batch, arguments.seq, arguments.device)
    torch.manual_seed(0)
    steps: dict[str, Callable[[], None]] = {}
    available = bench.peers()
    for name in [*arguments.peers, *(f"{name}, compiled" for name in arguments.compile)]:
        peer = name.removesuffix(", compiled")
        make, compiled = available[peer], name != peer
        try:
            model, loss = make(compiled=True) if compiled and isinstance(make, partial) else make()
        except ImportError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
            continue
        model.to(bench.device)
        if bench.device.type == "cuda":
            model.bfloat16()
        if compiled and not isinstance(make, partial):
            model.compile()
        steps[name] = step_of(model, loss, bench.device)
        # The first makes moments and compiles.
        begin = time.monotonic()
        for _ in range(2):
            steps[name]()
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name}: {count:,} parameters, first steps {time.monotonic() - begin:.1f} s", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, bench.device))

    base = next(iter(steps))
    tokens = bench.inputs.numel()
    flops = make_plan(bench.config("plain")).flops.total * tokens
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    peak = next((value for key, value in PEAK.items() if key in device), None)
    rows = {}
    print(f"| step | ms, median | ratio to {base} | 95 % | GFLOP/s |{' MFU |' if peak else ''}")
    print(f"| --- | --- | --- | --- | --- |{' --- |' if peak else ''}")
    for name, mine in times.items():
        ratios = [a / b for a, b in zip(mine, times[base], strict=True)]
        low, high = interval(ratios)
        median = statistics.median(mine)
        rows[name] = {"seconds": mine, "ratio": statistics.median(ratios), "low": low, "high": high}
        spread, rate = f"{low:.3f} to {high:.3f}", flops / median / 1e9
        mfu = f" {flops / median / peak:.1%} |" if peak else ""
        print(f"| {name} | {1e3 * median:.1f} | {rows[name]['ratio']:.3f} | {spread} | {rate:.1f} |{mfu}")
    if arguments.out:
        asked = vars(arguments) | {"out": str(arguments.out)}
        results = {"device_name": device, "flops": flops, "steps": rows}
        arguments.out.write_text(json.dumps(facts() | asked | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
