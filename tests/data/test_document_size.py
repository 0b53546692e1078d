"""A document longer than is allowed is refused by file and line or row, and reading it takes bounded memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from support.text_files import WRITERS, lines, read

from megatron_mea.data.sources import read_documents
from megatron_mea.data.text_records import BrokenRecords, ReadOptions
from megatron_mea.data.tokenizer import train_tokenizer
from megatron_mea.errors import UserError

MIB = 1 << 20


@pytest.fixture(params=[*WRITERS, "datasets"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A source whose third document has 1,000 bytes in 500 characters, and where it stands."""
    texts = ["a", "b", "\u00e9" * 500, "c"]
    path = tmp_path / f"corpus{request.param}"
    if request.param == "datasets":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(path)
    else:
        WRITERS[request.param](path, texts)

    return path, {".txt": "line 5", ".parquet": "row 2", "datasets": "row 2"}.get(request.param, "line 3")


def test_a_long_document_is_refused_by_its_place(source: tuple[Path, str]) -> None:
    path, place = source
    assert len(list(read(path, max_document=1000))) == 4

    # Whatever share of lines may be broken: it is not left out.
    with pytest.raises(UserError) as caught:
        list(read(path, max_document=999, broken=BrokenRecords(1)))
    (problem,) = caught.value.problems
    assert (problem.where, problem.got) == (f"{path}, {place}", "a document of 1,000 bytes")
    assert problem.expected == "a document of at most 999 bytes of UTF-8"
    assert "--max-document" in problem.hint


def test_bytes_of_escaped_characters_count_once(tmp_path: Path) -> None:
    text = "\x00" * 999 + "a"
    (tmp_path / "a.jsonl").write_bytes(lines([text]))
    assert len((tmp_path / "a.jsonl").read_bytes()) > 5 * len(text)
    assert list(read(tmp_path / "a.jsonl", max_document=1000)) == [text]


@pytest.mark.parametrize(
    ("raw", "is_allowed"),
    [
        (b"\xef\xbb\xbf" + b"a" * 1000 + b"\r\n", True),
        (b"\r\n" * 1001, True),
        (b"\xef\xbb\xbf" + b"\r\n" * 1001, True),
        (b"a" * 1002, False),
        (b"a" * 1002 + b"\r\n", False),
        (b"\r\n" * 1002 + b"a\r\n", False),
        (b"a\n\n" * 5000, False),
    ],
)
def test_a_long_txt_is_refused_as_one_that_could_be_cut(raw: bytes, is_allowed: bool, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(raw)
    if is_allowed:
        assert len(list(read_documents([str(tmp_path)], options=ReadOptions(max_document=1000)))) == (b"a" in raw)
        return

    with pytest.raises(UserError, match="--split-at blank-lines") as caught:
        list(read_documents([str(tmp_path)], options=ReadOptions(max_document=1000)))
    assert caught.value.problems[0].got == f"a document of {len(raw):,} bytes, since each .txt is one"


def peak_of(path: Path, **options: object) -> tuple[int, UserError]:
    """Bytes that Python held at most while `path` was refused, and the error."""
    documents = read_documents([str(path)], options=ReadOptions(**options))
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            list(documents)
        return tracemalloc.get_traced_memory()[1], caught.value
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.jsonl.zst", "bomb.jsonl", "bomb.txt", "blocks.txt"])
def test_an_endless_line_is_not_read_into_memory(name: str, tmp_path: Path) -> None:
    """200 MiB without a newline: in an archive of some 200 KB, or sparse."""
    path, size = tmp_path / name, 200 * MIB
    if name.endswith("gz"):
        with gzip.open(path, "wb", compresslevel=1) as stream:
            stream.write(b'{"text": "a"}\n')
            for _ in range(size // MIB):
                stream.write(bytes(MIB))
    elif name.endswith("zst"):
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(b'{"text": "a"}\n')
            for _ in range(size // MIB):
                stream.write(bytes(MIB))
    else:
        with path.open("wb") as stream:
            stream.write(b'{"text": "a"}\n\n')
            stream.truncate(size)

    blocks = "blank-lines" if name == "blocks.txt" else "file"
    peak, error = peak_of(path, max_document=MIB, split_at=blocks)
    # 22 MiB may be read for a document of one, and one copy of it exists for a moment.
    assert peak < 60 * MIB
    place = {"bomb.txt": "", "blocks.txt": ", line 3", "bomb.jsonl": ", line 3"}.get(name, ", line 2")
    assert error.problems[0].where == f"{path}{place}"
    assert "at most 1,048,576 bytes" in str(error)
    assert ("--split-at blank-lines" in str(error)) == (name == "bomb.txt")


def write_parquet_bomb(path: Path, *, rows: int, size: int, use_dictionary: bool) -> None:
    """`rows` rows of `size` bytes each behind one short row, in a row group of their own."""
    column = pyarrow.array(["a", "x" * size]).dictionary_encode().take(pyarrow.array([0] + [1] * rows))
    if not use_dictionary:
        column = column.cast("string")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": column}),
        path,
        compression="zstd",
        use_dictionary=use_dictionary,
        write_statistics=False,
        write_batch_size=1,
        data_page_size=4 * MIB,
    )


def test_repeated_rows_of_a_small_parquet_file_are_read_in_bounded_batches(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    write_parquet_bomb(path, rows=1000, size=8 * MIB, use_dictionary=True)
    assert path.stat().st_size < 10_000

    # Eight gigabytes: the first of them are enough.
    documents, already = read_documents([str(path)]), pyarrow.total_allocated_bytes()
    for _ in range(20):
        assert len(next(documents)) in (1, 8 * MIB)
        assert pyarrow.total_allocated_bytes() - already < 200 * MIB

    peak, error = peak_of(path, max_document=8 * MIB - 1)
    assert peak < 60 * MIB
    assert error.problems[0].where == f"{path}, row 1"


def test_a_row_group_that_declares_too_long_a_row_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema({"text": "string"}), use_dictionary=False) as writer:
        writer.write_table(pyarrow.table({"text": ["a", "b"]}))
        writer.write_table(pyarrow.table({"text": ["x" * 50 * MIB, "c"]}))

    peak, error = peak_of(path, max_document=MIB)
    assert error.problems[0].where == f"{path}, rows 2 to 3"
    assert peak < MIB


def test_rows_of_a_large_row_group_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "large.parquet"
    write_parquet_bomb(path, rows=80, size=4 * MIB, use_dictionary=False)
    already, sizes = pyarrow.total_allocated_bytes(), []
    for text in read(path):
        sizes.append(len(text))
        assert pyarrow.total_allocated_bytes() - already < 200 * MIB
    assert sizes == [1] + [4 * MIB] * 80


@pytest.mark.parametrize("compression", ["zstd", "lz4", None])
def test_compressed_arrow_files_are_refused(compression: str | None, tmp_path: Path) -> None:
    """`datasets` writes none, and would unpack the whole file into memory."""
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a", "b"]})}).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").rglob("*.arrow")
    assert list(read(tmp_path / "saved")) == ["a", "b"]

    schema, options = (
        pyarrow.ipc.open_stream(file.read_bytes()).schema,
        pyarrow.ipc.IpcWriteOptions(compression=compression),
    )
    with pyarrow.ipc.new_stream(str(file), schema, options=options) as writer:
        for text in ("a", "x" * 1000):
            writer.write_batch(pyarrow.record_batch({"text": [text]}, schema=schema))
    if compression is None:
        assert list(read(tmp_path / "saved")) == ["a", "x" * 1000]
        return

    with pytest.raises(UserError, match=r"\.arrow\n.*compressed Arrow buffers"):
        list(read(tmp_path / "saved"))


def test_training_of_a_tokenizer_is_bounded_alike(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" * 1001}) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 1\n.*1,001 bytes"):
        train_tokenizer(sources=[str(tmp_path / "a.jsonl")], vocab_size=300, out=tmp_path / "out", max_document=1000)
    assert not (tmp_path / "out").exists()
