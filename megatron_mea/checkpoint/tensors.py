"""The named tensors of a checkpoint folder, written and read in chunks with torch.distributed.checkpoint.

With ZeRO a rank holds a fragment: contiguous elements of the flattened shard of a parameter. A fragment is a few boxes
of the global tensor (at most three of a matrix, five of a stack of matrices), and the folder stores boxes: no rank
gathers anything, and any layout can read a checkpoint of any other.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    DefaultSavePlanner,
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
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_mea.checkpoint.index import CheckpointReader
from megatron_mea.errors import UserError
from megatron_mea.optimizers import is_optimizer_state

_TORCH_WRITER = "inline_container"
"""Source file of torch that writes files, as its error messages name it."""


class ReadChunk(Protocol):
    """Reads the chunk of a tensor at these offsets; float32."""

    def __call__(self, name: str, *, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """The elements of a global tensor that a rank holds.

    Args:
        name: of the global tensor.
        global_shape: of the global tensor.
        global_offset, local_shape: position of this rank's shard in it; beyond `global_shape` the shard is padding.
        start: index of the first element in the flattened shard.
        values: (count,) float32 from there on; a view of the engine's memory.
    """

    name: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    local_shape: tuple[int, ...]
    start: int
    values: torch.Tensor

    @classmethod
    def empty(
        cls,
        name: str,
        global_shape: tuple[int, ...],
        *,
        offsets: tuple[int, ...] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Fragment:
        """A box of a global tensor, by default all of it, to be read into new memory."""
        shape = shape or global_shape
        return cls(
            name=name,
            global_shape=global_shape,
            global_offset=offsets or (0,) * len(global_shape),
            local_shape=shape,
            start=0,
            values=torch.empty(prod(shape)),
        )

    def chunks(self) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """(offsets in the global tensor, view of `values`) of each box; padding is left out."""
        yield from self._boxes((), start=self.start, values=self.values)

    def _boxes(
        self, indices: tuple[int, ...], *, start: int, values: torch.Tensor
    ) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """Boxes of the elements from `start` on in the slice of the shard at these indices of its first dimensions."""
        dim = len(indices)
        slice_shape = self.local_shape[dim + 1 :]
        slice_size = prod(slice_shape)

        while len(values):
            index, offset = divmod(start, slice_size)
            if offset or len(values) < slice_size:
                num_elements = min(slice_size - offset, len(values))
                yield from self._boxes((*indices, index), start=offset, values=values[:num_elements])
            else:
                num_slices = len(values) // slice_size
                num_elements = num_slices * slice_size
                first = (*indices, index, *[0] * len(slice_shape))
                box = values[:num_elements].view(*[1] * dim, num_slices, *slice_shape)
                offsets = tuple(map(sum, zip(self.global_offset, first, strict=True)))
                for axis, (size, begin) in enumerate(zip(self.global_shape, offsets, strict=True)):
                    box = box.narrow(axis, 0, min(box.shape[axis], max(0, size - begin)))

                if box.numel():
                    yield offsets, box

            start, values = start + num_elements, values[num_elements:]


def write_fragments(folder: Path, fragments: Iterable[Fragment], *, group: Any) -> None:
    """Writes and flushes the fragments of all ranks, which together hold every element once; collective.

    Args:
        fragments: of this rank, on the CPU.
        group: gloo process group.

    Raises:
        CheckpointException: on every rank, where one of them could not write.
    """
    views = {
        MetadataIndex(fragment.name, torch.Size(offsets)): (fragment.global_shape, view)
        for fragment in fragments
        for offsets, view in _in_readable_pieces(fragment.chunks())
    }
    chunks = [(index, global_shape, view.shape) for index, (global_shape, view) in views.items()]
    planner = _SavePlanner(chunks, lambda index: views[index][1].contiguous())
    dcp.save({}, storage_writer=_Writer(folder), planner=planner, process_group=group)


def _in_readable_pieces(
    boxes: Iterable[tuple[tuple[int, ...], torch.Tensor]],
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """The boxes, large ones of stacks in pieces: whoever reads an expert reads the piece that it is stored in."""
    for offsets, view in boxes:
        if view.dim() < 3:
            yield offsets, view
            continue

        for (first, *_), (count, *_) in row_chunks(tuple(view.shape)):
            yield (offsets[0] + first, *offsets[1:]), view[first : first + count]


def write_tensors(
    *,
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: ReadChunk,
) -> None:
    """Writes and flushes full tensors, with a single chunk in memory at a time; a file for each chunk.

    Args:
        shapes: of all tensors of the checkpoint, by exported name.
        read: called when the chunk is written.

    Raises:
        OSError: the disk refuses.
        Exception: what `read` raises.
    """
    chunk_shapes = {
        MetadataIndex(name, torch.Size(offsets)): torch.Size(chunk_shape)
        for name, shape in shapes.items()
        for offsets, chunk_shape in row_chunks(shape)
    }
    planner = _SavePlanner(
        [(index, shapes[index.fqn], chunk_shape) for index, chunk_shape in chunk_shapes.items()],
        lambda index: read(index.fqn, offsets=tuple(index.offset or ()), shape=tuple(chunk_shapes[index])),
    )

    # For a single file the writer would hold all tensors in memory, and a single rank would verify it when it is read.
    writer = _Writer(folder, single_file_per_rank=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        if _TORCH_WRITER in str(failure):
            # torch raises RuntimeError with a C++ message where the disk is full.
            raise OSError(str(failure).partition("\n")[0]) from None
        raise failure from None


def row_chunks(
    shape: tuple[int, ...], max_elements: int = 1 << 26
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, shape) of chunks of a tensor: full rows, at most `max_elements` of them together but at least a row."""
    num_rows = max(1, max_elements // prod(shape[1:]))
    for first in range(0, shape[0], num_rows):
        yield (first, *[0] * (len(shape) - 1)), (min(num_rows, shape[0] - first), *shape[1:])


def read_fragments(folder: Path, fragments: Iterable[Fragment]) -> None:
    """Fills the values of fragments from a checkpoint folder; not collective, needs no process group.

    Raises:
        KeyError: the folder lacks a tensor.
        UserError: the index or a tensor cannot be read.
    """
    reader = CheckpointReader(folder)
    metadata = reader.read_metadata()
    planner = _LoadPlanner(fragments)
    planner.set_up_planner({}, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    try:
        reader.read_data(plan, planner).wait()
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            where=str(folder), got=f"tensors that cannot be read ({reason})", expected="a whole checkpoint"
        ) from None


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor of a checkpoint, optimizer state included."""
    entries = CheckpointReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every parameter of a checkpoint, by exported name."""
    return {name: shape for name, shape in tensor_shapes(folder).items() if not is_optimizer_state(name)}


def read_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The named full tensors of a checkpoint, float32 on the CPU."""
    fragments = {name: Fragment.empty(name, shape) for name, shape in shapes.items()}
    read_fragments(folder, fragments.values())
    return {name: fragment.values.view(shapes[name]) for name, fragment in fragments.items()}


def copy_fragment(fragment: Fragment, buffer: torch.Tensor) -> Fragment:
    """A copy of the fragment whose values are in `buffer`, of the same length; asynchronous from a GPU."""
    buffer.copy_(fragment.values, non_blocking=True)
    return replace(fragment, values=buffer)


class _Writer(FileSystemWriter):
    """torch's writer of files, with the disk's own error where torch raises another one while it closes the file."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


class _SavePlanner(DefaultSavePlanner):
    """Plans an item for every chunk; the default's global plan checks that the chunks make up each tensor.

    Args:
        chunks: (name and offsets, shape of the global tensor, shape of the chunk).
        read: name and offsets -> values of the chunk; float32, contiguous.
    """

    def __init__(
        self,
        chunks: Iterable[tuple[MetadataIndex, tuple[int, ...], torch.Size]],
        read: Callable[[MetadataIndex], torch.Tensor],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._read = read
        self._items = []
        for index, global_shape, chunk_shape in chunks:
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(index.offset, chunk_shape),
                properties=TensorProperties(dtype=torch.float32),
                size=torch.Size(global_shape),
            )
            self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._read(write_item.index)


class _LoadPlanner(DefaultLoadPlanner):
    """Plans reads into every chunk of the fragments of this rank."""

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._views = {
            MetadataIndex(fragment.name, torch.Size(offsets)): view
            for fragment in fragments
            for offsets, view in fragment.chunks()
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
