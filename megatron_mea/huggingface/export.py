"""From a checkpoint to a Hugging Face folder, a tensor at a time: the model need not fit into memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from math import prod
from pathlib import Path

import torch
from transformers import GenerationConfig

from megatron_mea.checkpoint.folder import GENERATION, SPARE
from megatron_mea.checkpoint.tensors import read_tensors, weight_shapes
from megatron_mea.data.corpora import Corpora
from megatron_mea.data.tokenizer import copy_tokenizer, load_tokenizer
from megatron_mea.errors import UserError
from megatron_mea.huggingface.card import model_card
from megatron_mea.huggingface.importing import import_model, read_settings
from megatron_mea.huggingface.place import is_hugging_face
from megatron_mea.huggingface.proof import compare
from megatron_mea.huggingface.shards import SHARD_BYTES, write_safetensors
from megatron_mea.huggingface.source import CheckpointSource, open_checkpoint, token_ids
from megatron_mea.huggingface.targets import Target, make_target
from megatron_mea.outputs import check_free_folder, output_place, require_space, written

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LENGTH, _LOGITS = 256, 1 << 26
"""As many tokens of two windows are compared, and so many logits at most: half a gigabyte of each model."""

_M_MMAP_THRESHOLD = -3


def export(
    model: str | Path, out: str | Path, dtype: str = "fp32", kind: str = "transformers", shard_bytes: int = SHARD_BYTES
) -> str:
    """Writes weights, configuration, tokenizer, model card and modeling files, then compares logits.

    Args:
        model: a checkpoint or run folder, or a Hugging Face folder, which is exported as its import.
        out: must not exist or be empty; it appears when everything, the comparison included, is done.
        dtype: `fp32` (the master weights) or `bf16`.
        kind: `transformers`, `stock` or `vllm`.
        shard_bytes: of a file at most.

    Returns:
        What was written and how far the logits are from the trainer's, for the user.

    Raises:
        UserError: nothing to export, a kind that this model cannot be, or `out` is not free.
        ExportError: the logits differ.
        RunError: the disk refuses.
    """
    out = Path(out)
    check_free_folder(out)
    if is_hugging_face(model):
        # What its target cannot be is refused before anything is read.
        make_target(kind, read_settings(Path(model))[1])
        with (
            output_place(out, folder=True),
            tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch,
        ):
            checkpoint = Path(scratch) / "checkpoint"
            import_model(model, checkpoint)
            return export(checkpoint, out, dtype, kind, shard_bytes)
    _return_freed_memory()
    source = open_checkpoint(model)
    ids = token_ids(source.tokenizer, source.config.model.vocab_size)
    target = make_target(kind, source.config.model, dtype=_DTYPES[dtype], **ids)
    with output_place(out, folder=True), written(out):
        require_space(out, sum(prod(one.shape) for one in target.tensors.values()) * _DTYPES[dtype].itemsize + SPARE)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            folder = Path(scratch) / "export"
            said = _write_and_compare(source, target, folder, dtype, shard_bytes)
            if out.exists():
                out.rmdir()
            shutil.move(folder, out)
    return "\n".join([f"wrote {out}: step {source.meta.step}, {dtype}", *target.notes, said])


def _return_freed_memory() -> None:
    """Tells glibc to give back what is freed; it would keep blocks of up to 32 MB, and more with every layer."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _write_and_compare(source: CheckpointSource, target: Target, folder: Path, dtype: str, shard_bytes: int) -> str:
    folder.mkdir()
    shapes = weight_shapes(source.folder)

    def masters(name: str) -> torch.Tensor:
        return read_tensors(source.folder, {name: shapes[name]})[name]

    def made(name: str) -> torch.Tensor:
        recipe = target.tensors[name]
        return recipe.make(*map(masters, recipe.sources))

    sizes = {name: recipe.shape for name, recipe in target.tensors.items()}
    files = write_safetensors(folder, sizes, _DTYPES[dtype], made, shard_bytes)
    target.config.save_pretrained(folder)
    if (source.folder / GENERATION).is_file():
        # As it is: transformers loads settings that it refuses to save.
        shutil.copy(source.folder / GENERATION, folder)
    else:
        GenerationConfig.from_model_config(target.config).save_pretrained(folder)
    for module in target.modules:
        shutil.copy(module.__file__, folder)
    copy_tokenizer(source.tokenizer, folder)
    (folder / "README.md").write_text(model_card(source, target, dtype))
    for file in folder.iterdir():
        file.chmod(0o666 & ~_umask())

    tokens = _real_tokens(source)
    agreement = compare(target, folder, files, _DTYPES[dtype], made, source.config.model, masters, tokens)
    kind = "real" if source.tokenizer.is_dir() else "random"
    return (
        f"logits of {agreement.tokens} {kind} tokens differ from the trainer's by at most {agreement.difference:.2g} "
        f"(they reach {agreement.scale:.3g})" + ("" if dtype == "fp32" else f", before the rounding to {dtype}")
    )


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _real_tokens(source: CheckpointSource) -> torch.Tensor:
    """(2, up to 256) tokens of the run's own data, or of a sentence where the data is not at hand.

    Without a tokenizer, which an imported checkpoint may lack, ids at random.
    """
    data, vocab = source.config.data, source.config.model.vocab_size
    length = max(min(data.seq_length, _LENGTH, _LOGITS // (2 * vocab)), 1)
    for corpora in (data.validation, data.train):
        if not corpora:
            continue
        try:
            batch = Corpora(corpora, length, vocab, None, "data").batch(torch.arange(2).numpy())
        except (UserError, IndexError):
            continue
        return torch.from_numpy(batch.input_ids.copy())
    if not source.tokenizer.is_dir():
        return torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(0))
    tokenizer = load_tokenizer(source.tokenizer, str(source.tokenizer))
    text = "In the beginning God created the heaven and the earth. " * 8
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
    # An imported tokenizer may have ids beyond the model's.
    return torch.tensor([ids] * 2).clamp(max=vocab - 1)
