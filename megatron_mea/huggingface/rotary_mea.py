"""Rotary position embeddings and their scalings, for training and in every export, with which it travels."""

import math

import torch

from .configuration_mea import MEAConfig


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type for sums and angles: float32 for 16-bit inputs, the input's own type otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def inverse_frequencies(config: MEAConfig) -> tuple[list[float], float]:
    """Inverse frequencies (head_dim / 2 of them) and the factor on cosine and sine, in double precision.

    The scalings are those of transformers' `modeling_rope_utils`, which rounds them to float32. `dynamic` depends on
    the positions: `rotary_cos_sin` has it.
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

        def stretch(f: float) -> float:
            # 0 below the low-frequency edge (interpolated), 1 above the high one (left alone), linear between.
            smooth = min(max((original * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0)
            return (1 - smooth) * f / factor + smooth * f

        return [stretch(f) for f in frequencies], 1.0
    if kind == "yarn":

        def dimension(rotations: float) -> float:
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
        scaled = [f / factor * r + f * (1 - r) for f, r in zip(frequencies, ramp, strict=True)]
        attention = rope.get("attention_factor")
        mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
        if attention is None and mscale and mscale_all:
            attention = magnitude(factor, mscale) / magnitude(factor, mscale_all)
        return scaled, magnitude(factor) if attention is None else attention
    raise ValueError(f"rope_type {kind!r} is not supported (allowed: default, linear, dynamic, yarn, llama3)")


def rotary_cos_sin(config: MEAConfig, position_ids: torch.Tensor, dtype: torch.dtype, on_device=None):
    """Cosine and sine of the rotary angles, each (batch, seq, head_dim), for `position_ids` (batch, seq).

    `on_device`: the inverse frequencies as a tensor, where a host must not wait for a GPU to take them.
    """
    frequencies, scale = inverse_frequencies(config)
    accurate, device = at_least_float32(dtype), position_ids.device
    frequencies = (
        torch.tensor(frequencies, dtype=accurate, device=device) if on_device is None else on_device.to(accurate)
    )
    if config.rope_parameters["rope_type"] == "dynamic":
        # The base grows with the context beyond the trained one. A tensor: no wait for a GPU, no break of a graph.
        factor, trained, dim = config.rope_parameters["factor"], config.max_position_embeddings, config.head_dim
        length = (position_ids.max() + 1).clamp(min=trained).to(accurate)
        growth = factor * length / trained - (factor - 1)
        frequencies = frequencies * growth ** (-torch.arange(0, dim, 2, dtype=accurate, device=device) / (dim - 2))
    # shape: (batch, seq, 1) * (head_dim / 2,) -> (batch, seq, head_dim / 2)
    angles = position_ids[..., None].to(accurate) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def apply_rotary(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates `heads` (..., head_dim) by broadcastable `cos` and `sin`; Hugging Face's half-split convention."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
