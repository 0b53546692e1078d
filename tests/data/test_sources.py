"""Every kind of source gives the same documents, in order, and none of them is read ahead of its use."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_mea.data.sources import check_sources, read_documents
from megatron_mea.data.text_records import BrokenRecords
from megatron_mea.errors import RunError, UserError

TEXTS = [
    "one line",
    "two\nlines",
    "  indented, \u00e9\u65e5\U0001f600 ",
    '"quotes" \\ and {braces}',
    "x" * 5000,
    "last",
]


def lines(texts: Sequence[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_text(path: Path, texts: Sequence[str]) -> None:
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    path.write_bytes(lines(texts))


def write_gzip(path: Path, texts: Sequence[str]) -> None:
    with gzip.open(path, "wb") as stream:
        stream.write(lines(texts))


def write_zstd(path: Path, texts: Sequence[str]) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(lines(texts))


def write_parquet(path: Path, texts: Sequence[str]) -> None:
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=max(2, len(texts) // 100))


WRITERS: dict[str, Callable[[Path, Sequence[str]], None]] = {
    ".txt": write_text,
    ".jsonl": write_jsonl,
    ".jsonl.gz": write_gzip,
    ".jsonl.zst": write_zstd,
    ".parquet": write_parquet,
}


@pytest.fixture(params=list(WRITERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_each_kind_gives_the_same_documents(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path / f"corpus{kind}", TEXTS)
    assert list(read_documents([str(tmp_path / f"corpus{kind}")])) == TEXTS


def test_the_suffix_decides_in_any_case_and_after_other_dots(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"corpus.v1.2{kind.upper()}"
    WRITERS[kind](path, TEXTS)
    assert list(read_documents([str(path)])) == TEXTS


def test_parquet_with_several_row_groups(tmp_path: Path) -> None:
    texts = [f"row {i}" for i in range(1000)]
    write_parquet(tmp_path / "corpus.parquet", texts)
    assert pyarrow.parquet.ParquetFile(tmp_path / "corpus.parquet").num_row_groups == 100
    assert list(read_documents([str(tmp_path / "corpus.parquet")])) == texts


@pytest.mark.parametrize("kind_of_string", ["large_string", "dictionary", "string_view"])
def test_parquet_with_other_kinds_of_strings(kind_of_string: str, tmp_path: Path) -> None:
    column = pyarrow.array(TEXTS)
    if kind_of_string == "dictionary":
        column = column.dictionary_encode()
    else:
        column = column.cast(getattr(pyarrow, kind_of_string)())

    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "corpus.parquet")
    assert list(read_documents([str(tmp_path / "corpus.parquet")])) == TEXTS


@pytest.mark.parametrize("blank", ["\n", " \n", "\t \n", "\n\n\n", "\n  \n\n"])
def test_blank_lines_separate_documents_of_a_text_file(blank: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(f"{blank}one\nstill one\n{blank}two\n{blank}  three\n{blank}")
    assert list(read_documents([str(path)])) == ["one\nstill one", "two", "  three"]


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_text_file_without_a_blank_line_is_one_document(end: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("a\nb\n c" + end)
    assert list(read_documents([str(path)])) == ["a\nb\n c"]


def test_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_bytes(b"a\r\nb\r\n\r\nc\r\n")
    (tmp_path / "corpus.jsonl").write_bytes(lines(["a\r\nb"]).replace(b"\n", b"\r\n"))
    assert list(read_documents([str(tmp_path / "corpus.txt")])) == ["a\nb", "c"]
    assert list(read_documents([str(tmp_path / "corpus.jsonl")])) == ["a\r\nb"]


def test_empty_documents_and_blank_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n" + lines(["", "a", " \n\t"]) + b"  \n\n" + lines(["b"]) + b"\n")
    assert list(read_documents([str(path)])) == ["a", "b"]


def test_unusual_line_separators_do_not_cut_a_json_line(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be"
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    assert list(read_documents([str(tmp_path / "corpus.jsonl")])) == [text]


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst"])
def test_joined_compressed_files(kind: str, tmp_path: Path) -> None:
    # `cat a.gz b.gz`, and what parallel compressors write, is one file of several streams.
    WRITERS[kind](tmp_path / f"a{kind}", TEXTS[:2])
    WRITERS[kind](tmp_path / f"b{kind}", TEXTS[2:])
    joined = tmp_path / f"joined{kind}"
    joined.write_bytes((tmp_path / f"a{kind}").read_bytes() + (tmp_path / f"b{kind}").read_bytes())
    assert list(read_documents([str(joined)])) == TEXTS


def test_datasets_folder(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"id": range(len(TEXTS)), "text": TEXTS}).save_to_disk(tmp_path / "one")
    assert list(read_documents([str(tmp_path / "one")])) == TEXTS


def test_datasets_folder_with_splits(tmp_path: Path) -> None:
    parts = {"train": TEXTS[:4], "validation": TEXTS[4:]}
    folder = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()})
    folder.save_to_disk(tmp_path / "two")
    assert list(read_documents([str(tmp_path / "two")])) == TEXTS[:4]
    assert list(read_documents([str(tmp_path / "two")], split="validation")) == TEXTS[4:]
    with pytest.raises(UserError, match="train, validation"):
        list(read_documents([str(tmp_path / "two")], split="test"))


def test_a_folder_gives_its_files_in_sorted_order(tmp_path: Path) -> None:
    # Written in another order than sorted, in folders too, with files that are no text in between.
    (tmp_path / "deep").mkdir()
    names = ["deep/part-0.jsonl.zst", "b.txt", "a.jsonl.gz", "deep.parquet", "c.jsonl"]
    for name in names:
        WRITERS[name[name.index(".") :]](tmp_path / name, [f"{name} {i}" for i in range(3)])

    (tmp_path / "README.md").write_text("not a document")
    (tmp_path / "a.json").write_text("{}")
    order = sorted(tmp_path / name for name in names)
    expected = [f"{path.relative_to(tmp_path)} {i}" for path in order for i in range(3)]

    assert list(read_documents([str(tmp_path)])) == expected


def test_files_of_unknown_kinds_in_a_folder_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "known.jsonl", TEXTS)
    check_sources([str(tmp_path)])
    assert capfd.readouterr().err == ""

    (tmp_path / "deep").mkdir()
    for name in ("a.csv", "b.txt.gz", "deep/c.json.gz"):
        (tmp_path / name).write_bytes(b"")

    check_sources([str(tmp_path), str(tmp_path / "known.jsonl")])
    report = f"left out 3 file(s) of unknown kinds in {tmp_path}: a.csv, b.txt.gz, deep/c.json.gz"
    assert capfd.readouterr().err == report + "\n"

    for number in range(10):
        (tmp_path / f"{number}.csv").write_bytes(b"")

    check_sources([str(tmp_path)])
    report = f"left out 13 file(s) of unknown kinds in {tmp_path}: 0.csv, 1.csv, 2.csv, 3.csv, 4.csv, ..."
    assert capfd.readouterr().err == report + "\n"


def test_several_sources_in_the_order_given(tmp_path: Path) -> None:
    for index, (suffix, write) in enumerate(WRITERS.items()):
        write(tmp_path / f"{9 - index}{suffix}", [f"{suffix} {i}" for i in range(3)])

    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder/x.jsonl", ["in a folder"])
    sources = [str(tmp_path / f"{9 - index}{suffix}") for index, suffix in enumerate(WRITERS)]
    expected = [f"{suffix} {i}" for suffix in WRITERS for i in range(3)]
    arguments = [sources[0], str(tmp_path / "folder"), *sources[1:], sources[0]]

    assert list(read_documents(arguments)) == [*expected[:3], "in a folder", *expected[3:], *expected[:3]]


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet", "datasets"])
def test_text_key(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"corpus{kind}"
    columns = {"text": ["wrong"] * 3, "body": ["a", "b", "c"]}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    elif kind == "datasets":
        datasets.Dataset.from_dict(columns).save_to_disk(path)
    else:
        raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)

    assert list(read_documents([str(path)], text_key="body")) == ["a", "b", "c"]
    with pytest.raises(UserError, match="--text-key"):
        list(read_documents([str(path)], text_key="boddy"))


def bytes_read() -> int:
    """Bytes that this process has asked the system for since it began."""
    counters = Path("/proc/self/io")
    if not counters.is_file():
        pytest.skip("needs Linux's /proc/self/io")
    return int(counters.read_text().split("rchar: ")[1].split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_the_first_document_costs_little_of_a_large_file(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    texts = [random.bytes(500).hex() for _ in range(20_000)]
    path = tmp_path / f"large{kind}"
    WRITERS[kind](path, texts)
    # Modules that the first use of a reader imports must not count.
    WRITERS[kind](tmp_path / f"small{kind}", ["a", "b"])
    list(read_documents([str(tmp_path / f"small{kind}")]))
    size, before = path.stat().st_size, bytes_read()
    assert size > 9_000_000

    stream = read_documents([str(path)])
    assert next(stream) == texts[0]
    assert bytes_read() - before < size / 10
    assert list(islice(stream, 2000)) == texts[1:2001]
    assert bytes_read() - before < size / 4


def test_parquet_is_read_in_constant_memory(tmp_path: Path) -> None:
    texts = ["x" * 10_000] * 3000
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "large.parquet", 30, use_dictionary=False, compression="none")
    size, peak = (tmp_path / "large.parquet").stat().st_size, 0
    del table
    already = pyarrow.total_allocated_bytes()
    for _ in read_documents([str(tmp_path / "large.parquet")]):
        peak = max(peak, pyarrow.total_allocated_bytes() - already)

    assert size > 25_000_000
    assert 0 < peak < size / 3


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst"])
def test_a_truncated_file_yields_its_documents_before_the_error(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    texts = [random.bytes(50).hex() for _ in range(20_000)]
    path = tmp_path / f"large{kind}"
    WRITERS[kind](path, texts)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    seen: list[str] = []

    with pytest.raises(UserError, match="large"):
        seen.extend(read_documents([str(path)]))
    assert 5_000 < len(seen) < 12_000
    assert seen == texts[: len(seen)]


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    raw = bytearray(gzip.compress(lines(TEXTS)))
    # The first byte after the header of ten: 7 announces a last block of a kind that does not exist.
    raw[10] = 7
    (tmp_path / "damaged.jsonl.gz").write_bytes(raw)
    with pytest.raises(UserError, match=r"damaged\.jsonl\.gz"):
        list(read_documents([str(tmp_path / "damaged.jsonl.gz")]))


BROKEN = {  # a line of JSON lines, and what the message says of it
    b'{"text": "cut of': "broken JSON: Unterminated string",
    b'{"text": "a"} {"text": "b"}': "broken JSON: Extra data",
    b'{"x": ' + b"9" * 5000 + b"}": "broken JSON: ",
    b"[" * 200_000: "broken JSON: ",
    b"[1]": "a JSON list",
    b'{"body": "a"}': "the fields body",
    b'{"text": null}': "NoneType",
    b'{"text": ["a"]}': "list",
    b'{"text": "\xe9t\xe9"}': "not UTF-8 (invalid continuation byte)",
    b'{"text": "half a pair: \\ud83d"}': "no Unicode text (surrogates not allowed)",
}


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: line[:12].decode(errors="replace"))
def test_a_broken_line_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(lines(["a", "b"]) + b"\n" + line + b"\n" + lines(["c"]))
    seen: list[str] = []
    with pytest.raises(UserError) as caught:
        seen.extend(read_documents([str(path)]))
    assert seen == ["a", "b", "c"]

    (problem,) = caught.value.problems
    assert problem.where == f"{path}, line 4"
    assert str(problem.got).startswith(BROKEN[line])


def test_broken_lines_of_every_kind_are_left_out_counted_and_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = [f"text {i}" for i in range(1000)]
    path, rows, text = tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.txt"
    path.write_bytes(lines(good[:500]) + b"".join(line + b"\n" for line in BROKEN) + lines(good[500:]))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row", None, "other"]}), rows)
    text.write_bytes(b"one\n\ntwo\nbad \xff\nthree\n\nfour\n")
    sources, broken = [str(path), str(rows), str(text)], BrokenRecords(12 / 1016)

    assert list(read_documents(sources, broken=broken)) == [*good, "row", "other", "one", "four"]
    assert (broken.count, broken.total) == (12, 1016)

    expected = [f"{path}, line {501 + i}" for i in range(len(BROKEN))] + [f"{rows}, row 1", f"{text}, line 4"]
    assert [problem.where for problem in broken.first_problems] == expected

    report = capfd.readouterr().err.splitlines()
    assert report[0] == "left out 12 of 1,016 lines and rows that are broken:"
    assert [line.split(": ")[0].strip() for line in report[1:]] == expected
    with pytest.raises(UserError, match=r"a\.jsonl, line 501(.|\n)*12 of 1,016 (.|\n)*at most 1\.18%"):
        list(read_documents(sources, broken=BrokenRecords(11.99 / 1016)))


@pytest.mark.parametrize("kind", ["plain.parquet", "dictionary.parquet", "datasets"])
def test_a_row_that_is_no_utf8_is_left_out_counted_and_named(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, texts = tmp_path / kind, [*(b"row %d" % i for i in range(700)), b"bad \xff\xfe", b"last"]
    column = pyarrow.array(texts).view("string")

    if kind == "datasets":
        datasets.Dataset(pyarrow.table({"id": range(702), "text": column})).save_to_disk(path)
    else:
        column = column.dictionary_encode() if kind == "dictionary.parquet" else column
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)

    assert list(read_documents([str(path)])) == [*(f"row {i}" for i in range(700)), "last"]
    assert capfd.readouterr().err.endswith(
        f"left out 1 of 702 lines and rows that are broken:\n  {path}, row 700: not UTF-8 (invalid start byte)\n"
    )
    with pytest.raises(UserError, match=rf"{path}, row 700\n.*not UTF-8 \(invalid start byte\)"):
        list(read_documents([str(path)], broken=BrokenRecords(0)))


def test_a_report_has_an_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(lines(["a"] * 2000) + b"oops\n" * 20 + b"[]\n")
    assert len(list(read_documents([str(tmp_path / "corpus.jsonl")], broken=BrokenRecords(0.02)))) == 2000
    report = capfd.readouterr().err.splitlines()
    assert len(report) == 22
    assert report[-1] == "  ... and 1 more"


@pytest.mark.parametrize(("share", "most"), [(0.0, 1), (0.01, 101), (0.5, 5001)])
def test_what_is_broken_throughout_ends_early(share: float, most: int, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(lines(["x" * 50] * 20_000, "body"))
    broken = BrokenRecords(share)
    with pytest.raises(UserError, match=r"line 1\n.*the fields id, body\n(.|\n)*--text-key"):
        list(read_documents([str(path)], broken=broken))
    # One batch of a quarter of a megabyte beyond what the share allows of 10,000.
    assert most <= broken.count < most + 4000
    assert list(read_documents([str(path)], broken=BrokenRecords(1))) == []


def test_a_few_broken_lines_at_the_beginning_wait_for_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"oops\n" * 50 + lines(["x" * 500] * 4950))
    assert len(list(read_documents([str(path)]))) == 4950

    path.write_bytes(b"oops\n" * 50 + lines(["x" * 500] * 4949))
    with pytest.raises(UserError, match="50 of 4,999"):
        list(read_documents([str(path)]))


def test_a_text_file_of_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_bytes("one\n\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"corpus\.txt, line 3\n.*not UTF-8"):
        list(read_documents([str(tmp_path / "corpus.txt")]))


@pytest.mark.parametrize("blank", ["\r\r", "\n\u3000\n", "\r\n\xa0\r\n"])
def test_unusual_blank_lines_separate_documents(blank: str, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_bytes(f"a\rb{blank}c".encode())
    assert list(read_documents([str(tmp_path / "corpus.txt")])) == ["a\nb", "c"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict]]:
    """In place of the hub: streams three records; the calls are noted."""
    calls: list[tuple[tuple, dict]] = []

    def records() -> Iterator[dict]:
        for i in range(3):
            yield {"text": f"{calls[-1][0][0]} {i}", "picture": b"large"}
        if "cut" in calls[-1][0][0]:
            raise ConnectionError("the line is dead\nand more")

    def load_dataset(*names: str | None, **options: object) -> datasets.IterableDataset:
        calls.append((names, options))
        if "missing" in str(names[0]):
            raise FileNotFoundError("no such dataset")
        return datasets.IterableDataset.from_generator(records)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_name_on_the_hub_is_streamed(hub: list[tuple[tuple, dict]]) -> None:
    assert list(read_documents(["owner/name", "wikitext:raw-v1"], split="test")) == [
        *("owner/name 0", "owner/name 1", "owner/name 2"),
        *("wikitext 0", "wikitext 1", "wikitext 2"),
    ]

    options = {"split": "test", "streaming": True}
    assert hub == [(("owner/name", None), options), (("wikitext", "raw-v1"), options)]
    with pytest.raises(UserError, match=r"columns text, picture\n.*'body'\n.*--text-key"):
        list(read_documents(["owner/name"], text_key="body"))


def test_a_name_that_the_hub_has_not_is_the_users_mistake(hub: list[tuple[tuple, dict]]) -> None:
    with pytest.raises(UserError, match=r"owner/missing\n.*FileNotFoundError: no such dataset"):
        list(read_documents(["owner/missing"]))


def test_a_stream_that_breaks_off_is_nobodys_corpus(hub: list[tuple[tuple, dict]]) -> None:
    with pytest.raises(RunError, match=r"owner/cut broke off after 3 rows: ConnectionError: the line is dead$"):
        list(read_documents(["owner/cut"]))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo\n")
    assert list(read_documents([str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")])) == ["one", "two"]
