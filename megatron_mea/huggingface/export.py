"""The `export` verb: from a checkpoint to a Hugging Face folder, with one tensor at a time in memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from transformers import GenerationConfig

from megatron_mea.checkpoint.folder import GENERATION, OVERHEAD_BYTES
from megatron_mea.checkpoint.tensors import row_chunks
from megatron_mea.data.corpora import Corpora
from megatron_mea.data.tokenizer import copy_tokenizer, limit_length
from megatron_mea.errors import UserError
from megatron_mea.huggingface.expert_tensors import ExpertMatrix
from megatron_mea.huggingface.importing import as_checkpoint, import_settings
from megatron_mea.huggingface.model_card import model_card
from megatron_mea.huggingface.model_folder import CheckpointFolder, HFFolder, ModelFolder, StoredTensors
from megatron_mea.huggingface.parity_check import check_parity
from megatron_mea.huggingface.safetensors_writer import SHARD_BYTES, write_safetensors
from megatron_mea.huggingface.targets import ExportTarget, make_export_target
from megatron_mea.outputs import (
    check_free_folder,
    disk_errors,
    flush_tree,
    publish,
    require_space,
    reserve_output,
    scratch_folder,
)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MAX_TOKENS, _MAX_LOGITS = 256, 1 << 26
"""Limits of the parity check: tokens of each of its two windows, and logits of each model (half a gigabyte)."""

_M_MMAP_THRESHOLD = -3


def export(
    model: ModelFolder,
    out: str | Path,
    *,
    dtype: str = "fp32",
    kind: str = "transformers",
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes weights, configuration, tokenizer, model card and modeling files, then compares logits.

    Args:
        model: a Hugging Face folder is exported as its import.
        out: must not exist or be empty; it appears when everything, the comparison included, is done.
        dtype: `fp32` (the master weights) or `bf16`.
        kind: `transformers`, `stock` or `vllm`.
        shard_bytes: largest size of a safetensors file.

    Returns:
        A message for the user: what was written, and how far its logits are from the trainer's.

    Raises:
        UserError: there is nothing to export, this model cannot be of that kind, or `out` is not free.
        ExportError: the logits differ.
        RunError: the disk fails.
    """
    out = Path(out)
    check_free_folder(out)
    if isinstance(model, HFFolder):
        # An impossible target is refused before any weight is read.
        make_export_target(kind, import_settings(model)[0])

    _return_freed_memory()
    with reserve_output(out, folder=True), disk_errors(out), scratch_folder(out) as scratch:
        source = as_checkpoint(model, scratch / "checkpoint")
        stored = source.tensors()
        target = make_export_target(kind, source.settings(), dtype=_DTYPES[dtype], **source.special_token_ids())
        num_elements = sum(prod(recipe.shape) for recipe in target.tensors.values())
        require_space(out, num_elements * _DTYPES[dtype].itemsize + OVERHEAD_BYTES)

        folder = scratch / "export"
        parity = _write_and_compare(
            source=source, stored=stored, target=target, folder=folder, dtype=dtype, shard_bytes=shard_bytes
        )
        flush_tree(folder)
        publish(folder, out)

    return "\n".join([f"wrote {out}: step {source.metadata.step}, {dtype}", *target.notes, parity])


def _return_freed_memory() -> None:
    """Makes glibc return freed memory to the system: it would retain blocks of up to 32 MB, more with every layer."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _write_and_compare(
    *,
    source: CheckpointFolder,
    stored: StoredTensors,
    target: ExportTarget,
    folder: Path,
    dtype: str,
    shard_bytes: int,
) -> str:
    """Writes all files of the export to `folder`, checks its logits, and describes the result for the user."""
    folder.mkdir()

    @lru_cache(maxsize=1)
    def read_experts(name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        return stored.read_tensor(name, offsets=offsets, shape=shape)

    def read_expert(name: str, expert: ExpertMatrix) -> torch.Tensor:
        # A chunk of a checkpoint is read whole for any part of it, so the experts of a chunk are read once.
        index, first, _ = expert.offsets
        chunks = row_chunks(stored.shapes[name])
        offsets, shape = next((start, size) for start, size in chunks if start[0] <= index < start[0] + size[0])
        box = read_experts(name, offsets, shape)[index - offsets[0]]
        return box[first : first + expert.shape[1]].unsqueeze(0)

    def read_exported(name: str) -> torch.Tensor:
        recipe = target.tensors[name]
        if recipe.expert is not None:
            return recipe.make(read_expert(recipe.sources[0], recipe.expert))

        return recipe.make(*map(stored.read_tensor, recipe.sources))

    shapes = {name: recipe.shape for name, recipe in target.tensors.items()}
    files = write_safetensors(folder, shapes, dtype=_DTYPES[dtype], read=read_exported, shard_bytes=shard_bytes)
    target.config.save_pretrained(folder)
    if (source.folder / GENERATION).is_file():
        # Copied, since transformers loads settings that it refuses to save.
        shutil.copy(source.folder / GENERATION, folder)
    else:
        GenerationConfig.from_model_config(target.config).save_pretrained(folder)

    for module in target.modules:
        shutil.copy(module.__file__, folder)

    if source.tokenizer is not None:
        copy_tokenizer(source.tokenizer, folder)
        limit_length(folder, target.config.max_position_embeddings)

    (folder / "README.md").write_text(model_card(source=source, target=target, dtype=dtype))
    for file in folder.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())

    tokens = _parity_tokens(source)
    parity = check_parity(
        target=target,
        folder=folder,
        files=files,
        dtype=_DTYPES[dtype],
        read_exported=read_exported,
        model=source.settings(),
        read_master=stored.read_tensor,
        tokens=tokens,
    )
    token_kind = "real" if source.tokenizer else "random"
    return (
        f"logits of {parity.tokens} {token_kind} tokens differ from the trainer's by at most {parity.difference:.2g} "
        f"(they reach {parity.scale:.3g})" + ("" if dtype == "fp32" else f", before the rounding to {dtype}")
    )


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _parity_tokens(source: CheckpointFolder) -> torch.Tensor:
    """Tokens (2, up to 256) for the parity check: of the run's data, else of a sentence, else random ids.

    The data may be gone, and an imported checkpoint may lack a tokenizer.
    """
    data, vocab = source.config.data, source.config.model.vocab_size
    length = max(min(data.seq_length, _MAX_TOKENS, _MAX_LOGITS // (2 * vocab)), 1)
    for corpora in (data.validation, data.train):
        if not corpora:
            continue

        try:
            batch = Corpora(corpora=corpora, seq_length=length, vocab_size=vocab, seed=None, key="data").batch(
                torch.arange(2).numpy()
            )
        except (UserError, IndexError):
            continue

        return torch.from_numpy(batch.input_ids.copy())

    if source.tokenizer is None:
        return torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(0))

    text = "In the beginning God created the heaven and the earth. " * 8
    ids = source.load_tokenizer()(text, add_special_tokens=False)["input_ids"][:length]
    # An imported tokenizer may have ids beyond the model's.
    return torch.tensor([ids] * 2).clamp(max=vocab - 1)
