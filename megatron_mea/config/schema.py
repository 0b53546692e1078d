"""Types, ranges and defaults of every configuration key, one class a section of the YAML."""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from megatron_mea.config.variants import LATENT_SUFFIX, VARIANTS, Variant

_NUMBER = re.compile(r"[-+]?((0|[1-9][\d_]*)(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?")
MAX_SIZE = 1 << 20
"""The largest size of a tensor's dimension: beyond it are typing errors, and numbers that take a machine's memory."""
MAX_LAYERS = 1000
"""The deepest transformers that were published (DeepNet) have so many."""
MAX_EXPERTS = 1 << 14
"""Experts of a layer; the largest that were published have a few hundred."""
MAX_COUNT = 10**12
"""The largest number of steps, samples or positions."""
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4096
"""Limits of Linux's file systems (NAME_MAX, PATH_MAX)."""


def _parse_float(value: Any) -> Any:
    """Turns text such as `3e-3` and `1e6`, which YAML 1.1 takes for no number, into a float; else the value itself."""
    return float(value) if isinstance(value, str) and len(value) < 400 and _NUMBER.fullmatch(value) else value


def _parse_int(value: Any) -> Any:
    value = _parse_float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_parse_int)]
Float = Annotated[float, BeforeValidator(_parse_float)]
PositiveInt = Annotated[Int, Field(gt=0, le=MAX_COUNT)]
Size = Annotated[Int, Field(gt=0, le=MAX_SIZE)]
PositiveFloat = Annotated[Float, Field(gt=0)]


def _check_path(path: str) -> str:
    if any(unicodedata.category(character) == "Cc" for character in path):
        raise ValueError("a path without line ends and other control characters")
    if len(os.fsencode(path)) >= _MAX_PATH_BYTES or max(map(len, os.fsencode(path).split(b"/"))) > _MAX_NAME_BYTES:
        raise ValueError(f"a path of fewer than {_MAX_PATH_BYTES} bytes, each name of {_MAX_NAME_BYTES} at most")

    return path


Path = Annotated[str, Field(min_length=1), AfterValidator(_check_path)]
Beta = Annotated[Float, Field(ge=0, lt=1)]


def _newest_or_step(value: Any) -> Any:
    # Checked here, since pydantic's message would name the first member of the union alone.
    value = _parse_int(value)
    if value == "newest" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError("newest, or the step of a checkpoint")


@dataclass(frozen=True, kw_only=True)
class OffValue:
    """Annotates a key whose default does more than the program did before the key: the value that does the same."""

    value: Any


class Section(BaseModel):
    """A section of the YAML: immutable, without unknown keys, types taken strictly."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class LinearRope(Section):
    rope_type: Literal["linear"]
    factor: Annotated[Float, Field(ge=1)]


class DynamicRope(Section):
    rope_type: Literal["dynamic"]
    factor: Annotated[Float, Field(ge=1)]


class YarnRope(Section):
    rope_type: Literal["yarn"]
    factor: Annotated[Float, Field(ge=1)]
    original_max_position_embeddings: PositiveInt
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: PositiveFloat | None = None
    mscale_all_dim: PositiveFloat | None = None
    truncate: bool = True


class Llama3Rope(Section):
    rope_type: Literal["llama3"]
    factor: Annotated[Float, Field(ge=1)]
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt


RopeScaling = Annotated[LinearRope | DynamicRope | YarnRope | Llama3Rope, Field(discriminator="rope_type")]


EXPERT_KEYS = (
    *("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("mlp_only_layers", "decoder_sparse_step"),
)
"""Keys that count where `num_experts` is above 0, and that decide on what the model computes."""


PairCounts = Annotated[list[Annotated[Int, Field(ge=0, le=MAX_SIZE)]], Field(max_length=MAX_SIZE)]
"""Pairs of each of the d/2 frequencies."""


Side = Literal["k", "v"]
"""Keys or values."""


class Model(Section):
    vocab_size: Size = 32000
    hidden_size: Size = 512
    intermediate_size: Size = 1408
    num_hidden_layers: Annotated[Int, Field(gt=0, le=MAX_LAYERS)] = 8
    num_attention_heads: Size = 8
    num_key_value_heads: Size = 4
    num_component_heads: Size | Annotated[list[Size], Field(max_length=MAX_LAYERS)] | None = None
    head_dim: Size = 64
    attention_variant: Literal[*VARIANTS] = "mea"
    hlc_init: Literal["block", "orthogonal", "normal"] = "block"
    hlc_mixes: Literal["both", "keys", "values"] = "both"
    hlc_form: Literal["head", "latent"] = "head"
    key_latent_dim: Size | Annotated[list[Size], Field(max_length=MAX_LAYERS)] | None = None
    value_latent_dim: Size | Annotated[list[Size], Field(max_length=MAX_LAYERS)] | None = None
    key_frequencies: Annotated[list[PairCounts], Field(max_length=MAX_LAYERS)] | None = None
    gate_width: Literal["feature", "head"] = "feature"
    qk_norm: bool = False
    attention_bias: bool = False
    head_norm_affine: bool = True
    head_norm_init: PositiveFloat = 1.0
    head_norm_eps: PositiveFloat = 1e-5
    rms_norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 500000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: PositiveInt = 2048
    tie_word_embeddings: bool = False
    initializer_range: PositiveFloat = 0.02
    embedding_initializer_range: PositiveFloat | None = None
    num_experts: Annotated[Int, Field(ge=0, le=MAX_EXPERTS)] = 0
    num_experts_per_tok: Size = 8
    moe_intermediate_size: Size | None = None
    norm_topk_prob: bool = True
    mlp_only_layers: Annotated[list[Annotated[Int, Field(ge=0)]], Field(max_length=MAX_LAYERS)] = []
    decoder_sparse_step: PositiveInt = 1
    router_aux_loss_coef: Annotated[Float, Field(ge=0)] = 0.001

    def is_routed(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts in place of a dense feed-forward; as Qwen3-MoE counts."""
        is_sparse = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return is_sparse and layer not in self.mlp_only_layers

    @property
    def routed_layers(self) -> list[int]:
        """The layers that have experts, counted from 0."""
        return [layer for layer in range(self.num_hidden_layers) if self.is_routed(layer)]

    @property
    def component_heads(self) -> list[int]:
        """Number of component heads (h') of each layer."""
        heads = self.num_key_value_heads if self.num_component_heads is None else self.num_component_heads
        return list(heads) if isinstance(heads, list) else [heads] * self.num_hidden_layers

    @property
    def key_latent_dims(self) -> list[int]:
        """Cached numbers of a token's keys in each layer, with `hlc_form: latent`."""
        return self._latent_dims(self.key_latent_dim)

    @property
    def value_latent_dims(self) -> list[int]:
        """Cached numbers of a token's values in each layer, with `hlc_form: latent`."""
        return self._latent_dims(self.value_latent_dim)

    def _latent_dims(self, dims: int | list[int] | None) -> list[int]:
        dims = self.num_key_value_heads * self.head_dim if dims is None else dims
        return list(dims) if isinstance(dims, list) else [dims] * self.num_hidden_layers

    def component_width(self, layer: int, side: Side) -> int:
        """Features that a layer's key or value projection gives and the cache holds: h' d, or latent numbers."""
        if self.hlc_form == "latent":
            return (self.key_latent_dims if side == "k" else self.value_latent_dims)[layer]

        return self.component_heads[layer] * self.head_dim

    @property
    def pair_counts(self) -> list[list[int]]:
        """Cached pairs of each of the d/2 frequencies in each layer, with `hlc_form: latent`.

        Without `key_frequencies` as many of each as can be, one more of the lowest where they do not divide evenly.
        """
        if self.key_frequencies is not None:
            return self.key_frequencies

        frequencies = self.head_dim // 2
        shares = [divmod(dim // 2, frequencies) for dim in self.key_latent_dims]
        return [[each] * (frequencies - more) + [each + 1] * more for each, more in shares]

    @property
    def variant(self) -> Variant:
        """The row of `attention_variant` in the registry."""
        return VARIANTS[self.attention_variant]

    @property
    def variant_label(self) -> str:
        """The name of the variant in sweeps and reports, by which `compared_variant` finds its row."""
        return self.attention_variant + (LATENT_SUFFIX if self.hlc_form == "latent" else "")

    @property
    def has_hlc(self) -> bool:
        """Whether the variant combines keys or values (HLC)."""
        return self.variant.combines_kv

    @property
    def mixes_keys(self) -> bool:
        """Whether layers have `hlc_k`."""
        return self.has_hlc and self.hlc_mixes in ("both", "keys")

    @property
    def mixes_values(self) -> bool:
        """Whether layers have `hlc_v`."""
        return self.has_hlc and self.hlc_mixes in ("both", "values")

    @property
    def has_head_norm(self) -> bool:
        """Whether each query head's output is normalised by itself."""
        return self.variant.head_norm

    @property
    def output_dim(self) -> int:
        """Features of an output of the attention: `head_dim` for each head that it comes from."""
        return self.variant.heads_per_output * self.head_dim

    @property
    def mixes_heads(self) -> bool:
        """Whether layers have matrices that combine heads: `hlc_k`, `hlc_v`, or those of their scores."""
        return self.has_hlc or self.variant.combines_scores

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """The RoPE settings as transformers 5 writes them into a `config.json`."""
        scaling = self.rope_scaling.model_dump(exclude_none=True) if self.rope_scaling else {}
        return {"rope_type": "default", "rope_theta": self.rope_theta} | scaling


MAX_CORPORA = 10_000
"""Weights are rounded to 1/10,000, and no corpus gets less."""


class TrainCorpus(Section):
    path: Path
    weight: PositiveFloat = 1.0


class Data(Section):
    tokenizer: Path
    train: Annotated[list[TrainCorpus], Field(max_length=MAX_CORPORA)]
    validation: Annotated[list[TrainCorpus], Field(max_length=MAX_CORPORA)] = []
    seq_length: PositiveInt = 1024
    document_mask: Annotated[bool, OffValue(value=False)] = True


class Parallel(Section):
    tensor_model_parallel_size: Size = 1
    pipeline_model_parallel_size: Size = 1
    context_parallel_size: Size = 1
    expert_model_parallel_size: Size = 1
    sequence_parallel: bool = False
    zero_stage: Annotated[Int, Field(ge=0, le=3)] = 1
    timeout_minutes: Annotated[PositiveFloat, Field(le=525_600)] = 10.0


class Optimizer(Section):
    lr: PositiveFloat = 3e-3
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[Float, Field(ge=0)] = 0.1
    decay_hlc: bool = False
    grad_clip: PositiveFloat = 1.0


class Schedule(Section):
    kind: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_steps: Annotated[Int, Field(ge=0, le=MAX_COUNT)] = 100
    min_lr_ratio: Annotated[Float, Field(ge=0, le=1)] = 0.1
    decay_steps: PositiveInt | None = None


class Distillation(Section):
    teacher: Path
    weight: Annotated[Float, Field(gt=0, le=1)] = 0.5
    temperature: PositiveFloat = 1.0


class Training(Section):
    steps: PositiveInt | None = None
    tokens: Annotated[PositiveFloat, Field(le=1e18)] | None = None
    global_batch_size: Size = 64
    micro_batch_size: Size = 4
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    deterministic: bool = False
    balance: Literal["sequence", "batch", "none"] = "sequence"
    router_z_loss_coef: Annotated[Float, Field(ge=0)] = 0.0
    replica_check_interval: PositiveInt | None = 1000
    distillation: Distillation | None = None
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 1234


class Evaluation(Section):
    interval: PositiveInt = 100
    batches: PositiveInt = 16


class Checkpoint(Section):
    interval: PositiveInt = 500
    keep: PositiveInt = 3
    keep_every: PositiveInt | None = None
    async_save: bool = True


class Profile(Section):
    start: PositiveInt
    steps: PositiveInt


class Logging(Section):
    interval: PositiveInt = 10
    tensorboard: bool = True
    sample_hashes: bool = False
    profile: Profile | None = None


class Run(Section):
    dir: Path
    init_from: Path | None = None
    resume_from: Annotated[Literal["newest"] | int, BeforeValidator(_newest_or_step)] = "newest"


class Config(Section):
    model: Model = Model()
    data: Data
    parallel: Parallel = Parallel()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    run: Run

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, which `load._resolve` has filled in."""
        assert self.training.steps is not None
        return self.training.steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.training.global_batch_size * self.data.seq_length
