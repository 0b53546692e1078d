"""Where documents come from: text, JSON lines, parquet, a `datasets` folder or a name on the hub; all streamed."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_mea.errors import UserError

_KINDS = ".txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet"


def documents(sources: Sequence[str], text_key: str = "text", split: str = "train") -> Iterator[str]:
    """The texts of all documents of all sources, in order; empty ones are left out.

    Args:
        sources: files, folders (of such files, or written by `datasets`), or names on the Hugging Face hub.
        text_key: the field or column that holds a document's text.
        split: which split of a `datasets` folder or hub name.

    Raises:
        UserError: a source is missing or unreadable, has no such field, or a line is broken; names file and line.
    """
    for source in sources:
        for text in _open(source, text_key, split):
            if text.strip():
                yield text


def check_sources(sources: Sequence[str]) -> None:
    """Raises UserError for a source that cannot exist, before any work is done."""
    for source in sources:
        path = Path(source)
        if path.is_dir():
            if not _is_datasets_folder(path):
                _files(path)
        elif path.is_file():
            _reader(path)
        elif _looks_like_a_file(source):
            raise UserError(source, "no such file or folder", f"a {_KINDS} file, a folder, or a hub name")


def _open(source: str, text_key: str, split: str) -> Iterator[str]:
    path = Path(source)
    if path.is_dir() and not _is_datasets_folder(path):
        for file in _files(path):
            yield from _reader(file)(file, text_key)
    elif path.is_file():
        yield from _reader(path)(path, text_key)
    else:
        yield from _from_datasets(source, text_key, split)


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


def _reader(path: Path) -> Callable[[Path, str], Iterator[str]]:
    try:
        return _READERS[_suffix(path)]
    except KeyError:
        raise UserError(str(path), f"a file of kind {_suffix(path)!r}", f"{_KINDS}") from None


def _from_text(path: Path, text_key: str) -> Iterator[str]:
    """Blank lines separate documents; a file without one is one document."""
    paragraph: list[str] = []
    for _, line in _lines(path):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).rstrip("\n")
            paragraph = []
    if paragraph:
        yield "".join(paragraph).rstrip("\n")


def _from_json_lines(path: Path, text_key: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        # Besides broken JSON, numbers and nestings beyond Python's limits.
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise UserError(where, f"broken JSON: {reason}", "one JSON object a line") from None
        if not isinstance(record, dict):
            raise UserError(where, f"a JSON {type(record).__name__}", "one JSON object a line")
        yield _text_of(record, text_key, where)


def _from_parquet(path: Path, text_key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise UserError(str(path), f"the columns {', '.join(names)}", f"a column {text_key!r}", _TEXT_KEY)
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    yield _text_of({text_key: text}, text_key, f"{path}, row {row}")
                    row += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(str(path), f"not readable as parquet: {error}", "a parquet file") from None


def _from_datasets(source: str, text_key: str, split: str) -> Iterator[str]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if Path(source).is_dir():
            data = datasets.load_from_disk(source)
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise UserError(source, f"the splits {', '.join(data)}", f"a split {split!r}", "give --split")
                data = data[split]
        else:
            data = datasets.load_dataset(source, split=split, streaming=True)
    except UserError:
        raise
    # What a missing hub, a misspelt name and a broken folder raise differs by release and by network.
    except Exception as error:
        reason = str(error).strip().splitlines()
        found = f"neither a file nor a loadable dataset ({type(error).__name__}: {reason[0] if reason else ''})"
        raise UserError(source, found, f"a {_KINDS} file, a folder, or a hub name") from None
    for row, record in enumerate(data):
        yield _text_of(record, text_key, f"{source}, row {row}")


_TEXT_KEY = "give the right one with --text-key"


def _text_of(record: dict, text_key: str, where: str) -> str:
    text = record.get(text_key)
    if not isinstance(text, str):
        found = f"the fields {', '.join(map(str, record))}" if text_key not in record else type(text).__name__
        raise UserError(where, found, f"text in the field {text_key!r}", _TEXT_KEY)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is no character.
        raise UserError(where, f"no Unicode text ({error.reason})", "text that UTF-8 can write") from None
    return text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines; `.gz` and `.zst` are decompressed on the way."""
    try:
        with _open_binary(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as stream:
            yield from enumerate(stream, start=1)
    except UnicodeDecodeError as error:
        raise UserError(str(path), f"not UTF-8 ({error.reason})", "UTF-8 text") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(str(path), f"not readable: {error}", "a readable, whole file") from None


def _open_binary(path: Path) -> io.BufferedIOBase:
    if path.suffix.lower() == ".gz":
        return gzip.open(path)
    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _from_text,
    ".jsonl": _from_json_lines,
    ".jsonl.gz": _from_json_lines,
    ".jsonl.zst": _from_json_lines,
    ".parquet": _from_parquet,
}
