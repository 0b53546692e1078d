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
from megatron_mea.checkpoint.folder import read_checksums
from megatron_mea.config.schema import Model
from megatron_mea.config.variants import VARIANTS, combining_variant
from megatron_mea.errors import UserError
from megatron_mea.huggingface.importing import as_checkpoint, import_settings
from megatron_mea.huggingface.model_folder import CheckpointFolder, HFFolder, ModelFolder, StoredTensors
from megatron_mea.outputs import scratch_folder

SIDES = ("k", "v")


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """The model that is compressed.

    Args:
        name: what the user called it, for messages.
        stored: its parameters.
    """

    name: str
    checkpoint: CheckpointFolder
    stored: StoredTensors

    @property
    def model(self) -> Model:
        """The settings."""
        return self.checkpoint.settings()

    @property
    def fingerprint(self) -> str:
        """Hash of weights and settings, the same for every import of a folder."""
        checksums = read_checksums(self.checkpoint.folder)
        tensors = sorted((name, checksum) for name, checksum in checksums.items() if name.endswith(".distcp"))
        return hashlib.sha256(json.dumps([tensors, self.model.model_dump(mode="json")]).encode()).hexdigest()

    def read(self, name: str) -> torch.Tensor:
        """A full parameter in float32."""
        return self.stored.read_tensor(name)

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


def read_model(source: ModelFolder) -> Model:
    """Reads the settings of MODEL alone, to refuse what cannot be compressed before long work begins.

    Raises:
        UserError: they cannot be read, or are of a variant without key and value heads to combine.
    """
    model = import_settings(source)[0] if isinstance(source, HFFolder) else source.settings()
    if combining_variant(model.attention_variant) is None:
        compressible = [name for name in VARIANTS if combining_variant(name)]
        raise UserError(
            where="MODEL",
            got=f"{source.path}, of the variant {model.attention_variant}",
            expected=f"one of {', '.join(compressible)}",
        )

    if model.hlc_form == "latent":
        expected = "a model whose hlc_form is head: this one is compressed already"
        raise UserError(where="MODEL", got=f"{source.path}, with hlc_form: latent", expected=expected)

    return model


@contextmanager
def open_source_model(model: ModelFolder, out: Path) -> Iterator[SourceModel]:
    """Opens a checkpoint or run folder, or the temporary import of a Hugging Face folder, while the block lasts.

    Args:
        out: a path in an existing folder, in which the import is made.

    Raises:
        UserError: it cannot be read or imported.
    """
    with scratch_folder(out) as scratch:
        checkpoint = as_checkpoint(model, scratch / "imported")
        yield SourceModel(name=str(model.path), checkpoint=checkpoint, stored=checkpoint.tensors())
