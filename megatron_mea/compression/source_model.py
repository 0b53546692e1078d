"""The model that is compressed: settings and named tensors, read from a checkpoint one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mea.attention.hlc import fold_weight
from megatron_mea.checkpoint.folder import CheckpointMetadata, checkpoint_folder, read_checksums
from megatron_mea.checkpoint.tensors import Fragment, read_fragments, read_tensors, weight_shapes
from megatron_mea.config.load import parse_config
from megatron_mea.config.schema import Model
from megatron_mea.config.variants import VARIANTS, combining_variant
from megatron_mea.errors import UserError
from megatron_mea.huggingface.importing import import_model, read_settings
from megatron_mea.huggingface.locate import is_hf_folder
from megatron_mea.huggingface.source import CheckpointSource, open_checkpoint
from megatron_mea.outputs import scratch_folder

SIDES = ("k", "v")


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """The model that is compressed.

    Args:
        name: what the user called it, for messages.
        shapes: of the parameters, by name.
    """

    name: str
    checkpoint: CheckpointSource
    shapes: dict[str, tuple[int, ...]]

    @property
    def model(self) -> Model:
        """The settings."""
        return self.checkpoint.config.model

    @property
    def fingerprint(self) -> str:
        """Hash of weights and settings, the same for every import of a folder."""
        checksums = read_checksums(self.checkpoint.folder)
        tensors = sorted((name, checksum) for name, checksum in checksums.items() if name.endswith(".distcp"))
        return hashlib.sha256(json.dumps([tensors, self.model.model_dump(mode="json")]).encode()).hexdigest()

    def read(self, name: str) -> torch.Tensor:
        """A full parameter in float32."""
        return read_tensors(self.checkpoint.folder, {name: self.shapes[name]})[name]

    def read_piece(self, *, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """A box of a parameter in float32."""
        piece = torch.empty(shape)
        fragment = Fragment(
            name=name,
            global_shape=self.shapes[name],
            global_offset=offsets,
            local_shape=shape,
            start=0,
            values=piece.view(-1),
        )
        read_fragments(self.checkpoint.folder, [fragment])

        return piece

    def composite_projection(self, layer: int, side: str) -> torch.Tensor:
        """Projection (h d, D) in float64 to the composite heads of a layer (counted from 0) and side.

        A bias is the last of the D columns; a combination is folded.
        """
        name = f"model.layers.{layer}.self_attn"
        weight = self.read(f"{name}.{side}_proj.weight").double()
        if self.model.attention_bias:
            weight = torch.cat([weight, self.read(f"{name}.{side}_proj.bias").double().unsqueeze(1)], 1)
        if {"k": self.model.mixes_keys, "v": self.model.mixes_values}[side]:
            weight = fold_weight(weight, self.read(f"{name}.hlc_{side}.weight").double())

        return weight


def read_model(path: str | Path) -> Model:
    """Reads the settings of MODEL alone, to refuse what cannot be compressed before long work begins.

    Raises:
        UserError: they cannot be read, or are of a variant without key and value heads to combine.
    """
    if is_hf_folder(path):
        model = read_settings(Path(path))[1]
    else:
        model = parse_config(CheckpointMetadata.read(checkpoint_folder(path)).config, needs_data=False).model

    if combining_variant(model.attention_variant) is None:
        compressible = [name for name in VARIANTS if combining_variant(name)]
        raise UserError(
            where="MODEL",
            got=f"{path}, of the variant {model.attention_variant}",
            expected=f"one of {', '.join(compressible)}",
        )

    return model


@contextmanager
def open_source_model(path: str | Path, out: Path) -> Iterator[SourceModel]:
    """Opens a checkpoint or run folder, or the temporary import of a Hugging Face folder, while the block lasts.

    Args:
        out: a path in an existing folder, in which the import is made.

    Raises:
        UserError: it cannot be read or imported.
    """
    with scratch_folder(out) as scratch:
        folder = path
        if is_hf_folder(path):
            folder = scratch / "imported"
            import_model(path, folder)

        checkpoint = open_checkpoint(folder)
        yield SourceModel(name=str(path), checkpoint=checkpoint, shapes=weight_shapes(checkpoint.folder))
