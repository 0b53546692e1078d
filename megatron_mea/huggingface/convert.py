"""Between our `model` section and the configuration of an export: the same names, but for RoPE's."""

from __future__ import annotations

from megatron_mea.config.schema import Model
from megatron_mea.huggingface.configuration_mea import MEAConfig


def to_hf_config(model: Model, **kwargs: object) -> MEAConfig:
    """The exported configuration of a `model` section; `kwargs` are further fields, such as token ids."""
    fields = model.model_dump(exclude={"rope_theta", "rope_scaling"})
    return MEAConfig(**fields, rope_parameters=model.rope_parameters, **kwargs)
