"""Differential attention (Differential Transformer, arXiv 2410.05258; MEA paper eq. 4-6 and appendix A)."""

from __future__ import annotations

import torch
from torch import nn

from megatron_mea.attention.documents import Attend
from megatron_mea.parallel.collectives import shared
from megatron_mea.parallel.grid import ALONE, TensorGroup
from megatron_mea.parallel.parameter import declare, normal


class DifferentialHeads(nn.Module):
    """Heads 2i and 2i + 1 make one: A_i = softmax(Q_2i K_2i) - lambda softmax(Q_2i+1 K_2i+1), on both their values.

    lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init, one a layer. The head norm that
    follows acts on all 2d features of a pair and is scaled by 1 - lambda_init (`scale`).

    Args:
        layer: counted from 0.
    """

    def __init__(self, name: str, layer: int, head_dim: int, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp = tp
        # A tensor, as a number would be compiled into each layer's code; not of floating point, as that is rounded with
        # the parameters.
        self.register_buffer("layer", torch.tensor(layer, device="cpu"), persistent=False)
        for which in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            self.register_parameter(which, declare(f"{name}.{which}", (head_dim,), "vector", normal(0.1), tp))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attend: Attend) -> torch.Tensor:
        """(batch, H, seq, d), (batch, h, seq, d), (batch, h, seq, d) -> (batch, H / 2, seq, 2d)"""
        query, key = _first_then_second(query), _first_then_second(key)
        # Fused kernels want values as wide as keys, so each half of a pair's values is attended to by itself.
        # shape: (batch, h, seq, d) -> (batch, h / 2, seq, d) twice over -> (batch, h, seq, d)
        halves = (half.repeat(1, 2, 1, 1) for half in (value[:, 0::2], value[:, 1::2]))
        weight = self.weight().to(query.dtype)
        outputs = [attend(query, key, half).chunk(2, dim=1) for half in halves]
        # shape: (batch, H / 2, seq, d) twice -> (batch, H / 2, seq, 2d)
        return torch.cat([first - weight * second for first, second in outputs], dim=-1)

    @property
    def lambda_init(self) -> torch.Tensor:
        """0.8 - 0.6 exp(-0.3 layer), a float64 scalar."""
        return 0.8 - 0.6 * torch.exp(-0.3 * self.layer.double())

    @property
    def scale(self) -> torch.Tensor:
        """What the normalised output of a pair is multiplied by, a float64 scalar."""
        return 1 - self.lambda_init

    def weight(self) -> torch.Tensor:
        """lambda, a scalar; in float32 at least."""
        q1, k1, q2, k2 = (shared(getattr(self, name), self.tp) for name, _ in self.named_parameters())
        accurate = torch.promote_types(q1.dtype, torch.float32)
        first, second = ((q.to(accurate) * k.to(accurate)).sum().exp() for q, k in ((q1, k1), (q2, k2)))
        return first - second + self.lambda_init


def _first_then_second(heads: torch.Tensor) -> torch.Tensor:
    """Orders heads as 0, 2, 4, ... 1, 3, 5, ...: groups of queries stay groups of their keys."""
    return torch.cat((heads[:, 0::2], heads[:, 1::2]), dim=1)
