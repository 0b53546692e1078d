"""A Llama-like decoder, or one pipeline stage of it: embedding, transformer blocks, final norm, language-model head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mea.attention.core import core_attention_class
from megatron_mea.attention.folds import FoldedKV, fold_kv
from megatron_mea.attention.mea import MultiheadExplicitAttention
from megatron_mea.config.schema import Model
from megatron_mea.exported.rotary_mea import inverse_frequencies, rotary_cos_sin
from megatron_mea.model.moe import MoE, RouterLosses
from megatron_mea.parallel.activation_checkpoint import maybe_checkpoint
from megatron_mea.parallel.collectives import enter_tp_region, exit_tp_region
from megatron_mea.parallel.cross_entropy import chunk_size, linear_cross_entropy_sum
from megatron_mea.parallel.grid import NO_CP, NO_TP, ContextGroup, TensorGroup
from megatron_mea.parallel.layers import Embedding, Linear, RMSNorm, cross_entropy_sum
from megatron_mea.parallel.parameter import ParameterSpec, normal, parameters_by_name, sharded_parameter

ActivationCheckpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class StageLayers:
    """The layers that a pipeline stage holds.

    Args:
        embedding: whether it holds the token embedding, as the first stage does.
        blocks: global indices of its transformer blocks, counted from 0.
        head: whether it holds the final norm and the language-model head, as the last stage does.
    """

    embedding: bool = False
    blocks: range = range(0)
    head: bool = False


EMBEDDING, HEAD = StageLayers(embedding=True), StageLayers(head=True)


def all_layers(config: Model) -> StageLayers:
    """Every layer of the model, as one stage without pipeline parallelism."""
    return StageLayers(embedding=True, blocks=range(config.num_hidden_layers), head=True)


def single_layers(config: Model) -> list[StageLayers]:
    """Each layer as a stage of its own, in the order of the forward pass: embedding, every block, head."""
    blocks = [StageLayers(blocks=range(index, index + 1)) for index in range(config.num_hidden_layers)]
    return [EMBEDDING, *blocks, HEAD]


class MLP(nn.Module):
    """SwiGLU feed-forward: down_proj(silu(gate_proj(x)) * up_proj(x)).

    Args:
        recompute: save only the outputs of gate_proj and up_proj, and recompute the rest in backward.
    """

    def __init__(self, config: Model, layer: int, *, tp: TensorGroup = NO_TP, recompute: bool = False) -> None:
        super().__init__()
        self.tp, self.recompute = tp, recompute
        name = f"model.layers.{layer}.mlp"
        hidden, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        output_std = std / math.sqrt(2 * config.num_hidden_layers)

        def input_projection(suffix: str) -> Linear:
            return Linear(
                name=f"{name}.{suffix}",
                component="mlp",
                in_features=hidden,
                out_features=inner,
                std=std,
                tp=tp,
                shard_dim=0,
            )

        self.gate_proj, self.up_proj = input_projection("gate_proj"), input_projection("up_proj")
        self.down_proj = Linear(
            name=f"{name}.down_proj",
            component="mlp",
            in_features=inner,
            out_features=hidden,
            std=output_std,
            tp=tp,
            shard_dim=1,
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) -> (batch, seq, hidden)"""
        hidden_states = enter_tp_region(hidden_states, self.tp)
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        output = maybe_checkpoint(self._gate_and_project, gate, up, enabled=self.recompute)
        return exit_tp_region(output, self.tp)

    def _gate_and_project(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """(batch, seq, intermediate), twice -> this rank's partial down_proj output (batch, seq, hidden)."""
        return self.down_proj(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)); `mlp` is dense or has experts."""

    def __init__(
        self,
        config: Model,
        layer: int,
        *,
        tp: TensorGroup = NO_TP,
        cp: ContextGroup = NO_CP,
        recompute: bool = False,
        fold_outside: bool = True,
        router_losses: RouterLosses | None = None,
    ) -> None:
        super().__init__()

        def norm(suffix: str) -> RMSNorm:
            return RMSNorm(
                name=f"model.layers.{layer}.{suffix}",
                size=config.hidden_size,
                eps=config.rms_norm_eps,
                tp=tp,
                reduce_weight_grad=tp.sequence_parallel,
            )

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = MultiheadExplicitAttention(
            config=config, layer=layer, tp=tp, cp=cp, recompute=recompute, fold_outside=fold_outside
        )
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp: MLP | MoE
        if config.is_routed(layer):
            self.mlp = MoE(config=config, layer=layer, tp=tp, cp=cp, recompute=recompute, losses=router_losses)
        else:
            self.mlp = MLP(config=config, layer=layer, tp=tp, recompute=recompute)

    def forward(
        self,
        hidden_states: torch.Tensor,
        **attention_arguments: Any,
    ) -> torch.Tensor:
        """(batch, seq, hidden) -> (batch, seq, hidden); the arguments are those of the attention layer."""
        attended = self.self_attn(self.input_layernorm(hidden_states), **attention_arguments)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LMHead(nn.Module):
    """The language-model head, its rows sharded over the tensor group.

    Args:
        weight: this rank's rows of (vocab_size, hidden_size); the embedding's where they are tied.
    """

    def __init__(self, config: Model, weight: nn.Parameter, *, tp: TensorGroup = NO_TP) -> None:
        super().__init__()
        self.tp, self.vocab_size, self.rows = tp, config.vocab_size, tp.local_range(config.vocab_size)
        self.weight = weight

    def forward(self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, seq, hidden) -> logits (batch, seq, this rank's shard of the vocabulary).

        With targets (batch, seq) -> the sum of the cross-entropies (nats), a float32 scalar; the logits of many tokens
        are computed in chunks.
        """
        num_rows = self.rows.stop - self.rows.start
        # Only the last ranks' padded shards are sliced: backward of a slice fills a matrix of zeros and copies.
        weight = self.weight if num_rows == len(self.weight) else self.weight[:num_rows]
        if targets is None:
            return F.linear(hidden_states, weight)

        # shape: (batch, seq, hidden) -> (tokens, hidden), (batch, seq) -> (tokens,)
        hidden_states, targets = hidden_states.flatten(0, 1), targets.flatten()

        # The largest shard decides, since ranks must agree.
        chunk = chunk_size(len(hidden_states), -(-self.vocab_size // self.tp.size))
        if chunk < len(hidden_states):
            return linear_cross_entropy_sum(
                hidden_states, weight, targets, offset=self.rows.start, tp=self.tp, chunk=chunk
            )

        logits = F.linear(hidden_states, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy_sum(logits, targets, vocab_size=self.vocab_size, tp=self.tp)


class Decoder(nn.Module):
    """A Llama-like decoder, or one pipeline stage of it, on one rank of a tensor and a context group.

    `embed_tokens`, `norm` and `lm_head` are None on a stage that does not hold them; `layers` maps global indices to
    the stage's blocks.

    Args:
        config: the `model` section.
        tp, cp: the tensor group and the context group of this rank. Token ids, targets and hidden states are those of
            this rank's tokens, position ids those of the full sequence, from which RoPE and documents follow.
        stage: the layers to build; None for all. Where embeddings are tied and the first and last stage differ, each
            holds a copy of the matrix.
        document_mask: whether attention stays inside documents, which begin where position ids are zero.
        activation_checkpointing: what is recomputed in backward instead of being saved: with `full` every block, with
            `selective` attention, its norms and the SwiGLU product, but no matrix product of a weight.
        compile_blocks: whether training runs the blocks through torch.compile.
        fold_outside: whether a block's key and value projections are folded outside of the activation checkpoint and
            the compiled code, and a context group may gather components of any size. Impossible with ZeRO 3, where full
            parameters exist only during their module's forward.
        router_losses: of the routers in training; None where nothing is trained.
    """

    def __init__(
        self,
        config: Model,
        *,
        tp: TensorGroup = NO_TP,
        cp: ContextGroup = NO_CP,
        stage: StageLayers | None = None,
        document_mask: bool = False,
        activation_checkpointing: ActivationCheckpointing = "none",
        compile_blocks: bool = False,
        fold_outside: bool = True,
        router_losses: RouterLosses | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tp, self.cp = config, tp, cp
        self.activation_checkpointing = activation_checkpointing
        self.document_mask, self.fold_outside = document_mask, fold_outside
        self._training_block = _compile_run_block(config.num_hidden_layers) if compile_blocks else run_block
        # No buffer: buffers are rounded to the parameter dtype, and have no memory on the device "meta".
        self._inv_freq = torch.tensor(inverse_frequencies(config)[0], dtype=torch.float64, device="cpu")

        stage = all_layers(config) if stage is None else stage
        selective = activation_checkpointing == "selective"
        self.embed_tokens = _build_embedding(config, tp) if stage.embedding else None
        self.layers = nn.ModuleDict(
            {
                str(index): TransformerBlock(
                    config=config,
                    layer=index,
                    tp=tp,
                    cp=cp,
                    recompute=selective,
                    fold_outside=fold_outside,
                    router_losses=router_losses,
                )
                for index in stage.blocks
            }
        )
        self.norm: RMSNorm | None = None
        self.lm_head: LMHead | None = None
        if stage.head:
            self.norm = RMSNorm(
                name="model.norm",
                size=config.hidden_size,
                eps=config.rms_norm_eps,
                tp=tp,
                reduce_weight_grad=tp.sequence_parallel,
            )
            weight = _lm_head_weight(config=config, embed_tokens=self.embed_tokens, tp=tp)
            self.lm_head = LMHead(config=config, weight=weight, tp=tp)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum of the cross-entropies (nats) of all targets that are not `IGNORE_INDEX`; a float32 scalar.

        All arguments are (batch, seq), and over a context group, but for the positions, this rank's shard of it.
        `targets[:, i]` is what should follow `input_ids[:, i]`.
        """
        return self.loss(self.forward_hidden(input_ids, position_ids), targets)

    def loss(self, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Output of `forward_hidden` on the last stage, targets (batch, seq) -> sum of the cross-entropies (nats)"""
        return self.lm_head(hidden_states, targets)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output of `forward_hidden` on the last stage -> logits (batch, seq, this rank's shard of the vocabulary)."""
        return self.lm_head(hidden_states)

    @property
    def blocks(self) -> list[TransformerBlock]:
        """Transformer blocks of this pipeline stage, in order."""
        return list(self.layers.values())

    def forward_hidden(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, *, folded: Sequence[FoldedKV] | None = None
    ) -> torch.Tensor:
        """Runs the layers of this stage up to, but without, the projection to logits.

        Args:
            hidden_states: (batch, seq) token ids on the first stage, (batch, seq, hidden) on the others; with sequence
                parallelism this rank's shard of the sequence.
            position_ids: (batch, seq), of the full sequence.
            folded: folded key and value projections of every block; None to fold here where that is cheapest.

        Returns:
            (batch, seq, hidden); on the last stage the output of the final norm, the full sequence on every rank.
        """
        if self.embed_tokens is not None:
            hidden_states = self.embed_tokens(hidden_states)
        if self.layers:
            hidden_states = self._forward_blocks(hidden_states, position_ids, folded=folded)
        if self.norm is not None:
            hidden_states = enter_tp_region(self.norm(hidden_states), self.tp)

        return hidden_states

    def _forward_blocks(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, *, folded: Sequence[FoldedKV] | None
    ) -> torch.Tensor:
        self._inv_freq = self._inv_freq.to(position_ids.device)
        cos_sin = rotary_cos_sin(
            config=self.config, position_ids=position_ids, dtype=hidden_states.dtype, inv_freq=self._inv_freq
        )
        # shape: (batch, seq, d) -> (batch, 1, seq, d), the same for all heads
        full_cos, full_sin = (angle.unsqueeze(1) for angle in cos_sin)
        # All positions come first: dynamic scaling looks at the largest.
        cos, sin = (self.cp.shard(angle, dim=2) for angle in (full_cos, full_sin))
        rotates_all_keys = any(block.self_attn.rotates_all_keys for block in self.blocks)
        full_cos_sin = (full_cos, full_sin) if rotates_all_keys else None
        del cos_sin, full_cos, full_sin
        num_tokens = position_ids.numel() // self.cp.size

        attention_fn = core_attention_class(self.config).attention_fn
        attend = attention_fn(position_ids, document_mask=self.document_mask, cp=self.cp)
        # Validation runs uncompiled, since compiled code does not call the hooks that observe it.
        block_fn = self._training_block if torch.is_grad_enabled() else run_block

        for index, block in enumerate(self.blocks):
            if folded is not None:
                folded_kv = folded[index]
            else:
                folded_kv = fold_kv(block.self_attn, num_tokens) if self.fold_outside else (None, None)

            hidden_states = maybe_checkpoint(
                block_fn,
                block,
                hidden_states,
                cos=cos,
                sin=sin,
                full_cos_sin=full_cos_sin,
                attend=attend,
                folded=folded_kv,
                enabled=self.activation_checkpointing == "full",
            )

        return hidden_states


def run_block(block: TransformerBlock, hidden_states: torch.Tensor, **arguments: object) -> torch.Tensor:
    """A block's forward pass, as the one function to compile so that blocks of one shape share their code."""
    return block(hidden_states, **arguments)


def _compile_run_block(num_layers: int) -> Callable[..., torch.Tensor]:
    """Returns `run_block` compiled, with torch's limit of graphs per function (8, then silently eager) raised."""
    import torch._dynamo

    # Each layer may have another number of component heads, and so another graph.
    limit = max(torch._dynamo.config.recompile_limit, 4 * num_layers)
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 8 * limit)
    return torch.compile(run_block, dynamic=False)


def _build_embedding(config: Model, tp: TensorGroup) -> Embedding:
    std = config.embedding_initializer_range or config.initializer_range
    return Embedding(
        name="model.embed_tokens", vocab_size=config.vocab_size, hidden_size=config.hidden_size, std=std, tp=tp
    )


def _lm_head_weight(*, config: Model, embed_tokens: Embedding | None, tp: TensorGroup) -> nn.Parameter:
    """This rank's rows of the head's matrix; of a tied one the embedding's, or a copy where another stage holds it."""
    if config.tie_word_embeddings:
        return (embed_tokens or _build_embedding(config, tp)).weight

    return sharded_parameter(
        name="lm_head.weight",
        global_shape=(config.vocab_size, config.hidden_size),
        component="lm_head",
        kind="matrix",
        initialize=normal(config.initializer_range),
        tp=tp,
        shard_dim=0,
    )


def parameter_specs(config: Model) -> dict[str, ParameterSpec]:
    """Maps exported names to the specifications of all parameters; allocates nothing."""
    with torch.device("meta"):
        parameters = parameters_by_name(Decoder(config))
    return {name: parameter.spec for name, parameter in parameters.items()}


def parameter_shapes(config: Model) -> dict[str, tuple[int, ...]]:
    """Maps exported names to global shapes of all parameters; allocates nothing."""
    return {name: spec.global_shape for name, spec in parameter_specs(config).items()}
