"""The attention variants: a row for each, with what configuration checks, plan, export and reports must know.

A new variant is a row here, and where it replaces the attention itself a module, a subclass of
`attention.core.CoreAttention`, which knows its own costs. Nothing else lists the variants. The files that travel with
an export cannot read this table; tests/exported/test_configuration.py holds them to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

TRANSFORMERS, STOCK, VLLM = "transformers", "stock", "vllm"
EXPORT_TARGETS = (TRANSFORMERS, STOCK, VLLM)
LATENT_KEYS = ("key_latent_dim", "value_latent_dim", "key_frequencies")
"""Keys of the section `model` that count with `hlc_form: latent` alone."""
LATENT_SUFFIX = "-latent"
"""Behind the name of a variant in sweeps and reports, where its `hlc_form` is `latent`."""
_COMBINATION_KEYS = ("hlc_mixes", "hlc_init", "hlc_form", *LATENT_KEYS)
_HEAD_NORM_KEYS = ("head_norm_affine", "head_norm_init", "head_norm_eps")

_NO_NORM_IN_STOCK = "no stock architecture norms the outputs of its heads, and the norm cannot be folded into weights"
_NO_SCORES_IN_VLLM = "vLLM attends once a layer, and hands out no scores"
_CACHES_AS_IT_IS = "this variant caches its heads as they are, and vLLM loads that"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What an attention variant is made of.

    Args:
        name: value of `model.attention_variant`.
        color, line_style: of its lines in reports.
        combines_kv: keys and values are combinations of component heads (`hlc_k`, `hlc_v`).
        head_norm: the output of every head is normalised.
        heads_per_output: query heads that one output comes from; they stay on one tensor rank.
        combines_scores: matrices combine the heads' scores, which no fused kernel hands out and no tensor group shards.
        output_scale: the largest factor on the output of a head at the start of training.
        core_attention: `module:class` of the `CoreAttention` in its layers; empty for softmax attention.
        own_keys: keys of the section `model` that this variant alone reads.
        not_exported: reason by export target, for those of `EXPORT_TARGETS` that cannot hold it.
        baselines: variants that `report` compares it with.
    """

    name: str
    color: str
    line_style: str = "-"
    combines_kv: bool = False
    head_norm: bool = False
    heads_per_output: int = 1
    combines_scores: bool = False
    output_scale: float = 1.0
    core_attention: str = ""
    own_keys: tuple[str, ...] = ()
    not_exported: Mapping[str, str] = field(default_factory=dict)
    baselines: tuple[str, ...] = ("plain",)

    @property
    def ignored_keys(self) -> dict[str, str]:
        """The keys of the section `model` that have no effect on this variant, and why."""
        ignored = {} if self.combines_kv else dict.fromkeys(_COMBINATION_KEYS, f"`{self.name}` has no head combination")
        if not self.head_norm:
            ignored |= dict.fromkeys(_HEAD_NORM_KEYS, f"`{self.name}` has no head norm")
        for other in VARIANTS.values():
            if other is not self:
                ignored |= dict.fromkeys(other.own_keys, f"`{other.name}` alone reads it")

        return ignored

    @property
    def export_targets(self) -> tuple[str, ...]:
        """The export targets that can hold it, apart from what other settings rule out."""
        return tuple(target for target in EXPORT_TARGETS if target not in self.not_exported)


_ROWS = (
    Variant(name="plain", color="#444444", not_exported={VLLM: _CACHES_AS_IT_IS}, baselines=()),
    Variant(
        name="plain_norm",
        color="#8c6bb1",
        head_norm=True,
        not_exported={STOCK: _NO_NORM_IN_STOCK, VLLM: _CACHES_AS_IT_IS},
    ),
    Variant(
        name="mea",
        color="#d95f02",
        combines_kv=True,
        head_norm=True,
        not_exported={STOCK: _NO_NORM_IN_STOCK},
        baselines=("plain", "plain_norm", "mea_no_norm"),
    ),
    Variant(name="mea_no_norm", color="#1b9e77", combines_kv=True),
    Variant(
        name="differential",
        color="#1f78b4",
        head_norm=True,
        heads_per_output=2,
        # 1 - lambda_init of the first layer.
        output_scale=0.8,
        core_attention="megatron_mea.attention.differential:DifferentialAttention",
        not_exported={STOCK: _NO_NORM_IN_STOCK, VLLM: _NO_SCORES_IN_VLLM},
    ),
    Variant(
        name="talking_heads",
        color="#b8860b",
        combines_scores=True,
        core_attention="megatron_mea.attention.talking_heads:TalkingHeadsAttention",
        not_exported={STOCK: "no stock architecture mixes the scores of its heads", VLLM: _NO_SCORES_IN_VLLM},
    ),
    Variant(
        name="gated",
        color="#e7298a",
        core_attention="megatron_mea.attention.gated:GatedAttention",
        own_keys=("gate_width",),
        not_exported={
            STOCK: "no stock architecture gates the outputs of its heads",
            VLLM: "this variant caches its heads as they are, which leaves nothing to save",
        },
    ),
)
VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}
"""The rows by name, in the order in which messages and reports name them."""


def compared_variant(label: str) -> Variant:
    """The row by the name that sweeps and reports give a variant; one with latent keys and values has a row as well."""
    row = VARIANTS[label.removesuffix(LATENT_SUFFIX)]
    if label == row.name:
        return row

    return replace(row, name=label, line_style="--", baselines=(*row.baselines, row.name))


def extending_variants(variant: str) -> list[str]:
    """Variants with all parts of this one; what they have beyond it can start without effect.

    Those are combinations that start as identities and norms with gains of 1: a core attention of its own makes a
    variant incomparable to all others.
    """
    row = VARIANTS[variant]
    if row.core_attention:
        return [variant]

    return [
        other.name
        for other in VARIANTS.values()
        if not other.core_attention and other.combines_kv >= row.combines_kv and other.head_norm >= row.head_norm
    ]


def combining_variant(variant: str) -> str | None:
    """The variant that combines keys and values and is otherwise this one; None where there is none."""
    for name in extending_variants(variant):
        if VARIANTS[name].combines_kv and VARIANTS[name].head_norm == VARIANTS[variant].head_norm:
            return name

    return None
