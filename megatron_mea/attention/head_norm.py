"""The norm of every query head's output by itself ("GroupNorm", MEA paper eq. 12), and the heads side by side."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron_mea.parallel.layers import RMSNorm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run in Python then, on a CPU: for tests."""
WIDEST = 1024
"""Features of a head that the kernels take."""


def head_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(batch, H, seq, d) -> (batch, seq, H d): y = x / sqrt(mean(x^2) + eps) * weight over the d features of a head.

    On a GPU with Triton it is one kernel each way, which reads x where attention wrote it, writes what o_proj reads,
    and keeps x alone for the backward pass. Elsewhere it is torch's operations, which a compiler fuses by itself.

    Args:
        weight: (d,)
        eps: positive.
    """
    if _is_fused(x, weight):
        return _Fused.apply(x if x.stride(-1) == 1 else x.contiguous(), weight, eps).flatten(2)
    return F.rms_norm(x, x.shape[-1:], weight, eps).transpose(1, 2).flatten(2)


class HeadNorm(RMSNorm):
    """`head_norm` with the gain of an RMSNorm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, H, seq, d) -> (batch, seq, H d)"""
        return head_norm(x, self.gain(), self.eps)


def _is_fused(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    if torch.compiler.is_compiling() or not (x.is_cuda or INTERPRETED):
        return False
    # float64 is for tests, and what becomes of two types is torch's to say.
    fits = x.dtype in (torch.bfloat16, torch.float16, torch.float32) and x.shape[-1] <= WIDEST and x.numel() > 0
    if weight is not None:
        fits = fits and weight.dtype == x.dtype and weight.stride(0) == 1
    return fits and _kernels() is not None


@cache
def _kernels() -> ModuleType | None:
    """Imported when first needed: it takes a while, and a torch without CUDA brings no Triton."""
    return import_module("megatron_mea.attention.head_norm_kernels") if find_spec("triton") else None


class _Fused(torch.autograd.Function):
    """(batch, H, seq, d), (d,) -> (batch, seq, H, d)"""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _kernels().forward(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        # shape: (batch, seq, H, d) -> (batch, H, seq, d)
        dy = (dy if dy.stride(-1) == 1 else dy.contiguous()).transpose(1, 2)
        return *_kernels().backward(x, weight, dy, ctx.eps), None
