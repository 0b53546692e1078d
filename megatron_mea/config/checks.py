"""Every rule that involves several configuration keys, checked before anything is started or allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.config.schema import EXPERT_KEYS, Config
from megatron_mea.config.variants import LATENT_KEYS, VARIANTS
from megatron_mea.errors import Problem

_MASK_BLOCK = 128
"""Tokens of a block in FlexAttention's mask."""
_MIN_CONTEXT_TOKENS = 2048


def cross_checks(config: Config, *, needs_data: bool = True) -> Iterator[Problem]:
    """Contradictions between keys of one configuration; with `needs_data`, an empty `data.train` is one too."""
    if needs_data and not config.data.train:
        yield Problem(where="data.train", got="a list of 0", expected="at least 1")

    yield from _head_problems(config)
    yield from _rope_problems(config)
    yield from _component_problems(config)
    yield from _latent_problems(config)
    yield from _expert_problems(config)
    yield from _training_problems(config)

    if config.parallel.expert_model_parallel_size > 1:
        yield Problem(
            where="parallel.expert_model_parallel_size",
            got=config.parallel.expert_model_parallel_size,
            expected="1: experts are sharded over the tensor group (parallel.tensor_model_parallel_size)",
        )
    if config.training.compile and config.parallel.zero_stage == 3:
        reason = "DeepSpeed fetches the parameters of every module in hooks, each of which ends a graph"
        yield Problem(where="training.compile", got=True, expected=f"false where parallel.zero_stage is 3: {reason}")


def start_checks(config: Config) -> Iterator[Problem]:
    """Contradictions that a run must not start with; one that an older program began with them is read all the same."""
    settings = config.checkpoint
    if settings.keep_every is not None and settings.keep_every % settings.interval:
        yield Problem(
            where="checkpoint.keep_every",
            got=settings.keep_every,
            expected=f"a multiple of checkpoint.interval = {settings.interval}: there is no other checkpoint to keep",
        )


def config_warnings(config: Config, dims: ParallelDims) -> list[str]:
    """Warnings about allowed settings that are known to train badly or slowly."""
    return [
        *_embedding_warnings(config),
        *_pipeline_warnings(dims),
        *_context_warnings(config, dims),
        *_router_warnings(config),
    ]


def _context_warnings(config: Config, dims: ParallelDims) -> Iterator[str]:
    if dims.cp == 1:
        return

    tokens, where = config.data.seq_length // dims.cp, f"parallel.context_parallel_size = {dims.cp}"
    if tokens < _MIN_CONTEXT_TOKENS:
        yield (
            f"{where} leaves a rank {tokens:,} tokens of a sequence: below {_MIN_CONTEXT_TOKENS:,} gathering keys and "
            "values takes longer than sharing attention saves. Lower it; tensor parallelism or recomputation saves "
            "memory too."
        )
    if config.data.document_mask and tokens // 2 % _MASK_BLOCK:
        yield (
            f"{where} deals out chunks of {tokens // 2:,} tokens: on a GPU documents are masked in blocks of "
            f"{_MASK_BLOCK}, which would reach over the borders of chunks. Let data.seq_length be a multiple of "
            f"2 x {_MASK_BLOCK} x {dims.cp} = {2 * _MASK_BLOCK * dims.cp:,}."
        )


def _router_warnings(config: Config) -> Iterator[str]:
    model = config.model
    if model.num_experts and model.num_experts_per_tok == 1 and model.norm_topk_prob:
        yield (
            "one expert a token with model.norm_topk_prob has the weight 1 whatever the router says, which so learns "
            "from its own losses alone: set model.norm_topk_prob to false"
        )


def _pipeline_warnings(dims: ParallelDims) -> Iterator[str]:
    if dims.num_micro_batches < 2 * dims.pp and dims.pp > 1:
        yield (
            f"{dims.num_micro_batches} micro-batches in a pipeline of {dims.pp} stages leave each idle for "
            f"{dims.pipeline_bubble:.0%} of a step. Twice as many micro-batches as stages would be better: raise "
            "training.global_batch_size, or lower training.micro_batch_size or the number of processes."
        )


def _embedding_warnings(config: Config) -> Iterator[str]:
    model = config.model
    if not model.has_head_norm or config.run.init_from is not None:
        return

    embedding_std = model.embedding_initializer_range or model.initializer_range
    output_std = model.initializer_range / math.sqrt(2 * model.num_hidden_layers)
    gain = model.head_norm_init if model.head_norm_affine else 1.0
    branch_rms = output_std * math.sqrt(model.num_attention_heads * model.head_dim) * gain * model.variant.output_scale

    if embedding_std < branch_rms / 2:
        yield (
            f"the head norm makes each attention branch add RMS {branch_rms:.3g} at the start, and the embeddings have "
            f"only {embedding_std:.3g}: that start was measured to cost 0.2 to 0.4 nats early on "
            "(docs/initialisation.md). "
            f"Raise model.embedding_initializer_range to about {branch_rms:.2g} or lower model.head_norm_init."
        )


def _head_problems(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.num_attention_heads % model.num_key_value_heads:
        yield Problem(
            where="model.num_attention_heads",
            got=model.num_attention_heads,
            expected=f"a multiple of model.num_key_value_heads = {model.num_key_value_heads}",
        )

    if (group := model.variant.heads_per_output) > 1:
        for key in ("num_attention_heads", "num_key_value_heads"):
            if getattr(model, key) % group:
                yield Problem(
                    where=f"model.{key}",
                    got=getattr(model, key),
                    expected=f"a multiple of {group}: `{model.variant.name}` has one output for {group} heads",
                )

    if config.optimizer.decay_hlc and not model.mixes_heads:
        expected = f"false: `{model.attention_variant}` has no matrices that combine heads"
        yield Problem(where="optimizer.decay_hlc", got=True, expected=expected)
    if config.optimizer.decay_hlc and config.optimizer.weight_decay == 0:
        yield Problem(where="optimizer.decay_hlc", got=True, expected="false where optimizer.weight_decay is 0")

    if model.head_dim % 2:
        yield Problem(
            where="model.head_dim", got=model.head_dim, expected="an even number: RoPE rotates pairs of features"
        )


def _rope_problems(config: Config) -> Iterator[Problem]:
    scaling = config.model.rope_scaling
    if scaling is None:
        return

    if scaling.rope_type == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield Problem(
            where="model.rope_scaling.high_freq_factor",
            got=scaling.high_freq_factor,
            expected=f"more than low_freq_factor = {scaling.low_freq_factor}",
        )

    if scaling.rope_type == "yarn" and scaling.beta_fast < scaling.beta_slow:
        yield Problem(
            where="model.rope_scaling.beta_fast",
            got=scaling.beta_fast,
            expected=f"at least beta_slow = {scaling.beta_slow}",
        )

    if scaling.rope_type == "dynamic" and config.model.head_dim < 4:
        yield Problem(where="model.head_dim", got=config.model.head_dim, expected="at least 4 with dynamic RoPE")


def _component_problems(config: Config) -> Iterator[Problem]:
    model = config.model
    where, composite = "model.num_component_heads", model.num_key_value_heads
    heads = model.component_heads

    if len(heads) != model.num_hidden_layers:
        yield Problem(
            where=where,
            got=f"a list of {len(heads)}",
            expected=f"one number, or one a layer: model.num_hidden_layers = {model.num_hidden_layers}",
        )

    if max(heads, default=0) > composite:
        yield Problem(where=where, got=max(heads), expected=f"at most model.num_key_value_heads = {composite}")
    elif min(heads, default=composite) < composite:
        if not model.has_hlc:
            combining = [row.name for row in VARIANTS.values() if row.combines_kv]
            yield Problem(
                where=where,
                got=min(heads),
                expected=f"model.num_key_value_heads = {composite}, "
                f"since `{model.attention_variant}` does not combine heads",
                hint=f"choose the variant {' or '.join(combining)}, or lower model.num_key_value_heads",
            )
        elif model.hlc_mixes != "both":
            yield Problem(
                where="model.hlc_mixes",
                got=f"{model.hlc_mixes} with {min(heads)} component heads",
                expected=f"`both` where component heads are fewer than model.num_key_value_heads = {composite}",
            )

    for key, reason in model.variant.ignored_keys.items():
        default = type(model).model_fields[key].default
        if getattr(model, key) != default:
            allowed = "null" if default is None else default
            yield Problem(where=f"model.{key}", got=getattr(model, key), expected=f"{allowed}: {reason}")

    if model.has_head_norm and not model.head_norm_affine and model.head_norm_init != 1:
        yield Problem(
            where="model.head_norm_init", got=model.head_norm_init, expected="1.0 where model.head_norm_affine is false"
        )


def _latent_problems(config: Config) -> Iterator[Problem]:
    model = config.model
    if not model.has_hlc:
        return

    if model.hlc_form == "head":
        for key in LATENT_KEYS:
            if getattr(model, key) is not None:
                yield Problem(
                    where=f"model.{key}", got=getattr(model, key), expected="null where model.hlc_form is `head`"
                )
        return

    for key in ("hlc_mixes", "hlc_init"):
        default = type(model).model_fields[key].default
        if getattr(model, key) != default:
            expected = f"{default} where model.hlc_form is `latent`"
            yield Problem(where=f"model.{key}", got=getattr(model, key), expected=expected)
    if set(model.component_heads) != {model.num_key_value_heads}:
        yield Problem(
            where="model.num_component_heads",
            got=model.num_component_heads,
            expected=f"model.num_key_value_heads = {model.num_key_value_heads} where model.hlc_form is `latent`",
            hint="model.key_latent_dim and model.value_latent_dim are the size of its cache",
        )

    composite = model.num_key_value_heads * model.head_dim
    for key, dims in (("key_latent_dim", model.key_latent_dims), ("value_latent_dim", model.value_latent_dims)):
        if len(dims) != model.num_hidden_layers:
            yield Problem(
                where=f"model.{key}",
                got=f"a list of {len(dims)}",
                expected=f"one number, or one a layer: model.num_hidden_layers = {model.num_hidden_layers}",
            )
        if max(dims, default=0) > composite:
            expected = f"at most model.num_key_value_heads x model.head_dim = {composite}"
            yield Problem(where=f"model.{key}", got=max(dims), expected=expected)
        elif key == "key_latent_dim" and (odd := [dim for dim in dims if dim % 2]):
            yield Problem(where=f"model.{key}", got=odd[0], expected="even numbers: RoPE rotates pairs of features")

    if model.key_frequencies is not None:
        yield from _frequency_problems(config)


def _frequency_problems(config: Config) -> Iterator[Problem]:
    model, where = config.model, "model.key_frequencies"
    if len(model.pair_counts) != model.num_hidden_layers:
        yield Problem(
            where=where,
            got=f"a list of {len(model.pair_counts)}",
            expected=f"one a layer: model.num_hidden_layers = {model.num_hidden_layers}",
        )
        return

    for layer, (counts, dim) in enumerate(zip(model.pair_counts, model.key_latent_dims, strict=False)):
        if len(counts) != model.head_dim // 2:
            expected = f"model.head_dim / 2 = {model.head_dim // 2} numbers of pairs"
            yield Problem(where=f"{where}.{layer}", got=f"a list of {len(counts)}", expected=expected)
        elif max(counts) > model.num_key_value_heads:
            expected = f"at most model.num_key_value_heads = {model.num_key_value_heads}"
            yield Problem(where=f"{where}.{layer}", got=max(counts), expected=expected)
        elif 2 * sum(counts) != dim:
            expected = f"model.key_latent_dim / 2 = {dim // 2} pairs"
            yield Problem(where=f"{where}.{layer}", got=f"{sum(counts)} pairs", expected=expected)


def _expert_problems(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.num_experts == 0:
        # Settings that would be ignored silently: of routers, of experts and of their losses.
        keys = [(f"model.{key}", model, key) for key in (*EXPERT_KEYS, "router_aux_loss_coef")]
        keys += [(f"training.{key}", config.training, key) for key in ("balance", "router_z_loss_coef")]
        for where, section, key in keys:
            default = type(section).model_fields[key].default
            if getattr(section, key) != default:
                expected = f"{default} where model.num_experts is 0: there are no experts"
                yield Problem(where=where, got=getattr(section, key), expected=expected)
        return

    if model.moe_intermediate_size is None:
        expected = "the width of an expert, since model.num_experts is above 0"
        yield Problem(where="model.moe_intermediate_size", got="nothing", expected=expected)
    if model.num_experts_per_tok > model.num_experts:
        yield Problem(
            where="model.num_experts_per_tok",
            got=model.num_experts_per_tok,
            expected=f"at most model.num_experts = {model.num_experts}",
        )

    default = type(model).model_fields["router_aux_loss_coef"].default
    if config.training.balance == "none" and model.router_aux_loss_coef not in (0, default):
        expected = f"{default} or 0 where training.balance is none: there is no balance loss"
        yield Problem(where="model.router_aux_loss_coef", got=model.router_aux_loss_coef, expected=expected)

    layers = model.num_hidden_layers
    if outside := [layer for layer in model.mlp_only_layers if layer >= layers]:
        expected = f"layers from 0 to {layers - 1}: model.num_hidden_layers = {layers}"
        yield Problem(where="model.mlp_only_layers", got=outside[0], expected=expected)
    if not model.routed_layers:
        yield Problem(
            where="model.num_experts",
            got=f"{model.num_experts}, and no layer has them",
            expected="0, or a layer that model.mlp_only_layers and model.decoder_sparse_step leave",
        )


def _training_problems(config: Config) -> Iterator[Problem]:
    """Problems of the schedule, the sequence length, the profile and the batch."""
    schedule, steps = config.schedule, config.steps
    if schedule.warmup_steps >= steps:
        yield Problem(
            where="schedule.warmup_steps", got=schedule.warmup_steps, expected=f"fewer than training.steps = {steps}"
        )

    if schedule.kind == "wsd":
        steps_after_warmup = steps - schedule.warmup_steps
        if schedule.decay_steps is None:
            yield Problem(where="schedule.decay_steps", got="nothing", expected="a number of steps: `wsd` needs it")
        elif schedule.decay_steps > steps_after_warmup:
            yield Problem(
                where="schedule.decay_steps",
                got=schedule.decay_steps,
                expected=f"at most the steps after warm-up, {max(steps_after_warmup, 0)}",
            )
    elif schedule.decay_steps is not None:
        yield Problem(
            where="schedule.decay_steps",
            got=schedule.decay_steps,
            expected=f"null: `{schedule.kind}` has no decay phase",
        )

    if config.data.seq_length > config.model.max_position_embeddings:
        yield Problem(
            where="data.seq_length",
            got=config.data.seq_length,
            expected=f"at most model.max_position_embeddings = {config.model.max_position_embeddings}",
        )

    profile = config.logging.profile
    if profile is not None and profile.start + profile.steps - 1 > steps:
        got = f"start {profile.start}, steps {profile.steps}"
        yield Problem(
            where="logging.profile", got=got, expected=f"steps that end with training.steps = {steps} at the latest"
        )

    if config.training.global_batch_size % config.training.micro_batch_size:
        yield Problem(
            where="training.global_batch_size",
            got=config.training.global_batch_size,
            expected=f"a multiple of training.micro_batch_size = {config.training.micro_batch_size}",
        )
