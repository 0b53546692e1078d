"""Every kind of source gives the same documents, in order, and folders say what they leave out."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from support.text_files import TEXTS, WRITERS, read, write_jsonl

from megatron_mea.data.sources import check_sources
from megatron_mea.errors import UserError


@pytest.fixture(params=list(WRITERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_each_kind_gives_the_same_documents(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path / f"corpus{kind}", TEXTS)
    assert list(read(tmp_path / f"corpus{kind}")) == TEXTS


def test_the_suffix_decides_in_any_case_and_after_other_dots(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"corpus.v1.2{kind.upper()}"
    WRITERS[kind](path, TEXTS)
    assert list(read(path)) == TEXTS


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

    assert list(read(tmp_path)) == expected


def test_files_of_unknown_kinds_in_a_folder_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "known.jsonl", TEXTS)
    check_sources([str(tmp_path)])
    assert capfd.readouterr().err == ""

    (tmp_path / "deep").mkdir()
    for name in ("a.csv", "b.txt.gz", "deep/c.json"):
        (tmp_path / name).write_bytes(b"")

    check_sources([str(tmp_path), str(tmp_path / "known.jsonl")])
    report = f"left out 3 file(s) of unknown kinds in {tmp_path}: a.csv, b.txt.gz, deep/c.json"
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

    assert list(read(*arguments)) == [*expected[:3], "in a folder", *expected[3:], *expected[:3]]


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

    assert list(read(path, text_key="body")) == ["a", "b", "c"]
    with pytest.raises(UserError, match="--text-key"):
        list(read(path, text_key="boddy"))


def folder_notes(folder: Path, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What is said of a folder, without its name, after its documents were read twice alike."""
    check_sources([str(folder)])
    assert list(read(folder)) == list(read(folder))
    return [line.replace(f" in {folder}", "") for line in capfd.readouterr().err.splitlines()]


def test_links_in_a_folder_are_followed_and_each_real_file_is_read_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (folder / "deep").mkdir(parents=True)
    (elsewhere / "below").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", ["b"])
    write_jsonl(elsewhere / "below/z.jsonl", ["z"])
    # As in a cache of the hub: the name that the link gives says what the file is.
    write_jsonl(tmp_path / "blob-of-a-hub", ["y"])

    (folder / "linked").symlink_to(elsewhere)
    (folder / "a.jsonl").symlink_to("../blob-of-a-hub")
    (folder / "c.jsonl").symlink_to("b.jsonl")
    # Loops: to itself, to what contains it, and to what contains the folder that was named.
    (folder / "self").symlink_to("self")
    (folder / "deep/up").symlink_to("..")
    (elsewhere / "all").symlink_to(tmp_path)
    (folder / "gone.jsonl").symlink_to("nowhere")

    assert list(read(folder)) == ["y", "b", "z"]
    assert folder_notes(folder, capfd) == [
        "followed 3 link(s): a.jsonl, linked, linked/all",
        "left out 4 file(s) or folder(s) that have two names: "
        "c.jsonl, deep/up, linked/all/corpus, linked/all/elsewhere",
        "left out 2 link(s) to nothing: gone.jsonl, self",
        "left out 1 file(s) of unknown kinds: linked/all/blob-of-a-hub",
    ]


def test_hidden_files_and_folders_are_left_out_unless_they_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ".cache/corpus"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.jsonl", ".ipynb_checkpoints/a.jsonl", ".b.jsonl"):
        write_jsonl(folder / name, [name])
    (folder / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07Mac OS X")

    assert list(read(folder)) == ["a.jsonl"]
    assert folder_notes(folder, capfd) == [
        "left out 3 hidden file(s) or folder(s): ._a.jsonl, .b.jsonl, .ipynb_checkpoints"
    ]
    assert list(read(folder / ".b.jsonl", folder / ".ipynb_checkpoints")) == [".b.jsonl", ".ipynb_checkpoints/a.jsonl"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry]:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    # Root, who runs some tests, may read everything.
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"locked\n.*not readable: Permission denied"):
        list(read(tmp_path))


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="an empty name"):
        check_sources([""])
    check_sources(["."])
