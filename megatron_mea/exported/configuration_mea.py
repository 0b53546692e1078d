"""Configuration of a Multi-head Explicit Attention (MEA) decoder. Travels with every export."""

from transformers.configuration_utils import PreTrainedConfig


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
    attention_dropout: float = 0.0
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        for name, allowed in (
            ("attention_variant", ("plain", "plain_norm", "mea", "mea_no_norm", "differential", "talking_heads")),
            ("hlc_mixes", ("both", "keys", "values")),
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

        if self.attention_variant == "differential" and (self.num_attention_heads % 2 or self.num_key_value_heads % 2):
            raise ValueError("num_attention_heads and num_key_value_heads are not both even (differential needs pairs)")

        self.num_component_heads = heads
        super().__post_init__(**kwargs)

    @property
    def mixes_keys(self) -> bool:
        """Whether keys are combined from component heads."""
        return self.attention_variant in ("mea", "mea_no_norm") and self.hlc_mixes in ("both", "keys")

    @property
    def mixes_values(self) -> bool:
        """Whether values are combined from component heads."""
        return self.attention_variant in ("mea", "mea_no_norm") and self.hlc_mixes in ("both", "values")

    @property
    def has_head_norm(self) -> bool:
        """Whether each query head's output is normalised."""
        return self.attention_variant in ("mea", "plain_norm", "differential")


__all__ = ["MEAConfig"]
