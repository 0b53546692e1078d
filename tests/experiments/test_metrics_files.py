"""metrics.jsonl of millions of rows, or with anything in them: streamed, a value or one message, in little memory."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.curves import noisy_loss, write_run
from support.foreign import DEEP, VALUES, examples
from support.limits import traced_memory_below, within_limits

from megatron_mea.cli import main
from megatron_mea.errors import UserError
from megatron_mea.experiments import runs, stability
from megatron_mea.experiments.runs import find_runs, read_run
from megatron_mea.experiments.sweep import _SweepRun
from megatron_mea.inputs import MAX_LINE_BYTES
from megatron_mea.run_folder import RunFolder
from megatron_mea.training.metrics import _truncate_rows

ROW = {"step": 3, "tokens": 6144, "loss": 2.5, "grad_norm": 1.0, "validation_loss": 2.75}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(
        folder=tmp_path_factory.mktemp("runs") / "run", variant="mea", lr=1e-3, seed=1, loss=noisy_loss(1)[1][:30]
    )


def sweep_result(run: Path) -> str:
    """How a sweep says that a run has ended, without its process."""
    return _SweepRun.result(SimpleNamespace(folder=RunFolder(run)))


def line(**changes: object) -> bytes:
    return json.dumps(ROW | changes).encode() + b"\n"


LINES = st.lists(
    st.one_of(
        st.just(line()),
        st.builds(lambda key, value: line(**{key: value}), st.sampled_from([*ROW, "new"]), VALUES),
        st.binary(max_size=30),
        st.sampled_from([b"\n", b"[]\n", DEEP + b"\n", b"\xff\n", b'{"step": ' + b"9" * 5000 + b"}\n", line()[:20]]),
    ),
    max_size=6,
)


@given(lines=LINES)
@examples(150)
def test_whatever_the_metrics_hold(run, lines) -> None:
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(b"".join(lines))
    with within_limits(), traced_memory_below(20_000_000), contextlib.suppress(UserError):
        record = read_run(run)
        assert len(record.steps) == len(record.tokens) == len(record.loss) == len(record.grad_norm)
        assert np.isfinite([*record.steps, *record.tokens, *record.validation[:, 0]]).all()
        assert record.failed == "" or record.failed.startswith(f"{metrics}:")
        stability.judge([record])


@given(lines=LINES, last=st.integers(-1, 5))
@examples(100)
def test_a_resumed_run_keeps_the_rows_before_it_byte_for_byte(tmp_path_factory, lines, last) -> None:
    path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    path.write_bytes(b"".join(lines))

    def is_row(raw: bytes) -> bool:
        try:
            return json.loads(raw)["step"] <= last
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    complete = [raw + b"\n" for raw in path.read_bytes().split(b"\n")[:-1]]
    expected = b"".join(raw for raw in complete if is_row(raw))
    with within_limits(), traced_memory_below(20_000_000):
        _truncate_rows(path, last)
    assert path.read_bytes() == expected


def test_rows_are_removed_where_the_file_system_has_no_hard_links(tmp_path, monkeypatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(line(step=3) + line(step=4))
    _truncate_rows(metrics, 3)
    # A process that was killed at the end has left it.
    (tmp_path / ".metrics.jsonl-0123abcd.tmp").mkdir()
    _truncate_rows(metrics, 3)
    assert metrics.read_bytes() == line(step=3)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_of_a_hundred_megabytes(run, tmp_path) -> None:
    """Between two rows it is refused, at the end it is half of a row; none of it is kept in memory."""
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(line())
    os.truncate(metrics, 100 << 20)
    with traced_memory_below(6 * MAX_LINE_BYTES):
        assert read_run(run).loss.tolist() == [2.5]
        assert sweep_result(run) == "ended"

    with metrics.open("ab") as stream:
        stream.write(b"\n" + line(step=4))
    with traced_memory_below(6 * MAX_LINE_BYTES):
        with pytest.raises(UserError, match=r"metrics\.jsonl:2\n.*no row of metrics"):
            read_run(run)
        assert sweep_result(run) == "at step 4, loss 2.5000, validation loss 2.7500"
        _truncate_rows(metrics, 4)
    assert metrics.read_bytes() == line() + line(step=4)


@pytest.mark.parametrize(
    "raw", [b"", b"7\n", b"{}\n", line(step="x"), line(loss=[]), line(loss=10**400), DEEP, b"\xff"]
)
def test_a_last_row_that_is_none(raw, tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(raw)
    assert sweep_result(tmp_path) == "ended"


@given(count=st.integers(0, 200), block=st.sampled_from([2, 4]), seed=st.integers(0, 99))
@examples(60)
def test_neighbours_of_a_long_run_are_averaged(run, count, block, seed) -> None:
    """Against means of the same rows all at once."""
    random = np.random.default_rng(seed)
    rows = [{"step": step, "tokens": 10 * step, "loss": random.normal()} for step in range(1, count + 1)]
    for row in rows:
        row |= {"grad_norm": random.normal()} if row["step"] % 7 else {}
        row |= {"validation_loss": random.normal()} if row["step"] % 2 else {}

    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "MAX_ROWS", 8)
        patch.setattr(runs, "_BLOCK", block)
        record = read_run(run)

    assert len(record.loss) <= 16
    assert (record.averaged == 1) == (count < 16)
    groups = [rows[start : start + record.averaged] for start in range(0, count, record.averaged)]
    assert record.steps.tolist() == [group[-1]["step"] for group in groups]
    assert record.tokens.tolist() == [group[-1]["tokens"] for group in groups]
    assert record.loss.tolist() == pytest.approx([np.mean([row["loss"] for row in group]) for group in groups])
    norms = [np.mean([row.get("grad_norm", math.nan) for row in group]) for group in groups]
    assert record.grad_norm.tolist() == pytest.approx(norms, nan_ok=True)
    validated = [row for row in rows if "validation_loss" in row]
    assert len(record.validation) <= 16
    if validated:
        assert record.validation[-1, 0] == validated[-1]["tokens"]


def test_memory_does_not_grow_with_the_rows(monkeypatch) -> None:
    monkeypatch.setattr(runs, "MAX_ROWS", 512)
    monkeypatch.setattr(runs, "_BLOCK", 8)
    rows = runs._AveragedRows(("step", "tokens"), "loss")
    with traced_memory_below(200_000):
        for step in range(100_000):
            rows.add(step, 10 * step, 1.0)
        assert rows.values()[-1].tolist() == [99_999, 999_990, 1.0]
    assert rows.group_size == 128


def test_averages_are_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runs, "MAX_ROWS", 64)
    monkeypatch.setattr(runs, "_BLOCK", 16)
    write_run(folder=tmp_path / "run", variant="mea", lr=1e-3, seed=1, loss=noisy_loss(1)[1])
    (record,) = find_runs([str(tmp_path)])
    assert record.is_complete
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 0
    assert "each row is the mean of 4 logged ones" in (tmp_path / "r.html").read_text()


@given(seed=st.integers(0, 999), rows=st.integers(0, 300), chunk=st.sampled_from([7, 64, 4096]))
@examples(60)
def test_spikes_are_those_of_the_rule_row_by_row(seed, rows, chunk) -> None:
    random = np.random.default_rng(seed)
    loss = noisy_loss(seed, rows=rows)[1] + 4 * (random.random(rows) < 0.05)
    expected: list[int] = []
    for row in range(stability.MIN_ROWS_BEFORE, rows):
        before = loss[max(0, row - stability.WINDOW) : row]
        deviation = 1.4826 * np.median(np.abs(np.diff(before))) / np.sqrt(2)
        threshold = np.median(before) + max(stability.MIN_DEVIATIONS * deviation, stability.MIN_NATS)
        if loss[row] > threshold and not (expected and row - expected[-1] < stability.WINDOW):
            expected.append(row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stability, "_CHUNK", chunk)
        assert stability.find_spikes(loss) == expected
