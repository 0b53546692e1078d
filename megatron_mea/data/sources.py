"""Where documents come from: text, JSON lines, parquet, a `datasets` folder or a name on the hub; all streamed.

A file is cut into records (a line, a row, a paragraph block) without looking into them, and batches of records are
read into texts afterwards: cutting is cheap and in order, reading can go on in other processes.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_mea.data.records import BrokenRecords, Records, Unreadable, batched
from megatron_mea.errors import RunError, UserError

_KINDS = ".txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet"
_TEXT_KEY = "give the right one with --text-key"


def documents(
    sources: Sequence[str], text_key: str = "text", split: str = "train", broken: BrokenRecords | None = None
) -> Iterator[str]:
    """The texts of all documents of all sources, in order; empty ones are left out.

    Args:
        sources: files, folders (of such files, or written by `datasets`), or names on the Hugging Face hub.
        text_key: the field or column that holds a document's text.
        split: which split of a `datasets` folder or hub name.
        broken: counts the records; the default allows MAX_BROKEN.

    Raises:
        UserError: a source is missing or unreadable, has no such column, or too many of its lines are broken.
    """
    broken = broken or BrokenRecords()
    for batch in batches(sources, text_key, split):
        texts, problems = batch.texts(text_key)
        yield from texts
        broken.add(len(batch.records), problems)
    broken.close()


def batches(sources: Sequence[str], text_key: str = "text", split: str = "train") -> Iterator[Records]:
    """All records of all sources, in order; how they are cut into batches depends on the sources alone.

    Raises:
        UserError: a source is missing or unreadable, or has no such column.
        RunError: a dataset breaks off.
    """
    for source in sources:
        path = Path(source)
        if path.is_dir() and not _is_datasets_folder(path):
            for file in _files(path):
                yield from _reader(file)(file, text_key)
        elif path.is_file():
            yield from _reader(path)(path, text_key)
        else:
            yield from _from_datasets(source, text_key, split)


def check_sources(sources: Sequence[str]) -> None:
    """Raises UserError for a source that cannot exist, before any work is done.

    Says on stderr which files of a folder will be left out, since their kind is unknown.
    """
    notes = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            if not _is_datasets_folder(path):
                _files(path)
                notes += _left_out(path)
        elif path.is_file():
            _reader(path)
        elif _looks_like_a_file(source):
            raise UserError(source, "no such file or folder", f"a {_KINDS} file, a folder, or a hub name")
    for note in notes:
        print(note, file=sys.stderr)


def _left_out(folder: Path) -> Iterator[str]:
    """A line about the files of unknown kinds, where there are any."""
    unknown = [path for path in folder.rglob("*") if path.is_file() and _suffix(path) not in _READERS]
    names = sorted(str(path.relative_to(folder)) for path in unknown)
    if names:
        first = ", ".join(names[:5]) + (", ..." if names[5:] else "")
        yield f"left out {len(names):,} file(s) of unknown kinds in {folder}: {first}"


def _looks_like_a_file(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or _suffix(Path(source)) in _READERS


def _suffix(path: Path) -> str:
    """The last suffix, with a compression suffix kept together with what it compresses."""
    last = path.suffix.lower()
    return "".join(path.suffixes[-2:]).lower() if last in (".gz", ".zst") else last


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _suffix(path) in _READERS)
    if not files:
        raise UserError(str(folder), "no file of a known kind", f"{_KINDS} files, or a folder of `datasets`")
    return files


def _is_datasets_folder(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def _reader(path: Path) -> Callable[[Path, str], Iterator[Records]]:
    try:
        return _READERS[_suffix(path)]
    except KeyError:
        raise UserError(str(path), f"a file of kind {_suffix(path)!r}", f"{_KINDS}") from None


def _from_text(path: Path, text_key: str) -> Iterator[Records]:
    return batched(str(path), "line", _blocks(path), _read_block)


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """What lies between blank lines; a file without one is one block."""
    begin, block = 0, []
    for number, line in _lines(path):
        if not line.isspace():
            begin = begin if block else number
            block.append(line)
        elif block:
            yield begin, b"".join(block)
            block = []
    if block:
        yield begin, b"".join(block)


def _read_block(raw: bytes, text_key: str) -> list[str]:
    """Usually one document; more where a blank line has other blanks than ASCII's, or lines end in a bare \\r."""
    documents: list[list[str]] = [[]]
    for line in io.StringIO(_decoded(raw), newline=None):
        if line.isspace():
            documents.append([])
        else:
            documents[-1].append(line)
    return ["".join(lines).removesuffix("\n") for lines in documents]


def _from_json_lines(path: Path, text_key: str) -> Iterator[Records]:
    lines = ((number, line) for number, line in _lines(path) if not line.isspace())
    return batched(str(path), "line", lines, _read_json)


def _read_json(raw: bytes, text_key: str) -> list[str]:
    # Without its end, which in a string that was cut off would be what the message speaks of.
    line = _decoded(raw.rstrip(b"\r\n"))
    try:
        record = json.loads(line)
    # Besides broken JSON, numbers and nestings beyond Python's limits.
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"broken JSON: {getattr(error, 'msg', error)}", "one JSON object a line") from None
    if not isinstance(record, dict):
        raise Unreadable(f"a JSON {type(record).__name__}", "one JSON object a line")
    if text_key not in record:
        raise Unreadable(f"the fields {', '.join(record)}", f"text in the field {text_key!r}", _TEXT_KEY)
    return _read_value(record[text_key], text_key)


def _read_value(text: Any, text_key: str) -> list[str]:
    if isinstance(text, UnicodeDecodeError):
        raise _not_utf8(text)
    if not isinstance(text, str):
        raise Unreadable(type(text).__name__, f"text in the field {text_key!r}", _TEXT_KEY)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is no character.
        raise Unreadable(f"no Unicode text ({error.reason})", "text that UTF-8 can write") from None
    return [text]


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, line=raw.count(b"\n", 0, error.start)) from None


def _not_utf8(error: UnicodeDecodeError, line: int = 0) -> Unreadable:
    return Unreadable(f"not UTF-8 ({error.reason})", "UTF-8 text", line=line)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers from 1 and lines; `.gz` and `.zst` are decompressed on the way."""
    try:
        with _open_binary(path) as stream:
            first = stream.readline().removeprefix(codecs.BOM_UTF8)
            if first:
                yield 1, first
            yield from enumerate(stream, start=2)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(str(path), f"not readable: {error}", "a readable, whole file") from None


def _open_binary(path: Path) -> io.BufferedReader:
    if path.suffix.lower() in (".gz", ".zst") and path.stat().st_size == 0:
        # Decompression takes it for the end of a good stream.
        raise EOFError("0 bytes: a truncated archive")
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path), 1 << 17)
    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 17)
    return path.open("rb", 1 << 17)


def _from_parquet(path: Path, text_key: str) -> Iterator[Records]:
    return batched(str(path), "row", enumerate(_parquet_values(path, text_key)), _read_value)


def _parquet_values(path: Path, text_key: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            _check_column(str(path), file.schema_arrow.names, text_key)
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                yield from _values(batch.column(0))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(str(path), f"not readable as parquet: {error}", "a parquet file") from None


def _values(column: Any) -> list[Any]:
    """The values of an Arrow column; where one is no UTF-8, the error that says so."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _from_datasets(source: str, text_key: str, split: str) -> Iterator[Records]:
    return batched(source, "row", enumerate(_dataset_values(source, text_key, split)), _read_value)


def _dataset_values(source: str, text_key: str, split: str) -> Iterator[Any]:
    data = _open_dataset(source, split)
    # Not known before the first record, where a script or a web server makes the records.
    if data.column_names is not None:
        _check_column(source, data.column_names, text_key)
        # The others may be pictures, which would be decoded for nothing.
        data = data.select_columns([text_key])
    rows = 0
    try:
        for values in _columns(data, source, text_key):
            for value in values:
                yield value
                rows += 1
    except UserError:
        raise
    except Exception as error:
        raise RunError(f"{source} broke off after {rows:,} rows: {_reason(error)}") from error


def _columns(data: Any, source: str, text_key: str) -> Iterator[list[Any]]:
    """The column of a dataset, some values at a time."""
    import datasets

    if isinstance(data, datasets.Dataset):
        # As Arrow holds it: a loop over records would end at the first text that is no UTF-8.
        for table in data.with_format("arrow").iter(256):
            yield _values(table.column(text_key))
        return
    for record in data:
        _check_column(source, list(record), text_key)
        yield [record[text_key]]


def _open_dataset(source: str, split: str) -> Any:
    """A folder of `datasets`, or a stream of NAME or NAME:CONFIG on the hub."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if not Path(source).is_dir():
            name, _, config = source.partition(":")
            return datasets.load_dataset(name, config or None, split=split, streaming=True)
        data = datasets.load_from_disk(source)
    # What a missing hub, a misspelt name and a broken folder raise differs by release and by network.
    except Exception as error:
        found = f"neither a file nor a loadable dataset ({_reason(error)})"
        raise UserError(source, found, f"a {_KINDS} file, a folder, or a hub name") from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(source, f"the splits {', '.join(data)}", f"a split {split!r}", "give --split")
        data = data[split]
    return data


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _check_column(source: str, names: Sequence[str], text_key: str) -> None:
    if text_key not in names:
        raise UserError(source, f"the columns {', '.join(names)}", f"a column {text_key!r}", _TEXT_KEY)


_READERS: dict[str, Callable[[Path, str], Iterator[Records]]] = {
    ".txt": _from_text,
    ".jsonl": _from_json_lines,
    ".jsonl.gz": _from_json_lines,
    ".jsonl.zst": _from_json_lines,
    ".parquet": _from_parquet,
}
