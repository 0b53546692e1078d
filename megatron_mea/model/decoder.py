"""The decoder as a flat list of layers: embedding, blocks, head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mea.attention.attention import Attention
from megatron_mea.attention.documents import Attend, causal, visible_tokens, within_documents
from megatron_mea.attention.folds import Folds, fold
from megatron_mea.attention.talking_heads import talking
from megatron_mea.config.schema import Model
from megatron_mea.huggingface.convert import to_hf_config
from megatron_mea.huggingface.rotary_mea import inverse_frequencies, rotary_cos_sin
from megatron_mea.parallel.collectives import enter, leave
from megatron_mea.parallel.cross_entropy import chunk_size, linear_cross_entropy_sum
from megatron_mea.parallel.grid import ALONE, TensorGroup
from megatron_mea.parallel.layers import Embedding, Linear, RMSNorm, cross_entropy_sum
from megatron_mea.parallel.parameter import declare, named_specs, normal
from megatron_mea.parallel.recompute import recomputed

Recompute = Literal["none", "selective", "full"]


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)).

    Args:
        recompute: keep gate and up as they are projected, and make the rest anew in the backward pass.
    """

    def __init__(self, config: Model, layer: int, tp: TensorGroup = ALONE, recompute: bool = False) -> None:
        super().__init__()
        self.tp, self.recompute = tp, recompute
        name = f"model.layers.{layer}.mlp"
        hidden, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_proj = Linear(f"{name}.gate_proj", hidden, inner, std, tp=tp, shard_dim=0)
        self.up_proj = Linear(f"{name}.up_proj", hidden, inner, std, tp=tp, shard_dim=0)
        output_std = std / math.sqrt(2 * config.num_hidden_layers)
        self.down_proj = Linear(f"{name}.down_proj", inner, hidden, output_std, tp=tp, shard_dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = enter(x, self.tp)
        return leave(recomputed(self._down, self.gate_proj(x), self.up_proj(x), when=self.recompute), self.tp)

    def _down(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: Model, layer: int, tp: TensorGroup = ALONE, recompute: bool = False) -> None:
        super().__init__()

        def norm(which: str) -> RMSNorm:
            name = f"model.layers.{layer}.{which}"
            return RMSNorm(name, config.hidden_size, config.rms_norm_eps, tp=tp, partial=tp.sequence_parallel)

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = Attention(config, layer, tp, recompute)
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = FeedForward(config, layer, tp, recompute)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend, folded: Folds
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend, folded)
        return x + self.mlp(self.post_attention_layernorm(x))


class Projection(nn.Module):
    """The language-model head, its rows cut over the tensor group.

    Args:
        weight: (vocab_size, hidden_size), this rank's rows; a tied embedding's, or its own.
    """

    def __init__(self, config: Model, weight: nn.Parameter, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp, self.vocab_size, self.rows = tp, config.vocab_size, tp.span(config.vocab_size)
        self.weight = weight

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, seq, hidden) -> logits (batch, seq, this rank's part of the vocabulary).

        With targets (batch, seq) -> the sum of the cross-entropies, a float32 scalar, of logits that are made in chunks
        where there are many.
        """
        weight, own = self.weight, self.rows.stop - self.rows.start
        # The last ranks' parts may be longer than their share of the vocabulary. Only then: the gradient of a slice is
        # a matrix of zeros and a copy.
        weight = weight if own == len(weight) else weight[:own]
        if targets is None:
            return F.linear(x, weight)
        x, targets = x.flatten(0, 1), targets.flatten()
        # The largest part decides: ranks must agree.
        chunk = chunk_size(len(x), -(-self.vocab_size // self.tp.size))
        if chunk < len(x):
            return linear_cross_entropy_sum(x, weight, targets, self.rows.start, self.tp, chunk)
        logits = F.linear(x, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy_sum(logits, targets, self.vocab_size, self.tp)


class Head(nn.Module):
    """Final norm and language-model head; the latter takes targets instead of making logits."""

    def __init__(self, config: Model, weight: nn.Parameter, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp = tp
        self.norm = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps, tp=tp, partial=tp.sequence_parallel)
        self.project = Projection(config, weight, tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) -> what is projected, (batch, seq, hidden), whole on every rank"""
        return enter(self.norm(x), self.tp)


class Decoder(nn.Module):
    """A Llama-like decoder, or one pipeline stage of it.

    Args:
        config: the `model` section.
        recompute: what is made anew in the backward pass instead of being kept: `full`, each block; `selective`, what
            follows from its projections without a matrix of parameters: attention, its norms and the gate.
        compiled: blocks are compiled, where they are trained.
        fold_outside: fold a block's keys and values outside of what is recomputed and compiled. Not where parameters
            are partitioned (ZeRO 3): there they exist inside their module's forward pass alone.
        tp: the tensor group of this rank.
        stage: which layers to make: 0 is the embedding, then the blocks, the last one the head; None: all.
            Where embeddings are tied and the two ends lie on different stages, each has a copy of the matrix.
        document_mask: attention stays inside documents, which begin where position ids are zero.
    """

    def __init__(
        self,
        config: Model,
        recompute: Recompute = "none",
        tp: TensorGroup = ALONE,
        stage: range | None = None,
        document_mask: bool = False,
        compiled: bool = False,
        fold_outside: bool = True,
    ) -> None:
        super().__init__()
        self.tp, self.vocab_size = tp, config.vocab_size
        self.hf_config = to_hf_config(config)
        # No buffer: those are rounded with the parameters, and have no memory on the device "meta".
        self._frequencies = torch.tensor(inverse_frequencies(self.hf_config)[0], dtype=torch.float64, device="cpu")
        self.recompute, self.document_mask, self.fold_outside = recompute, document_mask, fold_outside
        self._trained = _compiled(config.num_hidden_layers) if compiled else run_block
        self.heads_talk = config.attention_variant == "talking_heads"
        stage = range(config.num_hidden_layers + 2) if stage is None else stage
        self.layers = nn.ModuleList()
        embed = None
        for index in stage:
            if index == 0:
                embed = _embedding(config, tp)
                self.layers.append(embed)
            elif index <= config.num_hidden_layers:
                self.layers.append(Block(config, index - 1, tp, recompute == "selective"))
            else:
                self.layers.append(Head(config, _head_weight(config, embed, tp), tp))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum of the cross-entropies (nats) of all targets that are not `IGNORE`; a float32 scalar.

        All arguments are (batch, seq); `targets[:, i]` is what should follow `input_ids[:, i]`.
        """
        return self.loss(self.run(input_ids, position_ids), targets)

    def loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """What `run` returns on the last stage, and targets (batch, seq) -> the sum of the cross-entropies"""
        return self.layers[-1].project(x, targets)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """What `run` returns on the last stage -> (batch, seq, this rank's part of the vocabulary)"""
        return self.layers[-1].project(x)

    @property
    def blocks(self) -> list[Block]:
        """Of this stage."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def run(self, x: torch.Tensor, position_ids: torch.Tensor, folded: Sequence[Folds] | None = None) -> torch.Tensor:
        """Through the layers of this stage, but for the projection to logits.

        Args:
            x: (batch, seq) token ids on the first stage, hidden states (batch, seq, hidden) on the others, with
                sequence parallelism this rank's part of the sequence.
            position_ids: (batch, seq)
            folded: of every block, what is folded already.

        Returns:
            hidden states; on the last stage those behind the final norm, whole on every rank.
        """
        angles: tuple[torch.Tensor, ...] | None = None
        attend: Attend = causal
        given = iter(folded) if folded is not None else None
        for layer in self.layers:
            if not isinstance(layer, Block):
                x = layer(x)
                continue
            if angles is None:
                self._frequencies = self._frequencies.to(position_ids.device)
                cos_sin = rotary_cos_sin(self.hf_config, position_ids, x.dtype, self._frequencies)
                # shape: (batch, seq, d) -> (batch, 1, seq, d), the same for all heads
                angles = tuple(angle.unsqueeze(1) for angle in cos_sin)
                attend = self._attend(position_ids)
            if given is not None:
                folds = next(given)
            else:
                folds = fold(layer.self_attn, position_ids.numel()) if self.fold_outside else (None, None)
            # Hooks that watch a validation are not seen by what is compiled.
            run = self._trained if torch.is_grad_enabled() else run_block
            x = recomputed(run, layer, x, *angles, attend, folds, when=self.recompute == "full")
        return x

    def _attend(self, position_ids: torch.Tensor) -> Attend:
        """How tokens of these positions (batch, seq) attend to one another, in every block."""
        if self.heads_talk:
            return talking(visible_tokens(position_ids, self.document_mask))
        return within_documents(position_ids) if self.document_mask else causal


def run_block(
    block: Block, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend, folded: Folds
) -> torch.Tensor:
    """What is compiled: one function, so that blocks of one shape share their code."""
    return block(x, cos, sin, attend, folded)


def _compiled(layers: int) -> Callable[..., torch.Tensor]:
    """`run_block` compiled; torch gives up silently at more graphs of a function than it allows, 8 of itself."""
    import torch._dynamo

    # Layers may all differ in their number of component heads.
    limit = max(torch._dynamo.config.recompile_limit, 4 * layers)
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 8 * limit)
    return torch.compile(run_block, dynamic=False)


def _embedding(config: Model, tp: TensorGroup) -> Embedding:
    std = config.embedding_initializer_range or config.initializer_range
    return Embedding("model.embed_tokens", config.vocab_size, config.hidden_size, std, tp)


def _head_weight(config: Model, embed: Embedding | None, tp: TensorGroup) -> nn.Parameter:
    if config.tie_word_embeddings:
        return (embed or _embedding(config, tp)).weight
    shape = (config.vocab_size, config.hidden_size)
    return declare("lm_head.weight", shape, "matrix", normal(config.initializer_range), tp, 0)


def parameter_shapes(config: Model) -> dict[str, tuple[int, ...]]:
    """Global shape of every parameter by exported name; allocates nothing."""
    with torch.device("meta"):
        return {name: parameter.spec.shape for name, parameter in named_specs(Decoder(config)).items()}
