"""Writes safetensors a tensor at a time, so that no more than one is ever in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
SHARD_BYTES = 5_000_000_000


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    read: Callable[[str], torch.Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Path]:
    """Writes `model.safetensors`, or shards of at most `shard_bytes` (or of one larger tensor) and their index.

    Args:
        read: returns a tensor by its name, which is rounded to `dtype` here.

    Returns:
        The file of each tensor.
    """
    sizes = {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0

        shards[-1].append(name)
        filled += size

    files = {}
    for number, names in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file = folder / f"model{part}.safetensors"
        _write_shard(file=file, shapes={name: shapes[name] for name in names}, dtype=dtype, read=read)
        files |= dict.fromkeys(names, file)

    if len(shards) > 1:
        total = {"total_parameters": sum(map(prod, shapes.values())), "total_size": sum(sizes.values())}
        index = {"metadata": total, "weight_map": {name: file.name for name, file in sorted(files.items())}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    return files


def _write_shard(
    *, file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, read: Callable[[str], torch.Tensor]
) -> None:
    """Writes the length of a JSON header (8 bytes), the header padded to 8 bytes, and the elements end to end."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}

    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name, shape in shapes.items():
            tensor = read(name).to(dtype).contiguous()
            assert tensor.shape == shape, f"{name}: {tuple(tensor.shape)} for {shape}"
            stream.write(memoryview(tensor.view(torch.uint8).numpy()))
