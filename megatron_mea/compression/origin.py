"""The model that is compressed, as settings and named tensors, of which one is in memory."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mea.attention.hlc import fold_weight
from megatron_mea.checkpoint.folder import COMPLETE, Meta, checkpoint_folder
from megatron_mea.checkpoint.tensors import Fragment, read_fragments, read_tensors, weight_shapes
from megatron_mea.config.load import parse_config
from megatron_mea.config.schema import Model
from megatron_mea.errors import UserError
from megatron_mea.huggingface.importing import import_model, read_settings
from megatron_mea.huggingface.place import is_hugging_face
from megatron_mea.huggingface.source import CheckpointSource, open_checkpoint

SIDES = ("k", "v")
VARIANTS = {"plain": "mea_no_norm", "plain_norm": "mea", "mea": "mea", "mea_no_norm": "mea_no_norm"}
"""Of the compressed model, by the original's."""


@dataclass(frozen=True)
class Origin:
    """
    Args:
        name: what the user called it, for messages.
        shapes: of the parameters, by name.
    """

    name: str
    source: CheckpointSource
    shapes: dict[str, tuple[int, ...]]

    @property
    def model(self) -> Model:
        return self.source.config.model

    @property
    def fingerprint(self) -> str:
        """Of weights and settings, the same for every import of a folder."""
        checksums = json.loads((self.source.folder / COMPLETE).read_text())["sha256"]
        tensors = sorted((name, one) for name, one in checksums.items() if name.endswith(".distcp"))
        return hashlib.sha256(json.dumps([tensors, self.model.model_dump(mode="json")]).encode()).hexdigest()

    def read(self, name: str) -> torch.Tensor:
        """A parameter, whole and in float32."""
        return read_tensors(self.source.folder, {name: self.shapes[name]})[name]

    def read_piece(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        piece = torch.empty(shape)
        read_fragments(self.source.folder, [Fragment(name, self.shapes[name], offsets, shape, 0, piece.view(-1))])
        return piece

    def composites(self, layer: int, side: str) -> torch.Tensor:
        """(h d, D) in float64, of one layer (counted from 0) and side; a bias is the last of the D columns."""
        name = f"model.layers.{layer}.self_attn"
        weight = self.read(f"{name}.{side}_proj.weight").double()
        if self.model.attention_bias:
            weight = torch.cat([weight, self.read(f"{name}.{side}_proj.bias").double().unsqueeze(1)], 1)
        if {"k": self.model.mixes_keys, "v": self.model.mixes_values}[side]:
            weight = fold_weight(weight, self.read(f"{name}.hlc_{side}.weight").double())
        return weight


def read_model(path: str | Path) -> Model:
    """The settings of MODEL, of which nothing else is read: what cannot be is refused before long work begins.

    Raises:
        UserError: they cannot be read, or are of a variant without key and value heads to combine.
    """
    if is_hugging_face(path):
        model = read_settings(Path(path))[1]
    else:
        model = parse_config(Meta.read(checkpoint_folder(path)).config, needs_data=False).model
    if model.attention_variant not in VARIANTS:
        raise UserError("MODEL", f"{path}, of the variant {model.attention_variant}", f"one of {', '.join(VARIANTS)}")
    return model


@contextmanager
def open_origin(path: str | Path, beside: Path) -> Iterator[Origin]:
    """A checkpoint or run folder as it is; of a Hugging Face folder an import, for as long as the block lasts.

    Args:
        beside: the import is made in the same folder, which exists.

    Raises:
        UserError: it cannot be read or imported.
    """
    with tempfile.TemporaryDirectory(dir=beside.parent, prefix=f".{beside.name}-") as scratch:
        checkpoint = path
        if is_hugging_face(path):
            checkpoint = Path(scratch) / "imported"
            import_model(path, checkpoint)
        source = open_checkpoint(checkpoint)
        yield Origin(str(path), source, weight_shapes(source.folder))
