"""Differential attention (Differential Transformer, arXiv 2410.05258; MEA paper eq. 4-6 and appendix A)."""

from __future__ import annotations

import torch

from megatron_mea.attention.core import FLOAT32, AttentionSizes, CoreAttention
from megatron_mea.attention.document_mask import AttentionFn
from megatron_mea.config.schema import Model
from megatron_mea.parallel.collectives import copy_to_tp_region
from megatron_mea.parallel.grid import NO_TP, TensorGroup
from megatron_mea.parallel.parameter import normal, sharded_parameter

_LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


class DifferentialAttention(CoreAttention):
    """Attention of pairs of heads: A_i = softmax(Q_2i K_2i) - lambda softmax(Q_2i+1 K_2i+1), on both values.

    lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init, a scalar per layer. The head norm
    that follows acts on all 2d features of a pair and is scaled by 1 - lambda_init.
    """

    kernel_calls = 2

    def __init__(self, *, name: str, config: Model, layer: int, tp: TensorGroup = NO_TP) -> None:
        super().__init__(name=name, config=config, layer=layer, tp=tp)
        self.tp = tp
        # A tensor, since a Python number would recompile the code for each layer; an integer one, since floating-point
        # buffers are rounded to the parameter dtype.
        self.register_buffer("layer", torch.tensor(layer, device="cpu"), persistent=False)

        for lambda_name in _LAMBDAS:
            self.register_parameter(
                lambda_name,
                sharded_parameter(
                    name=f"{name}.{lambda_name}",
                    global_shape=(config.head_dim,),
                    component="attention",
                    kind="vector",
                    initialize=normal(0.1),
                    tp=tp,
                ),
            )

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, attend: AttentionFn
    ) -> torch.Tensor:
        """(batch, H, seq, d), (batch, h, seq, d), (batch, h, seq, d) -> (batch, H / 2, seq, 2d)"""
        query, key = _even_then_odd(query), _even_then_odd(key)

        # Fused kernels want values as wide as keys, so there is one call for each half of a pair's values.
        # shape: (batch, h, seq, d) -> (batch, h / 2, seq, d) twice over -> (batch, h, seq, d)
        halves = (half.repeat(1, 2, 1, 1) for half in (value[:, 0::2], value[:, 1::2]))
        weight = self.lambda_value().to(query.dtype)
        outputs = [attend(query, key, half).chunk(2, dim=1) for half in halves]

        # shape: (batch, H / 2, seq, d) twice -> (batch, H / 2, seq, 2d)
        return torch.cat([first - weight * second for first, second in outputs], dim=-1)

    def transform_output(self, output: torch.Tensor, projected: torch.Tensor | None) -> torch.Tensor:
        """Scales the normalised outputs (batch, seq, H d) by 1 - lambda_init."""
        return output * (1 - self.lambda_init)

    @property
    def lambda_init(self) -> torch.Tensor:
        """0.8 - 0.6 exp(-0.3 layer), a float64 scalar."""
        return 0.8 - 0.6 * torch.exp(-0.3 * self.layer.double())

    def lambda_value(self) -> torch.Tensor:
        """Current value of lambda, a scalar in float32 at least."""
        q1, k1, q2, k2 = (copy_to_tp_region(getattr(self, name), self.tp) for name in _LAMBDAS)
        sum_dtype = torch.promote_types(q1.dtype, torch.float32)
        first, second = ((q.to(sum_dtype) * k.to(sum_dtype)).sum().exp() for q, k in ((q1, k1), (q2, k2)))
        return first - second + self.lambda_init

    @staticmethod
    def flops_per_token(config: Model, seq_length: int) -> int:
        """Twice those of softmax attention: there is a kernel for each half of the values."""
        return 2 * CoreAttention.flops_per_token(config, seq_length)

    @staticmethod
    def saved_bytes(sizes: AttentionSizes) -> int:
        """Both kernels save queries and keys once, their halves of the values, which are repeated, and their outputs.

        The differences of the outputs are the input of the head norm. lambda saves its two exponentials and itself.
        """
        kernels = 3 * sizes.query_bytes + 3 * sizes.key_bytes + 2 * sizes.tokens * sizes.num_heads * FLOAT32
        return kernels + sizes.query_bytes + 3 * FLOAT32

    @staticmethod
    def saves_output(sizes: AttentionSizes) -> bool:
        """The outputs of the kernels, which are saved anyway, are as large as what the head norm saves."""
        return True

    @staticmethod
    def replicated_parameters(config: Model) -> tuple[int, ...]:
        """The four vectors of lambda."""
        return (config.head_dim,) * len(_LAMBDAS)


def _even_then_odd(heads: torch.Tensor) -> torch.Tensor:
    """Orders heads as 0, 2, 4, ... 1, 3, 5, ..., so that query heads stay grouped by their key head."""
    return torch.cat((heads[:, 0::2], heads[:, 1::2]), dim=1)
