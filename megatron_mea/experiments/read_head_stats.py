"""Reads the head statistics that training/head_stats.py wrote to a run's TensorBoard folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mea.run_folder import RunFolder

MATRIX_PREFIX, OUTPUT_PREFIX = "hlc/", "head_rms/"


@dataclass(frozen=True)
class HeadHistory:
    """The recorded matrices and outputs of heads over training, by short name of a parameter or an attention layer.

    Args:
        matrices: ("layers.0.self_attn.hlc_k", ...) -> (steps, [(h', h), ...]).
        outputs: ("layers.0.self_attn", ...) -> (steps, (steps, heads)).
    """

    matrices: dict[str, tuple[list[int], list[np.ndarray]]]
    outputs: dict[str, tuple[list[int], np.ndarray]]


def read_head_stats(run_dir: Path) -> HeadHistory:
    """The head statistics of a run; empty where it recorded none (`logging.tensorboard: false`, or no validation)."""
    folder = RunFolder(run_dir).tensorboard
    if not folder.is_dir():
        return HeadHistory({}, {})

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    records: dict[str, tuple[list[int], list[np.ndarray]]] = {}
    for tag in events.Tags()["tensors"]:
        if tag.startswith((MATRIX_PREFIX, OUTPUT_PREFIX)):
            steps, values = records[tag] = [], []
            for row in events.Tensors(tag):
                # A run that went back to an earlier step recorded later ones again.
                while steps and steps[-1] >= row.step:
                    steps.pop(), values.pop()
                steps.append(row.step)
                values.append(make_ndarray(row.tensor_proto))

    matrices = {tag.removeprefix(MATRIX_PREFIX): rows for tag, rows in records.items() if tag.startswith(MATRIX_PREFIX)}
    outputs = {
        tag.removeprefix(OUTPUT_PREFIX): (steps, np.stack(rows))
        for tag, (steps, rows) in records.items()
        if tag.startswith(OUTPUT_PREFIX)
    }
    return HeadHistory(matrices, outputs)
