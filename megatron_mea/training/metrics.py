"""The record of a run beside its checkpoints: configuration, rows of metrics and heads, how it ended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_mea.config import Config, dump_config
from megatron_mea.inputs import parse_json_object, read_lines
from megatron_mea.outputs import disk_errors, flush, remove_leftovers, scratch_folder, write_file
from megatron_mea.run_folder import RunFolder
from megatron_mea.training.head_stats import head_row, hlc_statistics
from megatron_mea.training.loggers import Trackers

_NO_SCALARS = ("step", "tokens", "sample_hashes")


class Metrics:
    """Writes config.yaml, then rows to metrics.jsonl and heads.jsonl, and passes them to the trackers; for rank 0.

    Args:
        versions: of packages, for the comment in config.yaml.
        step: the step after which the run resumes; None: step 0. Later rows and a half-written last line are
            removed; the rows before stay as they are, byte for byte.
        log: prints a line.

    Raises:
        OSError: the disk refuses.
    """

    def __init__(
        self, *, config: Config, versions: Mapping[str, str], step: int | None, log: Callable[[str], None]
    ) -> None:
        run = RunFolder(config.run.dir)
        comment = " ".join(f"{name}={version}" for name, version in versions.items())
        config_text = f"# {comment}\n{dump_config(config)}"
        write_file(run.config, config_text)

        self._routed_layers = config.model.routed_layers
        self._metrics, self._heads = _RowFile(run.metrics, step), _RowFile(run.heads, step)
        self._trackers = Trackers(run=run, settings=config.logging, step=step, log=log)
        self._trackers.for_each(lambda tracker: tracker.text("config", config_text, step or 0))

    def write(self, row: Mapping[str, Any], head_tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes a row, and at a validation the statistics of heads, to disk.

        Args:
            head_tensors: as `head_stats.head_tensors` makes them.

        Raises:
            RunError: the disk refuses.
        """
        self._metrics.write(row)
        step, tensors = row["step"], head_tensors or {}
        if tensors:
            self._heads.write({"step": step, "tokens": row["tokens"]} | head_row(tensors))

        scalars = {name: value for name, value in row.items() if name not in _NO_SCALARS} | hlc_statistics(tensors)
        loads = scalars.pop("expert_load", ())
        scalars |= {f"expert_load/{layer}": load for layer, load in zip(self._routed_layers, loads, strict=False)}

        self._trackers.for_each(lambda tracker: tracker.scalars(dict(scalars), step))
        if tensors:
            self._trackers.for_each(lambda tracker: tracker.tensors(dict(tensors), step))

    def close(self) -> None:
        self._metrics.close()
        self._heads.close()
        self._trackers.for_each(lambda tracker: tracker.close())


class _RowFile:
    """A file of JSON rows, one a line; rows after `step` are removed as `Metrics` has it."""

    def __init__(self, path: Path, step: int | None) -> None:
        _truncate_rows(path, -1 if step is None else step)
        self._path, self._file = path, path.open("a", encoding="utf-8")
        flush(path.parent)

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes a row and flushes it to disk; raises RunError where the disk refuses."""
        with disk_errors(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _truncate_rows(path: Path, step: int) -> None:
    """Removes the rows of steps after `step` from a file, and what is no row; the others stay, byte for byte."""
    remove_leftovers(path)
    if not path.exists() or all(_is_row(line, step) for line in read_lines(path)):
        return

    # A rename leaves the old rows or the new ones, and the removed rows have no value.
    with scratch_folder(path) as scratch:
        with (scratch / "rows").open("wb") as stream:
            stream.writelines(line for line in read_lines(path) if _is_row(line, step))

        flush(scratch / "rows")
        (scratch / "rows").replace(path)
        flush(path.parent)


def _is_row(line: bytes, last_step: int) -> bool:
    """Whether a line is complete, and its step is not after `last_step`."""
    try:
        return line.endswith(b"\n") and parse_json_object(line)["step"] <= last_step
    except (ValueError, KeyError, TypeError):
        return False


def write_finished(run: RunFolder, step: int) -> None:
    """Writes FINISHED, with the last step of the run."""
    write_file(run.finished, json.dumps({"step": step}) + "\n")


def write_diverged(*, run: RunFolder, step: int, reason: str) -> None:
    """Writes DIVERGED for sweeps and reports, to which a learning rate that diverges is a result."""
    write_file(run.diverged, json.dumps({"step": step, "reason": reason}) + "\n")
