"""What follows a step, and when the loop calls which callback."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.engines import config
from support.steps import trained

from megatron_mea.config import Config
from megatron_mea.run_folder import RunFolder
from megatron_mea.training import heartbeat, loop, replicas
from megatron_mea.training.callbacks import Callback, Record, what_is_due
from megatron_mea.training.step_result import StepResult


def settings(*, steps: int = 12, validation: bool = True, sample_hashes: bool = False) -> Config:
    """Logs every second step, validates every third, saves every fifth, checks replicas every fourth."""
    base = config(steps=steps, training={"replica_check_interval": 4})
    data = base.data.model_copy(update={"validation": base.data.train if validation else []})
    sections = {
        "data": data,
        "evaluation": base.evaluation.model_copy(update={"interval": 3}),
        "checkpoint": base.checkpoint.model_copy(update={"interval": 5}),
        "logging": base.logging.model_copy(update={"interval": 2, "sample_hashes": sample_hashes}),
    }
    return base.model_copy(update=sections)


@pytest.mark.parametrize(
    ("step", "stop_requested", "names"),
    [
        (1, False, ""),
        (2, False, "log"),
        (3, False, "log validate"),
        (5, False, "save"),
        (10, False, "log save"),
        (12, False, "log validate save last"),
        (12, True, "log validate save last"),
        # A stop request saves, and neither logs nor validates.
        (1, True, "save last"),
        (2, True, "log save last"),
        (3, True, "log validate save last"),
    ],
)
def test_what_is_due(step, stop_requested, names):
    due = what_is_due(step, config=settings(), stop_requested=stop_requested)
    assert " ".join(name for name, value in vars(due).items() if value) == names


@given(st.integers(1, 12), st.booleans(), st.booleans(), st.booleans())
def test_what_is_due_follows_the_rules(step, stop_requested, validation, sample_hashes):
    due = what_is_due(
        step, config=settings(validation=validation, sample_hashes=sample_hashes), stop_requested=stop_requested
    )
    assert due.validate == (validation and step in (3, 6, 9, 12))
    assert due.log == (due.validate or sample_hashes or step % 2 == 0)
    assert due.save == (due.last or step in (5, 10))
    assert due.last == (stop_requested or step == 12)


def test_a_step_without_a_teacher_has_no_distillation_loss():
    result = StepResult(loss=2.0, lr=1e-3, grad_norm=0.5)
    assert list(result.scalars()) == ["loss", "lr", "grad_norm"]
    with_teacher = StepResult(loss=2.0, lr=1e-3, grad_norm=0.5, distillation_loss=0.0, should_stop=True)
    assert list(with_teacher.scalars()) == ["loss", "lr", "grad_norm", "distillation_loss"]


class Journal(Callback):
    """Notes what it is called with, and adds a field and a warning."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def note(self, call: object) -> None:
        self.calls.append(f"{self.name} {call}")

    def on_step_begin(self, step):
        self.note(f"begin {step}")

    def on_update(self, trained):
        self.note(f"update {trained.step}")

    @contextmanager
    def validation(self, record):
        self.note("validation")
        yield
        record.head_tensors[self.name] = torch.tensor(record.row["validation_loss"])

    def on_log(self, trained):
        trained.record.row[self.name] = trained.step
        return [f"{self.name} warns of {trained.step}"]

    def on_step_end(self, trained):
        self.note(f"end {trained.step}")

    def on_close(self):
        self.note("close")


@pytest.fixture
def train(monkeypatch):
    """Runs the loop over steps that train nothing; returns what was called and written, in order."""

    def train(*, steps: int, stop_at: int | None = None, resume: int = 0) -> list[str]:
        calls: list[str] = []
        engine = MagicMock()
        engine.train_step = lambda **given: StepResult(
            loss=1.0, lr=given["lr"], grad_norm=1.0, should_stop=given["num_targets"] == stop_at
        )
        engine.evaluate = lambda batches, count: calls.append("evaluate") or 3.0
        data = [trained(step).data for step in range(resume + 1, steps + 1)]
        # The number of targets tells the steps apart.
        data = [SimpleNamespace(step=one.step, batches=[], num_targets=one.step) for one in data]
        monkeypatch.setattr(loop, "training_steps", lambda **_: iter(data))
        monkeypatch.setattr(loop, "validation_batches", lambda **_: iter(()))
        monkeypatch.setattr(loop, "check_lease", lambda *_, **__: calls.append("check lease"))
        monkeypatch.setattr(loop, "build_callbacks", lambda **_: [Journal("first", calls), Journal("second", calls)])
        monkeypatch.setattr(loop.dist, "barrier", lambda: calls.append("barrier"))
        monkeypatch.setattr(loop.CheckpointMetadata, "of_step", lambda step, **_: step)

        progress, saver, metrics, lease = MagicMock(), MagicMock(), MagicMock(), MagicMock()
        progress.log = lambda line: calls.append(f"print {line.partition(':')[0]}: {line.partition(': ')[2]}")
        progress.tokens_per_second = lambda step: 7.0
        saver.save = lambda step, fragments: calls.append(f"save {step}")
        saver.wait = lambda: calls.append("wait")
        metrics.write = lambda row, tensors: calls.append(
            f"write {' '.join(key for key in row if key not in ('tokens', 'lr'))} + {' '.join(tensors)}"
        )
        lease.new_holder.return_value = ""
        started = SimpleNamespace(
            folder=RunFolder("run"),
            lease=lease,
            step=resume,
            engine=engine,
            saver=saver,
            progress=progress,
            metrics=metrics,
            versions={},
            metadata=None,
        )
        monkeypatch.setattr(loop.metrics, "write_finished", lambda folder, step: calls.append(f"FINISHED {step}"))
        trainer = loop.Trainer(
            config=settings(steps=steps), inputs=MagicMock(), started=started, watchdog=MagicMock(), stop=MagicMock()
        )
        trainer.train()
        return calls

    return train


def test_the_order_of_a_run(train):
    """The order is that of collectives, so it is the same on all ranks and does not depend on what a rank measures."""
    validation = ["first validation", "second validation", "evaluate"]
    row = "loss grad_norm tokens_per_second"
    assert train(steps=3) == [
        *validation,
        "write step validation_loss + second first",
        *("first begin 1", "second begin 1", "first update 1", "second update 1", "first end 1", "second end 1"),
        *("first begin 2", "second begin 2", "first update 2", "second update 2"),
        f"write step {row} first second + ",
        *("print warning: first warns of 2", "print warning: second warns of 2", "first end 2", "second end 2"),
        *("first begin 3", "second begin 3", "first update 3", "second update 3"),
        *validation,
        f"write step {row} validation_loss first second + second first",
        *("print warning: first warns of 3", "print warning: second warns of 3"),
        *("save 3", "first end 3", "second end 3"),
        *("wait", "first close", "second close", "FINISHED 3", "print finished at step 3: run", "barrier"),
    ]


def test_a_run_that_is_asked_to_stop_checks_its_lease_saves_and_is_not_finished(train):
    calls = train(steps=9, stop_at=7, resume=6)
    assert "evaluate" not in calls
    assert not any(call.startswith(("write", "FINISHED")) for call in calls)
    assert calls[4:-1] == [
        "check lease",
        "save 7",
        *("first end 7", "second end 7", "wait", "first close", "second close"),
        "print asked to stop: saved step 7; the same command goes on from here",
    ]


def test_replicas_are_checked_at_their_interval(monkeypatch):
    checked = []
    monkeypatch.setattr(replicas, "check_replicas", lambda **given: checked.append(given["model"]))
    for interval, expected in ((4, 3), (None, 0)):
        base = settings()
        training = base.training.model_copy(update={"replica_check_interval": interval})
        check = replicas.ReplicaCheck(model="m", grid="g", config=base.model_copy(update={"training": training}))
        for step in range(1, 13):
            check.on_update(trained(step))
        assert checked == ["m"] * expected
        checked.clear()


def test_the_heartbeat(tmp_path, monkeypatch):
    """It is written after five seconds, a save, or the end; by rank 0; a disk that refuses does not matter."""
    now, saver, folder = [100.0], SimpleNamespace(seconds=None), RunFolder(tmp_path)
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    arguments = {"folder": folder, "step": 4, "steps": 9, "saver": saver}
    beat, other = heartbeat.Heartbeat(rank=0, **arguments), heartbeat.Heartbeat(rank=1, **arguments)

    beat.on_step_end(trained(5))
    assert (first := folder.read_heartbeat()).pop("time")
    assert first == {"step": 5, "steps": 9, "loss": 2.0, "save_seconds": None}

    now[0] += 4
    beat.on_step_end(trained(6))
    assert folder.read_heartbeat()["step"] == 5
    now[0] += 1
    beat.on_step_end(trained(7))
    assert folder.read_heartbeat()["step"] == 7
    saver.seconds = 2.5
    beat.on_step_end(trained(8, save=True))
    assert (folder.read_heartbeat()["step"], folder.read_heartbeat()["save_seconds"]) == (8, 2.5)

    monkeypatch.setenv("SLURM_JOB_ID", "42")
    beat.on_close()
    assert (folder.read_heartbeat()["step"], folder.read_heartbeat()["job"]) == (8, "42")

    folder.heartbeat.unlink()
    other.on_step_end(trained(9, save=True))
    other.on_close()
    assert not folder.heartbeat.exists()
    folder.heartbeat.mkdir()
    beat.on_close()


def test_a_callback_need_not_have_every_method():
    callback, record = Callback(), Record(row={})
    with callback.validation(record):
        callback.on_step_begin(1)
    for method in (callback.on_update, callback.on_step_end):
        method(trained(1))

    assert callback.on_log(trained(1)) == []
    callback.on_close()
    assert record == Record(row={})
