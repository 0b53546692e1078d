"""The model that is compressed: a checkpoint or a Hugging Face folder, as settings and named tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mea.attention.hlc import fold_weight
from megatron_mea.checkpoint.folder import COMPLETE, sha256
from megatron_mea.checkpoint.tensors import read_tensors, weight_shapes
from megatron_mea.config.schema import Config, Model
from megatron_mea.errors import UserError
from megatron_mea.huggingface.description import read_description
from megatron_mea.huggingface.source import is_hugging_face, open_checkpoint
from megatron_mea.huggingface.stored import check_names, read_piece, stored_tensors, without_tied_head
from megatron_mea.model.decoder import parameter_shapes

WHERE = "MODEL"
SIDES = ("k", "v")


@dataclass(frozen=True)
class Origin:
    """
    Args:
        folder: of the checkpoint, or the Hugging Face folder.
        read: a parameter by its name, whole and in float32.
        tokenizer: a folder, which may be absent.
        config: of a checkpoint.
    """

    folder: Path
    model: Model
    read: Callable[[str], torch.Tensor]
    tokenizer: Path
    config: Config | None

    def composites(self, layer: int, side: str) -> torch.Tensor:
        """(h, d, D) in float64, of one layer (counted from 0) and side; a bias is the last of the D columns."""
        heads, dim = self.model.num_key_value_heads, self.model.head_dim
        name = f"model.layers.{layer}.self_attn"
        weight = self.read(f"{name}.{side}_proj.weight").double()
        if self.model.attention_bias:
            weight = torch.cat([weight, self.read(f"{name}.{side}_proj.bias").double().unsqueeze(1)], 1)
        if {"k": self.model.mixes_keys, "v": self.model.mixes_values}[side]:
            weight = fold_weight(weight, self.read(f"{name}.hlc_{side}.weight").double())
        return weight.view(heads, dim, -1)

    def fingerprint(self) -> str:
        """Of the weights: their checksums, or of a Hugging Face folder the files' sizes and times."""
        seal = self.folder / COMPLETE
        if seal.is_file():
            return sha256(seal)
        files = sorted(self.folder.glob("*.safetensors"))
        told = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def open_origin(path: str | Path) -> Origin:
    """Raises UserError where nothing stands there that can be read, or of a variant without key and value heads."""
    path = Path(path)
    if not is_hugging_face(path):
        source = open_checkpoint(path)
        shapes = weight_shapes(source.folder)

        def read(name: str) -> torch.Tensor:
            return read_tensors(source.folder, {name: shapes[name]})[name]

        return Origin(source.folder, source.config.model, read, source.tokenizer, source.config)
    model = read_description(path, WHERE).model
    found = without_tied_head(path, WHERE, stored_tensors(path, WHERE), model.tie_word_embeddings)
    given = {name: one.shape for name, one in found.items()}
    if problems := check_names(path, WHERE, given, parameter_shapes(model), f"{path}/config.json"):
        raise UserError.of(problems)

    def read_stored(name: str) -> torch.Tensor:
        shape = found[name].shape
        return read_piece(found, name, (0,) * len(shape), shape)

    return Origin(path, model, read_stored, path, None)
