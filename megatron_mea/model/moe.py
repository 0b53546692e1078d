"""Mixture of experts in place of a dense feed-forward: router, experts, and the losses that balance them.

Experts are sharded over the tensor group, each whole on one rank. Every rank routes all tokens, computes those of its
own experts, and the sum over the ranks is the one that leaves a tensor-parallel region anyway: no all-to-all. No token
is dropped, since a capacity would depend on what else is in a micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mea.config.schema import Model
from megatron_mea.parallel.activation_checkpoint import maybe_checkpoint
from megatron_mea.parallel.collectives import all_reduce, copy_to_tp_region, enter_tp_region, exit_tp_region
from megatron_mea.parallel.grid import NO_CP, NO_TP, ContextGroup, TensorGroup
from megatron_mea.parallel.grouped import gather_tokens, grouped_linear, sum_choices
from megatron_mea.parallel.parameter import normal, sharded_parameter


@dataclass(frozen=True, kw_only=True)
class RouterLosses:
    """Auxiliary losses of the routers, whose gradients are added in the backward pass.

    Args:
        balance: how often experts are chosen in the balance loss (E / k) sum_e f_e P_e, which is 1 where they are
            balanced: `sequence`, in each sequence; `batch`, in the global batch of the step before; `none`.
        balance_coef, z_coef: weights of the balance loss and of the mean square of the logits' logsumexp
            (arXiv 2202.08906), each of a layer.
        gradient_scale: of a sequence's share in the mean over the global batch, as the engine reduces gradients.
    """

    balance: Literal["sequence", "batch", "none"] = "none"
    balance_coef: float = 0.0
    z_coef: float = 0.0
    gradient_scale: float = 1.0


class RouterStats:
    """Counts the choices and sums the balance loss of a router over the micro-batches that are trained.

    Both are taken in the backward pass, so that neither validation nor recomputation counts.

    Attributes:
        counts: (experts,) int64: how often each expert was chosen.
        balance_loss: float64 scalar: the sum over sequences.
        previous_counts: (experts,) int64: counts of the global batch of the step before; None: as if balanced.
    """

    def __init__(self) -> None:
        self.counts: torch.Tensor | None = None
        self.balance_loss: torch.Tensor | None = None
        self.previous_counts: torch.Tensor | None = None

    def add(self, counts: torch.Tensor, balance_loss: torch.Tensor) -> None:
        """Adds those of a micro-batch."""
        self.counts = counts if self.counts is None else self.counts + counts
        self.balance_loss = balance_loss if self.balance_loss is None else self.balance_loss + balance_loss


class _AddAuxiliaryGradient(torch.autograd.Function):
    """The identity of the routing weights, whose backward adds the gradient of `loss` and records the statistics."""

    @staticmethod
    def forward(ctx, weights, loss, record):  # noqa: PLR0917 - torch passes by position
        ctx.record, ctx.ones = record, torch.ones_like(loss)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, gradient):
        ctx.record()
        return gradient, ctx.ones, None


class Router(nn.Module):
    """Chooses the experts of every token: softmax over all of them, then the top k (Qwen3-MoE).

    Logits and probabilities are float32 at least: in bfloat16 a twentieth of all tokens have equal probabilities at the
    edge of the top k. The weight is replicated over the tensor group; each rank uses the choices of its own experts
    alone, so its gradient is partial.
    """

    def __init__(
        self, config: Model, layer: int, *, tp: TensorGroup, cp: ContextGroup, losses: RouterLosses | None
    ) -> None:
        super().__init__()
        self.config, self.tp, self.cp, self.losses, self.stats = config, tp, cp, losses, RouterStats()
        self.weight = sharded_parameter(
            name=f"model.layers.{layer}.mlp.gate.weight",
            global_shape=(config.num_experts, config.hidden_size),
            component="router",
            kind="matrix",
            initialize=normal(config.initializer_range),
            tp=tp,
        )

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, seq, hidden) -> weights and ids of the chosen experts, each (batch, seq, top_k)."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        logits = F.linear(hidden_states.to(dtype), copy_to_tp_region(self.weight, self.tp).to(dtype))
        probabilities = logits.softmax(-1)
        weights, chosen = probabilities.topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.losses is not None and torch.is_grad_enabled():
            weights = self._add_losses(weights, chosen=chosen, logits=logits, probabilities=probabilities)

        return weights, chosen

    def _add_losses(
        self, weights: torch.Tensor, *, chosen: torch.Tensor, logits: torch.Tensor, probabilities: torch.Tensor
    ) -> torch.Tensor:
        """The weights, whose backward adds the gradients of the auxiliary losses."""
        losses, num_experts = self.losses, self.config.num_experts
        assert losses is not None
        with torch.no_grad():
            # shape: (batch, seq, top_k) -> (batch, experts)
            counts = torch.zeros(len(chosen), num_experts, dtype=torch.int64, device=chosen.device)
            counts.scatter_add_(1, chosen.flatten(1), torch.ones_like(chosen).flatten(1))
            share = self._share(counts, probabilities.dtype)

        # A context rank adds its tokens' part of the mean over a sequence.
        # shape: (batch, experts)
        terms = share * (probabilities.mean(1) / self.cp.size)
        # Each rank adds the terms of its own experts, since gradients are summed over the tensor group.
        own = self.tp.local_range(num_experts)
        loss = losses.balance_coef * terms[:, own].sum()
        if losses.z_coef:
            # The same on every tensor rank.
            z_loss = logits.logsumexp(-1).square().mean(1).sum()
            loss = loss + losses.z_coef * z_loss / (self.tp.size * self.cp.size)

        total_counts, balance_loss = counts.sum(0), terms.detach().double().sum()
        return _AddAuxiliaryGradient.apply(
            weights, loss * losses.gradient_scale, lambda: self.stats.add(total_counts, balance_loss)
        )

    def _share(self, counts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """How often experts are chosen, 1 where they are balanced, from this rank's choices (batch, experts)."""
        if self.losses.balance == "batch":
            previous = self.stats.previous_counts
            counts = torch.ones_like(counts[:1]) if previous is None else previous.unsqueeze(0)
        else:
            counts = all_reduce(counts, over=self.cp)

        counts = counts.to(dtype)
        return counts * (self.config.num_experts / counts.sum(1, keepdim=True))


class Experts(nn.Module):
    """The SwiGLU feed-forwards of this rank's experts, in two stacks of matrices.

    Args:
        recompute: save only the products with gate_up_proj, and recompute the rest in backward.
    """

    def __init__(self, config: Model, layer: int, *, tp: TensorGroup, recompute: bool) -> None:
        super().__init__()
        self.own, self.recompute = tp.local_range(config.num_experts), recompute
        num_experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        std, name = config.initializer_range, f"model.layers.{layer}.mlp.experts"

        def stack(suffix: str, shape: tuple[int, int], std: float) -> nn.Parameter:
            return sharded_parameter(
                name=f"{name}.{suffix}",
                global_shape=(num_experts, *shape),
                component="experts",
                kind="matrix",
                initialize=normal(std),
                tp=tp,
                shard_dim=0,
                is_stack=True,
            )

        self.gate_up_proj = stack("gate_up_proj", (2 * inner, hidden), std)
        self.down_proj = stack("down_proj", (hidden, inner), std / math.sqrt(2 * config.num_hidden_layers))

    def forward(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden), twice (tokens, top_k) -> this rank's partial sum (tokens, hidden)."""
        num_experts, top_k = self.own.stop - self.own.start, chosen.shape[-1]
        # The experts of other ranks are sorted behind this rank's.
        local = chosen.flatten() - self.own.start
        local = torch.where((local >= 0) & (local < num_experts), local, num_experts)
        counts = torch.bincount(local, minlength=num_experts + 1)[:num_experts]
        order = local.argsort(stable=True)[: int(counts.sum())]

        gate_up = grouped_linear(gather_tokens(x, order, top_k), self.gate_up_proj, counts)
        y = maybe_checkpoint(self._gate_and_project, gate_up, counts, enabled=self.recompute)
        y = y * weights.flatten()[order].unsqueeze(1).to(y.dtype)
        return sum_choices(y, order, num_tokens=len(x), top_k=top_k)

    def _gate_and_project(self, gate_up: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """(rows, 2 intermediate) -> (rows, hidden)"""
        gate, up = gate_up.chunk(2, -1)
        return grouped_linear(F.silu(gate) * up, self.down_proj, counts)


class MoE(nn.Module):
    """Feed-forward of a few experts out of many, chosen for each token (arXiv 1701.06538, as in Qwen3-MoE)."""

    def __init__(
        self,
        config: Model,
        layer: int,
        *,
        tp: TensorGroup = NO_TP,
        cp: ContextGroup = NO_CP,
        recompute: bool = False,
        losses: RouterLosses | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.gate = Router(config, layer, tp=tp, cp=cp, losses=losses)
        self.experts = Experts(config, layer, tp=tp, recompute=recompute)

    # In float32 the compiler has no grouped product, and the rows of an expert differ in every step.
    @torch.compiler.disable
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) -> (batch, seq, hidden)"""
        hidden_states = enter_tp_region(hidden_states, self.tp)
        weights, chosen = self.gate(hidden_states)
        output = self.experts(hidden_states.flatten(0, 1), weights.flatten(0, 1), chosen.flatten(0, 1))
        return exit_tp_region(output.view_as(hidden_states), self.tp)
