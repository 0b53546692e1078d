"""Every operation on the disk of every verb fails in turn: one message, nothing half-written, nothing lost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.curves import noisy_loss, write_run
from support.desk import BASH
from support.faults import Command, Tree, difference, fail_everywhere, once, read_tree
from support.source_models import save_source_model

from megatron_mea.checkpoint.folder import all_checkpoints, find_corruption
from megatron_mea.experiments.runs import find_runs

pytestmark = pytest.mark.slow

TEXT = "In the beginning God created the heaven and the earth. {number} days of light, and 3 nights < 4 > {{5}}.\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder: the one that is watched."""
    folder = tmp_path / "root"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def check(root: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture) -> Callable[..., None]:
    """Lets every operation of a command fail in turn, and prints how many there were."""

    def check(*arguments: str, **options: Any) -> None:
        number = fail_everywhere(
            Command(arguments=arguments, **options), root=root, full=request.config.getoption("--full")
        )
        with capsys.disabled():
            print(f"\nfaults: {arguments[0]}: {number} cases, each with a next call")

    return check


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory) -> Path:
    """A Hugging Face folder of a few thousand parameters."""
    return save_source_model("llama", tmp_path_factory.mktemp("source") / "llama", tokenizer=tiny.tokenizer)


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory) -> Path:
    """Its import."""
    folder = tmp_path_factory.mktemp("checkpoint") / "imported"
    assert Command(arguments=("import", str(source), str(folder)))()[0] == 0
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(TEXT.format(number=number) for number in range(200)))
    return file


@pytest.mark.parametrize("exists", [False, True], ids=["new", "over-another"])
def test_tokenizer(exists, root, text, check):
    out = "tok" if exists else "made/new"
    if exists:
        Command(arguments=("tokenizer", "--input", str(text), "--vocab-size", "310", "--out", out))()
        (root / out / "notes.txt").write_text("mine")

    check("tokenizer", "--input", str(text), "--vocab-size", "305", "--out", out)


@pytest.mark.parametrize("exists", [False, True], ids=["new", "over-another"])
def test_prepare(exists, root, tiny, text, check):
    arguments = ("prepare", "--tokenizer", str(tiny.tokenizer), "--workers", "1", "--input")
    if exists:
        Command(arguments=(*arguments, str(tiny.root / "validation.jsonl"), "--out", "x"))()
        assert set(read_tree(root)) == {"x.bin", "x.idx", "x.meta.json"}

    check(*arguments, str(text), "--out", *(("x", "--force") if exists else ("made/new/x",)))


def test_export(checkpoint, check, no_parity):
    check("export", str(checkpoint), "made/new")


def same_checkpoint(expected: Tree, actual: Tree) -> str:
    """torch gives every index an id of its own."""
    different = {".metadata", "COMPLETE"}
    trees = [
        {path: content for path, content in tree.items() if Path(path).name not in different}
        for tree in (expected, actual)
    ]
    return difference(*trees) or find_corruption(Path("made/new")) or ""


def test_import(source, check):
    check("import", str(source), "made/new", check_done=same_checkpoint)


def test_compress(checkpoint, check):
    check("compress", str(checkpoint), "made/new", "--component-heads", "2", check_done=same_checkpoint)


@pytest.mark.full
def test_compress_of_a_hugging_face_folder(source, check, no_parity):
    check("compress", str(source), "out", "--component-heads", "2")


def test_evaluate(checkpoint, tiny, root, check):
    (root / "e.json").write_text("an earlier result")
    check("evaluate", str(checkpoint), "--data", str(tiny.validation), "--out", "e.json", prints='"cross_entropy": ')


def test_sensitivity(checkpoint, tiny, text, root, check, monkeypatch, tmp_path):
    """What has been measured stays in OUT.part, from which the next call resumes."""
    from megatron_mea.compression import sensitivity

    monkeypatch.setattr(sensitivity, "draw_plot", lambda _: b"a plot")
    (tmp_path / "short.txt").write_text("".join(text.read_text().splitlines(keepends=True)[:6]))
    prefix = str(tmp_path / "short")
    prepare = ("prepare", "--tokenizer", str(tiny.tokenizer), "--workers", "1", "--input", f"{prefix}.txt")
    assert Command(arguments=(*prepare, "--out", prefix))()[0] == 0

    def check_failed(before: Tree, after: Tree, _: str) -> str:
        return difference(before, {path: content for path, content in after.items() if path != "s.json.part"})

    (root / "s.json").write_text("an earlier result")
    arguments = (str(checkpoint), "--component-heads", "2", "--data", prefix, "--out", "s.json")
    check("sensitivity", *arguments, check_failed=check_failed)


def test_report(root, check, monkeypatch, tmp_path):
    from megatron_mea.experiments import report

    for rate in (0.01, 0.03):
        _, loss = noisy_loss(seed=1, rows=60)
        write_run(folder=tmp_path / f"runs/mea-{rate}", variant="mea", lr=rate, seed=1, loss=loss)

    # The figures take seconds, and the fits.
    results = report.evaluate_runs(find_runs([str(tmp_path / "runs")]))
    monkeypatch.setattr(report, "evaluate_runs", lambda _: results)
    monkeypatch.setattr(report, "_draw_figures", lambda _: ({"rates": ("a caption", b"a figure")}, []))

    for name in ("r.html", "r.csv", "r-rates.png"):
        (root / name).write_text("an earlier result")
    check("report", str(tmp_path / "runs"), "--out", "r.html", prints="2 runs, ")


def _check_text(content: bytes | None) -> bool:
    """Whether a small file of ours is whole."""
    return content is None or content.endswith(b"\n")


SUBMIT = ("submit", "tiny.yaml", "--nodes", "1", "--gpus-per-node", "1", "--time", "1:00:00")


def test_submit(root, desk, check, monkeypatch):
    """Where a job is submitted already, its files stay, and the message names it."""
    from megatron_mea.slurm import submit

    monkeypatch.chdir(root)
    (desk.folder / "tiny.yaml").rename(root / "tiny.yaml")
    monkeypatch.setattr(submit.time, "strftime", lambda *_: "now")
    # In place of SLURM's commands, which are processes, and of checks that write nothing.
    monkeypatch.setattr(submit, "check_run", once(submit.check_run))
    monkeypatch.setattr(submit, "check_resources", lambda **_: ([], []))
    monkeypatch.setattr(submit.scheduler, "check_script", lambda _: "at once")
    monkeypatch.setattr(submit.scheduler, "submit", lambda *_, **__: "42")
    assert Command(arguments=(*SUBMIT, "training.steps=3"))()[0] == 0

    def check_failed(before: Tree, after: Tree, err: str) -> str:
        if "submitted before: job 42" not in err:
            return difference(before, after)
        return "" if before.keys() == after.keys() and all(map(_check_text, after.values())) else "files are missing"

    check(*SUBMIT, check_failed=check_failed)


def test_sweep(root, desk, check, monkeypatch):
    """A run that fails, and one that is finished: what says so is whole, or not there."""
    from megatron_mea.experiments import sweep

    monkeypatch.chdir(root)
    monkeypatch.setattr(sweep, "_POLL_SECONDS", 0.002)
    (desk.folder / "tiny.yaml").rename(root / "tiny.yaml")
    script = desk.folder / "python"
    script.write_text(rf"""#!{BASH}
run=${{4%/slurm/config.yaml}}
case $4 in *lr3e-3*) printf '1\nno luck\n' > "$MEA_FAILURE_FILE"; exit 1 ;; esac
echo '{{"step": 4}}' > "$run/FINISHED"
""")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))

    def whole(tree: Tree) -> str:
        # train.log is empty.
        partial = [path for path, content in tree.items() if content != b"" and not _check_text(content)]
        return f"{partial[0]} is not whole" if partial else ""

    def check_failed(_: Tree, after: Tree, err: str) -> str:
        if "3e-3/FAILED" in err and "no luck" not in err:
            return "why the run failed is lost"
        return whole(after)

    def check_done(expected: Tree, after: Tree) -> str:
        finished = "out/mea-lr1e-3/FINISHED"
        return whole(after) or difference({finished: expected[finished]}, {finished: after.get(finished, b"")})

    arguments = ("sweep", "tiny.yaml", "--learning-rates", "3e-3,1e-3", "--out", "out", "training.steps=4")
    check(*arguments, check_failed=check_failed, check_done=check_done, status=1)


def test_train(root, tiny, check, one_engine):
    """The checkpoints of before stay whole, and the next call goes on from the newest."""
    settings = {"training.steps": 3, "checkpoint.interval": 1, "checkpoint.async_save": False, "evaluation.interval": 9}
    tiny.write_config(root / "tiny.yaml", **settings)
    assert Command(arguments=("train", "tiny.yaml", "training.steps=2"))()[0] == 0

    def whole(after: Tree) -> str:
        checkpoints = dict(all_checkpoints("run"))
        corrupt = [str(path) for path in checkpoints.values() if find_corruption(path)]
        left = [path for path in after if ".tmp" in path and "heartbeat" not in path]
        partial = [
            path for path in ("run/config.yaml", "run/FINISHED", "run/.lease") if not _check_text(after.get(path))
        ]
        if corrupt or left or partial or {1, 2} - checkpoints.keys():
            return f"checkpoints of the steps {[*checkpoints]}, corrupt {corrupt}, left {left}, not whole {partial}"
        return ""

    def check_done(expected: Tree, after: Tree) -> str:
        finished = {path: after.get(path) for path in ("run/FINISHED", "run/config.yaml")}
        return whole(after) or difference({path: expected[path] for path in finished}, finished)

    check("train", "tiny.yaml", check_failed=lambda _, after, __: whole(after), check_done=check_done)
