"""Outputs of commands: checked before any work starts, written beside their name, flushed to disk, then renamed.

Everything is written into a scratch folder beside its name, `.NAME-xxxxxxxx.tmp`. A lock in it says that its process
lives; what a killed process has left is removed by the next command with the same output.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from megatron_mea.errors import RunError, UserError
from megatron_mea.printing import note, show

_LOCK = ".lock"
_FILES = "files"
"""The name in the scratch folder of files, whichever they are."""
_MAX_NAME = 200
"""Bytes of an output's name in that of its scratch folder: file systems allow 255."""


@contextmanager
def reserve_output(path: str | Path, *, folder: bool) -> Iterator[Path]:
    """Makes the missing folders above `path`, and removes them again if the block fails.

    Args:
        folder: whether the block writes a folder (which may exist) or a file at `path`.

    Raises:
        UserError: `path` exists and is of another kind, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        got = "a folder" if path.is_dir() else "a file" if path.is_file() else "a device or pipe"
        expected = f"{'a folder' if folder else 'a file'}, or a name that is free"
        raise UserError(where=str(path), got=got, expected=expected)

    missing = [parent for parent in _real(path).parents if not parent.exists()]
    try:
        try:
            make_folder(_real(path).parent)
            # A rename would replace a file that is write-protected.
            if not all(os.access(place, os.W_OK) for place in (_real(path).parent, path) if place.exists()):
                raise PermissionError(None, "no permission to write there")
        except OSError as error:
            raise UserError(where=str(path), got=error.strerror, expected="a place that can be written") from None

        yield path
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def make_folder(path: Path) -> None:
    """Makes a folder, with all that are missing above it, on disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush(folder.parent)


def check_free_folder(path: Path) -> None:
    """Checks that a folder can get the name `path`, and removes what killed processes have left of it.

    Raises:
        UserError: `path` is neither an empty folder nor free, or it is a mount point.
    """
    remove_leftovers(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        got = "a folder that is not empty" if path.is_dir() else "a file"
        raise UserError(where=str(path), got=got, expected="a folder that is empty or does not exist")

    if path.exists() and _is_mount_point(path):
        raise UserError(
            where=str(path),
            got="a mount point, whose name no other folder can get",
            expected="a folder that is empty or does not exist",
            hint=f"name a folder in it, such as {path / 'model'}",
        )


def require_space(path: Path, needed: int) -> None:
    """Raises UserError where fewer than `needed` bytes are free beside `path`."""
    free = shutil.disk_usage(_real(path).parent).free
    if free < needed:
        raise UserError(
            where=str(path), got=f"{free / 1e9:,.3f} GB free there", expected=f"at least {needed / 1e9:,.3f} GB"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a RunError that says why `path` cannot be written."""
    try:
        yield
    except BrokenPipeError:
        # A console, not the disk.
        raise
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def print_and_write(text: str, files: Mapping[Path, str | bytes]) -> None:
    """Prints a result, then writes its files: a full disk loses no more than these, a closed console not even these.

    Raises:
        RunError: the disk refuses; names the last file.
    """
    try:
        show(text)
    finally:
        if files:
            with disk_errors([*files][-1]):
                write_files(files)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Makes an empty folder beside `path`, on the same file system; it is removed at the end of the block.

    Raises:
        OSError: the disk refuses.
    """
    remove_leftovers(path)
    scratch, lock = _locked_folder(_real(path))
    try:
        with lock:
            yield scratch
    finally:
        # The lock is closed: NFS keeps a file that is open, and its folder with it.
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def resumable_folder(path: Path) -> Iterator[Path]:
    """Makes, or takes up, the folder `PATH.part`, which is removed at the end of the block but not by an exception.

    Raises:
        UserError: another process uses it, or it was not made here.
        OSError: the disk refuses.
    """
    folder = _real(path).with_name(f"{_real(path).name}.part")
    is_own = (folder / _LOCK).is_file()
    if folder.exists() and not is_own and (not folder.is_dir() or any(folder.iterdir())):
        expected = f"no such file or folder: what is done of {path} would be kept there"
        hint = "move it away, or name another output"
        raise UserError(where=str(folder), got="something else of that name", expected=expected, hint=hint)

    make_folder(folder)
    with (folder / _LOCK).open("ab") as lock:
        if try_lock(lock) is False:
            expected = f"one process at a time that writes {path}"
            raise UserError(where=str(folder), got="in use by another process", expected=expected)

        try:
            yield folder
        except BaseException:
            note(f"{folder} keeps what is done: the same command goes on from there")
            raise

    # The lock is closed: NFS keeps a file that is open, and its folder with it.
    shutil.rmtree(folder)


def _locked_folder(path: Path) -> tuple[Path, IO[bytes]]:
    """A new scratch folder of `path`, and its locked file."""
    while True:
        scratch = path.with_name(f".{_short_name(path)}-{secrets.token_hex(4)}.tmp")
        scratch.mkdir()
        try:
            lock = (scratch / _LOCK).open("xb")
        except (FileNotFoundError, FileExistsError):
            # Another process took it for a leftover, before there was a lock.
            continue
        except OSError:
            scratch.rmdir()
            raise

        if try_lock(lock) is not False:
            return scratch, lock
        lock.close()


def remove_leftovers(path: Path) -> None:
    """Removes the scratch folders of `path` that no process has locked."""
    real = _real(path)
    pattern = re.compile(rf"\.{re.escape(_short_name(real))}-[0-9a-f]{{8}}\.tmp")
    entries: list[Path] = []
    with contextlib.suppress(OSError):
        entries = [entry for entry in real.parent.iterdir() if pattern.fullmatch(entry.name)]

    for scratch in entries:
        with contextlib.suppress(OSError):
            with (scratch / _LOCK).open("ab") as lock:
                is_dead = try_lock(lock)
            if is_dead:
                shutil.rmtree(scratch, ignore_errors=True)


def remove_leftovers_of_files(folder: Path) -> None:
    """Removes the scratch folders of files in `folder` that no process has locked."""
    remove_leftovers(folder / _FILES)


def _short_name(path: Path) -> str:
    return os.fsdecode(os.fsencode(path.name)[:_MAX_NAME])


def try_lock(stream: IO[bytes]) -> bool | None:
    """Locks a file for this process; False where another one has it, None where the file system has no locks."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def publish(folder: Path, final: Path) -> None:
    """Renames a folder, all of which is on disk, to `final`, which does not exist or is an empty folder.

    Raises:
        OSError: the disk refuses; `final` is as it was.
    """
    final = _real(final)
    existed = final.exists()
    folder.rename(final)
    try:
        flush(final.parent)
    except OSError:
        final.rename(folder)
        if existed:
            final.mkdir()
        raise


def write_files(contents: Mapping[Path, str | bytes]) -> None:
    """Replaces files, in their order, when all of them are on disk; restores the earlier ones where that fails.

    Raises:
        OSError: the disk refuses.
    """
    content_by_path = {_real(path): content for path, content in contents.items()}
    with restored_on_failure(content_by_path) as staging:
        for path, content in content_by_path.items():
            staging[path].write_bytes(content if isinstance(content, bytes) else content.encode())
            flush(staging[path])

        for path, staged in staging.items():
            staged.replace(path)
        for parent in {path.parent for path in staging}:
            flush(parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Replaces one file; as `write_files`."""
    write_files({path: content})


def replace_file(path: Path, text: str) -> None:
    """Replaces a file that has one writer, and may be lost with the machine: nothing waits for the disk."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


@contextmanager
def restored_on_failure(paths: Iterable[Path]) -> Iterator[dict[Path, Path]]:
    """Restores files, and removes those that did not exist, where the block fails.

    Yields, for each path, a place on the same file system where the block may write the new file.
    """
    paths = list(paths)
    with ExitStack() as scratches:
        scratch_by_parent = {
            parent: scratches.enter_context(scratch_folder(parent / _FILES))
            for parent in dict.fromkeys(path.parent for path in paths)
        }
        backups = {path: scratch_by_parent[path.parent] / f"{number}.old" for number, path in enumerate(paths)}
        existed: dict[Path, bool] = {}
        try:
            for path, backup in backups.items():
                existed[path] = _keep(path, backup)

            yield {path: backup.with_suffix(".new") for path, backup in backups.items()}
        except BaseException:
            changed = [path for path in existed if not _is_kept(path, backups[path], existed=existed[path])]
            # The last file may describe the others, so it goes first and comes last.
            for path in reversed(changed):
                path.unlink(missing_ok=True)
            for path in changed:
                if existed[path]:
                    backups[path].replace(path)
            raise


def _keep(path: Path, backup: Path) -> bool:
    """Gives a file a second name, or only that where the file system has no hard links; returns whether it exists."""
    if not os.path.lexists(path):
        return False
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))

    try:
        os.link(path, backup)
    except OSError:
        path.rename(backup)
    return True


def _is_kept(path: Path, backup: Path, *, existed: bool) -> bool:
    """Whether `path` is what it was before `_keep`."""
    if not existed or not os.path.lexists(path):
        return existed == os.path.lexists(path)
    return os.path.samestat(path.lstat(), backup.lstat())


def flush(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems know no fsync of a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """fsync of everything in a folder, and of the folder."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def _real(path: Path) -> Path:
    """The path without links: what is written beside a link would lie on another file system."""
    return Path(os.path.realpath(path))


def _is_mount_point(path: Path) -> bool:
    """Whether a file system, or a part of one (which `os.path.ismount` does not see), is mounted at `path`."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        mounts = []

    name = re.sub(r"[\s\\]", lambda match: f"\\{ord(match[0]):03o}", str(_real(path)))
    return os.path.ismount(path) or any(line.split(" ")[4] == name for line in mounts)
