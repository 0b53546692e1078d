"""The Megatron indexed format (`MMIDIDX`, version 1): PREFIX.bin holds raw tokens, PREFIX.idx where documents lie.

PREFIX.idx, little-endian: magic, u64 version, u8 type code, u64 sequences, u64 documents + 1, then i32 lengths
of the sequences in tokens, i64 offsets of the sequences in bytes, i64 sequence number at which each document
begins (a leading 0 and the total included). Ours has one sequence a document. Format: megatron-core's
`IndexedDataset`.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_mea.errors import UserError

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


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that Megatron chooses: uint16 below 65,500 ids, int32 from there on."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Writes documents to PREFIX.bin and PREFIX.idx; both appear when `commit` returns, or neither.

    Used as a context manager: leaving it by an exception removes what was written beside the final names.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = str(prefix), np.dtype(dtype)
        # A process id in the names keeps two commands on the same prefix from writing into one file.
        self._bin, self._idx = (Path(f"{self.prefix}.{kind}.tmp-{os.getpid()}") for kind in ("bin", "idx"))
        self._lengths: list[np.ndarray] = []
        self._stream: BinaryIO = self._bin.open("wb")

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents: their tokens one after another, and the length of each."""
        self._stream.write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
        self._lengths.append(np.asarray(lengths, dtype=np.int32))

    def commit(self) -> tuple[int, int]:
        """Flushes both files to disk and gives them their names; returns (documents, tokens)."""
        _flush(self._stream)
        lengths = np.concatenate([*self._lengths, np.empty(0, np.int32)])
        ends = np.cumsum(lengths, dtype=np.int64)
        offsets = (ends - lengths) * self.dtype.itemsize
        code = next(code for code, kind in _TYPES.items() if np.dtype(kind) == self.dtype)
        with self._idx.open("wb") as stream:
            stream.write(_HEADER.pack(MAGIC, 1, code, lengths.size, lengths.size + 1))
            for array in (lengths, offsets, np.arange(lengths.size + 1, dtype=np.int64)):
                stream.write(array.tobytes())
            _flush(stream)
        # An old .idx must never describe a new .bin, so it goes first and the new one comes last.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        self._bin.replace(f"{self.prefix}.bin")
        self._idx.replace(f"{self.prefix}.idx")
        return lengths.size, int(ends[-1]) if lengths.size else 0

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        for path in (self._bin, self._idx):
            path.unlink(missing_ok=True)


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
        raw = np.memmap(index, mode="r", dtype=np.uint8)
        at = _HEADER.size
        self.lengths = np.frombuffer(raw, np.int32, sequences, at)
        self.offsets = np.frombuffer(raw, np.int64, sequences, at + 4 * sequences)
        self.documents = np.frombuffer(raw, np.int64, boundaries, at + 12 * sequences)
        count = int(self.lengths.sum(dtype=np.int64))
        needed = count * self.dtype.itemsize
        if data.stat().st_size != needed:
            mend = "copy the file again, or run `megatron-mea prepare` again"
            raise UserError(str(data), f"{data.stat().st_size} bytes", f"the {needed} that its .idx announces", mend)
        if sequences and not _contiguous(self.offsets, self.lengths, self.dtype.itemsize):
            raise UserError(
                str(index), "sequences that do not follow one another", "sequences in the order of the .bin"
            )
        self.tokens = np.memmap(data, mode="r", dtype=self.dtype) if count else np.empty(0, self.dtype)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """The tokens, from `start` up to but not including `stop`, with which a document begins; in order."""
        # The arrays of an index are not aligned, and numpy would copy them whole to search them.
        size = self.dtype.itemsize
        first, last = (bisect_left(self.offsets, token * size) for token in (start, stop))
        sequences = self.documents[bisect_left(self.documents, first) : bisect_left(self.documents, last)]
        return np.unique(self.offsets[sequences] // size)

    def check_ids(self, vocab_size: int, allowed: str, mend: str = "", sample: int = 1 << 27) -> None:
        """Looks at up to `sample` tokens, in 64 blocks spread evenly.

        Raises:
            UserError: an id is negative or not below `vocab_size`; `allowed` and `mend` are for its message.
        """
        total = self.tokens.size
        block = total if total <= sample else sample // 64
        for start in np.unique(np.linspace(0, total - block, 64, dtype=np.int64)):
            check_ids(self.tokens[start : start + block], vocab_size, f"{self.prefix}.bin", allowed, mend)


def check_ids(tokens: np.ndarray, vocab_size: int, where: str, allowed: str, mend: str = "") -> None:
    """Raises UserError where one of `tokens` is negative or not below `vocab_size`."""
    for extreme in (int(tokens.max(initial=0)), int(tokens.min(initial=0))):
        if not 0 <= extreme < vocab_size:
            raise UserError(where, f"token id {extreme}", allowed, mend)


def _contiguous(offsets: np.ndarray, lengths: np.ndarray, itemsize: int) -> bool:
    """Whether every sequence begins where the one before it ends, checked in blocks of constant memory."""
    if offsets[0] != 0:
        return False
    for start in range(0, offsets.size - 1, 1 << 20):
        stop = min(start + (1 << 20), offsets.size - 1)
        expected = offsets[start:stop] + lengths[start:stop].astype(np.int64) * itemsize
        if not np.array_equal(offsets[start + 1 : stop + 1], expected):
            return False
    return True


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
