"""The building blocks that hold parameters: linear map, embedding and RMSNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mea.parallel.parameter import constant, declare, normal


class Linear(nn.Module):
    """y = x W^T (+ b), with W (out_features, in_features) as Hugging Face stores it."""

    def __init__(self, name: str, in_features: int, out_features: int, std: float, bias: bool = False) -> None:
        super().__init__()
        self.weight = declare(f"{name}.weight", (out_features, in_features), "matrix", normal(std))
        self.bias = declare(f"{name}.bias", (out_features,), "vector", constant(0.0)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Token embedding (vocab_size, hidden_size)."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, std: float) -> None:
        super().__init__()
        self.weight = declare(f"{name}.weight", (vocab_size, hidden_size), "matrix", normal(std))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(input_ids, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; torch sums 16-bit inputs in float32."""

    def __init__(self, name: str, size: int, eps: float, gain: float = 1.0, affine: bool = True) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = declare(f"{name}.weight", (size,), "vector", constant(gain)) if affine else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.size,), self.weight, self.eps)
