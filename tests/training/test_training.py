"""End-to-end runs through the commands: exact resume, several processes, signals, damaged checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import command, environment, interrupt, rows, train

from megatron_mea.checkpoint.folder import complete_checkpoints, find_corruption
from megatron_mea.checkpoint.tensors import read_tensors, tensor_shapes
from megatron_mea.experiments.read_head_stats import read_head_stats

pytestmark = pytest.mark.slow

STEPS = 60
SETTINGS = {
    "training.steps": STEPS,
    "model.num_attention_heads": 4,
    "model.num_component_heads": 1,
    "training.global_batch_size": 8,
    "schedule.warmup_steps": 5,
    "evaluation.interval": 20,
    "checkpoint.interval": 30,
    "checkpoint.keep": 5,
    "logging.tensorboard": True,
    "logging.sample_hashes": True,
}


def scalar_names(config: Path, name: str) -> set[str]:
    """Names of the scalars in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return set(EventAccumulator(str(config.parent / name / "tensorboard")).Reload().Tags()["scalars"])


def newest_state(config: Path, name: str) -> dict[str, torch.Tensor]:
    """Parameters and moments of the newest checkpoint of a run."""
    folder = complete_checkpoints(config.parent / name)[-1][1]
    return read_tensors(folder, tensor_shapes(folder))


def test_the_run_folder(config, whole):
    metrics = rows(config, "whole")
    assert [row["step"] for row in metrics] == list(range(STEPS + 1))
    assert metrics[0].keys() == {"step", "tokens", "validation_loss"}
    assert all(row["tokens"] == row["step"] * 8 * 32 for row in metrics)
    assert [row["step"] for row in metrics if "validation_loss" in row] == [0, 20, 40, 60]
    assert metrics[-1]["validation_loss"] < metrics[0]["validation_loss"] - 0.5
    assert metrics[5]["lr"] == 0.01
    assert metrics[-1]["lr"] == pytest.approx(0.001)

    assert (whole / "FINISHED").exists()
    assert (whole / "config.yaml").exists()
    assert [step for step, _ in complete_checkpoints(whole)] == [30, 60]
    assert all(find_corruption(folder) is None for _, folder in complete_checkpoints(whole))
    assert not list((whole / "checkpoints").glob(".tmp*"))


def test_tensorboard_holds_the_same_scalars(config, whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx({row["step"]: row["loss"] for row in rows(config, "whole")[1:]}, rel=1e-6)
    assert any(tag.startswith("hlc_condition/") for tag in events.Tags()["scalars"])


def test_the_resolved_configuration_starts_the_same_run(config, whole):
    result = subprocess.run(
        [sys.executable, "-m", "megatron_mea", "train", str(whole / "config.yaml")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "is finished at step 60" in result.stdout


@pytest.mark.parametrize("signal_number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_an_interrupted_run_equals_an_uninterrupted_one(config, whole, signal_number):
    """Bit for bit: losses, norms, validation, and the parameters and moments at the end."""
    name = signal_number.name
    status, _ = interrupt(config, name, step=45, signal_number=signal_number)
    run = config.parent / name
    assert not (run / "FINISHED").exists()
    if signal_number == signal.SIGKILL:
        assert status == -signal.SIGKILL
        assert complete_checkpoints(run)[-1][0] == 30
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 99, "lo')
    else:
        assert status == 0
        assert complete_checkpoints(run)[-1][0] >= 45

    before = (run / "metrics.jsonl").read_bytes()
    resume_step = complete_checkpoints(run)[-1][0]
    output = train(config, name)
    assert f"resuming from {run}/checkpoints/step_{resume_step:08d}" in output

    complete_lines = [line for line in before.splitlines(keepends=True) if line.endswith(b"\n")]
    earlier_rows = b"".join(line for line in complete_lines if json.loads(line)["step"] <= resume_step)
    assert (run / "metrics.jsonl").read_bytes().startswith(earlier_rows)
    assert rows(config, name) == rows(config, "whole")

    actual, expected = newest_state(config, name), newest_state(config, "whole")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in actual.items())


def test_a_run_killed_before_its_first_checkpoint_begins_anew(config, whole):
    interrupt(config, "early", step=12, signal_number=signal.SIGKILL)
    assert complete_checkpoints(config.parent / "early") == []
    train(config, "early")
    assert rows(config, "early") == rows(config, "whole")


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("event", ["Ctrl-C", "closed terminal", "killed launcher"])
def test_what_ends_a_terminal_or_the_launcher_saves(config, event):
    """A terminal signals local.sh and every rank, and local.sh passes it on: each rank gets it twice.

    Before a terminal is closed all processes are suspended for longer than a step may take.
    """
    run = config.parent / event.replace(" ", "-")
    limit = "parallel.timeout_minutes=0.2" if event == "closed terminal" else "parallel.timeout_minutes=1"
    arguments = command(config, run.name, "training.steps=100000", limit, processes=2)
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True)

    metrics = run / "metrics.jsonl"

    def wait_for_rows(count: int) -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < count:
            assert process.poll() is None
            time.sleep(0.05)

    try:
        wait_for_rows(5)
        if event == "closed terminal":
            os.killpg(process.pid, signal.SIGSTOP)
            time.sleep(14)
            num_rows = metrics.read_text().count("\n")
            os.killpg(process.pid, signal.SIGCONT)
            wait_for_rows(num_rows + 5)

        if event == "killed launcher":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGINT if event == "Ctrl-C" else signal.SIGHUP)
        # Until the ranks have closed it too.
        output, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    assert process.returncode == (-signal.SIGKILL if event == "killed launcher" else 0)
    assert "asked to stop: saved step" in output
    assert complete_checkpoints(run)

    lines = metrics.read_text().splitlines()
    assert all(row[key] < 12 for row in map(json.loads, lines) for key in row if key.endswith("seconds"))


def test_options_that_change_how_but_not_what(tiny, config, tmp_path, capsys):
    """No validation, the folder of a model as the tokenizer, bf16, recomputation, determinism; then an export."""
    from megatron_mea.cli import main

    model = tmp_path / "model"
    shutil.copytree(tiny.tokenizer, model)
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(b"other weights")
    (model / ".cache").mkdir()

    output = train(
        config,
        "options",
        *("training.steps=6", "training.precision=bf16", "training.activation_checkpointing=full"),
        *("training.deterministic=true", "data.validation=[]", f"data.tokenizer={model}", "checkpoint.keep_every=5"),
        *("checkpoint.interval=1", "checkpoint.keep=1", "logging.interval=4", "logging.sample_hashes=false"),
    )
    run = config.parent / "options"
    assert [row["step"] for row in rows(config, "options")] == [4, 6]
    assert [step for step, _ in complete_checkpoints(run)] == [5, 6]
    assert not any("bf16_optimizer" in line or line.startswith("MA ") for line in output.splitlines())

    assert main(["export", str(run), str(tmp_path / "export")]) == 0
    assert json.loads((tmp_path / "export/config.json").read_text())["model_type"] == "mea"
    assert not (tmp_path / "export/.cache").exists()


def test_two_processes_equal_one_to_rounding(config, whole):
    """Interrupted by a signal to local.sh, resumed on two; then longer, with another layout, on one."""
    status, output = interrupt(config, "two", step=25, signal_number=signal.SIGUSR2, processes=2)
    assert status == 0
    assert "asked to stop: saved step" in output

    train(config, "two", processes=2)
    expected_rows, actual_rows = rows(config, "whole"), rows(config, "two")
    assert [row["step"] for row in actual_rows] == [row["step"] for row in expected_rows]
    for actual, expected in zip(actual_rows, expected_rows, strict=True):
        assert actual.pop("sample_hashes", None) == expected.pop("sample_hashes", None)
        assert actual == pytest.approx(expected, rel=1e-3)
        assert actual.get("loss", 0) == pytest.approx(expected.get("loss", 0), rel=1e-4)

    output = train(config, "two", "training.steps=64", "training.micro_batch_size=4")
    assert "changed since then: training.micro_batch_size: 2 -> 4" in output
    assert [row["step"] for row in rows(config, "two")] == list(range(65))
    assert json.loads((config.parent / "two/FINISHED").read_text())["step"] == 64


def test_a_layout_changes_rounding_only(config, whole, tmp_path):
    """Three layouts that resume from each other's checkpoints; the export is the same."""
    from megatron_mea.cli import main

    tensor_parallel = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    context_2 = "parallel.context_parallel_size=2"
    zero_2, pipeline_2 = "parallel.zero_stage=2", "parallel.pipeline_model_parallel_size=2"
    status, _ = interrupt(
        config, "layout", *tensor_parallel, context_2, zero_2, step=12, signal_number=signal.SIGTERM, processes=4
    )
    assert status == 0
    status, output = interrupt(
        config, "layout", *tensor_parallel, pipeline_2, step=32, signal_number=signal.SIGUSR2, processes=4
    )
    assert status == 0
    assert "changed since then: parallel.pipeline_model_parallel_size: 1 -> 2" in output
    assert scalar_names(config, "layout") == scalar_names(config, "whole")

    output = train(config, "layout", context_2, "parallel.zero_stage=3", processes=2)
    # At step 20 two stages of two tensor ranks, then two context ranks record the head statistics of one process.
    actual, expected = (read_head_stats(config.parent / name) for name in ("layout", "whole"))
    assert actual.matrices.keys() == expected.matrices.keys()
    for step in (20, 40, 60):
        index, expected_index = actual.steps.index(step), expected.steps.index(step)
        for name, outputs in expected.outputs.items():
            assert actual.outputs[name][index] == pytest.approx(outputs[expected_index], rel=1e-3)

    assert "changed since then: parallel.tensor_model_parallel_size: 2 -> 1" in output
    for actual, expected in zip(rows(config, "layout"), rows(config, "whole"), strict=True):
        assert actual.get("sample_hashes") == expected.get("sample_hashes")
        assert actual.get("loss", 0) == pytest.approx(expected.get("loss", 0), rel=1e-4)
        assert actual.get("validation_loss", 0) == pytest.approx(expected.get("validation_loss", 0), rel=1e-4)

    exported = []
    for name in ("layout", "whole"):
        out = tmp_path / name
        assert main(["export", str(config.parent / name), str(out)]) == 0
        exported.append(load_file(out / "model.safetensors"))

    actual, expected = exported
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=2e-3, msg=name)


def test_a_damaged_checkpoint_is_quarantined(config, whole):
    run = config.parent / "damaged"
    shutil.copytree(whole, run)
    (run / "FINISHED").unlink()
    shard = next((run / "checkpoints/step_00000060").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (run / "checkpoints/.tmp-step_00000090").mkdir()

    output = train(config, "damaged")
    assert f"step_00000060 is damaged ({shard.name} does not match its checksum)" in output
    assert "resuming from" in output
    assert "step_00000030" in output
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step_00000030",
        "damaged-step_00000060",
        "step_00000060",
    }
    assert rows(config, "damaged") == rows(config, "whole")


def test_a_failing_rank_ends_the_run(config):
    """A rank exits in the middle of training: the others are ended at once, and its status is returned."""
    site = config.parent / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, threading, time\n"
        "def leave():\n"
        "    while not os.path.exists(os.environ['STARTED']):\n"
        "        time.sleep(0.1)\n"
        "    os._exit(7)\n"
        "if os.environ.get('RANK') == '1':\n"
        "    threading.Thread(target=leave, daemon=True).start()\n"
    )

    started = config.parent / "failing/metrics.jsonl"
    result = subprocess.run(
        command(config, "failing", "training.steps=1000000", processes=2),
        env=environment() | {"PYTHONPATH": str(site), "STARTED": str(started)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 7
    assert time.time() - started.stat().st_mtime < 10


def test_the_error_of_a_single_rank_is_that_of_the_run(config):
    """The others fail as well once it is gone, without a cause: its message and status are those of the run."""
    site = config.parent / "single-rank-site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from megatron_mea.data.corpora import Corpora\n"
        "    from megatron_mea.errors import UserError\n"
        "    batch, calls = Corpora.batch, []\n"
        "    def sometimes(self, samples):\n"
        "        calls.append(samples)\n"
        "        if len(calls) > 80:\n"
        "            raise UserError(where='train.bin', got='token id 999', expected='ids below 384')\n"
        "        return batch(self, samples)\n"
        "    Corpora.batch = sometimes\n"
    )

    result = subprocess.run(
        command(config, "alone", processes=2),
        env=environment() | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("megatron-mea: rank 1: error: train.bin\n  got:      token id 999\n")
    assert not (config.parent / "alone/FINISHED").exists()


def test_a_layout_is_refused_before_a_rank_is_started(config, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/started\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)

    result = subprocess.run(
        command(config, "refused", "parallel.pipeline_model_parallel_size=3", processes=3),
        env=environment() | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("megatron-mea: error: parallel.pipeline_model_parallel_size\n  got:      3\n")
    assert "no layout of 3 processes works" in result.stderr
    assert "-m megatron_mea" not in (tmp_path / "started").read_text()
    assert not (config.parent / "refused").exists()


def test_a_rate_that_diverges_is_a_result_of_a_sweep(config):
    """Its DIVERGED and FAILED files are removed when the run resumes with other settings."""
    out = config.parent / "sweep"
    command = [
        sys.executable,
        "-m",
        "megatron_mea",
        "sweep",
        str(config),
        "--learning-rates",
        "1e25",
        "--out",
        str(out),
    ]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    run = out / "mea-lr1e25"
    assert result.returncode == 0, result.stderr
    assert f"run 1 of 1: {run} diverged" in result.stdout
    diverged = json.loads((run / "DIVERGED").read_text())
    assert diverged["step"] == len([row for row in rows(config, "sweep/mea-lr1e25") if "loss" in row]) + 1
    assert diverged["reason"].startswith(f"step {diverged['step']} stopped before its update: the loss is ")

    (run / "FAILED").write_text('{"status": 1, "reason": "of an earlier sweep"}')
    train(config, "sweep/mea-lr1e25", "optimizer.lr=1e-3")
    assert not (run / "DIVERGED").exists()
    assert not (run / "FAILED").exists()
    assert (run / "FINISHED").exists()
