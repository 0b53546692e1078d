"""The named tensors of a checkpoint folder, written and read in pieces with torch.distributed.checkpoint.

A rank holds a run of numbers of the flattened part of a parameter that its tensor group gives it, as ZeRO cuts it.
Such a run is at most three rectangles of the global tensor, and rectangles are what the folder knows: no rank gathers
anything, and who wrote what does not matter to who reads it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's, as torch names them; the moment of parameter `name` is called `exp_avg.name`."""
_WRITER = "inline_container"
"""Where in torch's sources files are written."""


@dataclass(frozen=True)
class Fragment:
    """The numbers of a global tensor that one rank holds.

    Args:
        name: of the global tensor.
        shape: of the global tensor; one or two dimensions.
        offsets, local_shape: where the part of this rank's tensor group lies in it; what is beyond `shape` is padding.
        start: the first of the numbers, counted in the flattened part.
        numbers: (count,) float32 from there on; a view of what the engine holds.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local_shape: tuple[int, ...]
    start: int
    numbers: torch.Tensor

    def pieces(self) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """(offsets in the global tensor, view of `numbers`) of the rectangles; padding is left out."""
        width = prod(self.local_shape[1:])
        room = [max(0, whole - first) for whole, first in zip(self.shape, self.offsets, strict=True)]
        position, done = self.start, 0
        while done < len(self.numbers):
            row, column = divmod(position, width)
            left = len(self.numbers) - done
            rows, columns = (left // width, width) if column == 0 and left >= width else (1, min(width - column, left))
            # shape: (rows, columns)
            view = self.numbers[done : done + rows * columns].view(rows, columns)
            view = view[: max(0, room[0] - row)]
            if len(self.shape) == 1:
                # shape: (rows,)
                view, where = view[:, 0], (self.offsets[0] + row,)
            else:
                view = view[:, : max(0, room[1] - column)]
                where = (self.offsets[0] + row, self.offsets[1] + column)
            if view.numel():
                yield where, view
            position, done = position + rows * columns, done + rows * columns


def write_fragments(folder: Path, fragments: Iterable[Fragment], group: Any) -> None:
    """Writes and flushes what the ranks of a gloo group hold, together every number exactly once; collective.

    Args:
        fragments: of this rank, on the CPU.

    Raises:
        CheckpointException: on every rank, where one of them could not write.
    """
    views = {
        MetadataIndex(fragment.name, torch.Size(offsets)): (fragment.shape, view)
        for fragment in fragments
        for offsets, view in fragment.pieces()
    }
    pieces = [(index, shape, view.shape) for index, (shape, view) in views.items()]
    planner = _Save(pieces, lambda index: views[index][1].contiguous())
    dcp.save({}, storage_writer=FileSystemWriter(folder), planner=planner, process_group=group)


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str, tuple[int, ...], tuple[int, ...]], torch.Tensor],
) -> None:
    """Writes and flushes whole tensors, of which no more than a piece is in memory; a file a piece.

    Args:
        shapes: of all tensors of the checkpoint, by exported name.
        read: the float32 numbers of a piece, by name, offsets and shape; asked for when its turn comes.

    Raises:
        OSError: the disk refuses.
        Exception: what `read` raises.
    """
    pieces = {
        MetadataIndex(name, torch.Size(offsets)): (shape, torch.Size(size))
        for name, shape in shapes.items()
        for offsets, size in rows_of(shape)
    }
    planner = _Save(
        [(index, *both) for index, both in pieces.items()],
        lambda index: read(index.fqn, tuple(index.offset or ()), tuple(pieces[index][1])),
    )
    # One file would make the writer keep every tensor, and its reader's ranks leave the checksum to one of them.
    writer = FileSystemWriter(folder, single_file_per_rank=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        if _WRITER in str(failure):
            # Of a full disk torch says what the C++ below it says.
            raise OSError(str(failure).partition("\n")[0]) from None
        raise failure from None


def rows_of(shape: tuple[int, ...], most: int = 1 << 26) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, shape) of pieces of a tensor: whole rows of, together, `most` numbers or fewer (a row at least)."""
    step = max(1, most // prod(shape[1:]))
    for first in range(0, shape[0], step):
        yield (first, *[0] * (len(shape) - 1)), (min(step, shape[0] - first), *shape[1:])


def read_fragments(folder: Path, fragments: Iterable[Fragment]) -> None:
    """Fills the numbers of fragments; every caller by itself, no process group needed.

    Raises:
        KeyError: the folder lacks a tensor.
    """
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    planner = _Load(fragments)
    planner.set_up_planner({}, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor of a checkpoint, moments included."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(e.size) for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every parameter of a checkpoint, by exported name."""
    return {name: shape for name, shape in tensor_shapes(folder).items() if not name.startswith(MOMENTS)}


def read_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The named whole tensors, float32 on the CPU."""
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    wholes = (
        Fragment(name, tuple(one.shape), (0,) * one.dim(), tuple(one.shape), 0, one.view(-1))
        for name, one in tensors.items()
    )
    read_fragments(folder, wholes)
    return tensors


def copy_of(fragment: Fragment, buffer: torch.Tensor) -> Fragment:
    """The same numbers in `buffer`, which is as long; on a GPU the copy is only begun."""
    buffer.copy_(fragment.numbers, non_blocking=True)
    return replace(fragment, numbers=buffer)


class _Save(DefaultSavePlanner):
    """Plans one item of the folder for every piece; the default's global plan checks that they make up each tensor."""

    def __init__(
        self,
        pieces: Iterable[tuple[MetadataIndex, tuple[int, ...], torch.Size]],
        numbers: Callable[[MetadataIndex], torch.Tensor],
    ) -> None:
        """
        Args:
            pieces: name and offsets of each, the shape of the whole tensor, and its own.
            numbers: of a piece; float32, contiguous.
        """
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._numbers = numbers
        self._items = []
        for index, shape, size in pieces:
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(index.offset, size),
                properties=TensorProperties(dtype=torch.float32),
                size=torch.Size(shape),
            )
            self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._numbers(write_item.index)


class _Load(DefaultLoadPlanner):
    """Plans what to read for every piece."""

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._views = {
            MetadataIndex(fragment.name, torch.Size(offsets)): view
            for fragment in fragments
            for offsets, view in fragment.pieces()
        }

    def create_local_plan(self) -> LoadPlan:
        items = []
        for index, view in self._views.items():
            stored = self.metadata.state_dict_metadata[index.fqn]
            chunk = ChunkStorageMetadata(index.offset, view.shape)
            items += create_read_items_for_chunk_list(index.fqn, stored, [chunk])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        view = self._views[read_item.dest_index]
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view
