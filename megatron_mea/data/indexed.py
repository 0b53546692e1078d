"""The Megatron indexed format (`MMIDIDX`, version 1): PREFIX.bin holds raw tokens, PREFIX.idx where documents lie.

PREFIX.idx, little-endian: magic, u64 version, u8 type code, u64 sequences, u64 documents + 1, then i32 lengths
of the sequences in tokens, i64 offsets of the sequences in bytes, i64 sequence number at which each document
begins (a leading 0 and the total included). Ours has one sequence a document. Format: megatron-core's
`IndexedDataset`.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import mmap
import os
import resource
import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_mea.errors import RunError, UserError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_BLOCK = 1 << 18
"""Documents whose places are handled at a time."""
SAMPLE = 1 << 18
"""Tokens, and entries of an index, that a start looks at: some megabytes a corpus, since each rank does it and there
may be a thousand corpora. `prepare` guarantees all of them, a wrong tokenizer or a damaged copy shows in a sample, and
ids are checked again as they are read.
"""


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that Megatron chooses: uint16 below 65,500 ids, int32 from there on."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Writes documents to PREFIX.bin and PREFIX.idx; both appear when `commit` returns, or neither.

    Used as a context manager: leaving it by an exception removes what was written beside the final names, and what a
    killed process left there goes when the next one begins. Takes no memory for what it has written.

    Attributes:
        documents: how many were added.
        tokens: how many were added.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = str(prefix), np.dtype(dtype)
        self.documents, self.tokens = 0, 0
        _remove_leftovers(Path(prefix))
        # A process id in the names keeps two commands on the same prefix from writing into one file.
        self._bin, self._idx = (Path(f"{self.prefix}.{kind}.tmp-{os.getpid()}") for kind in ("bin", "idx"))
        with self._disk("bin"):
            self._data: BinaryIO = self._bin.open("wb")
        with self._disk("idx"):
            self._index: BinaryIO = self._idx.open("w+b")
        for stream in (self._data, self._index):
            _lock(stream)
        # The lengths follow the header, so they can be written as they come.
        self._index.write(bytes(_HEADER.size))

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents: their tokens one after another, and the length of each.

        Raises:
            ValueError: an id does not fit the type of the file.
            RunError: the disk refuses.
        """
        allowed = np.iinfo(self.dtype)
        if tokens.size and not (allowed.min <= tokens.min() and tokens.max() <= allowed.max):
            raise ValueError(f"ids from {tokens.min()} to {tokens.max()} do not fit {self.dtype}")
        with self._disk("bin"):
            self._data.write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
        with self._disk("idx"):
            self._index.write(np.asarray(lengths, dtype=np.int32).tobytes())
        self.documents += len(lengths)
        self.tokens += tokens.size

    def commit(self) -> tuple[int, int]:
        """Flushes both files to disk and gives them their names; returns (documents, tokens).

        Raises:
            RunError: the disk refuses.
        """
        with self._disk("bin"):
            _flush(self._data)
        with self._disk("idx"):
            self._finish_index()
            _flush(self._index)
            # An old .idx must never describe a new .bin, so it goes first and the new one comes last.
            Path(f"{self.prefix}.idx").unlink(missing_ok=True)
            self._bin.replace(f"{self.prefix}.bin")
            self._idx.replace(f"{self.prefix}.idx")
        return self.documents, self.tokens

    def _finish_index(self) -> None:
        """What follows the lengths, and the header."""
        end = 0
        for start in range(0, self.documents, _BLOCK):
            count = min(_BLOCK, self.documents - start)
            self._index.seek(_HEADER.size + 4 * start)
            lengths = np.frombuffer(self._index.read(4 * count), np.int32).astype(np.int64)
            ends = end + np.cumsum(lengths)
            self._index.seek(0, os.SEEK_END)
            self._index.write(((ends - lengths) * self.dtype.itemsize).tobytes())
            end = int(ends[-1])
        for start in range(0, self.documents + 1, _BLOCK):
            self._index.write(np.arange(start, min(start + _BLOCK, self.documents + 1), dtype=np.int64).tobytes())
        code = next(code for code, kind in _TYPES.items() if np.dtype(kind) == self.dtype)
        self._index.seek(0)
        self._index.write(_HEADER.pack(MAGIC, 1, code, self.documents, self.documents + 1))

    @contextlib.contextmanager
    def _disk(self, kind: str) -> Iterator[None]:
        """Takes back what was written where the disk refuses, and says why."""
        try:
            yield
        except OSError as error:
            self._remove()
            raise RunError(f"{self.prefix}.{kind} cannot be written: {error.strerror}") from error

    def _remove(self) -> None:
        for path in (self._bin, self._idx):
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._data, self._index):
            # A full disk refuses here again, what it has refused to write before.
            with contextlib.suppress(OSError):
                stream.close()
        self._remove()


def _remove_leftovers(prefix: Path) -> None:
    """Removes the files of writers that no longer live, as their locks tell."""
    for kind in ("bin", "idx"):
        for path in prefix.parent.glob(f"{glob.escape(prefix.name)}.{kind}.tmp-*"):
            with contextlib.suppress(OSError), path.open("r+b") as stream:
                if _lock(stream):
                    path.unlink()


def _lock(stream: BinaryIO) -> bool:
    """Whether this process could lock the file; False as well where the file system has no locks."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class IndexedReader:
    """Memory-mapped view of PREFIX.bin and PREFIX.idx.

    Attributes:
        tokens: (number of tokens,), the whole corpus as one flat read-only array.
        lengths: (sequences,) tokens of each sequence.
        offsets: (sequences,) where each sequence begins in PREFIX.bin, in bytes.
        documents: (documents + 1,) sequence number at which each document begins.

    Raises:
        UserError: a file is missing, foreign, truncated, or does not fit the other one.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index, data):
            if not path.is_file():
                raise UserError(str(path), "no such file", "the files that `megatron-mea prepare` wrote")
        with index.open("rb") as stream:
            header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or header[:9] != MAGIC:
            raise UserError(str(index), "not a Megatron index", "an .idx of `megatron-mea prepare` or Megatron")
        _, version, code, sequences, boundaries = _HEADER.unpack(header)
        if version != 1 or code not in _TYPES:
            found = f"version {version}, type code {code}"
            raise UserError(str(index), found, f"version 1 with integer tokens (type codes {sorted(_TYPES)})")
        self.dtype = np.dtype(_TYPES[code])
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        if index.stat().st_size != expected:
            raise UserError(str(index), f"{index.stat().st_size} bytes", f"the {expected} that its header announces")
        raw = _mapped(index, np.dtype(np.uint8))
        at = _HEADER.size
        self.lengths = np.frombuffer(raw, np.int32, sequences, at)
        self.offsets = np.frombuffer(raw, np.int64, sequences, at + 4 * sequences)
        self.documents = np.frombuffer(raw, np.int64, boundaries, at + 12 * sequences)
        if not self._is_contiguous():
            raise UserError(
                str(index), "sequences that do not follow one another", "sequences in the order of the .bin"
            )
        if not self._is_divided():
            found = "documents that do not divide its sequences"
            raise UserError(str(index), found, f"rising boundaries from 0 to {sequences}")
        # By the last sequence alone: a sum would read the whole index, gigabytes of it for a large corpus.
        needed = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if data.stat().st_size != needed:
            mend = "copy the file again, or run `megatron-mea prepare` again"
            raise UserError(str(data), f"{data.stat().st_size} bytes", f"the {needed} that its .idx announces", mend)
        self.tokens = _mapped(data, self.dtype) if needed else np.empty(0, self.dtype)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """The tokens, from `start` up to but not including `stop`, with which a document begins; in order."""
        # The arrays of an index are not aligned, and numpy would copy them whole to search them.
        size = self.dtype.itemsize
        first, last = (bisect_left(self.offsets, token * size) for token in (start, stop))
        sequences = self.documents[bisect_left(self.documents, first) : bisect_left(self.documents, last)]
        return np.unique(self.offsets[sequences] // size)

    def check_ids(self, vocab_size: int, allowed: str, mend: str = "", sample: int = SAMPLE) -> None:
        """Looks at up to `sample` tokens, in 64 blocks spread evenly.

        Raises:
            UserError: an id is negative or not below `vocab_size`; `allowed` and `mend` are for its message.
        """
        path = f"{self.prefix}.bin"
        for tokens in _read_blocks(path, self.dtype, 0, self.tokens.size, sample):
            check_ids(tokens, vocab_size, path, allowed, mend)

    def _is_contiguous(self) -> bool:
        """Whether every sequence begins where the one before it ends, by a sample of a large index."""
        count, path = self.offsets.size, f"{self.prefix}.idx"
        if count and self.offsets[0] != 0:
            return False
        lengths = _read_blocks(path, self.lengths.dtype, _HEADER.size, count - 1)
        offsets = _read_blocks(path, self.offsets.dtype, _HEADER.size + 4 * count, count - 1, overlap=1)
        pairs = zip(offsets, lengths, strict=True)
        return all(np.array_equal(np.diff(begin), length * np.int64(self.dtype.itemsize)) for begin, length in pairs)

    def _is_divided(self) -> bool:
        """Whether the boundaries rise from 0 to the number of sequences, by a sample of a large index."""
        count, sequences = self.documents.size, self.offsets.size
        if not count or self.documents[0] != 0 or self.documents[-1] != sequences:
            return False
        at = _HEADER.size + 12 * sequences
        blocks = _read_blocks(f"{self.prefix}.idx", self.documents.dtype, at, count - 1, overlap=1)
        return all((np.diff(block) >= 0).all() for block in blocks)


def check_ids(tokens: np.ndarray, vocab_size: int, where: str, allowed: str, mend: str = "") -> None:
    """Raises UserError where one of `tokens` is negative or not below `vocab_size`."""
    for extreme in (int(tokens.max(initial=0)), int(tokens.min(initial=0))):
        if not 0 <= extreme < vocab_size:
            raise UserError(where, f"token id {extreme}", allowed, mend)


def open_readers(prefixes: Sequence[str], where: str) -> list[IndexedReader]:
    """A reader of each corpus; raises the limit on open files, two of which a corpus keeps, as far as that goes.

    Args:
        where: the key or option that named them, for the message.

    Raises:
        UserError: a corpus is not usable, or the system lets no more files be open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + 2 * len(prefixes)
    if soft != resource.RLIM_INFINITY:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        return [IndexedReader(prefix) for prefix in prefixes]
    except OSError as error:
        allowed = "two files a corpus that can be opened and stay open"
        raise UserError(where, f"{len(prefixes):,} corpora: {error.strerror}", allowed, "see `ulimit -n`") from None


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """The file as a read-only array for windows in random order, each of a few pages."""
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    # Else the kernel reads what lies around every window as well: megabytes, where the disk is set up for that.
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype)


def _read_blocks(
    path: str, dtype: np.dtype, at: int, total: int, sample: int = SAMPLE, overlap: int = 0
) -> Iterator[np.ndarray]:
    """The blocks of a sample of the `total` entries from byte `at` on, and `overlap` entries after each.

    From the file and not through the mapping, which is read page by page.
    """
    with open(path, "rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            # Else the kernel reads megabytes behind every block.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for start, stop in spread_blocks(total, sample):
            for first in range(start, stop, 1 << 20):
                stream.seek(at + first * dtype.itemsize)
                yield np.fromfile(stream, dtype, min(1 << 20, stop - first) + overlap)


def spread_blocks(total: int, sample: int) -> list[tuple[int, int]]:
    """Begin and end of 64 blocks of `sample` entries together, spread evenly; of all entries where these are fewer."""
    if total <= sample:
        return [(0, max(total, 0))]
    block = sample // 64
    return [(int(start), int(start) + block) for start in np.linspace(0, total - block, 64, dtype=np.int64)]


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
