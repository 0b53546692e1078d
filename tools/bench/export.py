"""Measures memory and time of exports:  OMP_NUM_THREADS=2 python tools/bench/export.py [FOLDER] [--out export.json]

Writes a checkpoint of random weights without moments and exports it with each target, in a process of its own.
"Peak" is anonymous memory beyond what the imports take, sampled every few milliseconds; pages of files, which the
kernel takes back when it needs them, are left out. docs/serving.md has results.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import QUICKSTART, BenchParser, status_bytes, write_results

from megatron_mea.checkpoint.folder import CheckpointMetadata, seal
from megatron_mea.checkpoint.tensors import Fragment, write_fragments
from megatron_mea.config.load import parse_config
from megatron_mea.data.tokenizer import train_tokenizer
from megatron_mea.model.decoder import parameter_shapes

TEXT = QUICKSTART / "validation.jsonl.gz"
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
    """Writes a sealed checkpoint; returns the bytes of its weights."""
    config = parse_config(
        {"model": MODEL, "data": {"tokenizer": "none", "train": [{"path": "none"}]}, "run": {"dir": "none"}}
    )
    generator, total = torch.Generator().manual_seed(0), 0
    folder.mkdir(parents=True)

    def fragments() -> Iterator[Fragment]:
        nonlocal total
        for name, shape in parameter_shapes(config.model).items():
            tensor = torch.randn(shape, generator=generator) * 0.02
            total += tensor.nbytes
            yield Fragment(
                name=name,
                global_shape=shape,
                global_offset=(0,) * len(shape),
                local_shape=shape,
                start=0,
                values=tensor.view(-1),
            )

    write_fragments(folder, fragments(), group=None)
    train_tokenizer(sources=[str(TEXT)], vocab_size=512, out=folder / "tokenizer")
    CheckpointMetadata(
        step=1,
        samples=1,
        tokens=1,
        config=config.model_dump(mode="json"),
        data=[],
        layout={},
        versions={},
        validation_loss=None,
    ).write(folder)
    seal(folder)
    return total


def measure(*, checkpoint: Path, out: Path, kind: str, dtype: str) -> dict[str, Any]:
    """Exports; returns peak, time and the last line that the export says."""
    from megatron_mea.huggingface.export import export
    from megatron_mea.huggingface.model_folder import ModelFolder

    before, peak, done = status_bytes("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, status_bytes("RssAnon") - before)

    watcher, begin = threading.Thread(target=watch), time.monotonic()
    watcher.start()
    report = export(model=ModelFolder.locate(checkpoint), out=out, dtype=dtype, kind=kind)
    seconds = time.monotonic() - begin
    done.set()
    watcher.join()
    return {"kind": kind, "dtype": dtype, "peak_bytes": peak, "seconds": seconds, "report": report.splitlines()[-1]}


def main() -> None:
    parser = BenchParser(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="where to write (default: a temporary folder)")
    arguments = parser.parse()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        checkpoint, out = Path(scratch, "checkpoint"), Path(scratch, "out")
        size = make_checkpoint(checkpoint)
        print(f"{size / 4e6:,.0f} million parameters, {size / 1e6:,.0f} MB of float32")
        for kind, dtype in (("transformers", "fp32"), ("transformers", "bf16"), ("stock", "fp32"), ("vllm", "fp32")):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                row = process.submit(measure, checkpoint=checkpoint, out=out, kind=kind, dtype=dtype).result()

            rows.append(row)
            cells = f"peak {row['peak_bytes'] / 1e6:,.0f} MB  {row['seconds']:.0f} s  {row['said']}"
            print(f"{kind:<13} {dtype}  {cells}", flush=True)
            shutil.rmtree(out)

    write_results(arguments.out, {"model": MODEL, "weight_bytes": size, "results": rows})


if __name__ == "__main__":
    main()
