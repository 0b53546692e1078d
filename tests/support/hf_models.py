"""Exported models in memory, together with the tensors of the reference."""

from __future__ import annotations

import torch

from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.huggingface.hf_config import constant_tensors, to_hf_config
from support.models import decoder_and_tensors, small_model


def exported(case: dict, *, attention: str = "sdpa", dtype=torch.float64):
    """Returns a model section, the reference's random tensors, and the transformers model with the same values."""
    model = small_model(**case)
    _, tensors = decoder_and_tensors(model)
    # transformers' grouped products of experts are none of float64.
    config = to_hf_config(model=model, attn_implementation=attention, experts_implementation="eager", pad_token_id=0)
    hf = MEAForCausalLM(config).to(dtype).eval()
    missing, unexpected = hf.load_state_dict({n: t.detach().to(dtype) for n, t in tensors.items()}, strict=False)

    assert not unexpected
    # Constants stand in a state that was saved, and are set without.
    assert set(missing) == {*constant_tensors(model), *(["lm_head.weight"] if model.tie_word_embeddings else [])}

    hf.tie_weights()
    return model, tensors, hf


def left_padded(vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and position ids, each (3, 23), with 0, 5 and 11 padding tokens on the left."""
    ids = torch.randint(1, vocab, (3, 23), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :11] = 0
    ids[mask == 0] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)
