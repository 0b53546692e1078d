"""Differential attention (Differential Transformer, arXiv 2410.05258; MEA paper eq. 4-6 and appendix A)."""

from __future__ import annotations

import torch
from torch import nn

from megatron_mea.attention.document_mask import AttentionFn
from megatron_mea.parallel.collectives import copy_to_tp_region
from megatron_mea.parallel.grid import NO_TP, TensorGroup
from megatron_mea.parallel.parameter import normal, sharded_parameter


class DifferentialHeads(nn.Module):
    """Core attention of pairs of heads: A_i = softmax(Q_2i K_2i) - lambda softmax(Q_2i+1 K_2i+1), on both values.

    lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init, a scalar per layer. The head norm
    that follows acts on all 2d features of a pair and is scaled by 1 - lambda_init (`scale`).

    Args:
        layer: counted from 0.
    """

    def __init__(self, *, name: str, layer: int, head_dim: int, tp: TensorGroup = NO_TP) -> None:
        super().__init__()
        self.tp = tp
        # A tensor, since a Python number would recompile the code for each layer; an integer one, since floating-point
        # buffers are rounded to the parameter dtype.
        self.register_buffer("layer", torch.tensor(layer, device="cpu"), persistent=False)

        for lambda_name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            self.register_parameter(
                lambda_name,
                sharded_parameter(
                    name=f"{name}.{lambda_name}", global_shape=(head_dim,), kind="vector", initialize=normal(0.1), tp=tp
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

    @property
    def lambda_init(self) -> torch.Tensor:
        """0.8 - 0.6 exp(-0.3 layer), a float64 scalar."""
        return 0.8 - 0.6 * torch.exp(-0.3 * self.layer.double())

    @property
    def scale(self) -> torch.Tensor:
        """Factor on the normalised output of a pair, 1 - lambda_init; a float64 scalar."""
        return 1 - self.lambda_init

    def lambda_value(self) -> torch.Tensor:
        """Current value of lambda, a scalar in float32 at least."""
        q1, k1, q2, k2 = (copy_to_tp_region(getattr(self, name), self.tp) for name, _ in self.named_parameters())
        sum_dtype = torch.promote_types(q1.dtype, torch.float32)
        first, second = ((q.to(sum_dtype) * k.to(sum_dtype)).sum().exp() for q, k in ((q1, k1), (q2, k2)))
        return first - second + self.lambda_init


def _even_then_odd(heads: torch.Tensor) -> torch.Tensor:
    """Orders heads as 0, 2, 4, ... 1, 3, 5, ..., so that query heads stay grouped by their key head."""
    return torch.cat((heads[:, 0::2], heads[:, 1::2]), dim=1)
