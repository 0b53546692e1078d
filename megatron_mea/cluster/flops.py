"""Floating-point operations of training: 2 for a multiplication and an addition; matrix products only."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mea.cluster.setting import Setting


@dataclass(frozen=True)
class Flops:
    """FLOPs a token of the whole model, all ranks together.

    What ranks of a tensor group compute alike counts once. `recomputation` is a second forward pass of the blocks,
    or of their attention, with activation checkpointing; `teacher` the forward pass of another model.
    """

    forward: float
    backward: float
    recomputation: float
    teacher: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recomputation + self.teacher


def flops_per_token(setting: Setting) -> Flops:
    """Forward 2 x matrix parameters + attention + head combination; backward twice that (Kaplan, arXiv 2001.08361).

    Attention is 4 x seq_length x H d: scores and weighted values for all pairs of tokens. The causal half that a
    kernel may leave out is not taken off, which is the usual convention.
    """
    layers = range(setting.model.num_hidden_layers)
    blocks = sum(block_flops(setting, layer) for layer in layers)
    forward = blocks + 2 * setting.model.hidden_size * setting.model.vocab_size
    teacher = flops_per_token(setting.teacher).forward if setting.teacher else 0.0
    return Flops(forward, 2 * forward, sum(_recomputed(setting, layer) for layer in layers), teacher)


def _recomputed(setting: Setting, layer: int) -> float:
    if setting.recomputes_parts:
        return attention_flops(setting)
    if not setting.recomputes:
        return 0.0
    # Recomputation ends with the last tensor that is needed, the input of down_proj.
    last = 2 * setting.model.hidden_size * setting.model.intermediate_size
    folds = sum(fold_flops(setting, layer, which) for which in "kv") if setting.folds_outside else 0.0
    return block_flops(setting, layer) - folds - last


def stage_flops(setting: Setting) -> tuple[float, ...]:
    """FLOPs a token of every pipeline stage, its tensor ranks together, a teacher's not counted."""
    head = 6 * setting.model.hidden_size * setting.model.vocab_size
    return tuple(
        sum(3 * block_flops(setting, layer) + _recomputed(setting, layer) for layer in stage.blocks)
        + head * stage.has_head
        for stage in setting.stages
    )


def block_flops(setting: Setting, layer: int) -> float:
    """FLOPs a token of one block's forward pass."""
    model = setting.model
    width = model.num_attention_heads * model.head_dim
    queries_and_output = 4 * model.hidden_size * width
    feed_forward = 6 * model.hidden_size * model.intermediate_size
    heads = head_flops(setting, layer, "k") + head_flops(setting, layer, "v")
    return queries_and_output + attention_flops(setting) + feed_forward + heads


def attention_flops(setting: Setting) -> float:
    """FLOPs a token of one layer's scores and weighted values."""
    model, seq = setting.model, setting.config.data.seq_length
    attention = 4 * seq * model.num_attention_heads * model.head_dim
    if model.attention_variant == "differential":
        # Each half of the values is attended to by itself.
        attention *= 2
    elif model.attention_variant == "talking_heads":
        attention += 4 * seq * model.num_attention_heads**2
    return attention


def head_flops(setting: Setting, layer: int, which: str) -> float:
    """FLOPs a token of one layer's keys or values: a projection, and its head combination in the form that runs.

    Folded (paper eq. 18) h h' d (hidden + bias) multiplications a micro-batch, or a step, and a projection to h heads;
    combined (eq. 10) a projection to h' heads and h h' d multiplications a token.
    """
    model, how = setting.model, setting.projection(layer, which)
    mixing = 2 * how.components * how.composites * model.head_dim
    heads = how.components if how.form == "combined" else how.composites
    projection = 2 * model.hidden_size * heads * model.head_dim
    if how.form == "plain":
        return projection
    if how.form == "combined":
        return projection + mixing
    return projection + fold_flops(setting, layer, which)


def fold_flops(setting: Setting, layer: int, which: str) -> float:
    """FLOPs a token of folding one layer's keys or values."""
    model, how = setting.model, setting.projection(layer, which)
    if how.form != "folded":
        return 0.0
    columns = model.hidden_size + (1 if model.attention_bias else 0)
    tokens = setting.tokens * (setting.layout.micro_batches if setting.folds_once_a_step else 1)
    return 2 * how.components * how.composites * model.head_dim * columns / tokens
