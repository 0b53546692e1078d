"""A model run a layer at a time, for those that do not fit into memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_mea.config.schema import Model
from megatron_mea.model.decoder import Decoder


def one_layer(
    config: Model,
    index: int,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype = torch.float32,
    document_mask: bool = False,
) -> Decoder:
    """One of the decoder's flat list of layers with its parameters, which take no gradient.

    Args:
        index: 0 is the embedding, then the blocks, the last one the head.
        read: a whole parameter by its name.
    """
    with torch.device("meta"):
        layer = Decoder(config, stage=range(index, index + 1), document_mask=document_mask)
    weights = {key: read(parameter.spec.name).to(dtype) for key, parameter in layer.named_parameters()}
    layer.load_state_dict(weights, assign=True)
    return layer.requires_grad_(False)
