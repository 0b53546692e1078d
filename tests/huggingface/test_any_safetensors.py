"""Any bytes as safetensors: a list of tensors or one message, within limits (hypothesis; longer with `--full`)."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from support.foreign import VALUES
from support.limits import within_limits

from megatron_mea.errors import UserError
from megatron_mea.huggingface.safetensors_reader import scan_safetensors

SOUND = save({"a.weight": torch.ones(4, 3), "b.weight": torch.ones(5)}, {"format": "pt"})
HEADER_SIZE = struct.unpack("<Q", SOUND[:8])[0]
HEADER = json.loads(SOUND[8 : 8 + HEADER_SIZE])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


def scan(folder: Path, contents: bytes) -> dict | None:
    """The tensors of a folder with one file, or None where it is refused."""
    (folder / "model.safetensors").write_bytes(contents)
    with within_limits():
        try:
            return scan_safetensors(folder, "HF_DIR")
        except UserError:
            return None


def with_header(header: object, *, size: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + SOUND[8 + HEADER_SIZE :]


def test_the_sound_file(folder):
    assert scan(folder, SOUND).keys() == scan(folder, with_header(HEADER)).keys() == {"a.weight", "b.weight"}


@given(
    position=st.integers(0, len(SOUND) - 1), byte=st.integers(0, 255), cut=st.integers(0, len(SOUND)), more=st.binary()
)
def test_bytes_changed_cut_and_added(position, byte, cut, more, folder):
    scan(folder, SOUND[:position] + bytes([byte]) + SOUND[position + 1 :])
    assert scan(folder, SOUND[:cut]) is None or cut == len(SOUND)
    assert scan(folder, SOUND + more) is None or not more


@given(
    tensor=st.sampled_from(["a.weight", "x"]), field=st.sampled_from(["dtype", "shape", "data_offsets"]), value=VALUES
)
def test_any_field_of_a_header(folder, tensor, field, value):
    fields = HEADER["a.weight"] | {field: value}
    tensors = scan(folder, with_header(HEADER | {tensor: fields}))
    if tensors is not None:
        assert tensors["a.weight"].shape == (4, 3)


@given(header=VALUES, size=st.none() | st.integers(0, 2**64 - 1))
def test_any_header(header, size, folder):
    assert not scan(folder, with_header(header, size=size))


@given(index=VALUES | st.fixed_dictionaries({"weight_map": VALUES}))
def test_any_index(index, folder):
    """Of shards, of which one is there."""
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model-1.safetensors").write_bytes(SOUND)
    with within_limits():
        try:
            tensors = scan_safetensors(folder, "HF_DIR")
        except UserError:
            tensors = {}

    (folder / "model.safetensors.index.json").unlink()
    assert tensors.keys() <= {"a.weight", "b.weight"}
