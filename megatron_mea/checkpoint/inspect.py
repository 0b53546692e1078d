"""The verb `inspect`: a checkpoint as text."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_mea.checkpoint.folder import CheckpointMetadata, checkpoint_folder, find_corruption
from megatron_mea.errors import UserError


def inspect(path: str | Path) -> str:
    """Step, tokens, layout, versions, parameter table and integrity, as text.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    folder = checkpoint_folder(path)
    problem = find_corruption(folder)
    if problem is not None:
        raise UserError(
            where=str(folder), got=problem, expected="a whole checkpoint", hint="use an older one of the run"
        )

    metadata = CheckpointMetadata.read(folder)

    # Imports torch, which takes longer than the checks above.
    from megatron_mea.checkpoint.tensors import weight_shapes

    shapes = weight_shapes(folder)
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    rows = [
        ("checkpoint", str(folder)),
        ("step", f"{metadata.step:,}"),
        ("samples", f"{metadata.samples:,}"),
        ("tokens", f"{metadata.tokens:,}"),
        (
            "validation loss",
            "not measured" if metadata.validation_loss is None else f"{metadata.validation_loss:.4f}",
        ),
        ("variant", metadata.config["model"]["attention_variant"]),
        ("parameters", f"{sum(counts.values()):,}"),
        ("saved from", metadata.origin or ", ".join(f"{key} {value}" for key, value in metadata.layout.items())),
        ("versions", ", ".join(f"{key} {value}" for key, value in metadata.versions.items())),
        ("integrity", f"whole: all checksums hold, {size:,} bytes"),
    ]
    lines = [f"{key:<16} {value}" for key, value in rows]

    width = max(map(len, shapes))
    lines += ["", f"{'parameter':<{width}}  {'shape':<16} {'elements':>14}"]
    lines += [f"{name:<{width}}  {shape!s:<16} {counts[name]:>14,}" for name, shape in shapes.items()]
    return "\n".join(lines)
