"""Keeps the layers that an interrupted `compress --method latent` has fitted, for the same command to go on from."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from megatron_mea.inputs import read_json_object
from megatron_mea.outputs import write_file

Streams = dict[str, list[torch.Tensor]]
"""Hidden states (batch, seq, hidden) of the calibration's batches, by the name of the stream."""
_PROGRESS = "progress.json"


@dataclass(kw_only=True)
class PartialFit:
    """Files of one phase of the work: the changed parameters of each layer, and the streams behind the latest.

    What is there of another request, or cannot be read, is removed.

    Attributes:
        request: what the result depends on.
        layers: what is noted of every layer that is done, as JSON.
        streams: behind the latest layer; none before the first.
        result: what `finish` was given, as JSON.
    """

    folder: Path
    request: dict[str, Any]
    layers: list[Any] = field(default_factory=list)
    streams: Streams = field(default_factory=dict)
    result: Any = None

    def __post_init__(self) -> None:
        try:
            saved = read_json_object(self.folder / _PROGRESS)
            if saved["request"] != json.loads(json.dumps(self.request)):
                raise ValueError("of another request")

            layers, result = list(saved["layers"]), saved["result"]
            for layer in range(len(layers)):
                with safe_open(self._layer_file(layer), framework="pt"):
                    pass
            # Sorted by name and then index, whose digits are padded.
            for key, tensor in sorted(load_file(self._streams_file(len(layers))).items()):
                self.streams.setdefault(key.split(".")[0], []).append(tensor)
            self.layers, self.result = layers, result
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()

    def add(self, layer: dict[str, torch.Tensor], streams: Streams, note: Any) -> None:
        """Saves one more layer and the streams behind it, all of which count once its note is written."""
        before = self._streams_file(len(self.layers))
        save_file(layer, self._layer_file(len(self.layers)))
        self.layers.append(note)
        named = {f"{name}.{index:06d}": item for name, items in streams.items() for index, item in enumerate(items)}
        save_file(named, self._streams_file(len(self.layers)))
        self._write_progress()
        before.unlink(missing_ok=True)

    def finish(self, result: Any) -> None:
        """Saves what came out of all layers."""
        self.result = result
        self._write_progress()

    def _write_progress(self) -> None:
        progress = {"request": self.request, "layers": self.layers, "result": self.result}
        write_file(self.folder / _PROGRESS, json.dumps(progress))

    def read(self, name: str) -> torch.Tensor | None:
        """A changed parameter in float32; None where a layer has no such."""
        if ".self_attn." not in name:
            return None

        with safe_open(self._layer_file(int(name.split(".")[2])), framework="pt") as tensors:
            return tensors.get_tensor(name) if name in tensors.keys() else None  # noqa: SIM118 - it is no dictionary

    def _layer_file(self, layer: int) -> Path:
        return self.folder / f"layer_{layer:04d}.safetensors"

    def _streams_file(self, layers: int) -> Path:
        return self.folder / f"streams_{layers:04d}.safetensors"
