"""The workload that every formula of `plan` starts from: a configuration on a layout, and each stage's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from megatron_mea.attention.hlc import folding_is_cheaper, folding_once_per_step_pays
from megatron_mea.config.layout import Layout
from megatron_mea.config.schema import Config, Model
from megatron_mea.model.decoder import Decoder, StageLayers
from megatron_mea.model.stages import pipeline_stages
from megatron_mea.parallel.cross_entropy import chunk_size
from megatron_mea.parallel.grid import TensorGroup
from megatron_mea.parallel.parameter import parameters_by_name

Device = Literal["cuda", "cpu"]
Side = Literal["k", "v"]


@dataclass(frozen=True, kw_only=True)
class LocalParameter:
    """One rank's shard of a parameter: `local_numel` elements of `global_numel`."""

    name: str
    kind: str
    local_numel: int
    global_numel: int


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


@dataclass(frozen=True, kw_only=True)
class KVProjection:
    """The form in which a rank computes the key or the value heads of a layer (attention/hlc.py).

    Args:
        form: plain, folded or combined.
        num_components, num_composites: h' and h, of all ranks.
        sharded: whether the projection's rows are sharded over the tensor group.
        shards_composites: whether each rank has composite heads of its own (t divides h).
    """

    form: Literal["plain", "folded", "combined"]
    num_components: int
    num_composites: int
    sharded: bool
    shards_composites: bool


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A configuration on a layout. `device` decides on kernels: a GPU's save less for the backward pass.

    `teacher` is the same with the teacher of `training.distillation` in the model's place; its `trains` is False.
    """

    config: Config
    layout: Layout
    device: Device = "cuda"
    teacher: Workload | None = None
    trains: bool = True

    @property
    def model(self) -> Model:
        """The configuration's `model` section."""
        return self.config.model

    @property
    def element_bytes(self) -> int:
        """Bytes of an element in the parameter dtype."""
        return 2 if self.config.training.precision == "bf16" else 4

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.config.training.micro_batch_size * self.config.data.seq_length

    @property
    def sequence_shards(self) -> int:
        """Number of ranks over which sequence parallelism shards activations; 1 without it."""
        return self.layout.tensor if self.config.parallel.sequence_parallel else 1

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
        """Whether heads are folded outside of the recomputed blocks (`fold_outside` in training/build.py)."""
        return self.config.parallel.zero_stage < 3

    @property
    def folds_once_per_step(self) -> bool:
        """Whether all micro-batches of a step share one fold of a weight (attention/folds.py)."""
        pays = folding_once_per_step_pays(
            micro_batches=self.layout.micro_batches,
            tokens=self.tokens,
            hidden_size=self.model.hidden_size,
            tensor=self.layout.tensor,
            pipeline=self.layout.pipeline,
            zero_stage=self.config.parallel.zero_stage,
        )
        return self.trains and self.model.has_hlc and pays

    @property
    def zero_stage(self) -> int:
        """ZeRO stage as it runs: 0 runs as 1 (training/engine.py)."""
        return max(self.config.parallel.zero_stage, 1)

    @property
    def local_vocab_size(self) -> int:
        """Rows of the vocabulary that a rank holds: the largest shard."""
        return -(-self.model.vocab_size // self.layout.tensor)

    @property
    def loss_chunk_tokens(self) -> int:
        """Tokens whose logits exist at a time: all of a micro-batch where a teacher needs them."""
        return self.tokens if self.teacher else chunk_size(self.tokens, self.local_vocab_size)

    @property
    def local_heads(self) -> int:
        """Query heads of a rank."""
        return self.model.num_attention_heads // self.layout.tensor

    @property
    def local_composites(self) -> int:
        """Composite heads that a rank computes."""
        return max(self.model.num_key_value_heads // self.layout.tensor, 1)

    def kv_projection(self, layer: int, side: Side) -> KVProjection:
        """The form in which `HeadProjection` computes a layer's keys or values in training."""
        model, tensor = self.model, self.layout.tensor
        num_components, num_composites = model.component_heads[layer], model.num_key_value_heads
        combines = model.mixes_keys if side == "k" else model.mixes_values

        form: Literal["plain", "folded", "combined"] = "plain"
        if combines:
            folds = folding_is_cheaper(
                tokens=self.tokens,
                hidden_size=model.hidden_size,
                num_components=num_components,
                num_composites=num_composites,
                tensor_parallel_size=tensor,
            )
            form = "folded" if folds or self.folds_once_per_step else "combined"

        return KVProjection(
            form=form,
            num_components=num_components,
            num_composites=num_composites,
            sharded=tensor > 1 and num_components * model.head_dim % tensor == 0,
            shards_composites=num_composites % tensor == 0,
        )

    @cached_property
    def stages(self) -> tuple[StageShard, ...]:
        """Shard of tensor rank 0 of every stage: no rank holds more, since shorter shards come last."""
        return tuple(self.stage(index) for index in range(self.layout.pipeline))

    @cached_property
    def _stage_layers(self) -> list[StageLayers]:
        return pipeline_stages(self.model, self.layout.pipeline)

    def stage(self, index: int, tensor_rank: int = 0) -> StageShard:
        """A rank's shard of pipeline stage `index`, read from a decoder on the meta device, which takes no memory."""
        layers = self._stage_layers[index]
        with torch.device("meta"):
            decoder = Decoder(
                config=self.model, tp=TensorGroup(size=self.layout.tensor, rank=tensor_rank), stage=layers
            )

        parameters = tuple(
            LocalParameter(
                name=name,
                kind=parameter.spec.kind,
                local_numel=parameter.numel(),
                global_numel=torch.Size(parameter.spec.global_shape).numel(),
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
