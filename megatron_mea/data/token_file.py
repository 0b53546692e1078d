"""The tokens of a PREFIX.bin, read window by window."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mea.errors import RunError, UserError


class TokenFile:
    """A file of tokens as a flat read-only array, of which slices are read when they are asked for.

    It is read and not mapped: where a mapped file is cut short, or its disk fails, the kernel ends the process by
    SIGBUS, without a word about the file.

    Args:
        path: of the file, which holds at least `size` tokens.
        dtype: of a token.
        size: number of tokens.
    """

    def __init__(self, path: Path, *, dtype: np.dtype, size: int) -> None:
        self.path, self.dtype, self.size = path, dtype, size
        self._file = path.open("rb", buffering=0)
        if hasattr(os, "posix_fadvise"):
            # Without this the kernel may read megabytes around every window of a few pages.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, tokens: slice) -> np.ndarray:
        """The tokens of a slice without a step, as a new array.

        Raises:
            UserError: the file has become shorter.
            RunError: it cannot be read.
        """
        start, stop, step = tokens.indices(self.size)
        assert step == 1
        values = np.empty(max(stop - start, 0), self.dtype)
        self._read_into(values.view(np.uint8), start * self.dtype.itemsize)
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:  # noqa: FBT001 - numpy's
        """All tokens, for small files."""
        values = self[:]
        return values if dtype is None else values.astype(dtype)

    def _read_into(self, buffer: np.ndarray, offset: int) -> None:
        """Fills `buffer`, of bytes, from byte `offset` of the file on."""
        done = 0
        while done < len(buffer):
            try:
                # A single call reads 2 GiB at most.
                count = os.preadv(self._file.fileno(), [buffer[done:]], offset + done)
            except OSError as error:
                raise RunError(f"{self.path} cannot be read: {error.strerror}") from error

            if count == 0:
                raise UserError(
                    where=str(self.path),
                    got=f"{os.fstat(self._file.fileno()).st_size} bytes, fewer than when it was opened",
                    expected=f"the {self.size * self.dtype.itemsize} that its .idx announces, while it is read",
                    hint="copy the file again, or run `megatron-mea prepare` again",
                )
            done += count
