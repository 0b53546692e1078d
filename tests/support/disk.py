"""A layer under everything that writes below a folder: operations are seen, and made to fail.

It patches what Python's library writes with (`open`, and `os`'s operations that change a file system), so code is
tested as it is. torch writes into streams of Python; tokenizers is patched where its method is called.
"""

from __future__ import annotations

import builtins
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_CHANGING = re.compile(r"(?<=__\d_)\d+(?=\.distcp)|[0-9a-f]{8}(?=\.tmp)|(?<=tmp-)\d+|(?<=\d-)[0-9a-f]{8}(?=[/ ]|$)")
"""Numbers of shards, and what differs between two calls: random names, process ids, tokens of leases."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation on a file or folder: open (for writing), write, fsync, mkdir, rename, link, unlink or rmdir.

    Args:
        path: relative to the folder; of an open file its path when it was opened.
        target: the second path of a rename or link.
        creates: an `open` or `mkdir` that makes something.
        truncates: an `open` that empties a file.
    """

    kind: str
    path: str
    target: str = ""
    creates: bool = False
    truncates: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """(kind, file), the same at every call of a command."""
        return self.kind, _CHANGING.sub("*", f"{self.path} {self.target}".strip())


class Observer:
    """Sees operations; the base class does nothing with them."""

    def before(self, operation: Operation) -> None:
        """Called before an operation; what it raises is what the operation raises."""

    def after(self, operation: Operation, content: Callable[[], bytes]) -> None:
        """Called after an operation.

        Args:
            content: reads the file that was written or opened.
        """


class Recorder(Observer):
    """Keeps the operations in their order."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def before(self, operation: Operation) -> None:
        self.operations.append(operation)


class Fault(Observer):
    """Makes an operation fail.

    Args:
        key: of the operation.
        number: of its occurrence, from 1.
        error: EIO: this occurrence alone; ENOSPC: and everything afterwards that needs space.
    """

    def __init__(self, *, key: tuple[str, str], number: int, error: int) -> None:
        self._key, self._number, self._error = key, number, error
        self._count, self.raised = 0, False

    def before(self, operation: Operation) -> None:
        self._count += operation.key == self._key
        is_it = operation.key == self._key and self._count == self._number
        needs_space = operation.creates or operation.kind in ("write", "link")
        if is_it or (self.raised and needs_space and self._error == 28):
            self.raised = True
            raise OSError(self._error, os.strerror(self._error))


class _File(io.FileIO):
    """A file below the folder: its writes are operations."""

    def __init__(self, path: Path, mode: str, *, disk: _Disk) -> None:
        self._disk, self._path = disk, path
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        with self._disk.operation("write", self._path, content=self.read_all):
            return super().write(data)

    def read_all(self) -> bytes:
        return Path(f"/proc/self/fd/{self.fileno()}").read_bytes()


class _Disk:
    def __init__(self, root: Path, observer: Observer) -> None:
        self.root, self._observer = os.path.realpath(root), observer

    @contextmanager
    def operation(
        self, kind: str, path: Path, *, target: Path | None = None, content: Callable[[], bytes] = bytes, **facts: bool
    ) -> Iterator[None]:
        paths = {"path": os.path.relpath(path, self.root)}
        paths |= {"target": os.path.relpath(target, self.root)} if target else {}
        operation = Operation(kind=kind, **paths, **facts)
        self._observer.before(operation)
        yield
        self._observer.after(operation, content)

    def locate(self, path: Any, folder: int | None = None) -> Path | None:
        """The path below the root that a call names, folders without links; None for any other."""
        if isinstance(path, int):
            return self._inside(Path(os.readlink(f"/proc/self/fd/{path}")))

        base = Path(os.readlink(f"/proc/self/fd/{folder}")) if folder is not None else Path.cwd()
        path = base / os.fsdecode(path)
        return self._inside(Path(os.path.realpath(path.parent), path.name))

    def _inside(self, path: Path) -> Path | None:
        return path if path.is_relative_to(self.root) else None

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        path = None if isinstance(file, int) or set(mode) <= set("rbt") else self.locate(file)
        if path is None:
            return _OPEN(file, mode, buffering, *arguments, **options)

        exists = path.exists()
        with self.operation("open", path, creates=not exists, truncates="w" in mode):
            raw = _File(path, mode.replace("b", "").replace("t", ""), disk=self)
        if buffering == 0:
            return raw

        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        stream = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        return stream if "b" in mode else io.TextIOWrapper(stream, *arguments, **options)

    def fsync(self, file: Any) -> None:
        handle = file if isinstance(file, int) else file.fileno()
        if (path := self.locate(handle)) is None:
            return _OS["fsync"](handle)
        with self.operation("fsync", path):
            _OS["fsync"](handle)

    def two_paths(self, name: str, kind: str) -> Callable[..., None]:
        def call(source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
            paths = self.locate(source, src_dir_fd), self.locate(target, dst_dir_fd)
            if None in paths:
                return _OS[name](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            with self.operation(kind, paths[0], target=paths[1]):
                _OS[name](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

        return call

    def one_path(self, name: str, kind: str) -> Callable[..., None]:
        def call(path: Any, *arguments: Any, dir_fd: int | None = None) -> None:
            if (place := self.locate(path, dir_fd)) is None:
                return _OS[name](path, *arguments, dir_fd=dir_fd)
            with self.operation(kind, place, **({"creates": True} if kind == "mkdir" else {})):
                _OS[name](path, *arguments, dir_fd=dir_fd)

        return call


_OPEN = io.open
_ONE = {"mkdir": "mkdir", "unlink": "unlink", "remove": "unlink", "rmdir": "rmdir"}
_TWO = {"rename": "rename", "replace": "rename", "link": "link"}
_OS = {name: getattr(os, name) for name in [*_ONE, *_TWO, "fsync"]}


@contextmanager
def watched_disk(root: Path, observer: Observer) -> Iterator[None]:
    """Shows `observer` everything that this process does to files below `root` while the block lasts."""
    from transformers import PreTrainedTokenizerFast

    disk = _Disk(root, observer)
    save = PreTrainedTokenizerFast._save_pretrained

    def save_tokenizer(self: Any, save_directory: Any, *arguments: Any, **options: Any) -> Any:
        path = Path(save_directory, "tokenizer.json")
        with disk.operation("open", path, creates=True, truncates=True):
            pass
        with disk.operation("write", path, content=path.read_bytes):
            return save(self, save_directory, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        for module in (io, builtins):
            patch.setattr(module, "open", disk.open)
        patch.setattr(os, "fsync", disk.fsync)
        for name, kind in _ONE.items():
            patch.setattr(os, name, disk.one_path(name, kind))
        for name, kind in _TWO.items():
            patch.setattr(os, name, disk.two_paths(name, kind))

        # They copy inside the kernel, past any stream.
        patch.setattr(shutil, "_USE_CP_SENDFILE", False)
        # They name functions of `os` that are replaced here.
        patch.setattr(shutil, "_use_fd_functions", False)
        patch.setattr(PreTrainedTokenizerFast, "_save_pretrained", save_tokenizer)
        yield
