"""One fold for all micro-batches of a step: the gradients are those of a fold for each."""

from __future__ import annotations

import pytest
import torch
from models import decoder_and_tensors, name_of, small_model, variants
from test_model import positions_of, tokens

from megatron_mea.attention.folds import StepFolds
from megatron_mea.attention.hlc import HeadProjection, folding_serves_a_step
from megatron_mea.parallel.parameter import named_specs

MICRO_BATCHES = 3


def gradients_of(case: dict, dtype: torch.dtype, together: bool, recompute: str = "none"):
    """Of the sum of the losses; and of which parameters there is a gradient before the last micro-batch."""
    model = small_model(**case)
    decoder, _ = decoder_and_tensors(model)
    decoder = decoder.to(dtype)
    decoder.recompute = recompute
    folds = StepFolds([block.self_attn for block in decoder.blocks], MICRO_BATCHES) if together else None
    for index in range(MICRO_BATCHES):
        ids = tokens(model.vocab_size, 2, 17 + index)
        before = [name for name, parameter in named_specs(decoder).items() if parameter.grad is not None]
        folded = folds and folds.of(index)
        decoder.loss(decoder.run(ids, positions_of(ids), folded), ids).backward()
    return {name: parameter.grad for name, parameter in named_specs(decoder).items()}, before


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("case", [case for case in variants() if small_model(**case).has_hlc], ids=name_of)
def test_gradients_equal_those_of_a_fold_for_each_micro_batch(case, recompute):
    expected, all_names = gradients_of(case, torch.float64, together=False)
    found, before = gradients_of(case, torch.float64, together=True, recompute=recompute)
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (gradient - found[name]).norm() <= 1e-13 * whole, name
    mixed = [side for side in "kv" if getattr(small_model(**case), "mixes_keys" if side == "k" else "mixes_values")]
    factors = [name for name in expected for side in mixed if f"{side}_proj" in name or f"hlc_{side}" in name]
    assert factors
    assert set(all_names) - set(before) == set(factors)


def test_sums_over_micro_batches_are_kept_in_float32():
    """In bfloat16 what arrives at the fold is the exact sum rounded once; summed in bfloat16 it would not be."""
    projection = HeadProjection("m", "k", 8, 2, 2, 4, 1.0, False, "block").bfloat16()
    torch.nn.init.normal_(projection.weight)
    projection.hlc.data = torch.eye(2).bfloat16()

    class Layer:
        key = value = projection

    folds = StepFolds([Layer], 257)
    for index in range(257):
        key, _ = folds.of(index)[0]
        gradient = torch.full((8, 8), 256.0 if index == 0 else 1.0)
        key.weight.backward(gradient.bfloat16(), retain_graph=True)
    assert (projection.weight.grad == 512).all()


def test_one_fold_a_step_is_chosen_where_it_can_and_pays():
    sizes = {"micro_batches": 8, "tokens": 512, "hidden_size": 2048, "tensor": 2, "pipeline": 1, "zero_stage": 1}
    assert folding_serves_a_step(**sizes)
    for change in ({"micro_batches": 1}, {"tokens": 256}, {"tensor": 1}, {"pipeline": 2}, {"zero_stage": 2}):
        assert not folding_serves_a_step(**sizes | change)
