"""Streams documents from text, JSON lines, parquet, a `datasets` folder or a name on the hub.

A file is split into records (a line, a row, a block between blank lines) without parsing them, and batches of records
are parsed into texts afterwards: splitting is cheap and in order, parsing can run in other processes.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_mea.data.text_records import BrokenRecords, RecordBatch, UnreadableRecord, batch_records
from megatron_mea.errors import RunError, UserError
from megatron_mea.printing import note

_FILE_KINDS = ".txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet"
_TEXT_KEY_HINT = "give the right one with --text-key"


def read_documents(
    sources: Sequence[str], *, text_key: str = "text", split: str = "train", broken: BrokenRecords | None = None
) -> Iterator[str]:
    """The texts of all documents of all sources, in order and without empty ones.

    Args:
        sources: files, folders (of such files, or written by `datasets`), or names on the Hugging Face hub.
        text_key: the field or column that holds a document's text.
        split: which split of a `datasets` folder or hub name.
        broken: counts the records; the default allows MAX_BROKEN.

    Raises:
        UserError: a source is missing or unreadable, has no such column, or too many of its lines are broken.
    """
    broken = broken or BrokenRecords()

    for batch in record_batches(sources=sources, text_key=text_key, split=split):
        texts, problems = batch.texts(text_key)
        yield from texts
        broken.add(len(batch.records), problems)

    broken.close()


def record_batches(sources: Sequence[str], *, text_key: str = "text", split: str = "train") -> Iterator[RecordBatch]:
    """Batches of all records of all sources, in order; the batches depend on the sources alone.

    Raises:
        UserError: a source is missing or unreadable, or has no such column.
        RunError: a dataset breaks off.
    """
    for source in sources:
        path = Path(source)
        if path.is_dir() and not _is_datasets_folder(path):
            for file in _list_files(path):
                yield from _file_reader(file)(file, text_key)
        elif path.is_file():
            yield from _file_reader(path)(path, text_key)
        else:
            yield from _read_dataset(source=source, text_key=text_key, split=split)


def check_sources(sources: Sequence[str]) -> None:
    """Raises UserError for a missing or unknown source, before any work is done.

    Prints on stderr which files of a folder will be left out, since their kind is unknown.
    """
    lines = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            if not _is_datasets_folder(path):
                _list_files(path)
                lines += _unknown_file_notes(path)
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
            files += _list_files(path)
        elif path.is_file():
            files.append(path)

    return files


def _unknown_file_notes(folder: Path) -> Iterator[str]:
    """One line about the files of unknown kinds in `folder`, where there are any."""
    unknown = [path for path in folder.rglob("*") if path.is_file() and _suffix(path) not in _FILE_READERS]
    names = sorted(str(path.relative_to(folder)) for path in unknown)
    if names:
        first = ", ".join(names[:5]) + (", ..." if names[5:] else "")
        yield f"left out {len(names):,} file(s) of unknown kinds in {folder}: {first}"


def _looks_like_file(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or _suffix(Path(source)) in _FILE_READERS


def _suffix(path: Path) -> str:
    """The last suffix in lower case; for compressed files the last two, such as `.jsonl.gz`."""
    last = path.suffix.lower()
    return "".join(path.suffixes[-2:]).lower() if last in (".gz", ".zst") else last


def _list_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _suffix(path) in _FILE_READERS)
    if not files:
        raise UserError(
            where=str(folder), got="no file of a known kind", expected=f"{_FILE_KINDS} files, or a folder of `datasets`"
        )

    return files


def _is_datasets_folder(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def _file_reader(path: Path) -> Callable[[Path, str], Iterator[RecordBatch]]:
    try:
        return _FILE_READERS[_suffix(path)]
    except KeyError:
        raise UserError(where=str(path), got=f"a file of kind {_suffix(path)!r}", expected=f"{_FILE_KINDS}") from None


def _read_text_file(path: Path, text_key: str) -> Iterator[RecordBatch]:
    return batch_records(source=str(path), unit="line", records=_read_blocks(path), parse=_parse_block)


def _read_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """The blocks between blank lines, each with the number of its first line."""
    first_line, block = 0, []
    for number, line in _read_lines(path):
        if not line.isspace():
            first_line = first_line if block else number
            block.append(line)
        elif block:
            yield first_line, b"".join(block)
            block = []

    if block:
        yield first_line, b"".join(block)


def _parse_block(raw: bytes, text_key: str) -> list[str]:
    """The documents of a block: usually one, more where a line of Unicode blanks or a bare \\r separates them."""
    documents: list[list[str]] = [[]]
    for line in io.StringIO(_decode_utf8(raw), newline=None):
        if line.isspace():
            documents.append([])
        else:
            documents[-1].append(line)

    return ["".join(lines).removesuffix("\n") for lines in documents]


def _read_json_lines(path: Path, text_key: str) -> Iterator[RecordBatch]:
    lines = ((number, line) for number, line in _read_lines(path) if not line.isspace())
    return batch_records(source=str(path), unit="line", records=lines, parse=_parse_json)


def _parse_json(raw: bytes, text_key: str) -> list[str]:
    # Without its newline, of which the message about a truncated string would complain.
    line = _decode_utf8(raw.rstrip(b"\r\n"))
    try:
        record = json.loads(line)
    # Broken JSON, and numbers and nestings beyond Python's limits.
    except (ValueError, RecursionError) as error:
        raise UnreadableRecord(f"broken JSON: {getattr(error, 'msg', error)}", "one JSON object a line") from None

    if not isinstance(record, dict):
        raise UnreadableRecord(f"a JSON {type(record).__name__}", "one JSON object a line")

    if text_key not in record:
        raise UnreadableRecord(
            got=f"the fields {', '.join(record)}", expected=f"text in the field {text_key!r}", hint=_TEXT_KEY_HINT
        )

    return _parse_value(record[text_key], text_key)


def _parse_value(text: Any, text_key: str) -> list[str]:
    if isinstance(text, UnicodeDecodeError):
        raise _utf8_error(text)
    if not isinstance(text, str):
        raise UnreadableRecord(got=type(text).__name__, expected=f"text in the field {text_key!r}", hint=_TEXT_KEY_HINT)

    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can escape half of a surrogate pair, which is no character.
        raise UnreadableRecord(f"no Unicode text ({error.reason})", "text that UTF-8 can write") from None

    return [text]


def _decode_utf8(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _utf8_error(error, line=raw.count(b"\n", 0, error.start)) from None


def _utf8_error(error: UnicodeDecodeError, line: int = 0) -> UnreadableRecord:
    return UnreadableRecord(got=f"not UTF-8 ({error.reason})", expected="UTF-8 text", line=line)


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of each line of a file, decompressed where it is `.gz` or `.zst`."""
    try:
        with _open_binary(path) as stream:
            first = stream.readline().removeprefix(codecs.BOM_UTF8)
            if first:
                yield 1, first
            yield from enumerate(stream, start=2)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(where=str(path), got=f"not readable: {error}", expected="a readable, whole file") from None


def _open_binary(path: Path) -> io.BufferedReader:
    if path.suffix.lower() in (".gz", ".zst") and path.stat().st_size == 0:
        # Decompression would take it for the end of an intact stream.
        raise EOFError("0 bytes: a truncated archive")

    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path), 1 << 17)

    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 17)

    return path.open("rb", 1 << 17)


def _read_parquet(path: Path, text_key: str) -> Iterator[RecordBatch]:
    return batch_records(
        source=str(path), unit="row", records=enumerate(_parquet_values(path, text_key)), parse=_parse_value
    )


def _parquet_values(path: Path, text_key: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            _check_column(source=str(path), names=file.schema_arrow.names, text_key=text_key)
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                yield from _arrow_values(batch.column(0))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(where=str(path), got=f"not readable as parquet: {error}", expected="a parquet file") from None


def _arrow_values(column: Any) -> list[Any]:
    """The values of an Arrow column, with a UnicodeDecodeError in place of each that is no UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_arrow_value(scalar) for scalar in column]


def _arrow_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _read_dataset(*, source: str, text_key: str, split: str) -> Iterator[RecordBatch]:
    return batch_records(
        source=source,
        unit="row",
        records=enumerate(_dataset_values(source=source, text_key=text_key, split=split)),
        parse=_parse_value,
    )


def _dataset_values(*, source: str, text_key: str, split: str) -> Iterator[Any]:
    data = _open_dataset(source, split)
    # The columns of a stream are unknown before its first record.
    if data.column_names is not None:
        _check_column(source=source, names=data.column_names, text_key=text_key)
        # Other columns may hold pictures, which would be decoded for nothing.
        data = data.select_columns([text_key])

    rows = 0
    try:
        for column in _column_batches(data=data, source=source, text_key=text_key):
            for value in column:
                yield value
                rows += 1
    except UserError:
        raise
    except Exception as error:
        raise RunError(f"{source} broke off after {rows:,} rows: {_reason(error)}") from error


def _column_batches(*, data: Any, source: str, text_key: str) -> Iterator[list[Any]]:
    """The text column of a dataset, some values at a time."""
    import datasets

    if isinstance(data, datasets.Dataset):
        # As Arrow tables: iterating over records would end at the first text that is no UTF-8.
        for table in data.with_format("arrow").iter(256):
            yield _arrow_values(table.column(text_key))
        return

    for record in data:
        _check_column(source=source, names=list(record), text_key=text_key)
        yield [record[text_key]]


def _open_dataset(source: str, split: str) -> Any:
    """Opens a folder of `datasets`, or a stream of NAME or NAME:CONFIG on the hub."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if not Path(source).is_dir():
            name, _, config = source.partition(":")
            return datasets.load_dataset(name, config or None, split=split, streaming=True)
        data = datasets.load_from_disk(source)
    # The exceptions for a missing hub, a misspelt name and a broken folder differ by release and by network.
    except Exception as error:
        got = f"neither a file nor a loadable dataset ({_reason(error)})"
        raise UserError(where=source, got=got, expected=f"a {_FILE_KINDS} file, a folder, or a hub name") from None

    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(
                where=source, got=f"the splits {', '.join(data)}", expected=f"a split {split!r}", hint="give --split"
            )
        data = data[split]

    return data


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _check_column(*, source: str, names: Sequence[str], text_key: str) -> None:
    if text_key not in names:
        raise UserError(
            where=source, got=f"the columns {', '.join(names)}", expected=f"a column {text_key!r}", hint=_TEXT_KEY_HINT
        )


_FILE_READERS: dict[str, Callable[[Path, str], Iterator[RecordBatch]]] = {
    ".txt": _read_text_file,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".jsonl.zst": _read_json_lines,
    ".parquet": _read_parquet,
}
