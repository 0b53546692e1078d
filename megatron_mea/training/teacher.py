"""Distillation's teacher: opened and checked before processes meet, then a frozen decoder on the grid of the run."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mea.checkpoint.folder import TOKENIZER
from megatron_mea.checkpoint.tensors import Fragment
from megatron_mea.config.layout import TEACHER, check_teacher
from megatron_mea.config.schema import Config, Distillation
from megatron_mea.data.tokenizer import load_tokenizer
from megatron_mea.errors import UserError
from megatron_mea.huggingface.stored import check_names
from megatron_mea.huggingface.weights import StoredModel, open_stored
from megatron_mea.model.decoder import Decoder, parameter_shapes
from megatron_mea.model.stages import pipeline_stages
from megatron_mea.parallel.grid import Grid


def open_teacher(config: Config, rank: int = 0, world_size: int = 1) -> StoredModel | None:
    """The teacher that `training.distillation` names, checked against the model it teaches; None where none is named.

    Of a checkpoint each of `world_size` callers verifies its share.

    Raises:
        UserError: it is missing, damaged or of a kind that we do not compute, or cannot teach this model on the layout.
    """
    if config.training.distillation is None:
        return None
    stored = open_stored(Path(config.training.distillation.teacher), TEACHER, rank, world_size)
    check_teacher(config, stored.model)
    described = parameter_shapes(stored.model)
    if problems := check_names(stored.folder, TEACHER, stored.shapes, described, "the teacher's own settings"):
        raise UserError.of(problems)
    return stored


def foreign_tokenizer(config: Config, teacher: StoredModel) -> list[str]:
    """A warning where the teacher has a tokenizer, and its ids mean something else than those of `data.tokenizer`."""
    inside = teacher.folder / TOKENIZER
    try:
        theirs = load_tokenizer(inside if inside.is_dir() else teacher.folder, TEACHER)
    except UserError:
        # A model without its tokenizer may teach.
        return []
    if theirs.get_vocab() == load_tokenizer(config.data.tokenizer).get_vocab():
        return []
    return [f"{teacher.folder} has another tokenizer than data.tokenizer: the teacher may know other tokens by the ids"]


class Teacher:
    """A frozen decoder, or a pipeline stage of it, in the run's precision, cut as its tensor group cuts everything.

    It is no torch module, so that whoever holds one hides it from DeepSpeed, checkpoints and norms.
    """

    def __init__(self, decoder: Decoder, settings: Distillation) -> None:
        self.decoder, self.settings = decoder.requires_grad_(False).eval(), settings
        self.dtype = next(decoder.parameters()).dtype
        self.hidden_size = decoder.hf_config.hidden_size

    @torch.no_grad()
    def run(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """As `Decoder.run`."""
        return self.decoder.run(x, position_ids)

    @torch.no_grad()
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """As `Decoder.logits`."""
        return self.decoder.logits(x)


def make_teacher(stored: StoredModel, config: Config, grid: Grid, device: torch.device) -> Teacher:
    """This rank's part of the teacher, with its weights; collective.

    Raises:
        UserError: the ranks have opened different checkpoints, on all of them.
    """
    settings = config.training.distillation
    assert settings is not None
    opened = [""] * dist.get_world_size()
    dist.all_gather_object(opened, str(stored.folder))
    if len(set(opened)) > 1:
        found = f"{' and '.join(sorted(set(opened)))}, on different ranks"
        raise UserError(TEACHER, found, "the same on all", "name a checkpoint: the run that is named saves newer ones")
    stage = pipeline_stages(stored.model, grid.pipeline_size)[grid.pipeline_rank]
    decoder = Decoder(stored.model, tp=grid.tensor, stage=stage, document_mask=config.data.document_mask)
    named = [(parameter.spec, parameter.data.view(-1)) for parameter in decoder.parameters()]
    stored.read(Fragment(spec.name, spec.shape, spec.offsets, spec.local_shape, 0, data) for spec, data in named)
    return Teacher(decoder.to(device, torch.bfloat16 if config.training.precision == "bf16" else None), settings)
