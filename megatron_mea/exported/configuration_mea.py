"""Configuration of a Multi-head Explicit Attention (MEA) decoder. Travels with every export."""

from typing import NamedTuple

from transformers.configuration_utils import PreTrainedConfig


class Variant(NamedTuple):
    """Parts of an attention variant: combined keys and values, normalised heads, query heads for each output."""

    combines_kv: bool = False
    head_norm: bool = False
    heads_per_output: int = 1


VARIANTS = {
    "plain": Variant(),
    "plain_norm": Variant(head_norm=True),
    "mea": Variant(combines_kv=True, head_norm=True),
    "mea_no_norm": Variant(combines_kv=True),
    "differential": Variant(head_norm=True, heads_per_output=2),
    "talking_heads": Variant(),
    "gated": Variant(),
}


class MEAConfig(PreTrainedConfig):
    """A Llama-like decoder whose key and value heads are learned combinations of component heads.

    `num_key_value_heads` (h) are the composite heads that the queries attend to; `num_component_heads` (h',
    an int or one per layer) are the heads that the projections produce and the cache stores. See
    "Multi-head Explicit Attention", arXiv 2601.19611.
    """

    model_type = "mea"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    num_component_heads: int | list[int] | None = None
    head_dim: int = 64
    attention_variant: str = "mea"
    hlc_init: str = "block"
    hlc_mixes: str = "both"
    hlc_form: str = "head"
    key_latent_dim: int | list[int] | None = None
    value_latent_dim: int | list[int] | None = None
    key_frequencies: list[list[int]] | None = None
    gate_width: str = "feature"
    qk_norm: bool = False
    attention_bias: bool = False
    head_norm_affine: bool = True
    head_norm_init: float = 1.0
    head_norm_eps: float = 1e-5
    rms_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    embedding_initializer_range: float | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 8
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    mlp_only_layers: list[int] | None = None
    decoder_sparse_step: int = 1
    router_aux_loss_coef: float = 0.001
    attention_dropout: float = 0.0
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        for name, allowed in (
            ("attention_variant", tuple(VARIANTS)),
            ("hlc_mixes", ("both", "keys", "values")),
            ("hlc_form", ("head", "latent")),
            ("gate_width", ("feature", "head")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r} (expected: {', '.join(allowed)})")

        heads = self.num_component_heads or self.num_key_value_heads
        heads = list(heads) if isinstance(heads, (list, tuple)) else [heads] * self.num_hidden_layers
        if len(heads) != self.num_hidden_layers:
            raise ValueError(
                f"num_component_heads has {len(heads)} entries (expected: one number, or one for each of the "
                f"{self.num_hidden_layers} layers)"
            )

        if set(heads) != {self.num_key_value_heads} and not (self.mixes_keys and self.mixes_values):
            raise ValueError(
                f"num_component_heads is {heads} (expected where keys or values are not combined: "
                f"num_key_value_heads = {self.num_key_value_heads})"
            )

        self._check_latent(heads)

        group = self.variant.heads_per_output
        if self.num_attention_heads % group or self.num_key_value_heads % group:
            raise ValueError(
                "num_attention_heads and num_key_value_heads are "
                f"{self.num_attention_heads} and {self.num_key_value_heads} (expected for {self.attention_variant}: "
                f"multiples of {group})"
            )

        if self.num_experts and not (self.moe_intermediate_size and 0 < self.num_experts_per_tok <= self.num_experts):
            raise ValueError(
                f"num_experts_per_tok and moe_intermediate_size are {self.num_experts_per_tok} and "
                f"{self.moe_intermediate_size} (expected: 1 to num_experts = {self.num_experts}, and a width)"
            )

        self.mlp_only_layers = list(self.mlp_only_layers or ())
        self.num_component_heads = heads
        super().__post_init__(**kwargs)

    def _check_latent(self, component_heads: list[int]):
        """Checks and completes the sizes of latent keys and values: a number for each layer."""
        if self.hlc_form == "head":
            for name in ("key_latent_dim", "value_latent_dim", "key_frequencies"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is set (expected where hlc_form is head: None)")
            return

        if not (self.mixes_keys and self.mixes_values):
            raise ValueError(f"hlc_form is latent (expected for {self.attention_variant}: head)")
        if set(component_heads) != {self.num_key_value_heads}:
            raise ValueError(
                f"num_component_heads has {min(component_heads)} (expected where hlc_form is latent: None, or "
                f"num_key_value_heads = {self.num_key_value_heads})"
            )

        width = self.num_key_value_heads * self.head_dim
        for name in ("key_latent_dim", "value_latent_dim"):
            dims = width if getattr(self, name) is None else getattr(self, name)
            dims = list(dims) if isinstance(dims, (list, tuple)) else [dims] * self.num_hidden_layers
            if len(dims) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(dims)} entries (expected: one number, or one for each of the "
                    f"{self.num_hidden_layers} layers)"
                )
            if outside := [dim for dim in dims if not 1 <= dim <= width]:
                raise ValueError(f"{name} has {outside[0]} (expected: 1 to num_key_value_heads x head_dim = {width})")

            setattr(self, name, dims)

        if self.key_frequencies is not None and len(self.key_frequencies) != self.num_hidden_layers:
            raise ValueError(
                f"key_frequencies has {len(self.key_frequencies)} entries (expected: one list for each of the "
                f"{self.num_hidden_layers} layers)"
            )

        for layer_idx, dim in enumerate(self.key_latent_dim):
            counts = self.pair_counts(layer_idx)
            most = self.num_key_value_heads
            in_range = all(0 <= count <= most for count in counts)
            if len(counts) != self.head_dim // 2 or 2 * sum(counts) != dim or not in_range:
                raise ValueError(
                    f"key_frequencies of layer {layer_idx} are {counts} (expected: head_dim / 2 = {self.head_dim // 2} "
                    f"numbers from 0 to num_key_value_heads = {most}, with the sum key_latent_dim / 2 = {dim / 2:g})"
                )

    def pair_counts(self, layer_idx: int) -> list[int]:
        """Cached pairs of each of the head_dim / 2 frequencies; by default as even as can be, more of the lowest."""
        if self.key_frequencies is not None:
            return self.key_frequencies[layer_idx]

        frequencies = self.head_dim // 2
        each, more = divmod(self.key_latent_dim[layer_idx] // 2, frequencies)
        return [each] * (frequencies - more) + [each + 1] * more

    @property
    def variant(self) -> Variant:
        """Parts of `attention_variant`."""
        return VARIANTS[self.attention_variant]

    @property
    def mixes_keys(self) -> bool:
        """Whether keys are combined from component heads."""
        return self.variant.combines_kv and self.hlc_mixes in ("both", "keys")

    @property
    def mixes_values(self) -> bool:
        """Whether values are combined from component heads."""
        return self.variant.combines_kv and self.hlc_mixes in ("both", "values")

    @property
    def has_head_norm(self) -> bool:
        """Whether each query head's output is normalised."""
        return self.variant.head_norm

    def is_routed(self, layer_idx: int) -> bool:
        """Whether a layer, counted from 0, has experts in place of a dense feed-forward."""
        is_sparse = self.num_experts > 0 and (layer_idx + 1) % self.decoder_sparse_step == 0
        return is_sparse and layer_idx not in self.mlp_only_layers


__all__ = ["MEAConfig"]
