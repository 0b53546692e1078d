"""A variant that no user has: what a module may replace, all at once."""

from __future__ import annotations

import torch
from torch import nn

from megatron_mea.attention.core import CoreAttention
from megatron_mea.config.schema import Model
from megatron_mea.config.variants import Variant
from megatron_mea.parallel.grid import NO_TP, TensorGroup
from megatron_mea.parallel.layers import Linear
from megatron_mea.parallel.parameter import normal, sharded_parameter

ROW = Variant(name="toy", color="#000000", core_attention="support.toy_attention:ToyAttention")


class ToyAttention(CoreAttention):
    """Keys are shifted, values scaled, and a projection of the layer's input is added to the heads' outputs."""

    def __init__(self, *, name: str, config: Model, layer: int, tp: TensorGroup = NO_TP) -> None:
        super().__init__(name=name, config=config, layer=layer, tp=tp)
        width = config.num_attention_heads * config.head_dim
        self.skip_proj = Linear(
            name=f"{name}.skip_proj",
            component="attention",
            in_features=config.hidden_size,
            out_features=width,
            std=config.initializer_range,
            tp=tp,
            shard_dim=0,
        )

        def vector(suffix: str) -> nn.Parameter:
            shape = (config.head_dim,)
            return sharded_parameter(
                name=f"{name}.{suffix}",
                global_shape=shape,
                component="attention",
                kind="vector",
                initialize=normal(0.5),
                tp=tp,
            )

        self.key_shift, self.value_scale = vector("key_shift"), vector("value_scale")

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.skip_proj(hidden_states)

    def transform_kv(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return key + self.key_shift, value * self.value_scale

    def transform_output(self, output: torch.Tensor, projected: torch.Tensor | None) -> torch.Tensor:
        return output + projected
