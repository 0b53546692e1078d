"""Trackers as somebody may add them: one that writes JSON, and ones that raise."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

from megatron_mea.config.schema import Logging
from megatron_mea.run_folder import RunFolder
from megatron_mea.training.loggers import Tracker

NO_NETWORK = ConnectionError("no\x1b[2J network")


class JsonTracker(Tracker):
    """All that it is given, a line a call, in the file tracker.jsonl of the run folder."""

    def open(self, *, run: RunFolder, settings: Logging, step: int | None) -> None:
        self._file = (run.path / "tracker.jsonl").open("a")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._write("scalars", dict(values), step)

    def tensors(self, values: Mapping[str, torch.Tensor], step: int) -> None:
        self._write("tensors", {name: tensor.tolist() for name, tensor in values.items()}, step)

    def text(self, name: str, text: str, step: int) -> None:
        self._write("text", {name: text}, step)

    def close(self) -> None:
        self._write("close", {}, None)
        self._file.close()

    def _write(self, kind: str, values: dict[str, Any], step: int | None) -> None:
        self._file.write(json.dumps([kind, step, values]) + "\n")


class UnspeakableError(Exception):
    """Cannot be printed: what stands for it ends the program."""

    def __repr__(self) -> str:
        sys.exit("no message")


def raises_in(*methods: str, error: BaseException = NO_NETWORK) -> type[Tracker]:
    """A tracker whose `methods` raise."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return type("Raising", (Tracker,), dict.fromkeys(methods, fail))


CALLS = ("open", "text", "scalars", "tensors", "close")
