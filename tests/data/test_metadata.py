"""PREFIX.meta.json: right checksums, what may be overwritten, and what a killed `prepare` leaves."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.foreign import VALUES, examples

from megatron_mea.cli import main
from megatron_mea.data import indexed
from megatron_mea.data import prepare as prepare_module
from megatron_mea.data.indexed import IndexedReader, IndexedWriter
from megatron_mea.data.metadata import DataMetadata, Recipe, find_prepared
from megatron_mea.data.prepare import prepare
from megatron_mea.errors import UserError

RECIPE = Recipe(
    sources=["a"], tokenizer_folder="t", files=1, bytes=2, inputs="in", tokenizer="ids", options={"text_key": "text"}
)


@pytest.fixture
def desk(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a source of four documents, another one, and the tokenizer."""
    for name, texts in (("a", ["one", "two", "three", "four"]), ("b", ["five"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shutil.copytree(tiny.tokenizer, tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*options: str, source: str = "a.jsonl", tokenizer: str = "tokenizer") -> int:
    return main(["prepare", "--input", source, "--tokenizer", tokenizer, "--out", "out/x", "--workers", "1", *options])


def facts(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


@pytest.mark.parametrize("block", [3, 1 << 18])
def test_checksums_are_those_of_the_files(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_BLOCK_DOCUMENTS", block)
    for count in (0, 1, 3, 7):
        with IndexedWriter(tmp_path / "x", np.dtype("i4")) as writer:
            for length in range(count):
                writer.add(np.full(length, 70_000), np.asarray([length]))
            assert writer.commit(RECIPE) == (count, count * (count - 1) // 2)

        metadata = DataMetadata.read(tmp_path / "x")
        files = {kind: (tmp_path / f"x.{kind}").read_bytes() for kind in ("bin", "idx")}
        assert metadata.sha256 == {kind: hashlib.sha256(raw).hexdigest() for kind, raw in files.items()}
        assert metadata.sizes == {kind: len(raw) for kind, raw in files.items()}
        assert (metadata.documents, metadata.tokens, metadata.dtype) == (count, count * (count - 1) // 2, "int32")
        assert metadata.recipe == RECIPE
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.meta.json"]


def test_a_writer_without_a_recipe_leaves_none_of_older_data(tmp_path: Path) -> None:
    for recipe in (RECIPE, None):
        with IndexedWriter(tmp_path / "x", np.dtype("u2")) as writer:
            writer.add(np.asarray([1]), np.asarray([1]))
            writer.commit(recipe)
    assert DataMetadata.read(tmp_path / "x") is None
    assert IndexedReader(tmp_path / "x").tokens[:].tolist() == [1]


def test_the_same_command_again_leaves_the_data(desk, capsys, monkeypatch) -> None:
    """However the same files are named, at no cost: a job that was requeued must be harmless."""
    assert call() == 0
    out = capsys.readouterr().out
    assert out.startswith("wrote out/x.bin and .idx: 4 documents, ")
    before = facts(desk / "out")

    # What takes seconds is not reached.
    monkeypatch.setattr(prepare_module, "load_tokenizer", None)
    for source, options in (("a.jsonl", []), (str(desk / "a.jsonl"), ["--text-key", "text"])):
        assert call(*options, source=source) == 0
        again = capsys.readouterr().out
        assert again.startswith("left out/x.bin and .idx as they are")
        assert again.partition("options: ")[2] == out.partition(".idx: ")[2]
        assert again.count("\n") == 1
    assert facts(desk / "out") == before


def edit_input(desk: Path) -> None:
    file, stat = desk / "a.jsonl", (desk / "a.jsonl").stat()
    file.write_text(file.read_text().replace("four", "five"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def change_tokenizer(desk: Path) -> None:
    config = desk / "tokenizer/tokenizer_config.json"
    config.write_text(config.read_text() + "\n")


@pytest.mark.parametrize(
    ("change", "options", "got"),
    [
        (None, {"source": "b.jsonl"}, "data of other input (67 bytes in 1 file(s), now 17 bytes in 1 file(s))"),
        (edit_input, {}, "data of other input (files of the same size that were changed or moved since)"),
        (change_tokenizer, {}, "data of another tokenizer"),
        (None, {"split": "test", "max-broken": "0.5"}, "data of max_broken 0.01, now 0.5; split 'train', now 'test'"),
        (lambda desk: (desk / "out/x.meta.json").unlink(), {}, "data that nobody has noted the making of"),
        (lambda desk: (desk / "out/x.bin").write_bytes(b"12"), {}, "a .bin of another size than was written"),
    ],
)
def test_other_data_is_refused_without_force(change, options, got, desk, capsys) -> None:
    assert call() == 0
    if change:
        change(desk)

    before, source = facts(desk / "out"), options.pop("source", "a.jsonl")
    flags = [word for key, value in options.items() for word in (f"--{key}", value)]
    capsys.readouterr()
    assert call(*flags, source=source) == 2
    error = capsys.readouterr().err
    assert f"error: --out\n  got:      out/x, where x.bin and x.idx are: {got}\n" in error
    assert "--force" in error
    assert facts(desk / "out") == before

    assert call(*flags, "--force", source=source) == 0
    assert capsys.readouterr().out.startswith("wrote out/x.bin and .idx: ")
    assert call(*flags, source=source) == 0
    assert capsys.readouterr().out.startswith("left")


def test_metadata_that_is_unreadable_is_no_permission(desk, capsys) -> None:
    assert call() == 0
    meta = desk / "out/x.meta.json"
    for contents in ("{", "[]", meta.read_text().replace('"format_version": 1', '"format_version": 2')):
        meta.write_text(contents)
        assert call() == 2
        error = capsys.readouterr().err
        assert "x.meta.json\n  got:      unreadable (" in error
        assert meta.read_text() == contents
    assert call("--force") == 0


def test_one_file_alone_is_somebody_elses(desk) -> None:
    (desk / "out").mkdir()
    (desk / "out/x.bin").write_bytes(b"a model")
    assert call() == 2
    assert (desk / "out/x.bin").read_bytes() == b"a model"


def test_a_file_of_somebody_else_with_the_name_of_the_metadata_stays(desk, capsys) -> None:
    (desk / "out").mkdir()
    (desk / "out/x.meta.json").write_text('{"mine": 1}')
    assert call() == 2
    assert "--force" in capsys.readouterr().err
    assert [path.name for path in (desk / "out").iterdir()] == ["x.meta.json"]
    assert call("--force") == 0


@pytest.mark.parametrize("options", [[], ["--force"]])
@pytest.mark.parametrize("source", ["a.jsonl", "b.jsonl"])
def test_a_faster_process_is_seen_at_the_end(source, options, desk, capsys, monkeypatch) -> None:
    """Its data is left where it is the same, and replaced with --force alone where it is not."""
    open_encoder = prepare_module._open_encoder

    def be_overtaken(*arguments: object, **keywords: object) -> object:
        monkeypatch.setattr(prepare_module, "_open_encoder", open_encoder)
        assert call(source=source) == 0
        capsys.readouterr()
        return open_encoder(*arguments, **keywords)

    monkeypatch.setattr(prepare_module, "_open_encoder", be_overtaken)
    expected = "wrote" if options else "left" if source == "a.jsonl" else ""
    assert call(*options) == (0 if expected else 2)
    assert capsys.readouterr().out.partition(" ")[0] == expected
    assert DataMetadata.read("out/x").documents == (4 if expected else 1)
    assert sorted(path.name for path in (desk / "out").iterdir()) == ["x.bin", "x.idx", "x.meta.json"]


def test_processes_of_the_same_id_write_into_files_of_their_own(tmp_path: Path, monkeypatch) -> None:
    """As in two containers on one file system."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with IndexedWriter(tmp_path / "x", np.dtype("u2")) as first, IndexedWriter(tmp_path / "x", np.dtype("u2")) as last:
        for writer, token in ((first, 1), (last, 2)):
            writer.add(np.full(3, token), np.asarray([3]))
        for writer, token in ((first, 1), (last, 2)):
            writer.commit()
            assert IndexedReader(tmp_path / "x").tokens[:].tolist() == [token] * 3


KILLED = """if True:
    import os, sys
    from pathlib import Path
    import numpy as np
    from megatron_mea.data.indexed import IndexedWriter
    from megatron_mea.data.metadata import Recipe

    recipe = Recipe(sources=[], tokenizer_folder="t", files=1, bytes=2, inputs="in", tokenizer="ids", options={})
    names, last, replace = [], sys.argv[1], Path.replace

    def replace_or_die(path, target):
        if str(target).endswith(last):
            os._exit(9)
        return replace(path, target)

    with IndexedWriter("out/x", np.dtype("u2")) as writer:
        writer.add(np.asarray([1, 2]), np.asarray([2]))
        Path.replace = replace_or_die
        writer.commit(recipe)
"""


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", [".bin", ".idx", ".meta.json"])
def test_a_command_that_was_killed_between_the_files_is_called_again(name, old, desk) -> None:
    """It needs no --force, and old and new files are never taken for a pair."""
    settings = {"sources": ["a.jsonl"], "tokenizer_folder": "tokenizer", "prefix": "out/x"}
    (desk / "out").mkdir()
    if old:
        prepare(**settings | {"sources": ["b.jsonl"]})

    killed = subprocess.run([sys.executable, "-c", KILLED, name], cwd=desk, check=False)
    assert killed.returncode == 9
    with pytest.raises(UserError, match=r"x\.(idx|bin)"):
        IndexedReader("out/x")

    done = prepare(**settings)
    assert (done.documents, done.is_new) == (4, True)
    assert IndexedReader("out/x").lengths.size == 4
    assert sorted(path.name for path in Path("out").iterdir()) == ["x.bin", "x.idx", "x.meta.json"]
    assert prepare(**settings) == (4, done.tokens, False)


def test_a_recipe_knows_files_folders_and_names(desk) -> None:
    def recipe(*sources: str) -> Recipe:
        return Recipe.read(sources=sources, tokenizer_folder="tokenizer", options={})

    (desk / "folder").mkdir()
    for name in "ab":
        (desk / "folder" / f"{name}.jsonl.gz").write_bytes(gzip.compress((desk / f"{name}.jsonl").read_bytes()))

    files = [str(path) for path in sorted((desk / "folder").iterdir())]
    assert recipe("folder").differences(recipe(*files)) == []
    assert recipe("folder").files == 2
    assert recipe(*reversed(files)).differences(recipe(*files)) != [], "another order of documents"
    assert recipe("hub/name").differences(recipe("hub/name")) == []
    assert recipe("hub/name").differences(recipe("hub/other")) != []


@given(st.data())
@examples(200)
def test_whatever_the_metadata_holds_it_is_read_or_refused(tmp_path_factory, data) -> None:
    prefix = tmp_path_factory.getbasetemp() / "any"
    metadata = DataMetadata(
        documents=1,
        tokens=2,
        dtype="uint16",
        sizes={"bin": 4, "idx": 62},
        sha256={"bin": "a", "idx": "b"},
        recipe=RECIPE,
        versions={},
    )
    contents = json.loads(metadata.as_json())
    section = data.draw(st.sampled_from([contents, contents["recipe"], contents["sizes"], contents["sha256"]]))
    section[data.draw(st.sampled_from([*section, "new"]))] = data.draw(VALUES)
    raw = bytearray(json.dumps(contents).encode())
    place = data.draw(st.integers(0, len(raw)))
    stop = place + data.draw(st.sampled_from([0, 0, 1, 9]))
    raw[place:stop] = data.draw(st.sampled_from([b"", b"", b"\xff", b"9" * 5000]))

    Path(f"{prefix}.bin").write_bytes(bytes(4))
    Path(f"{prefix}.idx").write_bytes(bytes(62))
    DataMetadata.path(prefix).write_bytes(raw)
    with contextlib.suppress(UserError):
        found = find_prepared(prefix, RECIPE)
        assert found is not None
        assert found.recipe.differences(RECIPE) == []
