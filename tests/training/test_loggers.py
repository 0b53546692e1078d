"""Trackers: TensorBoard's files, one that is added by a row, and ones that fail, which costs a run nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from support.engines import config as small_config
from support.runs import ROOT, command, environment, rows, train
from support.trackers import CALLS, NO_NETWORK, JsonTracker, UnspeakableError, raises_in

from megatron_mea.config.schema import Logging
from megatron_mea.run_folder import RunFolder
from megatron_mea.training.loggers import TRACKERS, Tracker, Trackers
from megatron_mea.training.metrics import Metrics

WITH_TRACKERS = """if True:
    import sys
    from support.trackers import CALLS, JsonTracker, raises_in
    from megatron_mea.cli import main
    from megatron_mea.training.loggers import TRACKERS

    TRACKERS |= {"first": raises_in(*CALLS), "json": JsonTracker}
    TRACKERS |= {"last": raises_in(*CALLS[2:], error=SystemExit("no\x1b[2J network"))}
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_trackers_of_a_run(tiny, tmp_path):
    """Three starts of a run: with trackers beside TensorBoard, going back without any, and with TensorBoard again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny.write_config(tmp_path / "tiny.yaml")
    run, tensorboard = tmp_path / "run", "logging.tensorboard=true"
    arguments = command(config, "run", tensorboard, "training.steps=6", "optimizer.lr=0.01")
    arguments[1:3] = ["-c", WITH_TRACKERS]
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(arguments, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stdout.splitlines() if line.startswith("warning: tracker ")]
    assert [line.split()[2] for line in warnings] == ["first", "last"]
    for line, error in zip(warnings, ("ConnectionError", "SystemExit"), strict=True):
        assert line.endswith(rf"of this run: {error}('no\x1b[2J network')")

    calls = [json.loads(line) for line in (run / "tracker.jsonl").read_text().splitlines()]
    kind, step, texts = calls[0]
    assert (kind, step, list(texts)) == ("text", 0, ["config"])
    assert texts["config"] == (run / "config.yaml").read_text()
    assert "torch=" in texts["config"].splitlines()[0]
    assert yaml.safe_load(texts["config"])["training"]["steps"] == 6
    losses = {step: values["loss"] for kind, step, values in calls if kind == "scalars" and "loss" in values}
    assert losses == {row["step"]: row["loss"] for row in rows(config, "run") if "loss" in row}
    heads = {row["step"]: row for row in map(json.loads, (run / "heads.jsonl").read_text().splitlines())}
    assert list(heads) == [step for kind, step, _ in calls if kind == "tensors"] == [0, 2, 4, 6]
    for values in (values for kind, _, values in calls if kind == "tensors"):
        assert values.keys() == heads[0].keys() - {"step", "tokens"}
    assert calls[-1][0] == "close"

    train(config, "run", "run.resume_from=2", "training.steps=4", "optimizer.lr=0.02")
    assert [json.loads(line)["step"] for line in (run / "heads.jsonl").read_text().splitlines()] == [0, 2, 4]
    output = train(config, "run", "run.resume_from=2", "training.steps=8", "optimizer.lr=0.02", tensorboard)
    assert "this run has gone back to step 2 before (run.resume_from), and goes on from its newest" in output

    # Later rows were purged though TensorBoard was off meanwhile.
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 5, 6, 7, 8]
    assert {f"head_rms/layers.{layer}.self_attn" for layer in range(2)} <= set(events.Tags()["tensors"])
    assert "config/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize(
    "error", [NO_NETWORK, SystemExit(1), UnspeakableError()], ids=lambda error: type(error).__name__
)
@pytest.mark.parametrize("call", CALLS)
def test_a_tracker_that_fails_in_one_call(call, error, tmp_path, monkeypatch):
    """It is warned of once, and the others get everything."""
    for name, tracker in {"TensorBoard": raises_in(call, error=error), "json": JsonTracker}.items():
        monkeypatch.setitem(TRACKERS, name, tracker)

    lines: list[str] = []
    trackers = Trackers(run=RunFolder(tmp_path), settings=Logging(), step=None, log=lines.append)
    for step in (1, 2):
        trackers.for_each(lambda tracker: tracker.text("config", "a: 1", 0))
        trackers.for_each(lambda tracker, step=step: tracker.scalars({"loss": 2.0}, step))
        trackers.for_each(lambda tracker, step=step: tracker.tensors({"x": torch.ones(1)}, step))
    trackers.for_each(lambda tracker: tracker.close())

    (warning,) = lines
    start = "warning: tracker TensorBoard failed, and gets nothing more of this run: "
    assert warning.startswith(f"{start}{type(error).__name__}")
    written = [json.loads(line)[0] for line in (tmp_path / "tracker.jsonl").read_text().splitlines()]
    assert written == [*["text", "scalars", "tensors"] * 2, "close"]


def test_each_tracker_has_numbers_of_its_own(tmp_path, monkeypatch):
    """One that empties what it is given, and one that `settings` do not want, take nothing from the next."""

    class Emptying(Tracker):
        def scalars(self, values, step):
            values.clear()

        tensors = scalars

    class Unwanted(raises_in(*CALLS)):
        def open(self, **_):
            return False

    for name, tracker in {"TensorBoard": Unwanted, "first": Emptying, "json": JsonTracker}.items():
        monkeypatch.setitem(TRACKERS, name, tracker)

    lines: list[str] = []
    settings = small_config()
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": str(tmp_path)})})
    metrics = Metrics(config=settings, versions={}, step=None, log=lines.append)
    metrics.write({"step": 1, "tokens": 8, "loss": 2.0}, {"head_rms/layers.0.self_attn": torch.ones(2)})
    metrics.close()
    written = [json.loads(line) for line in (tmp_path / "tracker.jsonl").read_text().splitlines()]
    assert [values for kind, _, values in written if kind in ("scalars", "tensors")] == [
        {"loss": 2.0},
        {"head_rms/layers.0.self_attn": [1.0, 1.0]},
    ]
    assert lines == []


def test_a_run_without_the_library_of_a_tracker_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    lines: list[str] = []
    Trackers(run=RunFolder(tmp_path), settings=Logging(tensorboard=False), step=None, log=lines.append)
    assert lines == []

    Trackers(run=RunFolder(tmp_path), settings=Logging(), step=None, log=lines.append)
    assert len(lines) == 1
    assert "tracker TensorBoard failed" in lines[0]
