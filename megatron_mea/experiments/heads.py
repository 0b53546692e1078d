"""Reads what training/heads.py left in a run's TensorBoard folder: matrices and outputs of heads over training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

COMBINATION, OUTPUT = "hlc/", "head_rms/"


@dataclass(frozen=True)
class Heads:
    """By short name of a parameter or an attention layer: steps and what was recorded at each.

    Args:
        matrices: ("layers.0.self_attn.hlc_k", ...) -> (steps, [(h', h), ...]).
        outputs: ("layers.0.self_attn", ...) -> (steps, (steps, heads)).
    """

    matrices: dict[str, tuple[list[int], list[np.ndarray]]]
    outputs: dict[str, tuple[list[int], np.ndarray]]


def read_heads(run_dir: Path) -> Heads:
    """Nothing where the run recorded nothing (`logging.tensorboard: false`, or no validation)."""
    folder = run_dir / "tensorboard"
    if not folder.is_dir():
        return Heads({}, {})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    found: dict[str, tuple[list[int], list[np.ndarray]]] = {}
    for tag in events.Tags()["tensors"]:
        if tag.startswith((COMBINATION, OUTPUT)):
            steps, values = found[tag] = [], []
            for row in events.Tensors(tag):
                # A run that went back to an earlier step recorded later ones anew.
                while steps and steps[-1] >= row.step:
                    steps.pop(), values.pop()
                steps.append(row.step)
                values.append(make_ndarray(row.tensor_proto))
    matrices = {tag.removeprefix(COMBINATION): rows for tag, rows in found.items() if tag.startswith(COMBINATION)}
    outputs = {
        tag.removeprefix(OUTPUT): (steps, np.stack(rows))
        for tag, (steps, rows) in found.items()
        if tag.startswith(OUTPUT)
    }
    return Heads(matrices, outputs)
