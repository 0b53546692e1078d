"""What travels with an export, against the registry of variants: parts, choices of keys, and parameters."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from typing import get_args

import pytest
from support.models import small_model

from megatron_mea.config import variants
from megatron_mea.config.schema import Model
from megatron_mea.exported import configuration_mea
from megatron_mea.exported.configuration_mea import MEAConfig
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.huggingface.hf_config import to_hf_config
from megatron_mea.model.decoder import parameter_shapes


def choices(key: str) -> tuple:
    """The values that a key of the section `model` may have."""
    return get_args(Model.model_fields[key].annotation)


def test_the_same_variants_travel():
    assert list(configuration_mea.VARIANTS) == list(variants.VARIANTS)


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_has_the_same_parts(name):
    parts = configuration_mea.VARIANTS[name]._asdict()
    row = asdict(variants.VARIANTS[name])
    assert parts == {part: row[part] for part in parts}


@pytest.mark.parametrize("row", variants.VARIANTS.values(), ids=lambda row: row.name)
def test_a_variant_has_the_same_parameters(row):
    """With every choice of its own keys."""
    for values in product(*map(choices, row.own_keys)):
        model = small_model(attention_variant=row.name, **dict(zip(row.own_keys, values, strict=True)))
        exported = MEAForCausalLM(to_hf_config(model)).state_dict()
        assert {name: tuple(tensor.shape) for name, tensor in exported.items()} == parameter_shapes(model)


@pytest.mark.parametrize(
    "key", ["hlc_mixes", "hlc_form", *(key for row in variants.VARIANTS.values() for key in row.own_keys)]
)
def test_a_key_has_the_same_choices(key):
    for value in choices(key):
        assert getattr(MEAConfig(**{key: value}), key) == value
    with pytest.raises(ValueError, match=f"{key} is 'other'"):
        MEAConfig(**{key: "other"})
