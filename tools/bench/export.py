"""Memory and time of exports:  OMP_NUM_THREADS=2 python tools/bench/export.py [FOLDER] [--out export.json]

Writes a checkpoint of random weights without moments and exports it with each target, in a process of its own.
"Peak" is anonymous memory beyond what the imports take, sampled every few milliseconds; pages of files, which the
kernel takes back when it needs them, are left out. docs/serving.md has results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from megatron_mea.checkpoint.folder import Meta, seal
from megatron_mea.checkpoint.tensors import Fragment, write_fragments
from megatron_mea.config.load import parse_config
from megatron_mea.data.tokenizer import train_tokenizer
from megatron_mea.model.decoder import parameter_shapes

TEXT = Path(__file__).parents[2] / "launch/quickstart/validation.jsonl.gz"
MODEL = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_component_heads": 4,
    "head_dim": 64,
    "attention_variant": "mea_no_norm",
}


def make_checkpoint(folder: Path) -> int:
    """A sealed checkpoint; returns the bytes of its weights."""
    config = parse_config(
        {"model": MODEL, "data": {"tokenizer": "none", "train": [{"path": "none"}]}, "run": {"dir": "none"}}
    )
    generator, total = torch.Generator().manual_seed(0), 0
    folder.mkdir(parents=True)

    def fragments():
        nonlocal total
        for name, shape in parameter_shapes(config.model).items():
            tensor = torch.randn(shape, generator=generator) * 0.02
            total += tensor.nbytes
            yield Fragment(name, shape, (0,) * len(shape), shape, 0, tensor.view(-1))

    write_fragments(folder, fragments(), None)
    train_tokenizer([str(TEXT)], 512, folder / "tokenizer")
    Meta(1, 1, 1, config.model_dump(mode="json"), [], {}, {}, None).write(folder)
    seal(folder)
    return total


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def measure(checkpoint: Path, out: Path, kind: str, dtype: str) -> dict[str, Any]:
    """Exports; returns peak, time and what the export said."""
    from megatron_mea.huggingface.export import export

    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous() - before)

    watcher, began = threading.Thread(target=watch), time.monotonic()
    watcher.start()
    said = export(checkpoint, out, dtype, kind)
    seconds = time.monotonic() - began
    done.set()
    watcher.join()
    return {"kind": kind, "dtype": dtype, "peak_bytes": peak, "seconds": seconds, "said": said.splitlines()[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        checkpoint, out = Path(scratch, "checkpoint"), Path(scratch, "out")
        size = make_checkpoint(checkpoint)
        print(f"{size / 4e6:,.0f} million parameters, {size / 1e6:,.0f} MB of float32")
        for kind, dtype in (("transformers", "fp32"), ("transformers", "bf16"), ("stock", "fp32"), ("vllm", "fp32")):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                row = process.submit(measure, checkpoint, out, kind, dtype).result()
            rows.append(row)
            cells = f"peak {row['peak_bytes'] / 1e6:,.0f} MB  {row['seconds']:.0f} s  {row['said']}"
            print(f"{kind:<13} {dtype}  {cells}", flush=True)
            shutil.rmtree(out)
    if arguments.out:
        # Not at the top: what it imports would be missing in the peaks.
        from local_ranks import facts

        results = {"model": MODEL, "weight_bytes": size, "results": rows}
        arguments.out.write_text(json.dumps(facts() | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
