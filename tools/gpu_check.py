"""Checks on a GPU, in minutes, the correctness of the CUDA paths, and speed and memory of the 1B model.

    python tools/gpu_check.py [NAME ...] [--out gpu.json]

Every check runs, whatever becomes of the others; exit status 1 where one failed. NAMEs choose among them: kernels,
documents, context, compile, layouts, resume, waits, model (default: all). One process, one GPU.
"""

from __future__ import annotations

import gzip
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from common import QUICKSTART, BenchParser, peak_flops, seconds
from local_ranks import launch, layout, make_config, random_step

from megatron_mea.attention.causal import causal_attention
from megatron_mea.attention.document_mask import PerDocumentAttention, attention_function
from megatron_mea.attention.head_norm import head_norm
from megatron_mea.config import Config
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.grid import ContextGroup
from megatron_mea.parallel.parameter import init_parameters, parameters_by_name
from megatron_mea.plan.plan import make_plan
from megatron_mea.training.build import build_engine

SMALL = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "embedding_initializer_range": 0.4,
}
TEXT = QUICKSTART / "validation.jsonl.gz"
DEVICE = torch.device("cuda")
Facts = dict[str, Any]


def median_seconds(work: Callable[[], object], *, rounds: int = 10) -> float:
    """Median seconds of a call on the device, after three that warm up."""
    for _ in range(3):
        work()

    # Of an even number of rounds the upper one.
    return statistics.median_high(seconds(work, "cuda") for _ in range(rounds))


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The Frobenius norm of the difference relative to that of `expected`, in float64."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def kernels() -> Facts:
    """The head norm's kernels against float64, on x (batch, H, seq, d) that lies in memory as (batch, seq, H, d)."""
    facts = {}
    for dtype, limit in ((torch.bfloat16, 6e-3), (torch.float32, 1e-6)):
        for width in (64, 80, 128, 256):
            x = torch.randn(2, 333, 8, width, device=DEVICE, dtype=dtype).transpose(1, 2).requires_grad_()
            gain = torch.rand(width, device=DEVICE, dtype=dtype).requires_grad_()
            upstream = torch.randn(2, 333, 8 * width, device=DEVICE, dtype=dtype)
            output = head_norm(x, gain, eps=1e-6)
            actual = output, *torch.autograd.grad(output, (x, gain), upstream)

            x64, gain64 = (tensor.detach().double().requires_grad_() for tensor in (x, gain))
            output64 = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-6) * gain64
            output64 = output64.transpose(1, 2).flatten(2)
            expected = output64, *torch.autograd.grad(output64, (x64, gain64), upstream.double())

            errors = [distance(a, b) for a, b in zip(actual, expected, strict=True)]
            facts[f"{dtype} d {width}"] = [f"{error:.1e}" for error in errors]
            assert max(errors) < limit, facts

    return facts


def documents() -> Facts:
    """FlexAttention on blocks of documents against one document after the other, and its time."""
    batch, heads, groups, seq, dim = 4, 32, 8, 4096, 64
    shapes = ((batch, heads, seq, dim), (batch, groups, seq, dim), (batch, groups, seq, dim))
    inputs = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    starts = torch.rand(batch, seq, device=DEVICE) < 8 / seq
    starts[:, 0] = True
    index = torch.arange(seq, device=DEVICE)
    positions = index - torch.where(starts, index, 0).cummax(1).values
    upstream = torch.randn(batch, heads, seq, dim, device=DEVICE, dtype=torch.bfloat16)

    flex = attention_function(positions, document_mask=True)
    facts: Facts = {"documents": int(starts.sum())}
    outputs = [flex(*inputs), PerDocumentAttention(positions.cpu())(*inputs)]
    results = [(output, *torch.autograd.grad(output, inputs, upstream)) for output in outputs]
    facts["distance from the loop"] = [f"{distance(a, b):.1e}" for a, b in zip(*results, strict=True)]
    assert max(map(float, facts["distance from the loop"])) < 1e-2, facts

    def timed(attend: Callable[..., torch.Tensor]) -> str:
        return f"{1e3 * median_seconds(lambda: torch.autograd.grad(attend(*inputs), inputs, upstream)):.2f} ms"

    facts["flex, mask made once"] = timed(flex)
    facts["the mask"] = f"{1e3 * median_seconds(lambda: attention_function(positions, document_mask=True)):.2f} ms"
    facts["causal, no documents"] = timed(causal_attention)
    facts["the loop"] = timed(PerDocumentAttention(positions.cpu()))
    try:
        facts["variable length"] = timed(variable_length(starts))
        facts["its distance"] = f"{distance(variable_length(starts)(*inputs), results[1][0]):.1e}"
    except (ImportError, RuntimeError, TypeError, NotImplementedError) as error:
        facts["variable length"] = str(error).partition("\n")[0]

    return facts


def context() -> Facts:
    """Attention of each of four context ranks' queries to all keys, with documents and without, against all queries."""
    batch, heads, groups, seq, dim, size = 2, 32, 8, 8192, 64, 4
    shapes = ((batch, heads, seq, dim), (batch, groups, seq, dim), (batch, groups, seq, dim))
    query, key, value = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for shape in shapes)
    upstream = torch.randn_like(query)
    starts = torch.rand(batch, seq, device=DEVICE) < 8 / seq
    starts[:, 0] = True
    index = torch.arange(seq, device=DEVICE)
    positions = index - torch.where(starts, index, 0).cummax(1).values

    def gradients(attend: Callable, inputs: tuple, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = attend(*inputs)
        return output, *torch.autograd.grad(output, inputs, upstream)

    facts: Facts = {}
    for document_mask in (False, True):
        attend = attention_function(positions, document_mask=document_mask)
        expected = gradients(attend, (query, key, value), upstream)
        sums = [torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)]
        distances, times = [], []
        for rank in range(size):
            cp = ContextGroup(size=size, rank=rank)
            inputs = (cp.shard(query, dim=2).detach().requires_grad_(), key, value)
            attend = attention_function(positions, document_mask=document_mask, cp=cp)
            output, d_query, *d_key_value = gradients(attend, inputs, cp.shard(upstream, dim=2))
            sums = [total + part for total, part in zip(sums, d_key_value, strict=True)]
            own_results = zip((output, d_query), expected, strict=False)
            distances += [distance(own, cp.shard(full, dim=2)) for own, full in own_results]
            times.append(1e3 * median_seconds(partial(gradients, attend, inputs, cp.shard(upstream, dim=2))))

        distances += [distance(total, full) for total, full in zip(sums, expected[2:], strict=True)]
        name = "documents" if document_mask else "causal"
        facts[f"{name}, distance"] = f"{max(distances):.1e}"
        facts[f"{name}, ms of each rank"] = [round(time_of_rank, 2) for time_of_rank in times]
        assert max(distances) < 1e-2, facts

    return facts


def variable_length(starts: torch.Tensor) -> Callable[..., torch.Tensor]:
    """torch's own attention of documents in a row, for comparison: it needs their borders on the host."""
    from torch.nn.attention.varlen import varlen_attn

    borders = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([starts.numel()], device=DEVICE)])
    longest = int(borders.diff().max())
    parameters = inspect.signature(varlen_attn).parameters
    options: Facts = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    options |= {"enable_gqa": True} if "enable_gqa" in parameters else {}

    def attend(*heads: torch.Tensor) -> torch.Tensor:
        batch, count, seq, dim = heads[0].shape
        if "enable_gqa" not in parameters:
            heads = (heads[0], *(shared.repeat_interleave(count // shared.shape[1], 1) for shared in heads[1:]))

        # shape: (batch, heads, seq, d) -> (batch x seq, heads, d)
        rows = [tensor.transpose(1, 2).flatten(0, 1) for tensor in heads]
        borders32 = borders.int()
        output = varlen_attn(*rows, borders32, borders32, longest, longest, **options)
        return output.view(batch, seq, count, dim).transpose(1, 2)

    return attend


def compiled() -> Facts:
    """Compiled blocks against uncompiled ones, both in bfloat16, and where graphs break."""
    from torch._dynamo.utils import counters

    facts = {}
    ids = torch.randint(0, SMALL["vocab_size"], (2, 1024), device=DEVICE)
    index = torch.arange(1024, device=DEVICE).expand(2, 1024)
    for variant, masked, recompute in (
        ("mea", False, "none"),
        ("mea", True, "selective"),
        ("plain", False, "full"),
        ("differential", True, "none"),
        ("talking_heads", True, "none"),
    ):
        torch._dynamo.reset()
        counters.clear()
        config = make_config(model=SMALL | {"attention_variant": variant}, training={}, parallel={}, seq_length=1024)
        positions = torch.where(index < 300, index, index - 300) if masked else index
        results = []
        for compile_blocks in (False, True):
            decoder = Decoder(
                config=config.model,
                activation_checkpointing=recompute,
                document_mask=masked,
                compile_blocks=compile_blocks,
            )
            init_parameters(decoder, 0)
            decoder.to(DEVICE, torch.bfloat16)
            loss = decoder(ids, positions, ids)
            loss.backward()
            gradients = {name: parameter.grad for name, parameter in parameters_by_name(decoder).items()}
            results.append((loss, gradients))

        (loss, expected), (compiled_loss, actual) = results
        # Beside the norm of all gradients: some are next to nothing, and all rounding.
        norm = torch.stack([gradient.double().norm() for gradient in expected.values()]).norm()
        errors = {
            name: ((actual[name] - gradient).double().norm() / norm).item() for name, gradient in expected.items()
        }
        worst = max(errors, key=errors.get)
        stats = {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}
        name = f"{variant}, {'documents' if masked else 'causal'}, {recompute}"
        loss_error = abs(1 - (compiled_loss / loss).item())
        facts[name] = {"loss": loss_error, "gradients": f"{errors[worst]:.1e} {worst}"} | stats
        assert loss_error < 1e-3, facts
        assert errors[worst] < 0.02, facts

    return facts


def bf16_config(model: dict, training: dict, *, parallel: dict | None = None, seq: int = 1024) -> Config:
    """A configuration with steps of 8 samples, in bfloat16 unless `training` says otherwise."""
    training = {"global_batch_size": 8, "micro_batch_size": 2, "precision": "bf16"} | training
    return make_config(model=model, training=training, parallel=parallel or {}, seq_length=seq)


def train(config: Config, steps: int) -> tuple[list[float], float, Facts]:
    """Losses of so many steps on the same batches, seconds of one of five more, and peak memory beside its plan.

    The peak is that of this process, so it is meaningful for the first engine alone.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    engine = build_engine(config, DEVICE)
    train_step = random_step(config, engine)
    results = [train_step() for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated()
    planned = max(stage.total for stage in make_plan(config, world_size=1).memory)
    facts: Facts = {"peak MiB": round(peak / 2**20), "planned": round(planned / 2**20)}
    facts["gradient norms"] = [round(result.grad_norm, 4) for result in results]
    return [result.loss for result in results], median_seconds(train_step, rounds=5), facts


def layouts() -> Facts:
    """bfloat16 training of everything that fits one GPU, against float32."""
    cases: list[tuple[str, dict, dict, dict]] = [("mea", {}, {"precision": "fp32"}, {})]
    cases += [(f"mea, ZeRO {stage}", {}, {}, layout(zero=stage)) for stage in range(4)]
    cases += [(f"mea, {kind}", {}, {"activation_checkpointing": kind}, {}) for kind in ("selective", "full")]
    cases += [("mea, compiled", {}, {"compile": True}, {}), ("mea, half", {"num_component_heads": 2}, {}, {})]
    variants = ("plain", "differential", "talking_heads")
    cases += [(variant, {"attention_variant": variant}, {}, {}) for variant in variants]
    facts, first_losses = {}, {}
    for name, model, training, parallel in cases:
        config = bf16_config(model=SMALL | {"attention_variant": "mea"} | model, training=training, parallel=parallel)
        losses, step_seconds, memory = train(config, 6)
        facts[f"{name} {config.training.precision}"] = {
            "losses": [round(loss, 4) for loss in losses],
            "gradient norms": memory["gradient norms"],
            "ms a step": round(1e3 * step_seconds, 1),
        }
        expected = first_losses.setdefault(str(model), losses)
        assert all(abs(1 - a / b) < 0.02 for a, b in zip(losses, expected, strict=True)), facts
        assert losses[-1] < losses[0], facts

    return facts


def resume() -> Facts:
    """`megatron-mea train` on the GPU: six steps at once, and three and three with another ZeRO stage."""
    from megatron_mea.data.prepare import prepare
    from megatron_mea.data.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with gzip.open(TEXT, "rt", encoding="utf-8") as stream:
            (root / "text.jsonl").write_text("".join(stream.readlines()[:12]))

        train_tokenizer(sources=[str(root / "text.jsonl")], vocab_size=384, out=root / "tokenizer")
        prepare(sources=[str(root / "text.jsonl")], tokenizer_folder=root / "tokenizer", prefix=root / "data")
        tree = {
            "model": SMALL | {"vocab_size": 384, "attention_variant": "mea"},
            "data": {"tokenizer": str(root / "tokenizer"), "train": [{"path": str(root / "data")}], "seq_length": 128},
            "schedule": {"kind": "constant", "warmup_steps": 1},
            "training": {"steps": 6, "global_batch_size": 8, "micro_batch_size": 2},
            "checkpoint": {"interval": 3},
            "logging": {"interval": 1},
            "run": {"dir": "none"},
        }
        (root / "config.yaml").write_text(json.dumps(tree))

        base = [sys.executable, "-m", "megatron_mea", "train", "config.yaml"]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        for arguments in (
            ["run.dir=whole", "logging.profile={start: 4, steps: 1}"],
            ["run.dir=parts", "training.steps=3"],
            ["run.dir=parts", "parallel.zero_stage=3"],
        ):
            process = subprocess.run(base + arguments, cwd=root, env=environment, capture_output=True, text=True)
            assert process.returncode == 0, process.stdout + process.stderr

        curves = []
        for name in ("whole", "parts"):
            rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
            curves.append([row["loss"] for row in rows if "loss" in row])

        traces = [path.name for path in (root / "whole/profile").iterdir()]

    assert len(curves[0]) == len(curves[1]) == 6, curves
    assert all(abs(1 - a / b) < 5e-3 for a, b in zip(*curves, strict=True)), curves
    return {"losses": curves, "traces": traces}


def waits() -> Facts:
    """Where the host waits for the device in a step, by line of code; the first steps are left out."""
    config = bf16_config(SMALL | {"attention_variant": "mea"}, {})
    engine = build_engine(config, DEVICE)
    train_step = random_step(config, engine)
    for _ in range(3):
        train_step()

    torch.cuda.set_sync_debug_mode("warn")
    lines: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_step()

    torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            file = Path(warning.filename)
            lines[f"{file.parent.name}/{file.name}:{warning.lineno}"] += 1

    assert not any("model/" in line or "attention/" in line or "parallel/" in line for line in lines), lines
    return {"micro-batches": engine.grid.dims.num_micro_batches, "waits": dict(lines)}


def model() -> Facts:
    """Steps of the 1B model under DeepSpeed, ZeRO 1, each case in a new process: time, share of the peak, memory."""
    facts = {}
    peak_rate = peak_flops(torch.cuda.get_device_name())
    for variant, training in (
        ("plain", {}),
        ("mea", {}),
        ("mea", {"activation_checkpointing": "selective"}),
        ("mea", {"activation_checkpointing": "full"}),
        ("plain", {"compile": True}),
        ("mea", {"compile": True}),
    ):
        config = bf16_config(model=LLAMA_1B | {"attention_variant": variant}, training=training, seq=4096)
        ((losses, step_seconds, memory),) = launch(train, 1, config, 2)
        plan = make_plan(config, world_size=1)
        # Recomputing is no useful work.
        flops = (plan.flops.forward + plan.flops.backward) * plan.tokens_per_step
        name = ", ".join([variant, *("compiled" if key == "compile" else value for key, value in training.items())])
        facts[name] = {
            "ms a step": round(1e3 * step_seconds),
            "tokens/s": round(plan.tokens_per_step / step_seconds),
            "MFU": f"{flops / step_seconds / peak_rate:.1%}" if peak_rate else None,
            "loss": round(losses[-1], 3),
        } | memory
        print(name, facts[name], flush=True)

    return facts


CHECKS = {
    "kernels": kernels,
    "documents": documents,
    "context": context,
    "compile": compiled,
    "layouts": layouts,
    "resume": resume,
    "waits": waits,
    "model": model,
}


def main() -> int:
    parser = BenchParser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse()
    unknown = set(arguments.names) - CHECKS.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no check (there are {', '.join(CHECKS)})")
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")

    import deepspeed

    from megatron_mea.training.distributed import start_distributed, stop_distributed
    from megatron_mea.training.rank_env import RankEnv

    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "device": torch.cuda.get_device_name()}
    print(versions, flush=True)
    start_distributed(RankEnv.from_environment())
    checks: dict[str, Facts] = {}
    for name in arguments.names or CHECKS:
        begin, passed, facts = time.monotonic(), True, {}
        try:
            facts = CHECKS[name]()
        except Exception:
            passed, facts = False, {"error": traceback.format_exc()}
        checks[name] = {"passed": passed, "seconds": round(time.monotonic() - begin, 1), "facts": facts}
        print(f"\n{'passed' if passed else 'FAILED'}: {name} ({checks[name]['seconds']} s)", flush=True)
        for key, value in facts.items():
            print(f"  {key}: {value}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps({"versions": versions, "checks": checks}, indent=1) + "\n")

    stop_distributed()
    return 0 if all(check["passed"] for check in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
