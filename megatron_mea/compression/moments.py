"""Second moments of a layer's attention on real tokens, from which latent keys and values follow in closed form."""

from __future__ import annotations

import torch

from megatron_mea.attention.document_mask import AttentionFn
from megatron_mea.attention.mea import MultiheadExplicitAttention
from megatron_mea.config.schema import Model
from megatron_mea.exported.rotary_mea import apply_rotary


class Moments:
    """Sums over tokens, in float64.

    Attributes:
        keys: y y^T of the composite key heads before RoPE, (h d, h d). With `qk_norm` y has the gains of the norm in
            it, and the size that the norm gives a token's keys on the average over heads.
        query_energy: squares of the queries that meet a key head at each frequency, (h, d/2).
        values: u u^T, (h d, h d), where u are all value heads as a query head attends to them; the mean over query
            heads. With a head norm u is divided by the size of the query head's own output.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        heads, width = model.num_key_value_heads, model.num_key_value_heads * model.head_dim
        self.model = model
        self.keys = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.values = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.query_energy = torch.zeros(heads, model.head_dim // 2, dtype=torch.float64, device=device)

    def add(
        self,
        attention: MultiheadExplicitAttention,
        hidden_states: torch.Tensor,
        *,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: AttentionFn,
    ) -> None:
        """Adds the tokens of normalised hidden states (batch, seq, hidden)."""
        model, (batch, seq, _) = self.model, hidden_states.shape
        query = attention.q_proj(hidden_states).view(batch, seq, -1, model.head_dim).transpose(1, 2)
        key, value = attention.key_projection(hidden_states), attention.value_projection(hidden_states)
        latent_key = key
        if attention.q_norm is not None and attention.k_norm is not None:
            # Keys count by the size that the norm gives them, the same for all heads of a token, so that a
            # combination of heads can be weighted by it.
            query, normed, with_gain = attention.q_norm(query), attention.k_norm(key), key * attention.k_norm.gain()
            sizes = [heads.square().mean((1, 3), keepdim=True) for heads in (normed, with_gain)]
            latent_key, key = with_gain * (sizes[0] / sizes[1]).sqrt(), normed

        self.keys += _second_moment(latent_key)
        # shape: (batch, H, seq, d) -> (h, d/2)
        energy = query.double().square().sum((0, 2)).unflatten(0, (model.num_key_value_heads, -1)).sum(1)
        self.query_energy += energy.unflatten(1, (2, -1)).sum(1)

        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        queries_per_key = model.num_attention_heads // model.num_key_value_heads
        # A query head at a time: what all of them attend to is h times as large as attention's output.
        for index in range(model.num_attention_heads):
            group = index // queries_per_key
            # shape: (batch, h, seq, d), the value heads as this query head attends to them
            attended = attend(
                query[:, index : index + 1].expand_as(value).contiguous(),
                key[:, group : group + 1].expand_as(value).contiguous(),
                value,
            )
            if model.has_head_norm:
                own_square = attended[:, group : group + 1].square().mean(-1, keepdim=True)
                attended = attended / (own_square + model.head_norm_eps).sqrt()

            self.values += _second_moment(attended) / model.num_attention_heads


def _second_moment(heads: torch.Tensor) -> torch.Tensor:
    """Sum of y y^T over the tokens of heads (batch, h, seq, d): (h d, h d), in float64."""
    # shape: (batch, h, seq, d) -> (tokens, h d)
    rows = heads.transpose(1, 2).flatten(2).flatten(0, 1).double()
    return rows.mT @ rows
