"""Rotary position embeddings and their scalings, for training and in every export, with which it travels."""

import math
from typing import Protocol

import torch


class RotaryConfig(Protocol):
    """The configuration that RoPE reads: `rope_parameters` as transformers 5 writes them, and two sizes."""

    rope_parameters: dict
    head_dim: int
    max_position_embeddings: int


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and angles: float32 for 16-bit inputs, the input's dtype otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def inverse_frequencies(config: RotaryConfig) -> tuple[list[float], float]:
    """Returns head_dim / 2 inverse frequencies and the factor on cosine and sine, in double precision.

    The scalings are those of transformers' `modeling_rope_utils`, which rounds them to float32. `dynamic` depends on
    the positions, so `rotary_cos_sin` applies it.
    """
    rope, dim = config.rope_parameters, config.head_dim
    kind, base, factor = rope["rope_type"], rope["rope_theta"], rope.get("factor")
    frequencies = [base ** (-i / dim) for i in range(0, dim, 2)]
    if kind in ("default", "dynamic"):
        return frequencies, 1.0
    if kind == "linear":
        return [f / factor for f in frequencies], 1.0

    original = rope["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]

        def scaled(f: float) -> float:
            # 0 below the low-frequency edge (divided by the factor), 1 above the high one (unchanged), linear between.
            smooth = min(max((original * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0)
            return (1 - smooth) * f / factor + smooth * f

        return [scaled(f) for f in frequencies], 1.0

    if kind == "yarn":

        def dimension(rotations: float) -> float:
            """The (fractional) dimension that rotates this often over the original context."""
            return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        def magnitude(scale: float, mscale: float = 1.0) -> float:
            return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

        low = dimension(rope.get("beta_fast") or 32)
        high = dimension(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 if low == high else 0

        ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(dim // 2)]
        interpolated = [f / factor * r + f * (1 - r) for f, r in zip(frequencies, ramp, strict=True)]

        attention_factor = rope.get("attention_factor")
        mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        if attention_factor is None and mscale and mscale_all_dim:
            attention_factor = magnitude(factor, mscale) / magnitude(factor, mscale_all_dim)

        return interpolated, magnitude(factor) if attention_factor is None else attention_factor

    raise ValueError(f"rope_type {kind!r} is not supported (expected: default, linear, dynamic, yarn, llama3)")


def rotary_cos_sin(
    config: RotaryConfig, position_ids: torch.Tensor, *, dtype: torch.dtype, inv_freq: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the rotary angles, each (batch, seq, head_dim), for `position_ids` (batch, seq).

    Args:
        dtype: of the results; angles are computed in float32 at least.
        inv_freq: the inverse frequencies as a tensor on the device, so that the host need not wait to copy them.
    """
    frequencies, scale = inverse_frequencies(config)
    angle_dtype, device = at_least_float32(dtype), position_ids.device
    if inv_freq is None:
        inv_freq = torch.tensor(frequencies, dtype=angle_dtype, device=device)
    else:
        inv_freq = inv_freq.to(angle_dtype)

    if config.rope_parameters["rope_type"] == "dynamic":
        # The base grows with the context beyond the trained one. As a tensor: no wait for a GPU, no graph break.
        factor, trained, dim = config.rope_parameters["factor"], config.max_position_embeddings, config.head_dim
        length = (position_ids.max() + 1).clamp(min=trained).to(angle_dtype)
        growth = factor * length / trained - (factor - 1)
        inv_freq = inv_freq * growth ** (-torch.arange(0, dim, 2, dtype=angle_dtype, device=device) / (dim - 2))

    # shape: (batch, seq, 1) * (head_dim / 2,) -> (batch, seq, head_dim / 2)
    angles = position_ids[..., None].to(angle_dtype) * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def apply_rotary(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates `heads` (..., head_dim) by broadcastable `cos` and `sin`; Hugging Face's half-split convention."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
