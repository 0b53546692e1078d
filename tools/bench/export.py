"""Memory and time of exports:  OMP_NUM_THREADS=2 python tools/bench/export.py [FOLDER]

Writes a checkpoint of random weights without moments and exports it with each target, in a process of its own.
"Peak" is anonymous memory beyond what the imports take, sampled every few milliseconds; pages of files, which the
kernel takes back when it needs them, are left out. docs/serving.md has results.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

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


def measure(checkpoint: Path, out: Path, kind: str, dtype: str) -> None:
    """Exports, and prints peak and time."""
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
    print(f"{kind:<13} {dtype}  peak {peak / 1e6:,.0f} MB  {seconds:.0f} s  {said.splitlines()[-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        checkpoint, out, kind, dtype = arguments.one
        measure(Path(checkpoint), Path(out), kind, dtype)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        checkpoint, out = Path(scratch, "checkpoint"), Path(scratch, "out")
        size = make_checkpoint(checkpoint)
        print(f"{size / 4e6:,.0f} million parameters, {size / 1e6:,.0f} MB of float32")
        for kind, dtype in (("transformers", "fp32"), ("transformers", "bf16"), ("stock", "fp32"), ("vllm", "fp32")):
            command = [sys.executable, __file__, "--one", str(checkpoint), str(out), kind, dtype]
            subprocess.run(command, check=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
