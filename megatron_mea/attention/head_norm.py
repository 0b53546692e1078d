"""RMSNorm over each query head's output by itself ("GroupNorm", MEA paper eq. 12), and concatenation of the heads."""

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
"""Whether Triton's kernels run in its Python interpreter, on a CPU: for tests."""
HAS_TRITON = find_spec("triton") is not None
"""Whether Triton is installed; a torch without CUDA does not bring it."""
MAX_HEAD_DIM = 1024
"""The largest number of features of a head that the kernels take."""


def head_norm(x: torch.Tensor, weight: torch.Tensor | None, *, eps: float) -> torch.Tensor:
    """(batch, H, seq, d) -> (batch, seq, H d): y = x / sqrt(mean(x^2) + eps) * weight over the d features of a head.

    On a GPU with Triton it is one kernel for forward and one for backward, which read x in attention's layout, write
    o_proj's, and save only x and the weight for backward. Elsewhere it is torch's operations.

    Args:
        weight: (d,), or None for 1.
        eps: positive.
    """
    if _can_fuse(x, weight):
        return _fused_head_norm(x if x.stride(-1) == 1 else x.contiguous(), weight, eps).flatten(2)

    return F.rms_norm(x, x.shape[-1:], weight, eps).transpose(1, 2).flatten(2)


class HeadNorm(RMSNorm):
    """The head norm as a module, with the weight of an RMSNorm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, H, seq, d) -> (batch, seq, H d)"""
        return head_norm(x, self.gain(), eps=self.eps)


def _can_fuse(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether the kernels take these tensors."""
    if not (HAS_TRITON and (x.is_cuda or INTERPRETED)):
        return False

    # float64 is for tests, and torch decides on the result of two dtypes.
    fits = x.dtype in (torch.bfloat16, torch.float16, torch.float32) and x.shape[-1] <= MAX_HEAD_DIM and x.numel() > 0
    return fits and (weight is None or (weight.dtype == x.dtype and weight.stride(0) == 1))


def _kernels() -> ModuleType:
    """The module of kernels, imported when first needed since that takes a while."""
    return import_module("megatron_mea.attention.head_norm_kernels")


# Custom operators, which torch.compile calls as they are: it cannot trace through the kernels.
@torch.library.custom_op(
    "megatron_mea::head_norm", mutates_args=(), schema="(Tensor x, Tensor? weight, float eps) -> Tensor"
)
def _fused_head_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(batch, H, seq, d), (d,) -> (batch, seq, H, d)"""
    return _kernels().forward(x, weight, eps=eps)


@torch.library.custom_op(
    "megatron_mea::head_norm_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor dy, float eps) -> (Tensor, Tensor)",
)
def _fused_head_norm_backward(  # noqa: PLR0917 - torch passes by position
    x: torch.Tensor, weight: torch.Tensor | None, dy: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, H, seq, d), (d,), (batch, H, seq, d) -> gradients of x, in its layout, and of weight, empty if None"""
    dx, d_weight = _kernels().backward(x, weight, dy, eps=eps)
    return dx, x.new_empty(0) if d_weight is None else d_weight


@_fused_head_norm.register_fake
def _fake_head_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    batch, heads, seq, dim = x.shape
    return x.new_empty(batch, seq, heads, dim)


@_fused_head_norm_backward.register_fake
def _fake_head_norm_backward(  # noqa: PLR0917 - torch passes by position
    x: torch.Tensor, weight: torch.Tensor | None, dy: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(0) if weight is None else torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor | None, float], output: torch.Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    x, weight = ctx.saved_tensors
    # shape: (batch, seq, H, d) -> (batch, H, seq, d)
    dy = (dy if dy.stride(-1) == 1 else dy.contiguous()).transpose(1, 2)
    dx, d_weight = _fused_head_norm_backward(x, weight, dy, ctx.eps)
    return dx, None if weight is None else d_weight, None


_fused_head_norm.register_autograd(_backward, setup_context=_setup_context)
