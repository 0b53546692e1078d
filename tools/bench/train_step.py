"""Measures a training step (forward, loss, backward, AdamW) of our decoder and of its peers, in turn in one process.

    OMP_NUM_THREADS=1 python tools/bench/train_step.py --peers plain mea transformers litgpt megatron --out step.json
    python tools/bench/train_step.py --device cuda --shape 1b --batch 8 --seq 4096 --peers plain mea --compile plain mea

CPU time of one thread, so that other users of the machine cost all alike; on a GPU events of the device, in bfloat16.
A ratio is the median over the rounds of a peer's step to the first peer's of the same round, with its bootstrap
interval. Peers that are not installed are named and left out: `pip install --no-deps litgpt==0.5.13 lightning
lightning-utilities torchmetrics pytorch-lightning`, `pip install --no-deps megatron-core==0.16.1`.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    BenchParser,
    device_name,
    free_port,
    in_turn,
    median_ratio,
    peak_flops,
    print_header,
    print_row,
    seconds,
    write_results,
)
from torch import nn

from megatron_mea.attention.hlc import KeyValueProjection
from megatron_mea.config import Config
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.parameter import init_parameters
from megatron_mea.plan.plan import make_plan


class Shape(NamedTuple):
    """Sizes of a model; `inner` is the feed-forward's, `kv` the number of key/value heads, `dim` head_dim."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv: int
    dim: int
    vocab: int


SHAPES = {
    "58m": Shape(hidden=512, inner=1536, layers=8, heads=8, kv=4, dim=64, vocab=32000),
    "1b": Shape(hidden=2048, inner=8192, layers=16, heads=32, kv=8, dim=64, vocab=128256),
    # Little but a block.
    "58m-block": Shape(hidden=512, inner=1536, layers=1, heads=8, kv=4, dim=64, vocab=64),
    "1b-block": Shape(hidden=2048, inner=8192, layers=1, heads=32, kv=8, dim=64, vocab=64),
}

Loss = Callable[[], torch.Tensor]


class Peers:
    """Models of the same shape, each with a function that computes its mean loss of the same random batch."""

    def __init__(self, *, shape: str, batch: int, seq: int, device: str) -> None:
        self.shape, self.seq, self.device = SHAPES[shape], seq, torch.device(device)
        ids = torch.randint(0, self.shape.vocab, (batch, seq + 1), generator=torch.Generator().manual_seed(0))
        self.inputs, self.targets = (part.contiguous().to(device) for part in (ids[:, :-1], ids[:, 1:]))
        self.positions = torch.arange(seq, device=device).expand(batch, seq).contiguous()

    def mean_loss(self, logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy a token of logits (batch, seq, vocabulary)."""
        return F.cross_entropy(logits.flatten(0, 1).float(), self.targets.flatten())

    def config(self, variant: str, *, components: int | None = None) -> Config:
        """Our configuration; `components`: number of component heads, by default that of composite heads."""
        model = {
            "vocab_size": self.shape.vocab,
            "hidden_size": self.shape.hidden,
            "intermediate_size": self.shape.inner,
            "num_hidden_layers": self.shape.layers,
            "num_attention_heads": self.shape.heads,
            "num_key_value_heads": self.shape.kv,
            "num_component_heads": components,
            "head_dim": self.shape.dim,
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
        self, variant: str, *, form: str | None = None, components: int | None = None, compiled: bool = False
    ) -> tuple[nn.Module, Loss]:
        """Our decoder; `form`: always fold or always combine, instead of what costs less."""
        model = Decoder(self.config(variant, components=components).model, compile_blocks=compiled)
        init_parameters(model, 0)
        for module in model.modules():
            if form and isinstance(module, KeyValueProjection):
                module.form = lambda tokens: form
        return model, lambda: model(self.inputs, self.positions, self.targets) / self.targets.numel()

    def transformers(self) -> tuple[nn.Module, Loss]:
        """transformers' Llama, with sdpa."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.shape.vocab,
            hidden_size=self.shape.hidden,
            intermediate_size=self.shape.inner,
            num_hidden_layers=self.shape.layers,
            num_attention_heads=self.shape.heads,
            num_key_value_heads=self.shape.kv,
            head_dim=self.shape.dim,
            max_position_embeddings=self.seq,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
        model = LlamaForCausalLM(config)
        return model, lambda: self.mean_loss(model(input_ids=self.inputs).logits)

    def litgpt(self) -> tuple[nn.Module, Loss]:
        """litgpt's GPT."""
        from litgpt.config import Config as LitConfig
        from litgpt.model import GPT

        config = LitConfig(
            name="bench",
            block_size=self.seq,
            n_layer=self.shape.layers,
            n_head=self.shape.heads,
            n_query_groups=self.shape.kv,
            n_embd=self.shape.hidden,
            head_size=self.shape.dim,
            vocab_size=self.shape.vocab,
            padded_vocab_size=self.shape.vocab,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=self.shape.inner,
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

        backend = "gloo" if self.device.type == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
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
            num_layers=self.shape.layers,
            hidden_size=self.shape.hidden,
            num_attention_heads=self.shape.heads,
            num_query_groups=self.shape.kv,
            kv_channels=self.shape.dim,
            ffn_hidden_size=self.shape.inner,
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
            vocab_size=self.shape.vocab,
            max_sequence_length=self.seq,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        mask = torch.ones(self.seq, self.seq, dtype=torch.bool, device=self.device).triu(1)[None, None]
        return model, lambda: model(self.inputs, self.positions, mask, labels=self.targets).mean()

    def by_name(self) -> dict[str, Callable[..., tuple[nn.Module, Loss]]]:
        """Functions that build a model; ours, which are partials, take `compiled`."""
        return {
            "plain": partial(self.ours, "plain"),
            "plain again": partial(self.ours, "plain"),
            "plain_norm": partial(self.ours, "plain_norm"),
            "mea": partial(self.ours, "mea"),
            "mea folded": partial(self.ours, "mea", form="folded"),
            "mea combined": partial(self.ours, "mea", form="combined"),
            "mea half": partial(self.ours, "mea", components=self.shape.kv // 2),
            "mea_no_norm": partial(self.ours, "mea_no_norm"),
            "transformers": self.transformers,
            "litgpt": self.litgpt,
            "megatron": self.megatron,
        }


def training_step(*, model: nn.Module, loss: Loss) -> Callable[[], None]:
    """A function that takes a step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=next(model.parameters()).is_cuda)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def median_interval(ratios: list[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median."""
    generator = np.random.default_rng(0)
    resampled = generator.choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    return float(low), float(high)


def build_steps(peers: Peers, *, names: list[str], compiled_names: list[str]) -> dict[str, Callable[[], None]]:
    """Training steps by name, warmed up, of the peers that are installed; says on stderr what becomes of each."""
    steps: dict[str, Callable[[], None]] = {}
    available = peers.by_name()
    for name in [*names, *(f"{name}, compiled" for name in compiled_names)]:
        peer = name.removesuffix(", compiled")
        build, compiled = available[peer], name != peer
        try:
            model, loss = build(compiled=True) if compiled and isinstance(build, partial) else build()
        except ImportError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
            continue

        model.to(peers.device)
        if peers.device.type == "cuda":
            model.bfloat16()
        if compiled and not isinstance(build, partial):
            model.compile()

        steps[name] = training_step(model=model, loss=loss)
        # The first creates moments and compiles.
        begin = time.monotonic()
        for _ in range(2):
            steps[name]()

        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name}: {count:,} parameters, first steps {time.monotonic() - begin:.1f} s", file=sys.stderr)

    return steps


def main() -> None:
    parser = BenchParser(__doc__)
    parser.add_argument("--peers", nargs="+", default=["plain", "mea", "transformers", "litgpt", "megatron"])
    parser.add_argument("--compile", nargs="*", default=[], metavar="PEER", help="compiled as well")
    parser.add_argument("--shape", choices=SHAPES, default="58m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse(rounds=9)
    peers = Peers(shape=arguments.shape, batch=arguments.batch, seq=arguments.seq, device=arguments.device)
    torch.manual_seed(0)
    steps = build_steps(peers=peers, names=arguments.peers, compiled_names=arguments.compile)
    times = in_turn({name: partial(seconds, step, arguments.device) for name, step in steps.items()}, arguments.rounds)

    base = next(iter(steps))
    flops = make_plan(peers.config("plain")).flops.total * peers.inputs.numel()
    device = device_name(arguments.device)
    peak = peak_flops(device)
    rows = {}
    print_header(["step", "ms, median", f"ratio to {base}", "95 %", "GFLOP/s", *["MFU"] * bool(peak)])
    for name, values in times.items():
        median, ratio = statistics.median(values), median_ratio(values, times[base])
        low, high = median_interval([a / b for a, b in zip(values, times[base], strict=True)])
        rows[name] = {"seconds": values, "ratio": ratio, "low": low, "high": high}
        cells = [name, f"{1e3 * median:.1f}", f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", f"{flops / median / 1e9:.1f}"]
        print_row([*cells, *([f"{flops / median / peak:.1%}"] if peak else [])])

    settings = vars(arguments) | {"out": str(arguments.out)}
    write_results(arguments.out, settings | {"device_name": device, "flops": flops, "steps": rows})


if __name__ == "__main__":
    main()
