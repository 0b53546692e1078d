"""What an interrupted fit keeps: whole layers of the same request, and nothing that cannot be read."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
import torch

from megatron_mea.compression import partial_fit
from megatron_mea.compression.partial_fit import PartialFit
from megatron_mea.errors import UserError
from megatron_mea.outputs import resumable_folder

NAME = "model.layers.{}.self_attn.o_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """Two layers of the request {"ratio": 0.5}, and the streams behind them."""
    partial = PartialFit(folder=tmp_path / "fit", request={"ratio": 0.5})
    for layer in range(2):
        add(partial, layer)
    return tmp_path / "fit"


def add(partial: PartialFit, layer: int) -> None:
    streams = {"own": [torch.full((1, 2), 10.0 * layer + index) for index in range(12)], "source": [torch.zeros(1)]}
    partial.add({NAME.format(layer): torch.full((2, 2), float(layer))}, streams, {"error": layer})


def test_the_same_request_goes_on(folder):
    partial = PartialFit(folder=folder, request={"ratio": 0.5})
    assert partial.layers == [{"error": 0}, {"error": 1}]
    assert [stream[0, 0].item() for stream in partial.streams["own"]] == [10.0 + index for index in range(12)]
    assert partial.read(NAME.format(1)).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert partial.read("model.layers.1.self_attn.q_proj.weight") is None
    assert partial.read("lm_head.weight") is None

    partial.finish({"dims": [[4, 2]]})
    assert PartialFit(folder=folder, request={"ratio": 0.5}).result == {"dims": [[4, 2]]}
    assert len(list(folder.glob("streams_*"))) == 1


@pytest.mark.parametrize("damaged", ["progress.json", "layer_0000.safetensors", "streams_0002.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_what_cannot_be_read_counts_as_nothing(folder, damaged, damage):
    if damage == "cut":
        (folder / damaged).write_bytes((folder / damaged).read_bytes()[:-10])
    else:
        (folder / damaged).unlink()

    partial = PartialFit(folder=folder, request={"ratio": 0.5})
    assert (partial.layers, partial.streams) == ([], {})
    assert not any(folder.iterdir())


def test_another_request_takes_nothing_and_leaves_nothing(folder):
    assert PartialFit(folder=folder, request={"ratio": 0.4}).layers == []
    assert PartialFit(folder=folder, request={"ratio": 0.5}).layers == []


@pytest.mark.parametrize("stopped_at", [0, 1])
def test_a_layer_counts_whole_or_not_at_all(folder, stopped_at, monkeypatch):
    """Killed behind the layer's file or behind its streams, before the note that commits both."""
    partial, writes = PartialFit(folder=folder, request={"ratio": 0.5}), []
    save_file = partial_fit.save_file

    def stopping(tensors, file):
        save_file(tensors, file)
        writes.append(file)
        if len(writes) == stopped_at + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(partial_fit, "save_file", stopping)
    with pytest.raises(KeyboardInterrupt):
        add(partial, 2)

    again = PartialFit(folder=folder, request={"ratio": 0.5})
    assert len(again.layers) == 2
    assert again.streams["own"][3].tolist() == [[13.0, 13.0]]


def interrupt(out: Path, text: str = "") -> None:
    with resumable_folder(out) as part:
        (part / "done").write_text(text)
        raise KeyboardInterrupt


def test_the_folder_stays_after_an_exception_and_goes_with_the_work(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupt(out, "1")

    with resumable_folder(out) as part:
        assert (part / "done").read_text() == "1"
    assert not any(tmp_path.iterdir())


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part/letter").write_text("dear")
    with pytest.raises(UserError, match=r"out\.part"), resumable_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out.part/letter").read_text() == "dear"

    (tmp_path / "file.part").touch()
    with pytest.raises(UserError, match=r"file\.part"), resumable_folder(tmp_path / "file"):
        pass


def test_one_process_at_a_time(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path / "out")

    with (tmp_path / "out.part/.lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"), resumable_folder(tmp_path / "out"):
            pass

    with resumable_folder(tmp_path / "out"):
        pass
