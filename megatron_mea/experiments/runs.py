"""Reads the folders of runs, as they are: finished, running, failed."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_mea.config import Config
from megatron_mea.config.load import load_config
from megatron_mea.errors import UserError
from megatron_mea.inputs import parse_json_object, read_lines
from megatron_mea.progress import progress_bar
from megatron_mea.run_folder import RunFolder

T = TypeVar("T")
_TRAINED_KEYS = ("loss", "grad_norm", "balance_loss", "expert_load")
MAX_ROWS = 1 << 18
"""Of a run with twice as many, neighbours are averaged as they are read: a run may log millions of steps."""
_BLOCK = 1 << 12
"""Rows that are added to them at a time."""
_MAX_NUMBER = float(1 << 63)
_SHOWN_BYTES = 50_000_000
"""Of metrics, which take seconds to read."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run's configuration and the metrics that it logged.

    Args:
        steps, tokens, loss, grad_norm: (rows,) of the rows with a loss.
        balance_loss, expert_load: (rows,) of models with experts, the load of the fullest expert of any layer over its
            layer's mean; else not a number.
        validation: (rows, 2) tokens and validation loss.
        averaged: logged rows of which a row is the mean, with the step and the tokens of the last one.
        diverged, failed: why; empty where it did not.
    """

    dir: Path
    config: Config
    steps: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    grad_norm: np.ndarray
    balance_loss: np.ndarray
    expert_load: np.ndarray
    validation: np.ndarray
    diverged: str
    failed: str
    averaged: int = 1

    @property
    def variant(self) -> str:
        return self.config.model.variant_label

    @property
    def lr(self) -> float:
        return self.config.optimizer.lr

    @property
    def seed(self) -> int:
        return self.config.training.seed

    @property
    def is_complete(self) -> bool:
        """Whether the last step of the configuration was logged."""
        return bool(len(self.steps)) and self.steps[-1] >= self.config.steps

    @property
    def final_loss(self) -> float:
        """Mean loss (nats) over the last tenth of the rows."""
        return float(self.loss[-max(1, len(self.loss) // 10) :].mean())

    @property
    def final_validation(self) -> float | None:
        """The last validation loss (nats); None where there was no validation."""
        return float(self.validation[-1, 1]) if len(self.validation) else None


def find_runs(paths: Sequence[str]) -> list[RunRecord]:
    """The runs in folders, each a run or a sweep's `--out`, also those that have not begun; by variant, rate and seed.

    Raises:
        UserError: there is no run, or one is not readable.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        run_folders = [path] if _is_run(path) else sorted(filter(_is_run, path.iterdir())) if path.is_dir() else []
        if not run_folders:
            problem = "no such folder" if not path.exists() else "a file" if path.is_file() else "no run in it"
            expected = f"a run folder (with {RunFolder(path).config.name}), or a folder of run folders"
            raise UserError(where=str(path), got=problem, expected=expected)
        folders |= dict.fromkeys(folder.resolve() for folder in run_folders)

    metrics = [RunFolder(folder).metrics for folder in folders]
    size = sum(path.stat().st_size for path in metrics if path.exists())
    with progress_bar(desc="report", total=size, unit="B", unit_scale=True, disable=size < _SHOWN_BYTES) as progress:
        runs = [read_run(folder, progress.update) for folder in folders]

    return sorted(runs, key=lambda run: (run.variant, run.lr, run.seed))


def _is_run(path: Path) -> bool:
    return any(file.is_file() for file in (RunFolder(path).config, RunFolder(path).job_config))


def read_run(path: Path, show_progress: Callable[[int], object] = lambda _: None) -> RunRecord:
    """One folder; a last line that is being written is left out, and a run that has not begun has no rows.

    Args:
        show_progress: is called with the bytes of every line of metrics that was read.
    """
    trained = _AveragedRows(("step", "tokens"), *_TRAINED_KEYS)
    validation = _AveragedRows(("tokens",), "validation_loss")
    folder, problem = RunFolder(path), ""
    expected = "a JSON object of numbers: step, tokens"
    try:
        for row in read_rows(
            folder.metrics, _parse_row, kind="metrics", expected=expected, show_progress=show_progress
        ):
            if "loss" in row:
                trained.add(row["step"], row["tokens"], *(row.get(name, math.nan) for name in _TRAINED_KEYS))
            if "validation_loss" in row:
                validation.add(row["tokens"], row["validation_loss"])
    except OverflowError as error:
        problem = str(error)

    steps, tokens, *columns = np.ascontiguousarray(trained.values().T)
    return RunRecord(
        dir=path,
        config=_read_config(folder.config if folder.config.is_file() else folder.job_config),
        steps=steps,
        tokens=tokens,
        **dict(zip(_TRAINED_KEYS, columns, strict=True)),
        validation=validation.values(),
        averaged=trained.group_size,
        diverged=folder.divergence_reason(),
        failed=problem or folder.failure_reason(),
    )


def _read_config(path: Path) -> Config:
    try:
        return load_config(path)
    except UserError as error:
        # One of many files: the key alone does not say which.
        raise UserError.from_problems(error.problems, f"in {path}") from None


class _AveragedRows:
    """Rows of numbers in bounded memory: `MAX_ROWS` at least where there are so many, and less than twice as many.

    Args:
        progress: columns that rise, of which an average has the last value.
        others: the other columns.

    Attributes:
        group_size: rows of which one that is kept is the average.
    """

    def __init__(self, progress: tuple[str, ...], *others: str) -> None:
        self._progress, self._columns, self.group_size = len(progress), len(progress) + len(others), 1
        # Rows as they were added, and averages of `group_size` of them.
        self._pending, self._averages = array("d"), np.empty((0, self._columns))

    def add(self, *row: float) -> None:
        self._pending.extend(row)
        if len(self._pending) == _BLOCK * self.group_size * self._columns:
            self._averages, self._pending = self.values(), array("d")
            if len(self._averages) >= 2 * MAX_ROWS:
                self._averages = self._average(self._averages, 2)
                self.group_size *= 2

    def values(self) -> np.ndarray:
        """(rows, columns); the last row may be the average of fewer."""
        pending = np.array(self._pending).reshape(-1, self._columns)
        whole = len(pending) // self.group_size * self.group_size
        averages = [self._averages, self._average(pending[:whole], self.group_size)]
        if whole < len(pending):
            averages.append(self._average(pending[whole:], len(pending) - whole))

        return np.concatenate(averages)

    def _average(self, rows: np.ndarray, size: int) -> np.ndarray:
        """The averages of `size` neighbours each, (groups, columns)."""
        groups = rows.reshape(-1, size, self._columns)
        return np.concatenate([groups[:, -1, : self._progress], groups[:, :, self._progress :].mean(1)], axis=1)


def read_rows(
    path: Path,
    parse: Callable[[bytes], T],
    *,
    kind: str,
    expected: str,
    show_progress: Callable[[int], object] = lambda _: None,
) -> Iterator[T]:
    """What `parse` makes of each line of a file that a run writes; nothing where there is none.

    A last line of which it makes nothing (ValueError, KeyError, TypeError) is left out: it may be half-written.

    Args:
        kind, expected: of rows, for messages.
        show_progress: is called with the bytes of every line.

    Raises:
        UserError: another line is no row, or the file cannot be read.
        OverflowError: `parse` raised it; names the line.
    """
    broken = 0
    try:
        for number, line in enumerate(read_lines(path) if path.exists() else (), 1):
            show_progress(len(line))
            if broken:
                raise UserError(where=f"{path}:{broken}", got=f"no row of {kind}", expected=expected)

            try:
                yield parse(line)
            except OverflowError:
                raise OverflowError(f"{path}:{number} has a number that no run has") from None
            except (ValueError, KeyError, TypeError):
                broken = number
    except OSError as error:
        got = error.strerror or str(error)
        raise UserError(where=str(path), got=got, expected="a file that can be read") from None


def check_count(value: Any) -> float:
    """A number of steps or tokens; raises OverflowError where no run has so many."""
    count = float(value)
    if not 0 <= count < _MAX_NUMBER:
        raise OverflowError

    return count


def _parse_row(line: bytes) -> dict[str, float]:
    """Step, tokens, and what else of `_TRAINED_KEYS` and the validation loss a row of metrics has."""
    row = parse_json_object(line)
    counts = {name: check_count(row[name]) for name in ("step", "tokens")}
    values = {name: row[name] for name in (*_TRAINED_KEYS, "validation_loss") if row.get(name) is not None}
    # A number a layer.
    return counts | {
        name: max(map(float, value)) if name == "expert_load" else float(value) for name, value in values.items()
    }
