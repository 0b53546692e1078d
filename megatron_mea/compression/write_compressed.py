"""Writes a compressed model: a checkpoint, or where the source is a Hugging Face folder such a folder."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch

from megatron_mea.checkpoint.folder import GENERATION, TOKENIZER, CheckpointMetadata, publish, seal
from megatron_mea.checkpoint.tensors import write_tensors
from megatron_mea.compression.compressed_model import CompressedModel
from megatron_mea.compression.latent_model import LatentModel
from megatron_mea.huggingface.export import export
from megatron_mea.huggingface.importing import init_from_instructions
from megatron_mea.huggingface.model_folder import CheckpointFolder, HFFolder, ModelFolder
from megatron_mea.model.decoder import parameter_shapes
from megatron_mea.outputs import scratch_folder
from megatron_mea.progress import progress_bar
from megatron_mea.versions import versions


def write_compressed(
    compressed: CompressedModel | LatentModel, out: Path, *, model: ModelFolder, tokenizer: Path | None
) -> list[str]:
    """Writes OUT, of the same kind as MODEL; returns notes for the user."""
    with scratch_folder(out) as scratch:
        checkpoint = scratch / "compressed"
        _write_checkpoint(compressed, checkpoint, tokenizer)
        if isinstance(model, HFFolder):
            _, *notes = export(CheckpointFolder(checkpoint), out, dtype=_stored_dtype(model)).splitlines()
            return notes

        publish(checkpoint, out)
        return [init_from_instructions(compressed.model, out)]


def _write_checkpoint(compressed: CompressedModel | LatentModel, folder: Path, tokenizer: Path | None) -> None:
    """Writes the compressed model as a checkpoint of step 0, without Adam's moments."""
    source_model, model = compressed.source_model, compressed.model
    shapes, checkpoint = parameter_shapes(model), source_model.checkpoint
    with progress_bar(total=4 * sum(map(math.prod, shapes.values())), desc="write", unit="B", unit_scale=True) as bar:

        def read(name: str, *, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
            bar.update(4 * math.prod(shape))
            return compressed.read_piece(name=name, offsets=offsets, shape=shape)

        write_tensors(folder=folder, shapes=shapes, read=read)

    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / TOKENIZER)
    if (checkpoint.folder / GENERATION).is_file():
        shutil.copy(checkpoint.folder / GENERATION, folder)

    config = checkpoint.config.model_copy(update={"model": model})
    meta = checkpoint.metadata
    base = meta.origin or f"{Path(source_model.name).name}, step {meta.step:,}"
    note = f"{compressed.description}: {base}"
    CheckpointMetadata(
        step=0,
        samples=0,
        tokens=0,
        config=config.model_dump(mode="json"),
        data=meta.data,
        layout={},
        versions=versions(),
        validation_loss=None,
        origin=note,
    ).write(folder)
    seal(folder)


def _stored_dtype(model: HFFolder) -> str:
    """The dtype of `export` that keeps a Hugging Face folder's own: bf16 where all of its tensors are, else fp32."""
    dtypes = {entry.dtype for entry in model.tensors().entries.values()}
    return "bf16" if dtypes == {"BF16"} else "fp32"
