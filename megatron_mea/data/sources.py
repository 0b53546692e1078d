"""Streams documents from text, JSON lines, parquet, a `datasets` folder or a name on the hub.

A file is split into records (a line, a row, a block between blank lines) without parsing them, and batches of records
are parsed into texts afterwards: splitting is cheap and in order, parsing can run in other processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mea.data.column_files import read_dataset, read_parquet
from megatron_mea.data.line_files import read_json_lines, read_text_file
from megatron_mea.data.text_records import BrokenRecords, ReadOptions, RecordBatch
from megatron_mea.errors import UserError
from megatron_mea.printing import note

_FILE_KINDS = ".txt, .parquet or JSON lines (.jsonl, .ndjson; .jsonl, .ndjson or .json with .gz or .zst)"

_FILE_READERS: dict[str, Callable[[Path, ReadOptions], Iterator[RecordBatch]]] = {
    ".txt": read_text_file,
    ".parquet": read_parquet,
    # Not .json: it is mostly one value over many lines.
    **{
        f"{kind}{compressed}": read_json_lines
        for kind in (".jsonl", ".ndjson", ".json")
        for compressed in ("", ".gz", ".zst")
        if kind + compressed != ".json"
    },
}


def read_documents(
    sources: Sequence[str], *, options: ReadOptions | None = None, broken: BrokenRecords | None = None
) -> Iterator[str]:
    """The texts of all documents of all sources, in order and without empty ones.

    Args:
        sources: files, folders (of such files, or written by `datasets`), or names on the Hugging Face hub.
        broken: counts the records; the default allows MAX_BROKEN.

    Raises:
        UserError: a source is missing or unreadable, has no such column or too long a document, or too many of its
            lines are broken.
    """
    options, broken = options or ReadOptions(), broken or BrokenRecords()

    for batch in record_batches(sources, options):
        texts, problems = batch.texts(options.text_key)
        yield from texts
        broken.add(len(batch.records), problems)

    broken.close()


def record_batches(sources: Sequence[str], options: ReadOptions | None = None) -> Iterator[RecordBatch]:
    """Batches of all records of all sources, in order; the batches depend on the sources alone.

    Raises:
        UserError: a source is missing or unreadable, or has no such column or too long a record.
        RunError: a dataset breaks off.
    """
    options = options or ReadOptions()

    for source in sources:
        path = Path(source)
        if path.is_dir() and not _is_datasets_folder(path):
            for file in _list_folder(path).files:
                yield from _file_reader(file)(file, options)
        elif path.is_file():
            yield from _file_reader(path)(path, options)
        else:
            yield from read_dataset(source, options)


def check_sources(sources: Sequence[str]) -> None:
    """Raises UserError for a missing or unknown source, before any work is done.

    Prints on stderr which links in a folder are followed, and what of it is left out.
    """
    lines = []
    for source in sources:
        # A variable of a script that is not set: it would name the current folder.
        if not source:
            raise UserError(
                where="--input", got="an empty name", expected=f"a {_FILE_KINDS} file, a folder, or a hub name"
            )

        path = Path(source)
        if path.is_dir():
            if not _is_datasets_folder(path):
                lines += _list_folder(path).notes()
        elif path.is_file():
            _file_reader(path)
        elif _looks_like_file(source):
            raise UserError(
                where=source, got="no such file or folder", expected=f"a {_FILE_KINDS} file, a folder, or a hub name"
            )

    for line in lines:
        note(line)


def input_files(sources: Sequence[str]) -> list[Path]:
    """All files that the sources consist of, in order; a name on the hub has none."""
    files: list[Path] = []
    for path in map(Path, sources):
        if path.is_dir() and _is_datasets_folder(path):
            files += sorted(file for file in path.rglob("*") if file.is_file())
        elif path.is_dir():
            files += _list_folder(path).files
        elif path.is_file():
            files.append(path)

    return files


def _looks_like_file(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or _suffix(Path(source)) in _FILE_READERS


def _suffix(path: Path) -> str:
    """The last suffix in lower case; for compressed files the last two, such as `.jsonl.gz`."""
    last = path.suffix.lower()
    return "".join(path.suffixes[-2:]).lower() if last in (".gz", ".zst") else last


def _file_reader(path: Path) -> Callable[[Path, ReadOptions], Iterator[RecordBatch]]:
    try:
        return _FILE_READERS[_suffix(path)]
    except KeyError:
        raise UserError(where=str(path), got=f"a file of kind {_suffix(path)!r}", expected=f"{_FILE_KINDS}") from None


def _is_datasets_folder(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


@dataclass
class _Folder:
    """What a folder and those below it hold, in sorted order.

    Attributes:
        files: files of known kinds, each real one once.
        links: links to files of known kinds and to folders that are followed.
        repeated: files of known kinds and folders that are there under another name, too.
        hidden: files and folders whose name begins with a dot.
        dangling: links to nothing.
        unknown: files of other kinds.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)
    repeated: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    dangling: list[Path] = field(default_factory=list)
    unknown: list[Path] = field(default_factory=list)

    def notes(self) -> Iterator[str]:
        """A line for each list but `files` that is not empty."""
        for what, paths in (
            ("followed {} link(s)", self.links),
            ("left out {} file(s) or folder(s) that have two names", self.repeated),
            ("left out {} hidden file(s) or folder(s)", self.hidden),
            ("left out {} link(s) to nothing", self.dangling),
            ("left out {} file(s) of unknown kinds", self.unknown),
        ):
            if paths:
                names = sorted(str(path.relative_to(self.root)) for path in paths)
                first = ", ".join(names[:5]) + (", ..." if names[5:] else "")
                yield f"{what.format(f'{len(paths):,}')} in {self.root}: {first}"


def _list_folder(root: Path) -> _Folder:
    """What `root` holds: links are followed, what is hidden is left out.

    Raises:
        UserError: there is no file of a known kind, or a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(where=str(error.filename), got=f"not readable: {error.strerror}", expected="a readable folder")

    found, seen = _Folder(root), {os.path.realpath(root)}
    # From the top: what is taken out of `folders` is not entered.
    for parent, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real_parent = os.path.realpath(parent)
        folders.sort()

        for name in [*folders, *sorted(names)]:
            path, is_folder = Path(parent, name), name in folders
            is_link = path.is_symlink()
            real = os.path.realpath(path) if is_link else os.path.join(real_parent, name)

            if name.startswith("."):
                left_out = found.hidden
            elif is_link and not path.exists():
                left_out = found.dangling
            elif not is_folder and not (path.is_file() and _suffix(path) in _FILE_READERS):
                left_out = found.unknown
            elif real in seen:
                left_out = found.repeated
            else:
                left_out = None

            if left_out is None:
                seen.add(real)
                found.links += [path] if is_link else []
                found.files += [] if is_folder else [path]
            else:
                left_out.append(path)
                if is_folder:
                    folders.remove(name)

    found.files.sort()
    if not found.files:
        raise UserError(
            where=str(root), got="no file of a known kind", expected=f"{_FILE_KINDS} files, or a folder of `datasets`"
        )

    return found
