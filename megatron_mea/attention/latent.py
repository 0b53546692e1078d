"""The general head combination, `model.hlc_form: latent`: keys mixed by frequency, values by any matrix.

RoPE rotates the pair of features (f, f + d/2) of a head as one complex number z_f, by an angle that is the same for
all heads. So it commutes with every combination of heads that has a complex matrix of its own for each frequency:
cached pairs c_n, each of one frequency, give z_jf = sum over the pairs n of frequency f of W[n, j] c_n, before RoPE or
after it. Eq. 10 of the paper is the special case of the same h' pairs and the same real matrix for all frequencies.
Values meet no rotation, and come from any numbers by any matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mea.attention.hlc import KeyValueProjection
from megatron_mea.exported.combination_mea import (
    block_features,
    block_pairs,
    expand_pairs,
    mean_square_without_gain,
    pair_frequencies,
)
from megatron_mea.exported.rotary_mea import apply_rotary
from megatron_mea.parallel.grid import NO_TP, TensorGroup
from megatron_mea.parallel.layers import RMSNorm
from megatron_mea.parallel.parameter import sharded_parameter


def latent_folding_is_cheaper(
    *, tokens: int, hidden_size: int, latent: int, composite: int, tensor_parallel_size: int
) -> bool:
    """As `folding_is_cheaper`, with a dense matrix (latent, composite) for a combination, which both are widths of."""
    if tensor_parallel_size > 1:
        return tokens > hidden_size

    return composite * hidden_size * (latent + tokens) < tokens * latent * (hidden_size + composite)


class LatentProjection(KeyValueProjection):
    """Projects to latent numbers, of which every feature of a composite head is a linear combination.

    Latent numbers are one component of that many features. Subclasses say how the combination is stored.
    """

    def _folding_is_cheaper(self, tokens: int) -> bool:
        return latent_folding_is_cheaper(
            tokens=tokens,
            hidden_size=self.hidden_size,
            latent=self.rows,
            composite=self.num_composites * self.head_dim,
            tensor_parallel_size=self.tp.size,
        )

    def _split(self, components: torch.Tensor) -> torch.Tensor:
        return components.unsqueeze(2)

    def _combine(self, components: torch.Tensor) -> torch.Tensor:
        # shape: (batch, seq, 1, n) @ (n, h d) -> (batch, seq, 1, h d) -> (batch, h, seq, d)
        heads = components @ self._columns()
        return heads.squeeze(2).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class LatentKeys(LatentProjection):
    """Keys from pairs of features (n, n + pairs), each of one RoPE frequency.

    Attributes:
        hlc: (pairs, h, 2), the real and the imaginary part of W; sharded along h.
        frequency: (pairs,), the index f of each pair's frequency, ascending.

    Args:
        counts: pairs of each of the d/2 frequencies.
    """

    def __init__(
        self,
        *,
        layer: str,
        hidden_size: int,
        counts: Sequence[int],
        num_composites: int,
        head_dim: int,
        std: float,
        bias: bool,
        tp: TensorGroup = NO_TP,
    ) -> None:
        pairs = sum(counts)
        super().__init__(
            layer=layer,
            side="k",
            hidden_size=hidden_size,
            rows=2 * pairs,
            num_composites=num_composites,
            head_dim=head_dim,
            std=std,
            bias=bias,
            tp=tp,
        )
        # No buffer: it follows from the settings, and has no memory on the device "meta".
        self.frequency = pair_frequencies(counts)
        self.hlc = sharded_parameter(
            name=f"{layer}.hlc_k.weight",
            global_shape=(pairs, num_composites, 2),
            component="hlc",
            kind="matrix",
            initialize=lambda shape, _: block_pairs(counts, num_composites),
            tp=tp,
            shard_dim=1 if self.shards_composites else None,
        )

    def rotate(self, components: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        frequency = self._frequency(components.device).repeat(2)
        return apply_rotary(components, cos[..., frequency], sin[..., frequency])

    def _columns(self) -> torch.Tensor:
        return expand_pairs(self._local_part(), self._frequency(self.weight.device), head_dim=self.head_dim)

    def _frequency(self, device: torch.device) -> torch.Tensor:
        self.frequency = self.frequency.to(device)
        return self.frequency


class LatentValues(LatentProjection):
    """Values from any numbers by any matrix.

    Attributes:
        hlc: (n, h d); sharded along h d, by heads.
    """

    def __init__(
        self,
        *,
        layer: str,
        hidden_size: int,
        num_latent: int,
        num_composites: int,
        head_dim: int,
        std: float,
        bias: bool,
        tp: TensorGroup = NO_TP,
    ) -> None:
        super().__init__(
            layer=layer,
            side="v",
            hidden_size=hidden_size,
            rows=num_latent,
            num_composites=num_composites,
            head_dim=head_dim,
            std=std,
            bias=bias,
            tp=tp,
        )
        self.hlc = sharded_parameter(
            name=f"{layer}.hlc_v.weight",
            global_shape=(num_latent, num_composites * head_dim),
            component="hlc",
            kind="matrix",
            initialize=lambda shape, _: block_features(num_latent, num_composites, head_dim),
            tp=tp,
            shard_dim=1 if self.shards_composites else None,
        )

    def _columns(self) -> torch.Tensor:
        return self._local_part(self.head_dim)


class FoldedGainNorm(RMSNorm):
    """The RMSNorm of `qk_norm` for keys that already have its gains in them: y / rms(y / gain).

    A gain that differs within a pair of features does not commute with the complex combination, and cached pairs are
    combined after the norm. So the combination gives y = gain x key, and the norm only divides by the key's size.
    With y = gain x key that is the RMSNorm of the key.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean_square = mean_square_without_gain(x, self.gain()).unsqueeze(-1)
        return (x.to(mean_square.dtype) * torch.rsqrt(mean_square + self.eps)).to(x.dtype)
