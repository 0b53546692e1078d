"""The teacher of distillation: opened and checked at start-up, then a frozen decoder on the grid of the run."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mea.checkpoint.tensors import Fragment
from megatron_mea.config.layout import TEACHER_KEY, check_teacher
from megatron_mea.config.schema import Config, Distillation
from megatron_mea.data.tokenizer import load_tokenizer
from megatron_mea.errors import UserError
from megatron_mea.huggingface.model_folder import ModelFolder, StoredTensors
from megatron_mea.model.decoder import Decoder
from megatron_mea.model.stages import pipeline_stages
from megatron_mea.parallel.grid import Grid
from megatron_mea.training.initial_weights import read_weights


def open_teacher(config: Config, *, rank: int = 0, world_size: int = 1) -> StoredTensors | None:
    """Opens the teacher of `training.distillation` and checks it against the model; None where none is configured.

    Each of `world_size` callers verifies its share of a checkpoint's files.

    Raises:
        UserError: it is missing, damaged or of an unsupported architecture, or cannot teach this model on the layout.
    """
    if config.training.distillation is None:
        return None

    source = ModelFolder.locate(config.training.distillation.teacher, TEACHER_KEY)
    stored = source.tensors(rank=rank, world_size=world_size)
    check_teacher(config, source.settings())
    return stored


def tokenizer_warnings(config: Config, teacher: ModelFolder) -> list[str]:
    """A warning where the teacher has a tokenizer whose ids differ from those of `data.tokenizer`."""
    try:
        teacher_tokenizer = teacher.load_tokenizer()
    except UserError:
        # A model without its tokenizer may teach.
        return []

    if teacher_tokenizer.get_vocab() == load_tokenizer(config.data.tokenizer).get_vocab():
        return []

    return [f"{teacher.folder} has another tokenizer than data.tokenizer: the teacher may know other tokens by the ids"]


class Teacher:
    """A frozen decoder, or a pipeline stage of it, in the run's parameter dtype, sharded over its tensor group.

    It is no torch module, so that DeepSpeed, checkpoints and gradient norms do not see its parameters.
    """

    def __init__(self, decoder: Decoder, settings: Distillation) -> None:
        self.decoder, self.settings = decoder.requires_grad_(requires_grad=False).eval(), settings
        self.dtype = next(decoder.parameters()).dtype
        self.hidden_size = decoder.config.hidden_size

    @torch.no_grad()
    def forward_hidden(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """As `Decoder.forward_hidden`."""
        return self.decoder.forward_hidden(x, position_ids)

    @torch.no_grad()
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """As `Decoder.logits`."""
        return self.decoder.logits(x)


def make_teacher(*, stored: StoredTensors, config: Config, grid: Grid, device: torch.device) -> Teacher:
    """Builds this rank's part of the teacher and reads its weights; collective.

    Raises:
        UserError: on all ranks, where they have opened different checkpoints, or where weights are not finite.
    """
    settings = config.training.distillation
    assert settings is not None
    source, model = stored.source, stored.source.settings()

    opened = [""] * dist.get_world_size()
    dist.all_gather_object(opened, str(source.folder))
    if len(set(opened)) > 1:
        got = f"{' and '.join(sorted(set(opened)))}, on different ranks"
        raise UserError(
            where=TEACHER_KEY,
            got=got,
            expected="the same on all",
            hint="name a checkpoint: the run that is named saves newer ones",
        )

    stage = pipeline_stages(model, grid.dims.pp, seq_length=config.data.seq_length)[grid.pipeline_rank]
    decoder = Decoder(config=model, tp=grid.tp, cp=grid.cp, stage=stage, document_mask=config.data.document_mask)
    specs_and_values = [(parameter.spec, parameter.data.view(-1)) for parameter in decoder.parameters()]
    fragments = [
        Fragment(
            name=spec.name,
            global_shape=spec.global_shape,
            global_offset=spec.global_offset,
            local_shape=spec.local_shape,
            start=0,
            values=values,
        )
        for spec, values in specs_and_values
    ]
    read_weights(stored, fragments)
    return Teacher(decoder.to(device, torch.bfloat16 if config.training.precision == "bf16" else None), settings)
