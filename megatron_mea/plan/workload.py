"""The workload that every formula of `plan` starts from: a configuration on a layout, and each stage's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from megatron_mea.attention.core import AttentionSizes, CoreAttention, core_attention_class
from megatron_mea.attention.hlc import Form, folding_is_cheaper
from megatron_mea.attention.latent import latent_folding_is_cheaper
from megatron_mea.attention.mea import combination_numel, combination_products, components_are_gathered
from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.config.schema import Config, Model, Side
from megatron_mea.model.decoder import Decoder, StageLayers
from megatron_mea.model.stages import pipeline_stages
from megatron_mea.optimizers import state_bytes
from megatron_mea.parallel.cross_entropy import chunk_size
from megatron_mea.parallel.grid import TensorGroup
from megatron_mea.parallel.parameter import Component, parameters_by_name

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True, kw_only=True)
class LocalParameter:
    """One rank's shard of a parameter: `local_numel` elements of `global_numel`.

    `state_bytes` are those of an element's master weight and optimizer state, which a checkpoint stores too.
    """

    name: str
    component: Component
    local_numel: int
    global_numel: int
    state_bytes: int


@dataclass(frozen=True, kw_only=True)
class StageShard:
    """The part of the model that one rank of a pipeline stage holds.

    Args:
        index: of the stage.
        blocks: indices of the decoder's blocks.
        has_embedding, has_head: whether it is the first, the last.
        parameters: this rank's shards, in order of declaration.
    """

    index: int
    blocks: tuple[int, ...]
    has_embedding: bool
    has_head: bool
    parameters: tuple[LocalParameter, ...]

    @property
    def local_numel(self) -> int:
        """Elements of all parameters that the rank holds, before ZeRO partitions them."""
        return sum(parameter.local_numel for parameter in self.parameters)

    @property
    def state_bytes(self) -> int:
        """Bytes of the master weights and the optimizer state of them all, before ZeRO partitions them."""
        return sum(parameter.local_numel * parameter.state_bytes for parameter in self.parameters)


@dataclass(frozen=True, kw_only=True)
class KVProjection:
    """The form in which a rank computes the key or the value heads of a layer (attention/hlc.py).

    Args:
        form: plain, folded, combined, or components, which are combined once a context group has gathered them.
        component_width: features of all components, h' d or latent numbers, of all ranks.
        hlc_numel: elements of the combination, of all ranks.
        combination_products: multiplications of combining the components of a token, of all ranks.
        sharded: whether the projection's rows are sharded over the tensor group.
        shards_composites: whether each rank has composite heads of its own (t divides h).
    """

    form: Form
    component_width: int
    hlc_numel: int
    combination_products: int
    sharded: bool
    shards_composites: bool


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A configuration on a layout. `device` decides on kernels: a GPU's save less for the backward pass.

    `teacher` is the same with the teacher of `training.distillation` in the model's place; its `trains` is False.
    `expert_load` is what a rank's experts compute: an equal share of all choices, or as many as can fall on them.
    """

    config: Config
    dims: ParallelDims
    device: Device = "cuda"
    teacher: Workload | None = None
    trains: bool = True
    expert_load: Literal["mean", "worst"] = "mean"

    @property
    def model(self) -> Model:
        """The configuration's `model` section."""
        return self.config.model

    @property
    def element_bytes(self) -> int:
        """Bytes of an element in the parameter dtype."""
        return 2 if self.config.training.precision == "bf16" else 4

    @property
    def head_bytes(self) -> int:
        """Bytes of a token's features in a head."""
        return self.model.head_dim * self.element_bytes

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a rank."""
        return self.full_tokens // self.dims.cp

    @property
    def full_tokens(self) -> int:
        """Tokens of a micro-batch, all of whose positions, keys and values every rank of a context group holds."""
        return self.config.training.micro_batch_size * self.config.data.seq_length

    @property
    def full_recompute(self) -> bool:
        """Whether backward recomputes full blocks."""
        return self.config.training.activation_checkpointing == "full"

    @property
    def selective_recompute(self) -> bool:
        """Whether backward recomputes those parts of a block that need no matrix of parameters."""
        return self.config.training.activation_checkpointing == "selective"

    @property
    def folds_outside_recompute(self) -> bool:
        """Whether heads are folded outside of the recomputed blocks (`Decoder.fold_outside`)."""
        return self.dims.folds_outside

    @property
    def folds_once_per_step(self) -> bool:
        """Whether all micro-batches of a step share one fold of a weight (attention/folds.py)."""
        pays = self.dims.folds_once_per_step(tokens=self.tokens, hidden_size=self.model.hidden_size)
        return self.trains and self.model.has_hlc and pays

    @property
    def local_vocab_size(self) -> int:
        """Rows of the vocabulary that a rank holds: the largest shard."""
        return -(-self.model.vocab_size // self.dims.tp)

    @property
    def loss_chunk_tokens(self) -> int:
        """Tokens whose logits exist at a time: all of a micro-batch where a teacher needs them."""
        return self.tokens if self.teacher else chunk_size(self.tokens, self.local_vocab_size)

    @property
    def local_heads(self) -> int:
        """Query heads of a rank."""
        return self.model.num_attention_heads // self.dims.tp

    @property
    def local_composites(self) -> int:
        """Composite heads that a rank computes."""
        return max(self.model.num_key_value_heads // self.dims.tp, 1)

    @property
    def expert_rows(self) -> int:
        """Rows of a routed layer on a rank: a token for each of its choices among the rank's experts."""
        num_choices = self.model.num_experts_per_tok
        if self.expert_load == "worst":
            return self.tokens * min(num_choices, self.model.num_experts // self.dims.tp)

        return -(-self.tokens * num_choices // self.dims.tp)

    @property
    def core_attention(self) -> type[CoreAttention]:
        """The class of the core attention, which knows its costs."""
        return core_attention_class(self.model)

    @property
    def attention_sizes(self) -> AttentionSizes:
        """Sizes of a micro-batch in an attention layer on one rank."""
        return AttentionSizes(
            config=self.model,
            tokens=self.tokens,
            kv_tokens=self.full_tokens,
            seq_length=self.config.data.seq_length,
            num_heads=self.local_heads,
            num_kv_heads=self.local_composites,
            element_bytes=self.element_bytes,
        )

    def kv_projection(self, layer: int, side: Side) -> KVProjection:
        """The form in which `KeyValueProjection` computes a layer's keys or values in training."""
        model, tensor = self.model, self.dims.tp
        component_width, num_composites = model.component_width(layer, side), model.num_key_value_heads
        combines = model.mixes_keys if side == "k" else model.mixes_values

        # A teacher's parameters are not partitioned.
        fold_outside = self.dims.folds_outside or not self.trains
        form: Form = "plain"
        if combines and components_are_gathered(
            model, layer, side=side, tp_size=tensor, cp_size=self.dims.cp, fold_outside=fold_outside
        ):
            form = "components"
        elif combines:
            form = "folded" if self.folds_once_per_step or self._folding_is_cheaper(layer, side) else "combined"

        return KVProjection(
            form=form,
            component_width=component_width,
            hlc_numel=combination_numel(model, layer, side=side),
            combination_products=combination_products(model, layer, side=side),
            sharded=tensor > 1 and component_width % tensor == 0,
            shards_composites=num_composites % tensor == 0,
        )

    def _folding_is_cheaper(self, layer: int, side: Side) -> bool:
        model, component_width = self.model, self.model.component_width(layer, side)
        shared = {"tokens": self.tokens, "hidden_size": model.hidden_size, "tensor_parallel_size": self.dims.tp}
        if model.hlc_form == "latent":
            composite_width = model.num_key_value_heads * model.head_dim
            return latent_folding_is_cheaper(latent=component_width, composite=composite_width, **shared)

        return folding_is_cheaper(
            num_components=model.component_heads[layer], num_composites=model.num_key_value_heads, **shared
        )

    @cached_property
    def stages(self) -> tuple[StageShard, ...]:
        """Shard of tensor rank 0 of every stage: no rank holds more, since shorter shards come last."""
        return tuple(self.stage(index) for index in range(self.dims.pp))

    @cached_property
    def _stage_layers(self) -> list[StageLayers]:
        return pipeline_stages(self.model, self.dims.pp, seq_length=self.config.data.seq_length)

    def stage(self, index: int, tensor_rank: int = 0) -> StageShard:
        """A rank's shard of pipeline stage `index`, read from a decoder on the meta device, which takes no memory."""
        layers = self._stage_layers[index]
        with torch.device("meta"):
            decoder = Decoder(config=self.model, tp=TensorGroup(size=self.dims.tp, rank=tensor_rank), stage=layers)

        parameters = tuple(
            LocalParameter(
                name=name,
                component=parameter.spec.component,
                local_numel=parameter.numel(),
                global_numel=torch.Size(parameter.spec.global_shape).numel(),
                state_bytes=state_bytes(parameter.spec),
            )
            for name, parameter in parameters_by_name(decoder).items()
        )
        return StageShard(
            index=index,
            blocks=tuple(layers.blocks),
            has_embedding=layers.embedding,
            has_head=layers.head,
            parameters=parameters,
        )
