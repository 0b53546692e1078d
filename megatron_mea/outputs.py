"""Places that commands write to: checked before any work, left as they were when it fails, with one message."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_mea.errors import RunError, UserError


@contextmanager
def output_place(path: str | Path, folder: bool) -> Iterator[Path]:
    """Makes the missing folders above `path`, and removes them again if the block fails.

    Args:
        folder: whether a folder (which may exist) or a file is to be written at `path`.

    Raises:
        UserError: something else stands there, or the place cannot be written.
    """
    path = Path(path)
    if path.exists() and path.is_dir() != folder:
        kinds = ("a file", "a folder") if folder else ("a folder", "a file")
        raise UserError(str(path), kinds[0], f"{kinds[1]}, or a name that is free")
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(None, "no permission to write there")
    except OSError as error:
        raise UserError(str(path), error.strerror, "a place that can be written") from None
    try:
        yield path
    except BaseException:
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def check_free_folder(path: Path) -> None:
    """Raises UserError where `path` is anything but a folder that is empty or does not exist."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        found = "a folder that is not empty" if path.is_dir() else "a file"
        raise UserError(str(path), found, "a folder that is empty or does not exist")


def require_space(path: Path, needed: int) -> None:
    """Raises UserError where fewer than `needed` bytes are free beside `path`."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(str(path), f"{free / 1e9:,.3f} GB free there", f"at least {needed / 1e9:,.3f} GB")


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Makes one message of what the disk refuses.

    Raises:
        RunError: `path`, and why it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
