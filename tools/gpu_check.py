"""What only a GPU can show, in minutes: correctness of the CUDA paths, and speed and memory of the 1B model.

    python tools/gpu_check.py [NAME ...] [--out gpu.json]

Every check runs, whatever becomes of the others; exit status 1 where one failed. NAMEs choose among them: kernels,
documents, compile, layouts, resume, waits, model (default: all). One process, one GPU.
"""

from __future__ import annotations

import argparse
import gzip
import inspect
import json
import os
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
from local_ranks import launch, make_config, random_batches

from megatron_mea.attention.documents import OneByOne, causal, within_documents
from megatron_mea.attention.head_norm import head_norm
from megatron_mea.cluster.plan import make_plan
from megatron_mea.config import Config
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.parameter import initialize, named_specs
from megatron_mea.training.build import build_engine

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOPs a second, by the vendor's data sheet."""
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
TEXT = Path(__file__).parents[1] / "launch/quickstart/validation.jsonl.gz"
DEVICE = torch.device("cuda")
Facts = dict[str, Any]


def seconds(work: Callable[[], object], rounds: int = 10) -> float:
    """Median of one call, by events of the device."""
    times = []
    for _ in range(3):
        work()
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return sorted(times)[len(times) // 2]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def kernels() -> Facts:
    """The head norm's kernels against float64, with what attention returns: (batch, seq, H, d) seen heads first."""
    facts = {}
    for dtype, limit in ((torch.bfloat16, 6e-3), (torch.float32, 1e-6)):
        for width in (64, 80, 128, 256):
            x = torch.randn(2, 333, 8, width, device=DEVICE, dtype=dtype).transpose(1, 2).requires_grad_()
            gain = torch.rand(width, device=DEVICE, dtype=dtype).requires_grad_()
            upstream = torch.randn(2, 333, 8 * width, device=DEVICE, dtype=dtype)
            found = head_norm(x, gain, 1e-6)
            gradients = torch.autograd.grad(found, (x, gain), upstream)
            exact = [each.detach().double().requires_grad_() for each in (x, gain)]
            expected = exact[0] * torch.rsqrt(exact[0].square().mean(-1, keepdim=True) + 1e-6) * exact[1]
            expected = expected.transpose(1, 2).flatten(2)
            wanted = torch.autograd.grad(expected, exact, upstream.double())
            pairs = zip((found, *gradients), (expected, *wanted), strict=True)
            errors = [distance(ours, theirs) for ours, theirs in pairs]
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
    flex = within_documents(positions)
    facts: Facts = {"documents": int(starts.sum())}
    results = [flex(*inputs), OneByOne(positions.cpu())(*inputs)]
    results = [(each, *torch.autograd.grad(each, inputs, upstream)) for each in results]
    facts["distance from the loop"] = [f"{distance(a, b):.1e}" for a, b in zip(*results, strict=True)]
    assert max(map(float, facts["distance from the loop"])) < 1e-2, facts

    def timed(attend: Callable[..., torch.Tensor]) -> str:
        return f"{1e3 * seconds(lambda: torch.autograd.grad(attend(*inputs), inputs, upstream)):.2f} ms"

    facts["flex, mask made once"] = timed(flex)
    facts["the mask"] = f"{1e3 * seconds(lambda: within_documents(positions)):.2f} ms"
    facts["causal, no documents"] = timed(causal)
    facts["the loop"] = timed(OneByOne(positions.cpu()))
    try:
        facts["variable length"] = timed(variable_length(starts))
        facts["its distance"] = f"{distance(variable_length(starts)(*inputs), results[1][0]):.1e}"
    except (ImportError, RuntimeError, TypeError, NotImplementedError) as error:
        facts["variable length"] = str(error).partition("\n")[0]
    return facts


def variable_length(starts: torch.Tensor) -> Callable[..., torch.Tensor]:
    """torch's own attention of documents in a row, for comparison: it wants their borders on the host."""
    from torch.nn.attention.varlen import varlen_attn

    borders = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([starts.numel()], device=DEVICE)])
    longest = int(borders.diff().max())
    known = inspect.signature(varlen_attn).parameters
    options: Facts = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    options |= {"enable_gqa": True} if "enable_gqa" in known else {}

    def attend(*heads: torch.Tensor) -> torch.Tensor:
        batch, count, seq, dim = heads[0].shape
        if "enable_gqa" not in known:
            heads = (heads[0], *(each.repeat_interleave(count // each.shape[1], 1) for each in heads[1:]))
        rows = [each.transpose(1, 2).flatten(0, 1) for each in heads]
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
        model = make_config(SMALL | {"attention_variant": variant}, {}, {}, 1024).model
        positions = torch.where(index < 300, index, index - 300) if masked else index
        results = []
        for compiles in (False, True):
            decoder = Decoder(model, recompute, document_mask=masked, compiled=compiles)
            initialize(decoder, 0)
            decoder.to(DEVICE, torch.bfloat16)
            loss = decoder(ids, positions, ids)
            loss.backward()
            results.append((loss, {name: each.grad for name, each in named_specs(decoder).items()}))
        (loss, expected), (other, found) = results
        # Some gradients are next to nothing, and all rounding.
        whole = torch.stack([gradient.double().norm() for gradient in expected.values()]).norm()
        errors = {
            name: ((found[name] - gradient).double().norm() / whole).item() for name, gradient in expected.items()
        }
        worst = max(errors, key=errors.get)
        stats = {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}
        name = f"{variant}, {'documents' if masked else 'causal'}, {recompute}"
        facts[name] = {"loss": abs(1 - (other / loss).item()), "gradients": f"{errors[worst]:.1e} {worst}"} | stats
        assert abs(1 - (other / loss).item()) < 1e-3, facts
        assert errors[worst] < 0.02, facts
    return facts


def settings(model: dict, training: dict, parallel: dict | None = None, seq: int = 1024) -> Config:
    training = {"global_batch_size": 8, "micro_batch_size": 2, "precision": "bf16"} | training
    return make_config(model, training, parallel or {}, seq)


def trained(config: Config, count: int) -> tuple[list[float], float, Facts]:
    """Losses of `count` steps on the same batches, seconds of one of five more, and peak memory beside its plan.

    The peak is that of this process: it says something of the first engine alone.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    engine = build_engine(config, DEVICE)
    batches = random_batches(config, engine)
    step = partial(engine.train_step, batches, config.tokens_per_step, 1e-3)
    results = [step() for _ in range(count)]
    losses = [each.loss for each in results]
    peak = torch.cuda.max_memory_allocated()
    planned = max(stage.total for stage in make_plan(config, 1).memory)
    facts = {"peak MiB": round(peak / 2**20), "planned": round(planned / 2**20)}
    return losses, seconds(step, 5), facts | {"gradient norms": [round(each.grad_norm, 4) for each in results]}


def layouts() -> Facts:
    """bfloat16 training of everything that fits one GPU, against float32."""
    cases: list[tuple[str, dict, dict, dict]] = [("mea", {}, {"precision": "fp32"}, {})]
    cases += [(f"mea, ZeRO {stage}", {}, {}, {"zero_stage": stage}) for stage in range(4)]
    cases += [(f"mea, {kind}", {}, {"activation_checkpointing": kind}, {}) for kind in ("selective", "full")]
    cases += [("mea, compiled", {}, {"compile": True}, {}), ("mea, half", {"num_component_heads": 2}, {}, {})]
    cases += [(one, {"attention_variant": one}, {}, {}) for one in ("plain", "differential", "talking_heads")]
    facts, expected = {}, {}
    for name, model, training, parallel in cases:
        config = settings(SMALL | {"attention_variant": "mea"} | model, training, parallel)
        losses, step, more = trained(config, 6)
        facts[f"{name} {config.training.precision}"] = {
            "losses": [round(loss, 4) for loss in losses],
            "gradient norms": more["gradient norms"],
            "ms a step": round(1e3 * step, 1),
        }
        wanted = expected.setdefault(str(model), losses)
        assert all(abs(1 - a / b) < 0.02 for a, b in zip(losses, wanted, strict=True)), facts
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
        train_tokenizer([str(root / "text.jsonl")], 384, root / "tokenizer")
        prepare([str(root / "text.jsonl")], root / "tokenizer", root / "data")
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
            done = subprocess.run(base + arguments, cwd=root, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
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
    config = settings(SMALL | {"attention_variant": "mea"}, {})
    engine = build_engine(config, DEVICE)
    batches = random_batches(config, engine)
    for _ in range(3):
        engine.train_step(batches, config.tokens_per_step, 1e-3)
    torch.cuda.set_sync_debug_mode("warn")
    lines: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        engine.train_step(batches, config.tokens_per_step, 1e-3)
    torch.cuda.set_sync_debug_mode("default")
    for each in seen:
        if "synchroniz" in str(each.message):
            lines[f"{Path(each.filename).parent.name}/{Path(each.filename).name}:{each.lineno}"] += 1
    assert not any("model/" in line or "attention/" in line or "parallel/" in line for line in lines), lines
    return {"micro-batches": engine.accumulation, "waits": dict(lines)}


def model() -> Facts:
    """Steps of the 1B model under DeepSpeed, ZeRO 1, each in a process of its own: time, share of the peak, memory."""
    facts = {}
    peak_rate = next((value for key, value in PEAK.items() if key in torch.cuda.get_device_name()), None)
    for variant, training in (
        ("plain", {}),
        ("mea", {}),
        ("mea", {"activation_checkpointing": "selective"}),
        ("mea", {"activation_checkpointing": "full"}),
        ("plain", {"compile": True}),
        ("mea", {"compile": True}),
    ):
        config = settings(LLAMA_1B | {"attention_variant": variant}, training, seq=4096)
        ((losses, step, memory),) = launch(trained, 1, config, 2)
        plan = make_plan(config, 1)
        # Recomputing is no useful work.
        flops = (plan.flops.forward + plan.flops.backward) * plan.tokens_per_step
        name = ", ".join([variant, *("compiled" if key == "compile" else value for key, value in training.items())])
        facts[name] = {
            "ms a step": round(1e3 * step),
            "tokens/s": round(plan.tokens_per_step / step),
            "MFU": f"{flops / step / peak_rate:.1%}" if peak_rate else None,
            "loss": round(losses[-1], 3),
        } | memory
        print(name, facts[name], flush=True)
    return facts


CHECKS = {
    "kernels": kernels,
    "documents": documents,
    "compile": compiled,
    "layouts": layouts,
    "resume": resume,
    "waits": waits,
    "model": model,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    unknown = set(arguments.names) - CHECKS.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no check (there are {', '.join(CHECKS)})")
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    import deepspeed

    from megatron_mea.training.processes import start_distributed, stop_distributed
    from megatron_mea.training.ranks import Ranks

    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "device": torch.cuda.get_device_name()}
    print(versions, flush=True)
    start_distributed(Ranks.from_environment())
    found: dict[str, Facts] = {}
    for name in arguments.names or CHECKS:
        begin, passed, facts = time.monotonic(), True, {}
        try:
            facts = CHECKS[name]()
        except Exception:
            passed, facts = False, {"error": traceback.format_exc()}
        found[name] = {"passed": passed, "seconds": round(time.monotonic() - begin, 1), "facts": facts}
        print(f"\n{'passed' if passed else 'FAILED'}: {name} ({found[name]['seconds']} s)", flush=True)
        for key, value in facts.items():
            print(f"  {key}: {value}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps({"versions": versions, "checks": found}, indent=1) + "\n")
    stop_distributed()
    return 0 if all(each["passed"] for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
