"""Writer and reader of Megatron's indexed format (`MMIDIDX`, version 1).

PREFIX.bin holds raw tokens, PREFIX.idx tells where its sequences and documents lie.

PREFIX.idx, little-endian: magic, u64 version, u8 type code, u64 sequences, u64 documents + 1, then i32 lengths
of the sequences in tokens, i64 offsets of the sequences in bytes, i64 sequence number at which each document
begins (a leading 0 and the total included). Ours has one sequence a document. Format: megatron-core's
`IndexedDataset`.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import mmap
import os
import resource
import secrets
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_mea.data.index_entries import SAMPLE_ENTRIES, IndexEntries, spread_blocks
from megatron_mea.data.metadata import DataMetadata, Recipe, package_versions
from megatron_mea.data.token_file import TokenFile
from megatron_mea.errors import RunError, UserError
from megatron_mea.outputs import flush, remove_leftovers_of_files, restored_on_failure, try_lock

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_FILE_KINDS = ("bin", "idx", "meta.json")
_BLOCK_DOCUMENTS = 1 << 18
"""Documents whose index entries are written at a time."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron chooses for ids: uint16 for vocabularies below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Writes documents to PREFIX.bin and PREFIX.idx, in constant memory; `commit` makes the files appear, or none.

    A context manager: on an exception it removes its temporary files, and those of killed processes when it is
    created.

    Attributes:
        documents: number of documents added.
        tokens: number of tokens added.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = str(prefix), np.dtype(dtype)
        self.documents, self.tokens, self._bin_digest = 0, 0, hashlib.sha256()
        remove_leftovers(Path(prefix))

        # Two commands on the same prefix never write into one file. No process id: containers have the same ones.
        number = secrets.randbelow(10**10)
        self._bin_path, self._idx_path, self._meta_path = (
            Path(f"{self.prefix}.{kind}.tmp-{number}") for kind in _FILE_KINDS
        )
        with self._disk_errors("bin"):
            self._bin_stream: BinaryIO = self._bin_path.open("xb")
        with self._disk_errors("idx"):
            self._idx_stream: BinaryIO = self._idx_path.open("x+b")

        for stream in (self._bin_stream, self._idx_stream):
            try_lock(stream)

        # The lengths follow the header, so they can be written as they come.
        self._idx_stream.write(bytes(_HEADER.size))

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents: `tokens` (n,) of all of them one after another, and `lengths` (documents,) of each.

        Raises:
            ValueError: an id does not fit the dtype of the file.
            RunError: the files cannot be written.
        """
        bounds = np.iinfo(self.dtype)
        if tokens.size and not (bounds.min <= tokens.min() and tokens.max() <= bounds.max):
            raise ValueError(f"ids from {tokens.min()} to {tokens.max()} do not fit {self.dtype}")

        raw = np.ascontiguousarray(tokens, dtype=self.dtype).tobytes()
        self._bin_digest.update(raw)
        with self._disk_errors("bin"):
            self._bin_stream.write(raw)
        with self._disk_errors("idx"):
            self._idx_stream.write(np.asarray(lengths, dtype=np.int32).tobytes())

        self.documents += len(lengths)
        self.tokens += tokens.size

    def commit(self, recipe: Recipe | None = None) -> tuple[int, int]:
        """Flushes the files to disk and gives them their final names; returns (documents, tokens).

        Args:
            recipe: what the data was made of; it is written to PREFIX.meta.json, with the checksums of both files.

        Raises:
            RunError: the files cannot be written.
        """
        with self._disk_errors("bin"):
            _flush_to_disk(self._bin_stream)

        with self._disk_errors("idx"):
            idx_sha256 = self._write_index_tail()
            _flush_to_disk(self._idx_stream)
            meta_path = DataMetadata.path(self.prefix)
            if recipe is not None:
                self._write_metadata(recipe, {"bin": self._bin_digest.hexdigest(), "idx": idx_sha256})

            # An old .idx must never describe a new .bin, so it goes first and the new one comes last, also on disk. The
            # metadata says of a .bin alone that its writer was killed.
            final_bin, final_idx = Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")
            with restored_on_failure([final_bin, final_idx, meta_path]):
                final_idx.unlink(missing_ok=True)
                flush(final_idx.parent)
                if recipe is None:
                    meta_path.unlink(missing_ok=True)
                else:
                    self._meta_path.replace(meta_path)
                self._bin_path.replace(final_bin)
                flush(final_idx.parent)
                self._idx_path.replace(final_idx)
                flush(final_idx.parent)

        return self.documents, self.tokens

    def _write_metadata(self, recipe: Recipe, sha256: dict[str, str]) -> None:
        metadata = DataMetadata(
            documents=self.documents,
            tokens=self.tokens,
            dtype=str(self.dtype),
            sizes={"bin": self._bin_path.stat().st_size, "idx": self._idx_path.stat().st_size},
            sha256=sha256,
            recipe=recipe,
            versions=package_versions(),
        )
        with self._meta_path.open("wb") as stream:
            try_lock(stream)
            stream.write(metadata.as_json().encode())
            _flush_to_disk(stream)

    def _write_index_tail(self) -> str:
        """Writes offsets, document boundaries and the header; the lengths are in the file. Returns its SHA-256."""
        code = next(code for code, dtype in _DTYPES.items() if np.dtype(dtype) == self.dtype)
        header = _HEADER.pack(MAGIC, 1, code, self.documents, self.documents + 1)
        self._idx_stream.seek(0)
        self._idx_stream.write(header)

        digest = hashlib.sha256(header)
        for lengths in self._written_lengths():
            digest.update(lengths.tobytes())

        def append(entries: np.ndarray) -> None:
            raw = entries.astype(np.int64).tobytes()
            self._idx_stream.seek(0, os.SEEK_END)
            self._idx_stream.write(raw)
            digest.update(raw)

        end = 0
        for lengths in self._written_lengths():
            ends = end + np.cumsum(lengths, dtype=np.int64)
            append((ends - lengths) * self.dtype.itemsize)
            end = int(ends[-1])

        for start in range(0, self.documents + 1, _BLOCK_DOCUMENTS):
            append(np.arange(start, min(start + _BLOCK_DOCUMENTS, self.documents + 1)))

        return digest.hexdigest()

    def _written_lengths(self) -> Iterator[np.ndarray]:
        """The lengths of all documents, in blocks, from the file."""
        for start in range(0, self.documents, _BLOCK_DOCUMENTS):
            self._idx_stream.seek(_HEADER.size + 4 * start)
            yield np.frombuffer(self._idx_stream.read(4 * min(_BLOCK_DOCUMENTS, self.documents - start)), np.int32)

    @contextlib.contextmanager
    def _disk_errors(self, kind: str) -> Iterator[None]:
        """On an OSError removes the temporary files and raises a RunError that names PREFIX.`kind`."""
        try:
            yield
        except OSError as error:
            self._remove_temporary_files()
            raise RunError(f"{self.prefix}.{kind} cannot be written: {error.strerror}") from error

    def _remove_temporary_files(self) -> None:
        for path in (self._bin_path, self._idx_path, self._meta_path):
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._bin_stream, self._idx_stream):
            # Closing flushes, which fails once more on a full disk.
            with contextlib.suppress(OSError):
                stream.close()

        self._remove_temporary_files()


def remove_leftovers(prefix: Path) -> None:
    """Removes the temporary files of dead writers: those that no process has locked."""
    remove_leftovers_of_files(prefix.parent)
    for kind in _FILE_KINDS:
        for path in prefix.parent.glob(f"{glob.escape(prefix.name)}.{kind}.tmp-*"):
            with contextlib.suppress(OSError), path.open("r+b") as stream:
                if try_lock(stream):
                    path.unlink()


class IndexedReader:
    """PREFIX.idx, mapped into memory, and PREFIX.bin, whose tokens are read as they are asked for.

    Attributes:
        tokens: (tokens,), the corpus as one flat read-only array, of which slices can be taken.
        lengths: (sequences,) tokens of each sequence.
        offsets: (sequences,) where each sequence begins in PREFIX.bin, in bytes.
        document_indices: (documents + 1,) index of the sequence at which each document begins.
        index: the same three arrays, checked as they are used.

    Raises:
        UserError: a file is missing, foreign, truncated, or does not fit the other one.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index, data):
            if not path.is_file():
                raise UserError(
                    where=str(path), got="no such file", expected="the files that `megatron-mea prepare` wrote"
                )

        with index.open("rb") as stream:
            header = stream.read(_HEADER.size)

        if len(header) < _HEADER.size or header[:9] != MAGIC:
            raise UserError(
                where=str(index), got="not a Megatron index", expected="an .idx of `megatron-mea prepare` or Megatron"
            )

        _, version, code, sequences, boundaries = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            got = f"version {version}, type code {code}"
            raise UserError(
                where=str(index), got=got, expected=f"version 1 with integer tokens (type codes {sorted(_DTYPES)})"
            )

        self.dtype = np.dtype(_DTYPES[code])
        announced = _HEADER.size + 12 * sequences + 8 * boundaries
        if index.stat().st_size != announced:
            raise UserError(
                where=str(index),
                got=f"{index.stat().st_size} bytes",
                expected=f"the {announced} that its header announces",
            )

        raw = _memory_map(index, np.dtype(np.uint8))
        offset = _HEADER.size
        self.lengths = np.frombuffer(raw, np.int32, count=sequences, offset=offset)
        self.offsets = np.frombuffer(raw, np.int64, count=sequences, offset=offset + 4 * sequences)
        self.document_indices = np.frombuffer(raw, np.int64, count=boundaries, offset=offset + 12 * sequences)

        self.index = IndexEntries(
            path=str(index),
            begin=offset,
            itemsize=self.dtype.itemsize,
            lengths=self.lengths,
            offsets=self.offsets,
            document_indices=self.document_indices,
        )
        data_size = self.index.data_size
        if data.stat().st_size != data_size:
            raise UserError(
                where=str(data),
                got=f"{data.stat().st_size} bytes",
                expected=f"the {data_size} that its .idx announces",
                hint="copy the file again, or run `megatron-mea prepare` again",
            )

        self.tokens = TokenFile(data, dtype=self.dtype, size=data_size // self.dtype.itemsize)

    def check_ids(self, vocab_size: int, expected: str, *, hint: str = "", sample: int = SAMPLE_ENTRIES) -> None:
        """Checks up to `sample` tokens, in 64 blocks spread evenly.

        Raises:
            UserError: an id is negative or not below `vocab_size`; `expected` and `hint` are for its message.
        """
        path = f"{self.prefix}.bin"
        for tokens in _read_blocks(path=path, dtype=self.dtype, total=self.tokens.size, sample=sample):
            check_ids(tokens, vocab_size=vocab_size, where=path, expected=expected, hint=hint)


def check_ids(tokens: np.ndarray, *, vocab_size: int, where: str, expected: str, hint: str = "") -> None:
    """Raises UserError where one of `tokens` is negative or not below `vocab_size`."""
    for extreme in (int(tokens.max(initial=0)), int(tokens.min(initial=0))):
        if not 0 <= extreme < vocab_size:
            raise UserError(where=where, got=f"token id {extreme}", expected=expected, hint=hint)


def open_readers(prefixes: Sequence[str], where: str) -> list[IndexedReader]:
    """A reader of each corpus; raises the limit on open files up to the hard one, since each reader keeps two open.

    Args:
        where: the key or option that named the corpora, for the message.

    Raises:
        UserError: a corpus is not usable, or the system lets no more files be open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        limit = soft + 2 * len(prefixes)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

    try:
        return [IndexedReader(prefix) for prefix in prefixes]
    except OSError as error:
        expected = "two files a corpus that can be opened and stay open"
        raise UserError(
            where=where, got=f"{len(prefixes):,} corpora: {error.strerror}", expected=expected, hint="see `ulimit -n`"
        ) from None


def _memory_map(path: Path, dtype: np.dtype) -> np.ndarray:
    """Maps the file as a read-only array, for random access."""
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    # Without this the kernel may read megabytes around every window of a few pages.
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype)


def _read_blocks(*, path: str, dtype: np.dtype, total: int, sample: int) -> Iterator[np.ndarray]:
    """Blocks of a sample of the `total` entries of a file.

    Reads the file and not its memory map, which would be read page by page.
    """
    with open(path, "rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            # Without this the kernel reads megabytes behind every block.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

        for start, stop in spread_blocks(total, sample):
            for first in range(start, stop, 1 << 20):
                stream.seek(first * dtype.itemsize)
                yield np.fromfile(stream, dtype, min(1 << 20, stop - first))


def _flush_to_disk(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
