"""One fold for all micro-batches of a step: the gradients are those of a fold for each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import decoder_and_tensors, name_of, positions_of, small_model, tokens, variants

from megatron_mea.attention.folds import StepFolds
from megatron_mea.attention.hlc import HeadProjection
from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.parallel.parameter import parameters_by_name

MICRO_BATCHES = 3


def step_gradients(*, case: dict, dtype: torch.dtype, together: bool, recompute: str = "none"):
    """Gradients of the summed losses, and names of parameters with a gradient before the last micro-batch.

    Args:
        together: fold once for all micro-batches.
    """
    model = small_model(**case)
    decoder, _ = decoder_and_tensors(model)
    decoder = decoder.to(dtype)
    decoder.activation_checkpointing = recompute
    folds = StepFolds([block.self_attn for block in decoder.blocks], MICRO_BATCHES) if together else None

    for index in range(MICRO_BATCHES):
        ids = tokens(model.vocab_size, 2, 17 + index)
        early_names = [name for name, parameter in parameters_by_name(decoder).items() if parameter.grad is not None]
        folded = folds and folds.for_micro_batch(index)
        decoder.loss(decoder.forward_hidden(ids, positions_of(ids), folded=folded), ids).backward()

    return {name: parameter.grad for name, parameter in parameters_by_name(decoder).items()}, early_names


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("case", [case for case in variants() if small_model(**case).has_hlc], ids=name_of)
def test_gradients_equal_those_of_a_fold_for_each_micro_batch(case, recompute):
    expected, all_names = step_gradients(case=case, dtype=torch.float64, together=False)
    actual, early_names = step_gradients(case=case, dtype=torch.float64, together=True, recompute=recompute)
    total_norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (gradient - actual[name]).norm() <= 1e-13 * total_norm, name

    combined = [side for side in "kv" if getattr(small_model(**case), "mixes_keys" if side == "k" else "mixes_values")]
    factors = [name for name in expected for side in combined if f"{side}_proj" in name or f"hlc_{side}" in name]
    assert factors
    assert set(all_names) - set(early_names) == set(factors)


def test_gradients_are_summed_over_micro_batches_in_float32():
    """In bfloat16 the fold's gradient is the exact sum, rounded once; a sum in bfloat16 would lose terms."""
    projection = HeadProjection(
        layer="m",
        side="k",
        hidden_size=8,
        num_components=2,
        num_composites=2,
        head_dim=4,
        std=1.0,
        bias=False,
        hlc="block",
    ).bfloat16()
    torch.nn.init.normal_(projection.weight)
    projection.hlc.data = torch.eye(2).bfloat16()

    class Layer:
        key_projection = value_projection = projection

    folds = StepFolds([Layer], 257)
    for index in range(257):
        key, _ = folds.for_micro_batch(index)[0]
        gradient = torch.full((8, 8), 256.0 if index == 0 else 1.0)
        key.weight.backward(gradient.bfloat16(), retain_graph=True)

    assert (projection.weight.grad == 512).all()


def test_one_fold_per_step_is_chosen_where_it_is_possible_and_pays():
    dims = ParallelDims(tp=2, num_micro_batches=8)
    assert dims.folds_once_per_step(tokens=512, hidden_size=2048)
    assert not dims.folds_once_per_step(tokens=256, hidden_size=2048)
    for change in ({"num_micro_batches": 1}, {"tp": 1}, {"pp": 2}, {"zero_stage": 2}):
        assert not replace(dims, **change).folds_once_per_step(tokens=512, hidden_size=2048)
