"""Lines and rows that give no text are left out, counted and named, and too many end the command."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from support.text_files import lines, read

from megatron_mea.data.text_records import BrokenRecords
from megatron_mea.errors import UserError

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
        seen.extend(read(path))
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

    assert list(read(*sources, broken=broken)) == [*good, "row", "other", "one", "four"]
    assert (broken.count, broken.total) == (12, 1016)

    expected = [f"{path}, line {501 + i}" for i in range(len(BROKEN))] + [f"{rows}, row 1", f"{text}, line 4"]
    assert [problem.where for problem in broken.first_problems] == expected

    report = capfd.readouterr().err.splitlines()
    assert report[0] == "left out 12 of 1,016 lines and rows that are broken:"
    assert [line.split(": ")[0].strip() for line in report[1:]] == expected
    with pytest.raises(UserError, match=r"a\.jsonl, line 501(.|\n)*12 of 1,016 (.|\n)*at most 1\.18%"):
        list(read(*sources, broken=BrokenRecords(11.99 / 1016)))


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

    assert list(read(path)) == [*(f"row {i}" for i in range(700)), "last"]
    assert capfd.readouterr().err.endswith(
        f"left out 1 of 702 lines and rows that are broken:\n  {path}, row 700: not UTF-8 (invalid start byte)\n"
    )
    with pytest.raises(UserError, match=rf"{path}, row 700\n.*not UTF-8 \(invalid start byte\)"):
        list(read(path, broken=BrokenRecords(0)))


def test_a_report_has_an_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(lines(["a"] * 2000) + b"oops\n" * 20 + b"[]\n")
    assert len(list(read(tmp_path / "corpus.jsonl", broken=BrokenRecords(0.02)))) == 2000
    report = capfd.readouterr().err.splitlines()
    assert len(report) == 22
    assert report[-1] == "  ... and 1 more"


@pytest.mark.parametrize(("share", "most"), [(0.0, 1), (0.01, 101), (0.5, 5001)])
def test_what_is_broken_throughout_ends_early(share: float, most: int, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(lines(["x" * 50] * 20_000, "body"))
    broken = BrokenRecords(share)
    with pytest.raises(UserError, match=r"line 1\n.*the fields id, body\n(.|\n)*--text-key"):
        list(read(path, broken=broken))
    # One batch of a quarter of a megabyte beyond what the share allows of 10,000.
    assert most <= broken.count < most + 4000
    assert list(read(path, broken=BrokenRecords(1))) == []


def test_a_few_broken_lines_at_the_beginning_wait_for_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"oops\n" * 50 + lines(["x" * 500] * 4950))
    assert len(list(read(path))) == 4950

    path.write_bytes(b"oops\n" * 50 + lines(["x" * 500] * 4949))
    with pytest.raises(UserError, match="50 of 4,999"):
        list(read(path))


def test_a_text_file_of_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_bytes("one\n\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"corpus\.txt, line 3\n.*not UTF-8"):
        list(read(tmp_path / "corpus.txt"))
