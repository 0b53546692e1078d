"""Between our `model` section and the configuration of an export: the same names, but for RoPE's."""

from __future__ import annotations

from typing import Any

from megatron_mea.config.schema import Model
from megatron_mea.huggingface.configuration_mea import MEAConfig


def to_hf_config(model: Model, **kwargs: object) -> MEAConfig:
    """The exported configuration of a `model` section; `kwargs` are further fields, such as token ids."""
    fields = model.model_dump(exclude={"rope_theta", "rope_scaling"})
    return MEAConfig(**fields, rope_parameters=model.rope_parameters, **kwargs)


def from_hf_config(config: MEAConfig) -> dict[str, Any]:
    """The `model` section of an exported configuration, not validated."""
    names = Model.model_fields.keys() - {"rope_theta", "rope_scaling"}
    return {name: getattr(config, name) for name in names} | from_rope_parameters(config.rope_parameters)


def from_rope_parameters(rope: dict[str, Any]) -> dict[str, Any]:
    """Our `rope_theta` and `rope_scaling` of what transformers 5 makes of any config.json, not validated."""
    # transformers 4 wrote `type`, which stays beside the new name.
    scaling = {key: value for key, value in rope.items() if key not in ("type", "rope_theta") and value is not None}
    # A part of 1 is all of the head.
    if scaling.get("partial_rotary_factor") == 1:
        del scaling["partial_rotary_factor"]
    plain = scaling == {"rope_type": "default"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}
