"""What is left where the power fails, at any moment and whatever was not on disk yet: whole, refused or absent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.crashes import Journal
from support.disk import watched_disk
from support.faults import Command, Tree, difference, read_tree
from support.source_models import save_source_model

from megatron_mea.checkpoint.folder import complete_checkpoints, find_corruption
from megatron_mea.data.indexed import IndexedReader
from megatron_mea.errors import UserError

pytestmark = pytest.mark.slow

HIDDEN = re.compile(r"(^|/)\.(tmp-step_|[^/]*-[0-9a-f]{8}\.tmp)|\.tmp-\d+$|heartbeat")
"""What nothing reads, and the heartbeat, which nothing waits for."""


def visible(tree: Tree) -> Tree:
    return {path: content for path, content in tree.items() if not HIDDEN.search(path)}


@pytest.fixture
def crash(tmp_path, monkeypatch, capsys) -> Callable[..., list[Tree]]:
    """Runs a command in the current folder; returns the states without what is hidden, each once."""
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.chdir(root)

    def crash(*arguments: str) -> list[Tree]:
        journal = Journal(root)
        with watched_disk(root, journal):
            status, _, err = Command(arguments=arguments)()
        assert status == 0, err
        # The journal follows what happens.
        assert read_tree(root) == journal.now()

        trees = [visible(tree) for tree in journal.states.values()]
        unique = list({tuple(tree.items()): tree for tree in trees}.values())
        with capsys.disabled():
            print(f"\ncrash states: {arguments[0]}: {len(journal.states):,}, {len(unique)} without what is hidden")

        # What was said to be written stays.
        assert not [text for tree in journal.last if (text := difference(visible(read_tree(root)), visible(tree)))]
        return unique

    return crash


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory) -> Path:
    return save_source_model("llama", tmp_path_factory.mktemp("source") / "llama", tokenizer=tiny.tokenizer)


def below(tree: Tree, folder: str) -> Tree:
    """The part of a tree in a folder."""
    return {path: content for path, content in tree.items() if path.startswith(folder)}


def write_tree(tree: Tree, folder: Path) -> Path:
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)

    return folder


FOLDERS = [
    ("export", "SOURCE", "made/new"),
    ("import", "SOURCE", "made/new"),
    ("tokenizer", "--input", "TEXT", "--vocab-size", "384", "--out", "made/new"),
]


@pytest.fixture
def complete(source, tiny, no_parity) -> Callable[[Sequence[str]], list[str]]:
    """Puts paths into the arguments of a command."""
    places = {"SOURCE": str(source), "TEXT": str(tiny.root / "validation.jsonl"), "TOKENIZER": str(tiny.tokenizer)}
    return lambda command: [places.get(argument, argument) for argument in command]


@pytest.mark.parametrize("command", FOLDERS, ids=lambda command: command[0])
def test_a_folder_is_whole_or_absent(command, crash, complete):
    states = crash(*complete(command))

    whole = below(read_tree(Path()), "made/new")
    assert len(whole) > 3
    folders = [below(tree, "made/new") for tree in states]
    assert {} in folders
    assert all(folder in ({}, whole) for folder in folders)


def test_a_corpus_is_the_old_one_or_the_new_one_or_refused(crash, tiny, tmp_path):
    arguments = ("prepare", "--tokenizer", str(tiny.tokenizer), "--workers", "1", "--out", "x", "--input")
    # Documents in another order: no size tells an old file from a new one.
    documents = [json.dumps({"text": "In the beginning " * count}) + "\n" for count in (1, 2, 3)]
    (tmp_path / "old.jsonl").write_text("".join(documents))
    (tmp_path / "new.jsonl").write_text("".join(reversed(documents)))
    Command(arguments=(*arguments, str(tmp_path / "old.jsonl")))()
    old = read_tree(Path())

    states = crash(*arguments, str(tmp_path / "new.jsonl"), "--force")
    new, refused = read_tree(Path()), 0
    for number, tree in enumerate(states):
        if tree not in (old, new):
            with pytest.raises(UserError):
                IndexedReader(write_tree(tree, tmp_path / f"state-{number}") / "x")
            refused += 1

    assert old in states
    assert new in states
    assert refused


def test_a_result_is_the_old_one_or_the_new_one(crash, source, tiny):
    Path("e.json").write_text("an earlier result")
    states = crash("evaluate", str(source), "--data", str(tiny.validation), "--out", "e.json")
    new = Path("e.json").read_bytes()
    assert {tree["e.json"] for tree in states} == {b"an earlier result", new}


def test_a_run_has_a_whole_checkpoint(crash, tiny, one_engine, tmp_path):
    """Of two that are kept the older one is removed when the newest is on disk."""
    settings = {"training.steps": 3, "checkpoint.interval": 1, "checkpoint.keep": 2, "checkpoint.async_save": False}
    tiny.write_config(Path("tiny.yaml"), **settings)
    assert Command(arguments=("train", "tiny.yaml", "training.steps=2"))()[0] == 0
    before = read_tree(Path())

    states = crash("train", "tiny.yaml")
    after = read_tree(Path())
    whole_by_content: dict[tuple, bool] = {}
    for tree in states:
        whole = set()
        for step in (1, 2, 3):
            checkpoint = below(tree, f"run/checkpoints/step_{step:08d}/")
            content = tuple(checkpoint.items())
            if content not in whole_by_content:
                folder = write_tree(checkpoint, tmp_path / f"state-{len(whole_by_content)}") / "run"
                complete = dict(complete_checkpoints(folder))
                whole_by_content[content] = bool(complete) and find_corruption(complete[step]) is None
            whole |= {step} if whole_by_content[content] else set()

        assert whole == {step for step in (1, 2, 3) if below(tree, f"run/checkpoints/step_{step:08d}/")}
        assert 2 in whole or 3 in whole
        assert tree.get("run/config.yaml") in (before["run/config.yaml"], after["run/config.yaml"])
        if "run/FINISHED" in tree:
            step = json.loads(tree["run/FINISHED"])["step"]
            assert step == max(whole)


KILLED = [
    *FOLDERS,
    ("compress", "SOURCE", "made/new", "--component-heads", "2"),
    ("prepare", "--tokenizer", "TOKENIZER", "--workers", "1", "--input", "TEXT", "--out", "made/new"),
]


@pytest.mark.parametrize("command", KILLED, ids=lambda command: command[0])
def test_a_killed_command_leaves_nothing_behind_the_next_one(command, complete, tmp_path, monkeypatch):
    """What is there at some moments of a command, without its process: the next call clears it, and succeeds."""
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.chdir(root)
    journal = Journal(root)
    with watched_disk(root, journal):
        assert Command(arguments=complete(command))()[0] == 0

    names = set(read_tree(root))
    moments = journal.moments[:: len(journal.moments) // 5] + journal.moments[-4:]
    assert sum(any(HIDDEN.search(path) for path in moment) for moment in moments) >= 4
    for number, moment in enumerate(moments):
        folder = tmp_path / f"moment-{number}"
        folder.mkdir()
        monkeypatch.chdir(write_tree(moment, folder))
        status, _, err = Command(arguments=complete(command))()
        # It may have been killed when all was done.
        assert status == 0 or "a folder that is not empty" in err
        assert set(read_tree(folder)) == names
