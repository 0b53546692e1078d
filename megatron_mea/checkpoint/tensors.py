"""Reading and writing the named tensors of a checkpoint folder with torch.distributed.checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def write_tensors(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], writer: int, writers: int) -> None:
    """Writes named tensors; collective.

    Each tensor is copied to the CPU and written by one rank, dealt out in turn, so that ranks write in parallel.

    Args:
        writer, writers: which of the ranks that iterate over the same tensors this is, of how many.
    """
    mine = {}
    for index, (name, tensor) in enumerate(tensors):
        if index % writers == writer:
            mine[name] = tensor.detach().to("cpu", copy=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(mine, checkpoint_id=folder)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor of a checkpoint, moments included."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(e.size) for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}


def read_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The named tensors, float32 on the CPU; every caller by itself, no process group needed."""
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors
