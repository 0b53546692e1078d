"""The rules of stability on made-up curves: what they find, and what they leave alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.curves import noisy_loss, write_run

from megatron_mea.experiments.runs import find_runs
from megatron_mea.experiments.stability import find_spikes, judge


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), sd=st.floats(0.001, 0.3), rows=st.integers(60, 600))
def test_noise_and_a_falling_loss_are_no_spikes(seed, sd, rows):
    assert find_spikes(noisy_loss(seed=seed, rows=rows, sd=sd)[1]) == []


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), at=st.integers(100, 380), height=st.floats(1, 5), length=st.integers(1, 20))
def test_a_spike_is_found_where_it_is(seed, at, height, length):
    _, loss = noisy_loss(seed)
    loss[at : at + length] += height
    rows = find_spikes(loss)
    assert len(rows) == 1
    assert rows[0] == at


def kinds(tmp_path, **curves) -> dict[str, str]:
    rates = {"low": 1e-3, "best": 3e-3, "high": 0.1}
    for name, loss in curves.items():
        write_run(folder=tmp_path / name, variant="mea", lr=rates.get(name, 0.01), seed=1, loss=loss)
    runs = find_runs([str(tmp_path)])
    return {run.dir.name: verdict.kind for run, verdict in zip(runs, judge(runs), strict=True)}


def test_a_high_plateau_is_a_collapse_and_a_slow_rate_is_not(tmp_path):
    best = noisy_loss(1)[1]
    plateau = np.full(400, best[0] - 1) + np.random.default_rng(0).normal(0, 0.05, 400)
    plateau[0] = best[0]
    actual = kinds(tmp_path=tmp_path, best=best, high=plateau, low=plateau)
    assert actual == {"best": "stable", "high": "collapsed", "low": "stable"}


def test_a_loss_that_rises_again_has_diverged(tmp_path):
    loss = noisy_loss(1)[1]
    rising = loss.copy()
    rising[200:] += np.linspace(0, 2, 200)
    assert kinds(tmp_path=tmp_path, best=loss, high=rising) == {"best": "stable", "high": "diverged"}


@pytest.mark.parametrize("mark", ["DIVERGED", "FAILED"])
def test_what_a_run_left_behind(tmp_path, mark):
    run = write_run(folder=tmp_path / "run", variant="mea", lr=0.1, seed=1, loss=noisy_loss(1)[1], finished=False)
    (run / mark).write_text(json.dumps({"step": 401, "status": 1, "reason": "the loss is nan"}))
    (record,) = find_runs([str(run)])
    (verdict,) = judge([record])

    assert (record.diverged or record.failed) == "the loss is nan"
    assert verdict.kind == {"DIVERGED": "diverged", "FAILED": "stable"}[mark]


def test_why_a_job_ended_is_read_where_slurm_ran_it(tmp_path):
    run = write_run(folder=tmp_path / "run", variant="mea", lr=0.1, seed=1, loss=noisy_loss(1)[1], finished=False)
    (run / "slurm").mkdir()
    (run / "slurm/ended-mea-1").write_text("1\n3 attempts in a row began at step 0\n")
    assert find_runs([str(run)])[0].failed == "3 attempts in a row began at step 0"

    (run / "slurm/ended-mea-1").write_text("0\nstopped as asked\n")
    assert find_runs([str(run)])[0].failed == ""


def test_a_run_without_a_row_is_neither_stable_nor_not(tmp_path):
    run = write_run(folder=tmp_path / "run", variant="mea", lr=0.1, seed=1, loss=noisy_loss(1)[1], finished=False)
    (run / "metrics.jsonl").write_text("")
    write_run(folder=tmp_path / "other", variant="mea", lr=0.01, seed=1, loss=noisy_loss(1)[1])
    assert [verdict.kind for verdict in judge(find_runs([str(tmp_path)]))] == ["stable", "unknown"]


def test_a_collapse_does_not_depend_on_how_often_rows_are_logged(tmp_path):
    """A rate that learns faster has its first row, late as it is, where the other one still falls."""
    fast = noisy_loss(1, rows=2000)[1]
    slow = fast + 2 * np.exp(-np.arange(2000) / 100)
    for name, lr, loss in (("best", 1e-3, slow), ("high", 3e-3, fast + 0.01)):
        metrics = write_run(folder=tmp_path / name, variant="mea", lr=lr, seed=1, loss=loss) / "metrics.jsonl"
        metrics.write_text("\n".join(metrics.read_text().splitlines()[::100]))

    assert [verdict.kind for verdict in judge(find_runs([str(tmp_path)]))] == ["stable", "stable"]


def test_a_spike_among_few_rows_is_found():
    loss = np.linspace(4, 3, 45)
    loss[30] += 1
    assert find_spikes(loss) == [30]
