"""Reads the head statistics that training wrote to heads.jsonl."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mea.experiments.runs import check_count, read_rows
from megatron_mea.inputs import parse_json_object
from megatron_mea.run_folder import RunFolder

_NAME = re.compile(r"(?:hlc|head_rms)/(layers\.\d{1,6}\.self_attn(\.[a-z_]{1,20})?)")
_MAX_HEADS, _MAX_KINDS = 1024, 8
"""Of a layer, and of matrices: every head is a line or a column of a figure, and every kind is a figure."""
_MAX_ROWS, _MAX_ELEMENTS = 2048, 1 << 24
"""Beyond either every second row is dropped as they are read: a run may validate many thousand times."""
_Row = tuple[int, dict[str, np.ndarray]]


@dataclass(frozen=True)
class HeadHistory:
    """The recorded matrices and outputs of heads over training, by short name of a parameter or an attention layer.

    Args:
        steps: (rows,) of validations.
        matrices: ("layers.0.self_attn.hlc_k", ...) -> (rows, h', h), or sizes of latent numbers' parts (rows, n, h).
        outputs: ("layers.0.self_attn", ...) -> (rows, heads).
    """

    steps: list[int]
    matrices: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def read_head_stats(run_dir: Path) -> HeadHistory:
    """The head statistics of a run: of many rows the first, the last, and some between them, evenly spaced.

    Empty where a run has none: an older program trained it, or it has not validated.

    Raises:
        UserError: a row but the last is none, or the file cannot be read.
        OverflowError: a number that no run has; names its line.
    """
    rows: list[_Row] = []
    row, stride = None, 1
    expected = "a JSON object: step, and numbers by the names of heads"
    parsed = read_rows(RunFolder(run_dir).heads, _parse_row, kind="head statistics", expected=expected)
    for index, row in enumerate(_drawable(parsed)):
        if index % stride:
            continue

        rows.append(row)
        elements = sum(values.size for values in row[1].values())
        if len(rows) > max(2, min(_MAX_ROWS, _MAX_ELEMENTS // elements)):
            rows, stride = rows[::2], 2 * stride

    if row is None:
        return HeadHistory(steps=[], matrices={}, outputs={})
    if rows[-1] is not row:
        rows.append(row)

    stacked = {name: np.stack([tensors[name] for _, tensors in rows]) for name in row[1]}
    return HeadHistory(
        steps=[step for step, _ in rows],
        matrices={name: values for name, values in stacked.items() if values.ndim == 3},
        outputs={name: values for name, values in stacked.items() if values.ndim == 2},
    )


def _parse_row(line: bytes) -> _Row:
    """Step, and matrices and vectors by short name."""
    row = parse_json_object(line)
    step = int(check_count(row["step"]))
    tensors: dict[str, np.ndarray] = {}
    kinds = set()
    for name, values in row.items():
        if match := _NAME.fullmatch(name):
            with np.errstate(over="ignore"):
                tensor = np.array(values, dtype=np.float32)
            if tensor.ndim != (2 if match[2] else 1) or not tensor.size or tensor.shape[-1] > _MAX_HEADS:
                raise ValueError(f"{name} has the shape {tensor.shape}")

            tensors[match[1]] = tensor
            kinds.add(match[2])

    if not 0 < len(kinds) <= _MAX_KINDS:
        raise ValueError(f"{len(kinds)} kinds of statistics")

    return step, tensors


def _drawable(rows: Iterable[_Row]) -> Iterator[_Row]:
    """The rows whose numbers are finite, and whose names and shapes are those of the first such row."""
    first: dict[str, tuple[int, ...]] = {}
    for step, tensors in rows:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if all(np.isfinite(tensor).all() for tensor in tensors.values()) and shapes == (first or shapes):
            first = shapes
            yield step, tensors
