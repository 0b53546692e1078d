"""The verb `inspect`: a checkpoint as text."""

from __future__ import annotations

import math

from megatron_mea.huggingface.model_folder import CheckpointFolder


def inspect(checkpoint: CheckpointFolder) -> str:
    """Step, tokens, layout, versions, parameter table and integrity, as text.

    Raises:
        UserError: it is damaged.
    """
    checkpoint.verify()
    folder, metadata = checkpoint.folder, checkpoint.metadata

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
