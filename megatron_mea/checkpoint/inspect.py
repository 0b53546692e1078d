"""What `megatron-mea inspect` shows of a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_mea.checkpoint.folder import Meta, checkpoint_folder, damage
from megatron_mea.errors import UserError


def inspect(path: str | Path) -> str:
    """Step, tokens, layout, versions, parameter table and integrity, as text.

    Raises:
        UserError: no checkpoint stands there, or it is damaged.
    """
    folder = checkpoint_folder(path)
    problem = damage(folder)
    if problem is not None:
        raise UserError(str(folder), problem, "a whole checkpoint", "use an older one of the run")
    meta = Meta.read(folder)

    # It imports torch.
    from megatron_mea.checkpoint.tensors import weight_shapes

    shapes = weight_shapes(folder)
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    rows = [
        ("checkpoint", str(folder)),
        ("step", f"{meta.step:,}"),
        ("samples", f"{meta.samples:,}"),
        ("tokens", f"{meta.tokens:,}"),
        (
            "validation loss",
            "not measured" if meta.validation_loss is None else f"{meta.validation_loss:.4f}",
        ),
        ("variant", meta.config["model"]["attention_variant"]),
        ("parameters", f"{sum(counts.values()):,}"),
        ("saved from", meta.origin or ", ".join(f"{key} {value}" for key, value in meta.layout.items())),
        ("versions", ", ".join(f"{key} {value}" for key, value in meta.versions.items())),
        ("integrity", f"whole: all checksums hold, {size:,} bytes"),
    ]
    lines = [f"{key:<16} {value}" for key, value in rows]
    width = max(map(len, shapes))
    lines += ["", f"{'parameter':<{width}}  {'shape':<16} {'elements':>14}"]
    lines += [f"{name:<{width}}  {shape!s:<16} {counts[name]:>14,}" for name, shape in shapes.items()]
    return "\n".join(lines)
