"""The head statistics that training records, against the reference's attention, written from the paper."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.foreign import DEEP, VALUES, examples
from support.limits import traced_memory_below, within_limits
from support.models import decoder_and_tensors, name_of, small_model
from support.reference import attention, rms_norm

from megatron_mea.config.load import parse_config
from megatron_mea.errors import RunError, UserError
from megatron_mea.experiments import read_head_stats as read_module
from megatron_mea.experiments.read_head_stats import read_head_stats
from megatron_mea.inputs import MAX_LINE_BYTES
from megatron_mea.parallel.grid import NO_TP
from megatron_mea.training.head_stats import HeadOutputs, head_row, head_tensors, hlc_statistics
from megatron_mea.training.metrics import Metrics

CASES = [
    {"attention_variant": "plain"},
    {"attention_variant": "plain_norm"},
    {"attention_variant": "mea", "num_component_heads": 2, "qk_norm": True},
    {"attention_variant": "mea_no_norm"},
    {"attention_variant": "talking_heads"},
    {"attention_variant": "gated", "gate_width": "head"},
]
WITHOUT_NORM = {"plain_norm": "plain", "mea": "mea_no_norm"}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_outputs_before_the_head_norm(case):
    """The first layer's outputs are the reference's heads, where W_O is the identity and the variant has no norm."""
    model = small_model(**case)
    decoder, tensors = decoder_and_tensors(model)
    batches = [torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    positions = torch.arange(12).expand(2, 12)
    outputs = HeadOutputs(decoder)
    for _ in range(2):
        # A second time it begins anew.
        with outputs.recording(), torch.no_grad():
            for ids in batches:
                decoder.forward_hidden(ids, positions)

    rms = outputs.rms(NO_TP)
    decoder.forward_hidden(batches[0], positions)
    assert rms.keys() == {f"model.layers.{layer}.self_attn" for layer in range(3)}

    prefix = "model.layers.0.self_attn."
    layer_tensors = {
        name.removeprefix(prefix): tensor.double() for name, tensor in tensors.items() if name.startswith(prefix)
    }
    layer_tensors["o_proj.weight"] = torch.eye(8 * 6, dtype=torch.float64)
    config = model.model_dump() | {
        "attention_variant": WITHOUT_NORM.get(case["attention_variant"], case["attention_variant"])
    }
    squares = 0
    for ids in batches:
        embedded = tensors["model.embed_tokens.weight"].double()[ids]
        normed = rms_norm(embedded, tensors["model.layers.0.input_layernorm.weight"].double(), eps=model.rms_norm_eps)
        output = attention(normed, weights=layer_tensors, config=config, layer=0, positions=positions.double())
        heads = output.unflatten(-1, (8, 6))
        squares = squares + heads.square().mean((0, 1, 3)) / 2

    torch.testing.assert_close(rms["model.layers.0.self_attn"], squares.sqrt().float().detach(), rtol=1e-6, atol=0)


def test_pairs_are_heads():
    model = small_model(attention_variant="differential")
    decoder, _ = decoder_and_tensors(model)
    outputs = HeadOutputs(decoder)
    with outputs.recording(), torch.no_grad():
        decoder.forward_hidden(torch.zeros(1, 5, dtype=torch.long), torch.arange(5)[None])

    assert {tuple(values.shape) for values in outputs.rms(NO_TP).values()} == {(4,)}


def open_metrics(run: Path, *, step: int | None = None) -> Metrics:
    """The record of a run in which everything that can be off is off."""
    tree = {"data": {"tokenizer": "none", "train": []}, "logging": {"tensorboard": False}, "run": {"dir": str(run)}}
    return Metrics(config=parse_config(tree, needs_data=False), versions={}, step=step, log=pytest.fail)


def write_heads(run: Path, *, steps: Iterable[int], resumed: int | None = None, scale: float = 1.0) -> None:
    """Records made-up heads at `steps`."""
    metrics = open_metrics(run, step=resumed)
    for step in steps:
        named = {"model.layers.1.self_attn.hlc_k.weight": torch.full((2, 4), float(scale * step))}
        rms = {"model.layers.1.self_attn": torch.arange(4.0) / 3 + step}
        metrics.write({"step": step, "tokens": 10 * step}, head_tensors(named, rms))

    metrics.close()


def test_what_is_written_is_read(tmp_path):
    """Without what a run that went back to an earlier step had written later, and without half of a row."""
    write_heads(tmp_path, steps=(0, 10, 20))
    path = tmp_path / "heads.jsonl"
    before = path.read_bytes()
    with path.open("ab") as stream:
        stream.write(b'{"step": 10, "hlc')

    assert read_head_stats(tmp_path).steps == [0, 10, 20]
    write_heads(tmp_path, steps=(20,), resumed=10, scale=2)
    assert path.read_bytes().splitlines()[:2] == before.splitlines()[:2]
    assert not (tmp_path / "tensorboard").exists()

    history = read_head_stats(tmp_path)
    assert history.steps == [0, 10, 20]
    assert {name: values.shape for name, values in history.matrices.items()} == {"layers.1.self_attn.hlc_k": (3, 2, 4)}
    assert history.matrices["layers.1.self_attn.hlc_k"][:, 0, 0].tolist() == [0, 10, 40]
    assert history.outputs["layers.1.self_attn"][2] == pytest.approx([20, 61 / 3, 62 / 3, 21], rel=1e-5)
    assert json.loads(path.read_text().splitlines()[-1])["head_rms/layers.1.self_attn"] == [20, 20.3333, 20.6667, 21]
    assert read_head_stats(tmp_path / "none").steps == []


def test_a_disk_that_is_full_ends_the_run_with_its_message(tmp_path, monkeypatch):
    metrics = open_metrics(tmp_path)

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("heads.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match=r"/heads\.jsonl cannot be written: No space left on device$"):
        metrics.write({"step": 1, "tokens": 10}, head_tensors({}, {"model.layers.1.self_attn": torch.ones(2)}))


def test_matrices_that_would_make_a_line_too_long_are_left_out():
    """The longest numbers of the largest row that is written, by which a line stays within what is read back."""
    names = [f"model.layers.{layer}.self_attn.hlc_k.weight" for layer in range(64)]
    matrices = {name: torch.full((64, 64), -1.234567e-30) for name in names}
    rms = {"model.layers.0.self_attn": torch.ones(2)}
    row = head_row(head_tensors(matrices, rms))
    assert len(row) == 65
    assert len(json.dumps(row)) < MAX_LINE_BYTES

    matrices["model.layers.64.self_attn.hlc_k.weight"] = torch.ones(1, 1)
    assert head_row(head_tensors(matrices, rms)).keys() == {"head_rms/layers.0.self_attn"}


def test_matrices_of_a_run_that_diverges():
    tensors = {"hlc/layers.0.hlc_k": torch.tensor([[1.0, math.inf]]), "hlc/layers.0.hlc_v": torch.eye(2)}
    assert hlc_statistics(tensors).keys() == {"hlc_rms/layers.0.hlc_v", "hlc_condition/layers.0.hlc_v"}
    assert json.loads(json.dumps(head_row(tensors)))["hlc/layers.0.hlc_k"] == [[1.0, math.inf]]


ROW = {
    "step": 3,
    "tokens": 30,
    "hlc/layers.0.self_attn.hlc_k": [[1.0, 2.0], [3.0, 4.0]],
    "head_rms/layers.0.self_attn": [1.0, 0.5],
}


def line(**changes: object) -> bytes:
    return json.dumps(ROW | changes).encode() + b"\n"


@given(
    lines=st.lists(
        st.just(line())
        | st.builds(lambda key, value: line(**{key: value}), st.sampled_from([*ROW, "hlc/x", "new"]), VALUES)
        | st.binary(max_size=30)
        | st.sampled_from([b"[]\n", DEEP + b"\n", line()[:20], line(**{"hlc/layers.0.self_attn.../x": [[1.0]]})]),
        max_size=5,
    )
)
@examples(150)
def test_whatever_the_file_holds(tmp_path_factory, lines):
    """A history that can be drawn, or one message."""
    path = tmp_path_factory.getbasetemp() / "heads.jsonl"
    path.write_bytes(b"".join(lines))
    with within_limits(), traced_memory_below(20_000_000), contextlib.suppress(UserError, OverflowError):
        history = read_head_stats(path.parent)
        assert {*history.matrices, *history.outputs} <= {"layers.0.self_attn.hlc_k", "layers.0.self_attn"}
        for values in (*history.matrices.values(), *history.outputs.values()):
            assert len(values) == len(history.steps) > 0
            assert np.isfinite(values).all()
            assert values.size


@pytest.mark.parametrize(
    ("raw", "steps"),
    [
        (line() + line(**{"head_rms/layers.0.self_attn": [1.0, math.inf]}) + line(step=5), [3, 5]),
        (line() + line(**{"head_rms/layers.0.self_attn": [1.0]}) + line(step=5), [3, 5]),
        (line() + line(**{f"hlc/layers.0.self_attn.{kind}": [[1.0]] for kind in "abcdefgh"}), [3]),
        (line() + line(**{"head_rms/layers.0.self_attn": [1.0] * 1025}), [3]),
        (line() + line()[:-9], [3]),
    ],
)
def test_rows_that_are_left_out(tmp_path, raw, steps):
    (tmp_path / "heads.jsonl").write_bytes(raw)
    assert read_head_stats(tmp_path).steps == steps


def test_memory_does_not_grow_with_the_validations(tmp_path, monkeypatch):
    """Of many rows the first and the last are kept, and some in between at equal distances."""
    monkeypatch.setattr(read_module, "_MAX_ROWS", 16)
    with (tmp_path / "heads.jsonl").open("wb") as stream:
        stream.writelines(line(step=step) for step in range(10_001))

    with traced_memory_below(300_000):
        steps = read_head_stats(tmp_path).steps
    assert steps == [*range(0, 10_001, 1024), 10_000]

    monkeypatch.setattr(read_module, "_MAX_ELEMENTS", 24)
    assert read_head_stats(tmp_path).steps == [*range(0, 10_001, 4096), 10_000]
