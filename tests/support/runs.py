"""End-to-end runs through the commands, as a user starts them: train, interrupt, read the metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(config: Path, name: str, *overrides: str, processes: int = 1) -> list[str]:
    """The command that trains the run `name` beside `config`, on one process or through local.sh."""
    arguments = [str(config), f"run.dir={config.parent / name}", *overrides]
    if processes == 1:
        return [sys.executable, "-m", "megatron_mea", "train", *arguments]
    return ["bash", str(ROOT / "launch/local.sh"), str(processes), *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def train(config: Path, name: str, *overrides: str, processes: int = 1) -> str:
    """Trains to the end; returns stdout."""
    result = subprocess.run(
        command(config, name, *overrides, processes=processes), env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def interrupt(
    config: Path, name: str, *overrides: str, step: int, signal_number: int, processes: int = 1
) -> tuple[int, str]:
    """Trains until the metrics show `step`, sends a signal, and waits for the end; returns status and stdout."""
    metrics = config.parent / name / "metrics.jsonl"
    process = subprocess.Popen(
        command(config, name, *overrides, processes=processes), env=environment(), stdout=subprocess.PIPE, text=True
    )

    deadline = time.monotonic() + 300
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None, "the run ended before the signal"
        assert time.monotonic() < deadline
        time.sleep(0.02)

    process.send_signal(signal_number)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def rows(config: Path, name: str) -> list[dict]:
    """The rows of metrics.jsonl without times, which differ between any two runs."""
    lines = (config.parent / name / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    for row in metrics:
        for key in [key for key in row if "second" in key]:
            del row[key]

    return metrics
