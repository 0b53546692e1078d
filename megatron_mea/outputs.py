"""Output paths of commands: checked before any work starts, and left as they were when it fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_mea.errors import RunError, UserError


@contextmanager
def reserve_output(path: str | Path, *, folder: bool) -> Iterator[Path]:
    """Makes the missing folders above `path`, and removes them again if the block fails.

    Args:
        folder: whether the block writes a folder (which may exist) or a file at `path`.

    Raises:
        UserError: `path` exists and is of the other kind, or cannot be written.
    """
    path = Path(path)
    if path.exists() and path.is_dir() != folder:
        got, expected = ("a file", "a folder") if folder else ("a folder", "a file")
        raise UserError(where=str(path), got=got, expected=f"{expected}, or a name that is free")

    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(None, "no permission to write there")
    except OSError as error:
        raise UserError(where=str(path), got=error.strerror, expected="a place that can be written") from None

    try:
        yield path
    except BaseException:
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def check_free_folder(path: Path) -> None:
    """Raises UserError unless `path` is an empty folder or does not exist."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        got = "a folder that is not empty" if path.is_dir() else "a file"
        raise UserError(where=str(path), got=got, expected="a folder that is empty or does not exist")


def require_space(path: Path, needed: int) -> None:
    """Raises UserError where fewer than `needed` bytes are free beside `path`."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(
            where=str(path), got=f"{free / 1e9:,.3f} GB free there", expected=f"at least {needed / 1e9:,.3f} GB"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a RunError that says why `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
