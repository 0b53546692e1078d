"""Bytes that a micro-batch keeps for its backward pass, counted from the code of model/ and attention/.

On a GPU torch's RMSNorm is one kernel, which keeps its input in the working precision and a number a row; the
head norm's keeps its input alone. On a CPU both are composed and keep a float32 input, its normalised values and that
number.
"""

from __future__ import annotations

from megatron_mea.cluster.setting import Setting, Stage

FLOAT32 = 4


def stage_activations(setting: Setting, stage: Stage) -> int:
    """Of one micro-batch on one rank of a stage, without the loss."""
    tokens, size, hidden = setting.tokens, setting.number_bytes, setting.model.hidden_size
    local = tokens // setting.sequence_parts
    kept = 2 * tokens * 8
    if stage.blocks:
        # cos and sin, which all blocks share.
        kept += 2 * tokens * setting.model.head_dim * size
        if setting.model.attention_variant == "talking_heads":
            # Which tokens each one attends to.
            seq = setting.config.data.seq_length
            kept += tokens * seq if setting.config.data.document_mask else seq * seq
    if setting.recomputes:
        kept += len(stage.blocks) * local * hidden * size
        if setting.folds_outside:
            kept += sum(folded_weights(setting, layer) for layer in stage.blocks)
    else:
        kept += sum(block_activations(setting, layer) for layer in stage.blocks)
    if stage.has_head:
        kept += norm_activations(setting, local, hidden) + tokens * hidden * size
    elif setting.layout.pipeline > 1:
        # What was sent on: DeepSpeed holds it until its gradient comes back.
        kept += local * hidden * size
    return kept


def recomputed_activations(setting: Setting, layer: int) -> int:
    """What is there for a block's backward pass alone, beside what is kept until then."""
    if setting.recomputes:
        given = folded_weights(setting, layer) if setting.folds_outside else 0
        return block_activations(setting, layer) - given
    if setting.recomputes_parts:
        inner = setting.tokens * (setting.model.intermediate_size // setting.layout.tensor) * setting.number_bytes
        return max(2 * inner, attention_activations(setting) - _projected(setting))
    return 0


def _projected(setting: Setting) -> int:
    """Queries, keys and values."""
    width = (setting.heads + 2 * setting.composites) * setting.model.head_dim
    return setting.tokens * width * setting.number_bytes


def block_activations(setting: Setting, layer: int) -> int:
    """Of one block and micro-batch on one rank: two norms, attention, feed-forward."""
    model, size, tokens = setting.model, setting.number_bytes, setting.tokens
    local = tokens // setting.sequence_parts
    norms = 2 * norm_activations(setting, local, model.hidden_size)
    # What q, k, v and gate, up read.
    inputs = 2 * tokens * model.hidden_size * size
    # gate, up, and where they are kept silu(gate) and the product
    pieces = 2 if setting.recomputes_parts else 4
    feed_forward = pieces * tokens * (model.intermediate_size // setting.layout.tensor) * size
    projections = projection_activations(setting, layer, "k") + projection_activations(setting, layer, "v")
    attention = _projected(setting) if setting.recomputes_parts else attention_activations(setting)
    return norms + inputs + feed_forward + projections + attention


def attention_activations(setting: Setting) -> int:
    """Of queries, keys and values to the input of o_proj; the kernel keeps no weights but a number a query."""
    model, size, tokens = setting.model, setting.number_bytes, setting.tokens
    width = setting.heads * model.head_dim
    keys = setting.composites * model.head_dim
    kept = tokens * (2 * width + 2 * keys) * size
    if model.attention_variant == "talking_heads":
        # Logits, mixed weights; weights in float32 and, where that is another type, in the working precision.
        scores = tokens * setting.config.data.seq_length * setting.heads
        kept += scores * (2 * size + FLOAT32 + (size if size < FLOAT32 else 0))
    elif model.attention_variant == "differential":
        # A kernel for each half of the values, which are repeated; what both kernels make is an input of the norm.
        kept += tokens * (2 * width + keys) * size + 2 * tokens * setting.heads * FLOAT32
        # lambda, its two exponentials
        kept += 3 * FLOAT32
    else:
        kept += tokens * setting.heads * FLOAT32
    if model.qk_norm:
        kept += norm_activations(setting, tokens * setting.heads, model.head_dim)
        kept += norm_activations(setting, tokens * setting.composites, model.head_dim)
    if model.has_head_norm:
        # Its own output is what o_proj reads. Its input is kept already, and on a GPU it keeps nothing else.
        kept += tokens * width * size
        if setting.device == "cpu":
            is_same = size == FLOAT32 or model.attention_variant == "differential"
            shared = tokens * width * size if is_same else 0
            rows = tokens * width // model.output_dim
            kept += norm_activations(setting, rows, model.output_dim, model.head_norm_affine) - shared
    return kept


def projection_activations(setting: Setting, layer: int, which: str) -> int:
    """Of a head combination, beyond what attention keeps of its result.

    Folded: the folded weight, and the component weight where it is a copy, which is gathered; once a step they are no
    micro-batch's (`step_folds`). Combined: the component heads of all tokens.
    """
    model, size, how = setting.model, setting.number_bytes, setting.projection(layer, which)
    components = how.components * model.head_dim
    if how.form == "combined":
        return setting.tokens * components * size
    if how.form == "plain":
        gathers = how.cut and not how.own_columns
        return components * model.hidden_size * size if gathers else 0
    return 0 if setting.folds_once_a_step else _folded(setting, layer, which)


def folded_weights(setting: Setting, layer: int) -> int:
    """Of a layer and micro-batch, where heads are folded."""
    names = [which for which in "kv" if setting.projection(layer, which).form == "folded"]
    return sum(projection_activations(setting, layer, which) for which in names)


def step_folds(setting: Setting, stage: Stage) -> int:
    """Of a whole step: folded weights that all micro-batches use, and the float32 sums of their gradients."""
    if not setting.folds_once_a_step:
        return 0
    rows = setting.composites * setting.model.head_dim * setting.model.hidden_size
    names = [(layer, which) for layer in stage.blocks for which in "kv"]
    folded = [each for each in names if setting.projection(*each).form == "folded"]
    return sum(_folded(setting, *each) + rows * FLOAT32 for each in folded)


def _folded(setting: Setting, layer: int, which: str) -> int:
    how = setting.projection(layer, which)
    copy = how.components if how.cut else 0
    return (setting.composites + copy) * setting.model.head_dim * setting.model.hidden_size * setting.number_bytes


def norm_activations(setting: Setting, rows: int, width: int, affine: bool = True) -> int:
    """Of an RMSNorm over `rows` vectors, without its output."""
    if setting.device == "cuda":
        return rows * (width * setting.number_bytes + FLOAT32)
    return rows * (width * FLOAT32 * (2 if affine else 1) + FLOAT32)
