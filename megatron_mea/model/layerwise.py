"""Running a model one layer at a time, for models that do not fit into memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megatron_mea.config.schema import Model
from megatron_mea.model.decoder import Decoder, StageLayers


def load_layer(
    *,
    config: Model,
    layer: StageLayers,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype = torch.float32,
    document_mask: bool = False,
) -> Decoder:
    """Builds one layer of the decoder and loads its parameters, which take no gradient.

    Args:
        layer: an entry of `single_layers`.
        read: returns the full tensor of a parameter, given its exported name.
    """
    with torch.device("meta"):
        decoder = Decoder(config=config, stage=layer, document_mask=document_mask)

    load_parameters(decoder, read=read, dtype=dtype)
    return decoder


def load_parameters(
    module: nn.Module, *, read: Callable[[str], torch.Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Loads the parameters of a module on the device "meta", which then take no gradient.

    Args:
        read: returns the full tensor of a parameter, given its exported name.
    """
    specs = {key: parameter.spec for key, parameter in module.named_parameters()}
    module.load_state_dict({key: read(spec.name).to(dtype) for key, spec in specs.items()}, assign=True)
    for key, parameter in module.named_parameters():
        parameter.spec = specs[key]

    module.requires_grad_(requires_grad=False)
