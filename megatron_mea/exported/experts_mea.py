"""Mixture of experts of a MEA decoder, as Qwen3-MoE computes it. Travels with every export."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations import use_experts_implementation

from .configuration_mea import MEAConfig
from .rotary_mea import at_least_float32


def softmax_dtype(logits: torch.Tensor) -> torch.dtype:
    """The dtype of the router's softmax."""
    return at_least_float32(logits.dtype)


# vLLM traces the router with torch.fx to run it in a kernel of its own, and would stop at a look into the dtype.
torch.fx.wrap("softmax_dtype")


class MEARouter(nn.Module):
    """Chooses the experts of every token: softmax over all of them, then the top k."""

    def __init__(self, config: MEAConfig):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))

    def forward(self, hidden_states):
        """(tokens, hidden) -> logits (tokens, experts), weights and ids (tokens, top_k)"""
        logits = F.linear(hidden_states, self.weight)
        probabilities = F.softmax(logits, dim=-1, dtype=softmax_dtype(logits))
        weights, chosen = torch.topk(probabilities, self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)

        return logits, weights.to(logits.dtype), chosen


@use_experts_implementation
class MEAExperts(nn.Module):
    """The SwiGLU feed-forwards of all experts, in two stacks of matrices."""

    def __init__(self, config: MEAConfig):
        super().__init__()
        self.num_experts = config.num_experts
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, inner))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """(tokens, hidden), twice (tokens, top_k) -> (tokens, hidden), an expert at a time: in any precision."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, choice = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, rows * top_k_weights[token, choice, None])

        return output


class MEASparseMLP(nn.Module):
    """Feed-forward of a few experts out of many, chosen for each token."""

    # vLLM takes `gate` and `experts` for its kernel where a block has no other state and returns one tensor.
    def __init__(self, config: MEAConfig):
        super().__init__()
        self.experts = MEAExperts(config)
        self.gate = MEARouter(config)

    def forward(self, hidden_states):
        """(batch, seq, hidden) -> (batch, seq, hidden)"""
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, shape[-1])
        _, weights, chosen = self.gate(hidden_states)
        return self.experts(hidden_states, chosen, weights).reshape(shape)


def register_expert_conversion(model_type: str) -> None:
    """Has transformers load and save a tensor for each expert, as Qwen3-MoE's files have them.

    Without it a model would load with random experts. Every exported folder brings this file under a module name of its
    own, and all may register.
    """
    gate_and_up = ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"]
    register_checkpoint_conversion_mapping(
        model_type,
        [
            WeightConverter(
                source_patterns=gate_and_up,
                target_patterns="mlp.experts.gate_up_proj",
                operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(
                source_patterns="mlp.experts.*.down_proj.weight",
                target_patterns="mlp.experts.down_proj",
                operations=[MergeModulelist(dim=0)],
            ),
        ],
        overwrite=True,
    )


register_expert_conversion(MEAConfig.model_type)
