"""Training engines on small models, and the plain float64 loop that they are compared with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from models import SMALL

from megatron_mea.config import Config
from megatron_mea.config.load import parse_config
from megatron_mea.data.corpora import IGNORE, Batch
from megatron_mea.parallel.parameter import named_specs

BATCH, MICRO = 8, 2


def layout(tensor: int = 1, zero: int = 1, sequence: bool = False, pipeline: int = 1) -> dict:
    """The `parallel` section."""
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "zero_stage": zero,
        "sequence_parallel": sequence,
    }


def config(
    parallel: dict | None = None,
    model: dict | None = None,
    steps: int = 6,
    seq_length: int = 12,
    document_mask: bool = False,
    training: dict | None = None,
    **optimizer,
) -> Config:
    """A few steps of a small MEA model in fp32, eps large enough that rounding does not flip signs in Adam."""
    return parse_config(
        {
            "model": SMALL
            | {"attention_variant": "mea", "num_component_heads": 2, "initializer_range": 0.1}
            | (model or {}),
            "parallel": parallel or {},
            "data": {
                "tokenizer": "none",
                "train": [{"path": "none"}],
                "seq_length": seq_length,
                "document_mask": document_mask,
            },
            "optimizer": {"lr": 1e-3, "eps": 1e-6, "grad_clip": 0.5} | optimizer,
            "schedule": {"warmup_steps": 2},
            "training": {
                "steps": steps,
                "global_batch_size": BATCH,
                "micro_batch_size": MICRO,
                "precision": "fp32",
                "seed": 3,
            }
            | (training or {}),
            "run": {"dir": "none"},
        }
    )


def global_batch(settings: Config, step: int) -> Batch:
    """(batch, seq) random tokens; a quarter of them begins a document where documents are masked."""
    seq, random = settings.data.seq_length, np.random.default_rng(step)
    tokens = random.integers(0, settings.model.vocab_size, (BATCH, seq + 1))
    begins = (random.random((BATCH, seq + 1)) < 0.25) & settings.data.document_mask
    index = np.arange(seq)
    positions = index - np.maximum.accumulate(np.where(begins[:, :-1], index, 0), axis=1)
    return Batch(tokens[:, :-1], positions, np.where(begins[:, 1:], IGNORE, tokens[:, 1:]))


def batches_of(engine, step: int) -> list[Batch]:
    """The micro-batches of this engine's data rank."""
    whole, grid = global_batch(engine.config, step), engine.grid

    def mine(array: np.ndarray) -> np.ndarray:
        return array.reshape(-1, grid.data_size, MICRO, array.shape[1])[:, grid.data_rank]

    parts = (mine(whole.input_ids), mine(whole.position_ids), mine(whole.targets))
    return [Batch(*micro) for micro in zip(*parts, strict=True)]


def train_step(engine, step: int, lr: float, stop: bool = False):
    targets = int((global_batch(engine.config, step).targets != IGNORE).sum())
    return engine.train_step(batches_of(engine, step), targets, lr, lambda: stop)


def plain_training(
    settings: Config, teacher: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
) -> tuple[list[tuple[float, ...]], float, dict[str, np.ndarray]]:
    """Whole batches, one process, torch's AdamW and clipping, float64.

    Args:
        teacher: token ids and position ids (batch, seq) -> logits (batch, seq, vocab_size), float64.

    Returns:
        (loss, gradient norm) of each step, with a teacher the divergence from it behind them, the loss on one more
        batch, and the parameters by name.
    """
    from megatron_mea.model.decoder import Decoder
    from megatron_mea.parallel.parameter import initialize
    from megatron_mea.training.schedule import learning_rate

    model = Decoder(settings.model, document_mask=settings.data.document_mask)
    initialize(model, settings.training.seed)
    model.double()
    named = named_specs(model)
    decayed = [p for n, p in named.items() if n.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight"))]
    exempt = [p for p in named.values() if not any(p is other for other in decayed)]
    others = ("hlc_", "norm", ".bias", "lambda_", "_mix.")
    assert len(exempt) == sum(any(mark in name for mark in others) for name in named)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": exempt, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=settings.optimizer.eps)

    def loss_of(step: int) -> tuple[torch.Tensor, ...]:
        batch = global_batch(settings, step)
        ids, positions, targets = map(torch.from_numpy, (batch.input_ids, batch.position_ids, batch.targets))
        counted = targets != IGNORE
        loss = model(ids, positions, targets) / int(counted.sum())
        if teacher is None:
            return loss, loss
        how = settings.training.distillation
        ours, theirs = (
            logits[counted] / how.temperature
            for logits in (model.logits(model.run(ids, positions)), teacher(ids, positions))
        )
        divergence = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True)
        return (1 - how.weight) * loss + how.weight * how.temperature**2 * divergence, loss, divergence

    results = []
    for step in range(1, settings.steps + 1):
        minimised, loss, *divergence = loss_of(step)
        minimised.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        optimizer.zero_grad()
        results.append((loss.item(), norm.item(), *(each.item() for each in divergence)))
    return results, loss_of(settings.steps + 1)[1].item(), {n: p.detach().numpy() for n, p in named.items()}


def new_engine(settings: Config, initialized: bool = True, teacher=None):
    """The engine of this rank; collective."""
    from megatron_mea.training.build import build_engine

    return build_engine(settings, torch.device("cpu"), initialized, teacher)


def train(engine, first: int, last: int) -> list[tuple[float, ...]]:
    """(loss, gradient norm) of the steps from `first` to `last`, with a teacher the divergence from it behind them."""
    from megatron_mea.training.schedule import learning_rate

    results = []
    for step in range(first, last + 1):
        result = train_step(engine, step, learning_rate(engine.config, step))
        divergence = [] if result.distillation_loss is None else [result.distillation_loss]
        results.append((result.loss, result.grad_norm, *divergence))
    return results


def state(engine) -> dict[str, torch.Tensor]:
    """Whole master weights and moments, by name, as DeepSpeed gathers them; collective.

    The tied matrix of a later pipeline stage is left out, as it is in a checkpoint.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name, parameter in named_specs(engine.model).items():
        if getattr(parameter, "ds_pipe_replicated", False):
            continue
        whole = parameter.spec.whole
        found[name] = whole(safe_get_full_fp32_param(parameter)).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{moment}.{name}"] = whole(safe_get_full_optimizer_state(parameter, moment)).clone()
    return found


def set_state(engine, whole: dict[str, torch.Tensor], updates: int) -> None:
    """Writes whole tensors into what this engine holds of them; collective."""
    for fragment in engine.fragments():
        for offsets, view in fragment.pieces():
            box = tuple(slice(first, first + size) for first, size in zip(offsets, view.shape, strict=True))
            view.copy_(whole[fragment.name][box])
    engine.loaded(updates)
