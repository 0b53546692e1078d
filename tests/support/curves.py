"""Runs that were never trained: folders with a configuration and made-up metrics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

BATCH, SEQ, WARMUP = 16, 128, 20


def power_law(tokens: np.ndarray, *, asymptote: float, critical: float, alpha: float) -> np.ndarray:
    """The loss after so many tokens, by paper eq. 35."""
    return (critical / tokens) ** alpha + asymptote


def noisy_loss(
    seed: int, *, asymptote: float = 3.0, critical: float = 3e5, alpha: float = 0.6, rows: int = 400, sd=0.05
):
    """(tokens, loss) of a run, with noise of which neighbours share a part."""
    random = np.random.default_rng(seed)
    tokens = np.arange(1, rows + 1) * BATCH * SEQ * 1.0
    noise = random.normal(0, sd, rows)
    noise[1:] = 0.3 * noise[:-1] + noise[1:]
    return tokens, power_law(tokens, asymptote=asymptote, critical=critical, alpha=alpha) + noise


def write_run(
    *, folder: Path, variant: str, lr: float, seed: int, loss: np.ndarray, finished: bool = True, **changes: object
) -> Path:
    """A run folder whose rows have these losses."""
    config = {
        "model": {"attention_variant": variant, "max_position_embeddings": SEQ},
        "data": {"tokenizer": "none", "train": [{"path": "none"}], "seq_length": SEQ},
        "optimizer": {"lr": lr},
        "schedule": {"kind": "constant", "warmup_steps": WARMUP},
        "training": {"steps": len(loss) if finished else 2 * len(loss), "global_batch_size": BATCH, "seed": seed},
        "run": {"dir": str(folder)},
    }
    for section, values in changes.items():
        config[section] |= values

    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("# made by hand\n" + yaml.safe_dump(config))
    rows = [{"step": 0, "tokens": 0, "validation_loss": 7.5}]
    for step, value in enumerate(loss, 1):
        rows.append({"step": step, "tokens": step * BATCH * SEQ, "loss": value, "lr": lr, "grad_norm": 1.0 + step % 3})

    rows[-1]["validation_loss"] = float(np.mean(loss[-20:])) + 0.1
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "FINISHED").write_text(json.dumps({"step": len(loss)}))
    return folder
