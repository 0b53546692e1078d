"""The norm of every query head's output by itself ("GroupNorm", MEA paper eq. 12), and the heads side by side."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from megatron_mea.parallel.layers import RMSNorm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run in Python then, on a CPU: for tests."""
TRITON = find_spec("triton") is not None
"""A torch without CUDA brings none."""
WIDEST = 1024
"""Features of a head that the kernels take."""


def head_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(batch, H, seq, d) -> (batch, seq, H d): y = x / sqrt(mean(x^2) + eps) * weight over the d features of a head.

    On a GPU with Triton it is one kernel each way, which reads x where attention wrote it, writes what o_proj reads,
    and keeps x alone for the backward pass. Elsewhere it is torch's operations.

    Args:
        weight: (d,)
        eps: positive.
    """
    if _is_fused(x, weight):
        return _fused(x if x.stride(-1) == 1 else x.contiguous(), weight, eps).flatten(2)
    return F.rms_norm(x, x.shape[-1:], weight, eps).transpose(1, 2).flatten(2)


class HeadNorm(RMSNorm):
    """`head_norm` with the gain of an RMSNorm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, H, seq, d) -> (batch, seq, H d)"""
        return head_norm(x, self.gain(), self.eps)


def _is_fused(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    if not (TRITON and (x.is_cuda or INTERPRETED)):
        return False
    # float64 is for tests, and what becomes of two types is torch's to say.
    fits = x.dtype in (torch.bfloat16, torch.float16, torch.float32) and x.shape[-1] <= WIDEST and x.numel() > 0
    return fits and (weight is None or (weight.dtype == x.dtype and weight.stride(0) == 1))


def _kernels() -> ModuleType:
    """Imported when first needed: it takes a while."""
    return import_module("megatron_mea.attention.head_norm_kernels")


# Operators, since a compiler cannot look into them and leaves them as they are.
@torch.library.custom_op(
    "megatron_mea::head_norm", mutates_args=(), schema="(Tensor x, Tensor? weight, float eps) -> Tensor"
)
def _fused(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(batch, H, seq, d), (d,) -> (batch, seq, H, d)"""
    return _kernels().forward(x, weight, eps)


@torch.library.custom_op(
    "megatron_mea::head_norm_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor dy, float eps) -> (Tensor, Tensor)",
)
def _fused_backward(
    x: torch.Tensor, weight: torch.Tensor | None, dy: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, H, seq, d), (d,), (batch, H, seq, d) -> gradients of x, in its layout, and of the gain, empty for none"""
    dx, d_weight = _kernels().backward(x, weight, dy, eps)
    return dx, x.new_empty(0) if d_weight is None else d_weight


@_fused.register_fake
def _(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    batch, heads, seq, dim = x.shape
    return x.new_empty(batch, seq, heads, dim)


@_fused_backward.register_fake
def _(x: torch.Tensor, weight: torch.Tensor | None, dy: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(0) if weight is None else torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor | None, float], output: torch.Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _back(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    x, weight = ctx.saved_tensors
    # shape: (batch, seq, H, d) -> (batch, H, seq, d)
    dy = (dy if dy.stride(-1) == 1 else dy.contiguous()).transpose(1, 2)
    dx, d_weight = _fused_backward(x, weight, dy, ctx.eps)
    return dx, None if weight is None else d_weight, None


_fused.register_autograd(_back, setup_context=_keep)
