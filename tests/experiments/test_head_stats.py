"""The head statistics that training records, against the reference's attention, written from the paper."""

from __future__ import annotations

import pytest
import torch
from support.models import decoder_and_tensors, name_of, small_model
from support.reference import attention, rms_norm

from megatron_mea.experiments.read_head_stats import read_head_stats
from megatron_mea.parallel.grid import NO_TP
from megatron_mea.training.head_stats import HeadOutputs, head_tensors
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


def test_what_is_written_is_read(tmp_path):
    """Through TensorBoard's files, and without what a run that went back to an earlier step had written later."""
    matrices = {step: torch.full((2, 4), float(step)) for step in (0, 10, 20)}
    for resumed in (None, 10):
        metrics = Metrics(run_dir=tmp_path, step=resumed, tensorboard=True)
        for step in matrices if resumed is None else (20,):
            named = {"model.layers.1.self_attn.hlc_k.weight": matrices[step] + (resumed or 0)}
            rms = {"model.layers.1.self_attn": torch.arange(4.0) + step}
            metrics.write(row={"step": step, "tokens": step}, extra_scalars={}, tensors=head_tensors(named, rms))
        metrics.close()

    history = read_head_stats(tmp_path)
    steps, recorded = history.matrices["layers.1.self_attn.hlc_k"]
    assert steps == [0, 10, 20]
    assert [float(matrix[0, 0]) for matrix in recorded] == [0, 10, 30]

    steps, recorded = history.outputs["layers.1.self_attn"]
    assert recorded.shape == (3, 4)
    assert recorded[2].tolist() == [20, 21, 22, 23]
    assert read_head_stats(tmp_path / "none").matrices == {}
