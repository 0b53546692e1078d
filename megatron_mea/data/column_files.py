"""Columns of text: parquet files, folders that `datasets` saved, and streams from the hub, some values at a time."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_mea.data.line_files import TEXT_KEY_HINT, parse_value
from megatron_mea.data.text_records import ReadOptions, RecordBatch, TooLongDocument, batch_records, too_long
from megatron_mea.errors import RunError, UserError

_ROWS = 256
"""Rows that are read at once where these cannot be large."""

_ROWS_BYTES = 64 << 20
"""Bytes that so many rows may have before fewer are read at once."""


def read_parquet(path: Path, options: ReadOptions) -> Iterator[RecordBatch]:
    """The text column of a parquet file."""
    return batch_records(
        source=str(path),
        unit="row",
        records=enumerate(_parquet_values(path, options)),
        parse=parse_value,
        max_document=options.max_document,
    )


def read_dataset(source: str, options: ReadOptions) -> Iterator[RecordBatch]:
    """The text column of a folder of `datasets`, or of a name on the hub.

    Raises:
        UserError: neither loads, or the split or the column is missing.
        RunError: it breaks off.
    """
    return batch_records(
        source=source,
        unit="row",
        records=enumerate(_dataset_values(source, options)),
        parse=parse_value,
        max_document=options.max_document,
    )


def _parquet_values(path: Path, options: ReadOptions) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    column = [options.text_key]
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            _check_column(source=str(path), names=file.schema_arrow.names, text_key=options.text_key)
            for group in range(file.num_row_groups):
                rows = _rows_at_once(path=path, metadata=file.metadata, group=group, options=options)
                for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=column):
                    yield from _arrow_values(batch.column(0), options.max_document)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(where=str(path), got=f"not readable as parquet: {error}", expected="a parquet file") from None


def _rows_at_once(*, path: Path, metadata: Any, group: int, options: ReadOptions) -> int:
    """How many rows of a row group fit into memory together, by what the file declares of itself.

    Raises:
        UserError: some row of the group must be longer than a document may be.
    """
    row_group = metadata.row_group(group)
    chunks = [row_group.column(index) for index in range(row_group.num_columns)]
    key = options.text_key
    chunks = [chunk for chunk in chunks if chunk.path_in_schema == key or chunk.path_in_schema.startswith(f"{key}.")]
    declared = sum(chunk.total_uncompressed_size for chunk in chunks)

    # A page may hold a value, and its header the value as its least and its largest: four times is beyond doubt.
    if declared > 4 * row_group.num_rows * options.max_document + (1 << 20):
        first = sum(metadata.row_group(before).num_rows for before in range(group))
        raise too_long(
            where=f"{path}, rows {first} to {first + row_group.num_rows - 1}",
            got=f"{declared:,} bytes",
            max_document=options.max_document,
        )

    # What is written out is no larger than declared; where that is much, the rows of a batch may hold most of it.
    rows = _ROWS if declared <= 4 * _ROWS_BYTES else 16 if declared <= 32 * _ROWS_BYTES else 1
    if declared > _ROWS_BYTES // _ROWS and any(chunk.has_dictionary_page for chunk in chunks):
        rows = min(rows, max(1, _ROWS_BYTES // _longest_of_dictionary(path=path, group=group, text_key=key)))

    return rows


def _longest_of_dictionary(*, path: Path, group: int, text_key: str) -> int:
    """Bytes of the longest value that a row group's dictionary holds: each of its rows may repeat that one."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, read_dictionary=[text_key]) as file:
        column = next(file.iter_batches(batch_size=1, row_groups=[group], columns=[text_key])).column(0)

    if not pyarrow.types.is_dictionary(column.type):
        return _ROWS_BYTES
    return pyarrow.compute.max(pyarrow.compute.binary_length(column.dictionary)).as_py() or 1


def _arrow_values(column: Any, max_document: int) -> Iterator[Any]:
    """The values of an Arrow column one by one, an exception in place of each that is no UTF-8 or too long."""
    may_be_too_long = column.nbytes > max_document
    for scalar in column:
        if may_be_too_long and (size := _value_bytes(scalar)) > max_document:
            yield TooLongDocument(size)
            continue

        try:
            yield scalar.as_py()
        except UnicodeDecodeError as error:
            yield error


def _value_bytes(scalar: Any) -> int:
    """Size of a value of text; 0 for what is none."""
    value = getattr(scalar, "value", scalar)
    buffer = value.as_buffer() if hasattr(value, "as_buffer") else None
    return 0 if buffer is None else buffer.size


def _dataset_values(source: str, options: ReadOptions) -> Iterator[Any]:
    data = _open_dataset(source, options.split)
    # The columns of a stream are unknown before its first record.
    if data.column_names is not None:
        _check_column(source=source, names=data.column_names, text_key=options.text_key)
        # Other columns may hold pictures, which would be decoded for nothing.
        data = data.select_columns([options.text_key])

    rows = 0
    try:
        for value in _column_values(data=data, source=source, options=options):
            yield value
            rows += 1
    except UserError:
        raise
    except Exception as error:
        raise RunError(f"{source} broke off after {rows:,} rows: {_reason(error)}") from error


def _column_values(*, data: Any, source: str, options: ReadOptions) -> Iterator[Any]:
    """The text column of a dataset."""
    import datasets

    if isinstance(data, datasets.Dataset):
        # As Arrow tables: iterating over records would end at the first text that is no UTF-8.
        for table in data.with_format("arrow").iter(_ROWS):
            yield from _arrow_values(table.column(options.text_key), options.max_document)
        return

    for record in data:
        _check_column(source=source, names=list(record), text_key=options.text_key)
        yield record[options.text_key]


def _open_dataset(source: str, split: str) -> Any:
    """Opens a folder of `datasets`, or a stream of NAME or NAME:CONFIG on the hub."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if not Path(source).is_dir():
            name, _, config = source.partition(":")
            return datasets.load_dataset(name, config or None, split=split, streaming=True)
        _check_arrow_files(Path(source))
        data = datasets.load_from_disk(source)
    except UserError:
        raise
    # The exceptions for a missing hub, a misspelt name and a broken folder differ by release and by network.
    except Exception as error:
        got = f"neither a file nor a loadable dataset ({_reason(error)})"
        expected = "a file or a folder of text that exists, or a hub name"
        raise UserError(where=source, got=got, expected=expected) from None

    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(
                where=source, got=f"the splits {', '.join(data)}", expected=f"a split {split!r}", hint="give --split"
            )
        data = data[split]

    return data


def _check_arrow_files(folder: Path) -> None:
    """Refuses compressed Arrow files: `datasets`, which writes none, would unpack them into memory whole.

    Raises:
        UserError: a file has compressed record batches.
    """
    import pyarrow

    for file in sorted(folder.rglob("*.arrow")):
        with pyarrow.memory_map(str(file)) as stream:
            for message in pyarrow.ipc.MessageReader.open_stream(stream):
                if message.type == "record batch" and _is_compressed(message.metadata.to_pybytes()):
                    raise UserError(
                        where=str(file),
                        got="compressed Arrow buffers",
                        expected="a folder as `datasets` saves it, uncompressed",
                        hint="load it with `datasets`, and save it anew with save_to_disk",
                    )


def _is_compressed(metadata: bytes) -> bool:
    """Whether a record batch is compressed: whether its table has field 3 (Message.fbs of Arrow, version 1.0)."""

    def field(table: int, number: int) -> int:
        """Where a field of a flatbuffer's table lies, or 0 where it has none."""
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        position = 4 + 2 * number
        if position >= struct.unpack_from("<H", metadata, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", metadata, vtable + position)[0]
        return offset and table + offset

    header = field(struct.unpack_from("<I", metadata, 0)[0], 2)
    return bool(field(header + struct.unpack_from("<I", metadata, header)[0], 3))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _check_column(*, source: str, names: Sequence[str], text_key: str) -> None:
    if text_key not in names:
        raise UserError(
            where=source, got=f"the columns {', '.join(names)}", expected=f"a column {text_key!r}", hint=TEXT_KEY_HINT
        )
