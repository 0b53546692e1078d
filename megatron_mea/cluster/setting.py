"""What every formula of `plan` starts from: a configuration on a layout, and what each pipeline stage holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from megatron_mea.attention.hlc import folding_is_cheaper, folding_serves_a_step
from megatron_mea.config.layout import Layout
from megatron_mea.config.schema import Config, Model
from megatron_mea.model.decoder import Decoder
from megatron_mea.model.stages import pipeline_stages
from megatron_mea.parallel.cross_entropy import chunk_size
from megatron_mea.parallel.grid import TensorGroup
from megatron_mea.parallel.parameter import named_specs

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class LocalParameter:
    """One rank's part of a parameter: `size` numbers of `whole`."""

    name: str
    kind: str
    size: int
    whole: int


@dataclass(frozen=True)
class Stage:
    """What one rank of a pipeline stage holds.

    Args:
        index: of the stage.
        blocks: numbers of the decoder's blocks.
        has_embedding, has_head: whether it is the first, the last.
        parameters: this rank's parts, in order of declaration.
    """

    index: int
    blocks: tuple[int, ...]
    has_embedding: bool
    has_head: bool
    parameters: tuple[LocalParameter, ...]

    @property
    def size(self) -> int:
        """Numbers of all parameters that the rank holds."""
        return sum(parameter.size for parameter in self.parameters)


@dataclass(frozen=True)
class Projection:
    """How a rank makes the key or the value heads of a layer (attention/hlc.py).

    Args:
        form: plain, folded or combined.
        components, composites: h' and h, of all ranks.
        cut: whether the projection's rows are cut over the tensor group.
        own_columns: whether each rank has whole composite heads of its own (t divides h).
    """

    form: Literal["plain", "folded", "combined"]
    components: int
    composites: int
    cut: bool
    own_columns: bool


@dataclass(frozen=True)
class Setting:
    """A configuration on a layout. `device` decides on kernels: a GPU's keep less for the backward pass.

    `teacher` is the same with the teacher of `training.distillation` in the model's place, which does not learn.
    """

    config: Config
    layout: Layout
    device: Device = "cuda"
    teacher: Setting | None = None
    learns: bool = True

    @property
    def model(self) -> Model:
        return self.config.model

    @property
    def number_bytes(self) -> int:
        """Bytes of a number in the working precision."""
        return 2 if self.config.training.precision == "bf16" else 4

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.config.training.micro_batch_size * self.config.data.seq_length

    @property
    def sequence_parts(self) -> int:
        """In how many parts activations between the matrices are cut."""
        return self.layout.tensor if self.config.parallel.sequence_parallel else 1

    @property
    def recomputes(self) -> bool:
        """Whole blocks."""
        return self.config.training.activation_checkpointing == "full"

    @property
    def recomputes_parts(self) -> bool:
        """Of each block what needs no matrix of parameters."""
        return self.config.training.activation_checkpointing == "selective"

    @property
    def folds_outside(self) -> bool:
        """Whether heads are folded outside of what is recomputed (training/build.py)."""
        return self.config.parallel.zero_stage < 3

    @property
    def folds_once_a_step(self) -> bool:
        layout = self.layout
        sizes = (layout.micro_batches, self.tokens, self.model.hidden_size, layout.tensor, layout.pipeline)
        return self.learns and self.model.has_hlc and folding_serves_a_step(*sizes, self.config.parallel.zero_stage)

    @property
    def zero_stage(self) -> int:
        """As it runs: 0 is 1 (training/engine.py)."""
        return max(self.config.parallel.zero_stage, 1)

    @property
    def vocabulary(self) -> int:
        """Rows of the vocabulary that a rank holds: the largest part."""
        return -(-self.model.vocab_size // self.layout.tensor)

    @property
    def chunk(self) -> int:
        """Tokens whose logits are made at a time; all of a micro-batch where a teacher needs them."""
        return self.tokens if self.teacher else chunk_size(self.tokens, self.vocabulary)

    @property
    def heads(self) -> int:
        """Query heads of a rank."""
        return self.model.num_attention_heads // self.layout.tensor

    @property
    def composites(self) -> int:
        """Composite heads that a rank makes."""
        return max(self.model.num_key_value_heads // self.layout.tensor, 1)

    def projection(self, layer: int, which: Literal["k", "v"]) -> Projection:
        """The form that `HeadProjection` takes in training."""
        model, size = self.model, self.layout.tensor
        components, composites = model.component_heads[layer], model.num_key_value_heads
        mixed = model.mixes_keys if which == "k" else model.mixes_values
        form: Literal["plain", "folded", "combined"] = "plain"
        if mixed:
            folds = folding_is_cheaper(self.tokens, model.hidden_size, components, composites, size)
            form = "folded" if folds or self.folds_once_a_step else "combined"
        cut = size > 1 and components * model.head_dim % size == 0
        return Projection(form, components, composites, cut, composites % size == 0)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What tensor rank 0 of every stage holds: no rank holds more, since parts that are shorter come last."""
        return tuple(self.stage(index) for index in range(self.layout.pipeline))

    @cached_property
    def _cuts(self) -> list[range]:
        return pipeline_stages(self.model, self.layout.pipeline)

    def stage(self, index: int, tensor_rank: int = 0) -> Stage:
        """Made of the decoder's own specifications, on a device without memory."""
        layers, last = self._cuts[index], self.model.num_hidden_layers + 1
        with torch.device("meta"):
            decoder = Decoder(self.model, tp=TensorGroup(self.layout.tensor, tensor_rank), stage=layers)
        parameters = tuple(
            LocalParameter(name, parameter.spec.kind, parameter.numel(), torch.Size(parameter.spec.shape).numel())
            for name, parameter in named_specs(decoder).items()
        )
        blocks = tuple(layer - 1 for layer in layers if 0 < layer < last)
        return Stage(index, blocks, 0 in layers, last in layers, parameters)
