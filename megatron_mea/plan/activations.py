"""Bytes that a micro-batch saves for its backward pass, counted from the code of model/ and attention/.

On a GPU torch's RMSNorm is one kernel, which saves its input in the parameter dtype and one float32 a row; the head
norm's kernel saves its input alone. On a CPU both are composed and save a float32 input, its normalised values and that
float32 a row.
"""

from __future__ import annotations

from megatron_mea.attention.core import FLOAT32
from megatron_mea.config.schema import Side
from megatron_mea.plan.workload import StageShard, Workload


def stage_activations(workload: Workload, stage: StageShard) -> int:
    """Bytes that one micro-batch saves on one rank of a pipeline stage, without the loss."""
    tokens, element_bytes, hidden = workload.tokens, workload.element_bytes, workload.model.hidden_size
    local_tokens = tokens // workload.dims.sequence_shards

    # Two int64 a token, such as its id and its position; positions are those of all context ranks.
    saved_bytes = (tokens + workload.full_tokens) * 8
    if stage.blocks:
        saved_bytes += _cos_sin_bytes(workload, stage)
        saved_bytes += workload.core_attention.mask_bytes(
            workload.attention_sizes, document_mask=workload.config.data.document_mask
        )

    if workload.full_recompute:
        saved_bytes += len(stage.blocks) * local_tokens * hidden * element_bytes
        if workload.folds_outside_recompute:
            saved_bytes += sum(folded_weights(workload, layer) for layer in stage.blocks)
    else:
        saved_bytes += sum(block_activations(workload, layer) for layer in stage.blocks)

    if stage.has_head:
        saved_bytes += norm_activations(workload=workload, rows=local_tokens, width=hidden)
        saved_bytes += tokens * hidden * element_bytes
    elif workload.dims.pp > 1:
        # DeepSpeed holds the hidden states that it sent on until their gradient comes back.
        saved_bytes += local_tokens * hidden * element_bytes

    return saved_bytes


def _cos_sin_bytes(workload: Workload, stage: StageShard) -> int:
    """Bytes of cos and sin, which all blocks share.

    Over a context group those of all tokens too, where keys are combined and normed before they are rotated.
    """
    tokens, model = workload.tokens, workload.model
    combines = any(workload.kv_projection(layer, "k").form == "components" for layer in stage.blocks)
    if model.qk_norm and combines:
        tokens += workload.full_tokens

    return 2 * tokens * model.head_dim * workload.element_bytes


def recomputed_activations(workload: Workload, layer: int) -> int:
    """Bytes that exist during a block's backward pass alone, in addition to those saved until then."""
    if workload.full_recompute:
        saved_bytes = folded_weights(workload, layer) if workload.folds_outside_recompute else 0
        return block_activations(workload, layer) - saved_bytes

    if workload.selective_recompute:
        return max(_inner_bytes(workload, layer), _recomputed_attention(workload, layer))

    return 0


def _recomputed_attention(workload: Workload, layer: int) -> int:
    """Bytes that the selective recomputation of a block's attention adds."""
    return attention_activations(workload, layer) - _attention_input_bytes(workload, layer)


def context_backward(workload: Workload, layer: int) -> int:
    """Bytes beyond what the forward pass saves, while the attention of a block runs backwards over a context group.

    The feed-forward has run by then. Gradients of the keys and values of all tokens exist beside those of this rank's
    queries and outputs and of the residual stream.
    """
    sizes = workload.attention_sizes
    recomputed_bytes = 0
    if workload.full_recompute:
        recomputed_bytes = recomputed_activations(workload, layer)
    elif workload.selective_recompute:
        recomputed_bytes = _recomputed_attention(workload, layer)

    gradients = 2 * sizes.query_bytes + 2 * sizes.key_bytes
    residual = workload.tokens // workload.dims.sequence_shards * workload.model.hidden_size * workload.element_bytes
    return recomputed_bytes - feed_forward_activations(workload, layer) + gradients + residual


def gathered_kv_bytes(*, workload: Workload, layer: int, side: Side) -> int:
    """Bytes of the key or value heads that a context group gathers in a layer: components or composites."""
    return workload.full_tokens * _projected_width(workload, layer, side) * workload.element_bytes


def _projected_width(workload: Workload, layer: int, side: Side) -> int:
    """Features of the keys or values that a rank's projection makes."""
    projection = workload.kv_projection(layer, side)
    is_component = projection.form == "components"
    return projection.component_width if is_component else workload.local_composites * workload.model.head_dim


def _attention_input_bytes(workload: Workload, layer: int) -> int:
    """Bytes of this rank's queries, keys and values as projected, and of the core attention's own projections."""
    sizes = workload.attention_sizes
    width = sum(_projected_width(workload, layer, side) for side in ("k", "v"))
    projected_bytes = workload.core_attention.projected_bytes(sizes)
    return sizes.query_bytes + sizes.tokens * width * workload.element_bytes + projected_bytes


def block_activations(workload: Workload, layer: int) -> int:
    """Bytes that one block saves of a micro-batch on one rank: two norms, attention, feed-forward."""
    model, element_bytes, tokens = workload.model, workload.element_bytes, workload.tokens
    local_tokens = tokens // workload.dims.sequence_shards
    norms = 2 * norm_activations(workload=workload, rows=local_tokens, width=model.hidden_size)

    # The input of q, k, v.
    inputs = tokens * model.hidden_size * element_bytes
    projections = sum(projection_activations(workload=workload, layer=layer, side=side) for side in ("k", "v"))
    attention_bytes = _attention_input_bytes if workload.selective_recompute else attention_activations
    attention = attention_bytes(workload, layer)
    feed_forward = feed_forward_activations(workload, layer)

    return norms + inputs + feed_forward + projections + attention


def feed_forward_activations(workload: Workload, layer: int) -> int:
    """Bytes that a block's feed-forward saves, its input included."""
    model, tokens, element_bytes = workload.model, workload.tokens, workload.element_bytes
    # gate and up, and unless they are recomputed silu(gate) and the product
    products = (1 if workload.selective_recompute else 2) * _inner_bytes(workload, layer)
    if not model.is_routed(layer):
        return tokens * model.hidden_size * element_bytes + products

    # An expert's input and output, and the output's weight.
    rows = workload.expert_rows * (2 * model.hidden_size + 1) * element_bytes
    return _router_activations(workload) + rows + products


def _router_activations(workload: Workload) -> int:
    """Bytes that a router saves on every rank of a tensor group; it computes in float32."""
    model, training = workload.model, workload.config.training
    # Probabilities of all experts; of each choice its probability, expert and place among the rows.
    token_bytes = model.hidden_size * FLOAT32 + model.num_experts * FLOAT32 + model.num_experts_per_tok * (8 + 8)
    if model.norm_topk_prob:
        token_bytes += (model.num_experts_per_tok + 1) * FLOAT32
    if training.router_z_loss_coef:
        token_bytes += (model.num_experts + 1) * FLOAT32

    rounds = workload.element_bytes < FLOAT32
    weight_copy = model.num_experts * model.hidden_size * FLOAT32 if rounds else 0
    return workload.tokens * token_bytes + weight_copy


def feed_forward_temporaries(workload: Workload, layer: int) -> int:
    """Bytes beyond what is saved, while a block's feed-forward runs forwards or backwards."""
    model, tokens, element_bytes = workload.model, workload.tokens, workload.element_bytes
    # The gradients around the block.
    gradients = 2 * tokens * model.hidden_size * element_bytes
    if not model.is_routed(layer):
        # The gradients of both factors of the product.
        return gradients + _inner_bytes(workload, layer)

    # Backward the gradients of the experts' weighted outputs, of the outputs, and of the weights before their sum;
    # forward the weighted outputs, and a place for every choice of a token, also of other ranks' experts.
    rows, choices = workload.expert_rows, tokens * model.num_experts_per_tok
    return gradients + max(3 * rows, rows + choices) * model.hidden_size * element_bytes


def _inner_bytes(workload: Workload, layer: int) -> int:
    """Bytes of the two tensors between the matrices of a block's feed-forward that are as wide as it is inside."""
    model = workload.model
    if model.is_routed(layer):
        numel = workload.expert_rows * model.moe_intermediate_size
    else:
        numel = workload.tokens * (model.intermediate_size // workload.dims.tp)

    return 2 * numel * workload.element_bytes


def attention_activations(workload: Workload, layer: int) -> int:
    """Bytes saved from queries, keys and values to the input of o_proj."""
    model, sizes, core_attention = workload.model, workload.attention_sizes, workload.core_attention
    saved_bytes = core_attention.saved_bytes(sizes) + core_attention.transform_saved_bytes(sizes)
    saved_bytes += _context_activations(workload)

    combined = [side for side in ("k", "v") if workload.kv_projection(layer, side).form == "components"]
    # The components of all tokens.
    saved_bytes += sum(gathered_kv_bytes(workload=workload, layer=layer, side=side) for side in combined)

    if model.qk_norm:
        key_tokens = sizes.kv_tokens if combined else sizes.tokens
        rows = sizes.tokens * sizes.num_heads + key_tokens * sizes.num_kv_heads
        saved_bytes += norm_activations(workload=workload, rows=rows, width=model.head_dim)

    if model.has_head_norm:
        # Its output is the input of o_proj. Its input is saved already, and on a GPU it saves nothing else.
        saved_bytes += sizes.query_bytes
        if workload.device == "cpu":
            shared_bytes = sizes.query_bytes if core_attention.saves_output(sizes) else 0
            rows = sizes.tokens * sizes.num_heads * model.head_dim // model.output_dim
            saved_bytes += (
                norm_activations(workload=workload, rows=rows, width=model.output_dim, affine=model.head_norm_affine)
                - shared_bytes
            )

    return saved_bytes


def _context_activations(workload: Workload) -> int:
    """Bytes that attention saves in addition over a context group on a CPU: a call for each chunk of queries.

    Their outputs are saved beside what they are joined to, and keys and values repeated for every query head: on the
    first rank those of the second chunk, all of them.
    """
    sizes, calls = workload.attention_sizes, workload.core_attention.kernel_calls
    if workload.dims.cp == 1 or workload.device == "cuda":
        return 0

    return calls * (sizes.query_bytes + 2 * sizes.kv_tokens * sizes.num_heads * workload.head_bytes)


def projection_activations(*, workload: Workload, layer: int, side: Side) -> int:
    """Bytes that a head combination saves, apart from the keys or values that attention saves.

    Folded: the folded weight, and the component weight where it was gathered into a copy; where a step folds once,
    these belong to no micro-batch (`step_folds`). Combined: the component heads of this rank's tokens.
    """
    model, element_bytes = workload.model, workload.element_bytes
    projection = workload.kv_projection(layer, side)
    component_width = projection.component_width

    if projection.form == "components":
        return 0
    if projection.form == "combined":
        return workload.tokens * component_width * element_bytes
    if projection.form == "plain":
        gathers_weight = projection.sharded and not projection.shards_composites
        return component_width * model.hidden_size * element_bytes if gathers_weight else 0

    return 0 if workload.folds_once_per_step else _fold_bytes(workload=workload, layer=layer, side=side)


def folded_weights(workload: Workload, layer: int) -> int:
    """Bytes that a layer's folded keys and values save for a micro-batch."""
    folded = [side for side in ("k", "v") if workload.kv_projection(layer, side).form == "folded"]
    return sum(projection_activations(workload=workload, layer=layer, side=side) for side in folded)


def step_folds(workload: Workload, stage: StageShard) -> int:
    """Bytes held for a full step: folded weights that all micro-batches share, and float32 sums of their gradients."""
    if not workload.folds_once_per_step:
        return 0

    folded_numel = workload.local_composites * workload.model.head_dim * workload.model.hidden_size
    return sum(
        _fold_bytes(workload=workload, layer=layer, side=side) + folded_numel * FLOAT32
        for layer in stage.blocks
        for side in ("k", "v")
        if workload.kv_projection(layer, side).form == "folded"
    )


def _fold_bytes(*, workload: Workload, layer: int, side: Side) -> int:
    """Bytes of a folded weight, and of the component weight where it was gathered."""
    projection = workload.kv_projection(layer, side)
    gathered_width = projection.component_width if projection.sharded else 0
    rows = workload.local_composites * workload.model.head_dim + gathered_width
    return rows * workload.model.hidden_size * workload.element_bytes


def norm_activations(*, workload: Workload, rows: int, width: int, affine: bool = True) -> int:
    """Bytes that an RMSNorm over `rows` vectors of `width` elements saves, without its output."""
    if workload.device == "cuda":
        return rows * (width * workload.element_bytes + FLOAT32)
    return rows * (width * FLOAT32 * (2 if affine else 1) + FLOAT32)
