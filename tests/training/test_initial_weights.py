"""Weights that a run begins with, and a teacher's: read, and refused where they are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.hf_folders import save_stock_model

from megatron_mea.checkpoint.tensors import Fragment
from megatron_mea.cli import main
from megatron_mea.errors import UserError
from megatron_mea.huggingface.model_folder import ModelFolder, StoredTensors
from megatron_mea.training.initial_weights import read_weights

NAMES = ("model.layers.1.self_attn.k_proj.weight", "model.norm.weight")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fragments(stored: StoredTensors) -> list[Fragment]:
    """All tensors, each with a padded row, which is left as it is: not finite."""
    return [
        Fragment(
            name=name,
            global_shape=shape,
            global_offset=(0,) * len(shape),
            local_shape=(shape[0] + 1, *shape[1:]),
            start=0,
            values=torch.full((shape[0] + 1, *shape[1:]), torch.nan).view(-1),
        )
        for name, shape in stored.shapes.items()
    ]


@pytest.mark.parametrize("kind", ["one file", "shards"])
@pytest.mark.parametrize("broken", [NAMES[:0], NAMES[:1], NAMES], ids=["none", "one", "two"])
def test_of_a_hugging_face_folder(broken, kind, tmp_path):
    source = save_stock_model("llama", tmp_path / "llama", max_shard_size="20KB" if kind == "shards" else "1GB")
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors.keys() & set(broken):
            tensors[name].view(-1)[-1] = torch.nan if name == NAMES[0] else -torch.inf
        save_file(tensors, file, {"format": "pt"})

    stored = ModelFolder.locate(source, "run.init_from").tensors()
    read = fragments(stored)
    if not broken:
        read_weights(stored, read)
        assert all(view.isfinite().all() for fragment in read for _, view in fragment.chunks())
        return

    with pytest.raises(UserError) as refused:
        read_weights(stored, read)

    assert [problem.where for problem in refused.value.problems] == ["run.init_from"] * len(broken)
    for problem, name in zip(refused.value.problems, broken, strict=True):
        assert str(problem.got).startswith(f"{name} in {stored.entries[name].file}, ")
        assert name in load_file(stored.entries[name].file)


@pytest.mark.slow
def test_of_a_checkpoint(tmp_path):
    """That of a run that had diverged."""
    source = save_stock_model("llama", tmp_path / "llama")
    assert main(["import", str(source), str(tmp_path / "checkpoint")]) == 0
    stored = ModelFolder.locate(tmp_path / "checkpoint", "training.distillation.teacher").tensors()

    def read_broken(fragments: list[Fragment]) -> None:
        stored.fill(fragments)
        fragments[0].values[0] = torch.nan

    broken = replace(stored, fill=read_broken)
    read_weights(stored, fragments(stored))
    first, folder = next(iter(stored.shapes)), Path(tmp_path / "checkpoint")
    with pytest.raises(UserError, match=f"{first} in {folder}, with numbers"):
        read_weights(broken, fragments(broken))
