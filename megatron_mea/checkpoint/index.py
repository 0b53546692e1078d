"""The index of a checkpoint's tensors, `.metadata`, read without running what a stranger may have put there.

torch.distributed.checkpoint writes it as a pickle, which can name any function. Only the types that an index consists
of are loaded, and the files that it names lie in the checkpoint's folder.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from megatron_mea.errors import UserError

_DCP = "torch.distributed.checkpoint"
_ALLOWED_GLOBALS = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch.serialization", "_get_layout"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_DCP}.metadata", name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
}
"""Module and name of everything that an index of ours names, from torch 2.11 to 2.13."""


class _IndexUnpickler(pickle.Unpickler):
    """Loads the types of an index and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an index")
        return super().find_class(module, name)


def read_index(path: Path) -> Metadata:
    """Shapes, chunks and files of the tensors of a checkpoint, from its file `.metadata`.

    Raises:
        UserError: the index is missing, names what is no part of one, or a file outside of the folder.
    """
    try:
        with path.open("rb") as stream:
            index = _IndexUnpickler(stream).load()
        _check_index(index)
    except Exception as error:
        # A pickle can fail in every way that its types can.
        reason = " ".join(str(error).split()) or type(error).__name__
        expected = "the index of a checkpoint of this package"
        raise UserError(where=str(path), got=f"unreadable ({reason})", expected=expected) from None

    return index


class CheckpointReader(FileSystemReader):
    """torch's reader of a checkpoint folder with `read_index` in place of its own, which runs the pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index; raises as `read_index`."""
        metadata = read_index(Path(self._get_metadata_path(None)))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def _check_index(index: Any) -> None:
    """Raises where an object is not the index of a checkpoint: what its readers take for granted."""
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise TypeError("no index of tensors")

    for name, entry in index.state_dict_metadata.items():
        is_tensor = isinstance(name, str) and isinstance(entry, TensorStorageMetadata)
        if not is_tensor or entry.properties.dtype != torch.float32 or not _is_shape(entry.size):
            raise TypeError(f"{name!r} is no float32 tensor")

    for info in index.storage_data.values():
        file = info.relative_path
        if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file:
            raise ValueError(f"it names the file {file!r}, which is not in its folder")
        if not _is_shape((info.offset, info.length)):
            raise ValueError(f"the place of a tensor in {file} is {info.offset!r}, {info.length!r}")


def _is_shape(numbers: Any) -> bool:
    return all(type(number) is int and 0 <= number < 2**62 for number in numbers)
