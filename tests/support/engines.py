"""Training engines on small models, and a plain float64 training loop to compare them with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from megatron_mea.config import Config
from megatron_mea.config.load import parse_config
from megatron_mea.data.corpora import IGNORE_INDEX, Batch
from megatron_mea.optimizers import optimizer_of
from megatron_mea.parallel.parameter import parameters_by_name
from support.models import SMALL

BATCH, MICRO = 8, 2


def layout(*, tensor: int = 1, zero: int = 1, sequence: bool = False, pipeline: int = 1, context: int = 1) -> dict:
    """The `parallel` section."""
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "context_parallel_size": context,
        "zero_stage": zero,
        "sequence_parallel": sequence,
    }


def config(
    *,
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
    """(batch, seq) random tokens; with `document_mask` a quarter of them begins a document."""
    seq_length, random = settings.data.seq_length, np.random.default_rng(step)
    tokens = random.integers(0, settings.model.vocab_size, (BATCH, seq_length + 1))
    is_start = (random.random((BATCH, seq_length + 1)) < 0.25) & settings.data.document_mask

    index = np.arange(seq_length)
    positions = index - np.maximum.accumulate(np.where(is_start[:, :-1], index, 0), axis=1)
    targets = np.where(is_start[:, 1:], IGNORE_INDEX, tokens[:, 1:])
    return Batch(input_ids=tokens[:, :-1], position_ids=positions, targets=targets)


def rank_batches(engine, step: int) -> list[Batch]:
    """The micro-batches of this engine's data rank."""
    batch, grid, size = global_batch(engine.config, step), engine.grid, engine.config.training.micro_batch_size

    def micro_batches(array: np.ndarray) -> np.ndarray:
        return array.reshape(-1, grid.dims.dp, size, array.shape[1])[:, grid.data_rank]

    arrays = (micro_batches(batch.input_ids), micro_batches(batch.position_ids), micro_batches(batch.targets))
    return [
        Batch(input_ids=input_ids, position_ids=position_ids, targets=targets)
        for input_ids, position_ids, targets in zip(*arrays, strict=True)
    ]


def train_step(*, engine, step: int, lr: float, stop: bool = False):
    """`Engine.train_step` on the global batch of `step`; `stop`: this rank asks to stop."""
    num_targets = int((global_batch(engine.config, step).targets != IGNORE_INDEX).sum())
    return engine.train_step(
        batches=rank_batches(engine, step), num_targets=num_targets, lr=lr, stop_requested=lambda: stop
    )


def plain_training(
    settings: Config, teacher: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
) -> tuple[list[tuple[float, ...]], float, dict[str, np.ndarray]]:
    """Trains on global batches in this process, in float64, with torch's AdamW and clipping.

    Args:
        teacher: token ids and position ids (batch, seq) -> logits (batch, seq, vocab_size), float64.

    Returns:
        (loss, gradient norm) of each step, with a teacher (loss, gradient norm, divergence), with experts (loss,
        gradient norm, balance loss); the loss on a further batch; the parameters by name, and of experts the counts of
        the last step.
    """
    from megatron_mea.model.decoder import Decoder
    from megatron_mea.model.moe import RouterLosses
    from megatron_mea.parallel.parameter import init_parameters
    from megatron_mea.training.schedule import learning_rate

    training = settings.training
    losses = RouterLosses(
        balance=training.balance,
        balance_coef=0.0 if training.balance == "none" else settings.model.router_aux_loss_coef,
        z_coef=training.router_z_loss_coef,
        gradient_scale=1 / BATCH,
    )
    model = Decoder(settings.model, document_mask=settings.data.document_mask, router_losses=losses)
    routers = {layer: model.layers[str(layer)].mlp.gate for layer in settings.model.routed_layers}
    init_parameters(model, settings.training.seed)
    model.double()

    parameters = parameters_by_name(model)
    matrices = ("proj.weight", "embed_tokens.weight", "lm_head.weight")
    matrices += (".mlp.gate.weight", ".experts.gate_up_proj", ".experts.down_proj")
    decayed = [parameter for name, parameter in parameters.items() if name.endswith(matrices)]
    exempt = [parameter for parameter in parameters.values() if not any(parameter is other for other in decayed)]
    exempt_marks = ("hlc_", "norm", ".bias", "lambda_", "_mix.")
    assert len(exempt) == sum(any(mark in name for mark in exempt_marks) for name in parameters)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": exempt, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=settings.optimizer.eps)

    def compute_losses(step: int) -> tuple[torch.Tensor, ...]:
        """(objective, cross-entropy) of a global batch, with a teacher (objective, cross-entropy, divergence)."""
        batch = global_batch(settings, step)
        ids, positions, targets = map(torch.from_numpy, (batch.input_ids, batch.position_ids, batch.targets))
        is_target = targets != IGNORE_INDEX
        if teacher is None:
            loss = model(ids, positions, targets) / int(is_target.sum())
            return loss, loss

        distillation = settings.training.distillation
        # One pass: routers add their losses in the backward of each.
        student_logits = model.logits(model.forward_hidden(ids, positions))[is_target]
        loss = F.cross_entropy(student_logits, targets[is_target])
        log_probs, teacher_log_probs = (
            (logits / distillation.temperature).log_softmax(-1)
            for logits in (student_logits, teacher(ids, positions)[is_target])
        )
        divergence = F.kl_div(log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
        weight, temperature = distillation.weight, distillation.temperature
        return (1 - weight) * loss + weight * temperature**2 * divergence, loss, divergence

    results = []
    for step in range(1, settings.steps + 1):
        objective, loss, *divergence = compute_losses(step)
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        optimizer.zero_grad()

        stats = [router.stats for router in routers.values()]
        balance = [torch.stack([stat.balance_loss for stat in stats]).mean() / BATCH] if stats else []
        results.append((loss.item(), norm.item(), *(tensor.item() for tensor in (*divergence, *balance))))
        for stat in stats:
            stat.previous_counts, stat.counts, stat.balance_loss = stat.counts, None, None

    validation = compute_losses(settings.steps + 1)[1].item()
    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    tensors |= {f"counts.{layer}": router.stats.previous_counts for layer, router in routers.items()}
    return results, validation, {name: tensor.numpy() for name, tensor in tensors.items()}


def new_engine(settings: Config, *, initialized: bool = True, teacher=None):
    """The engine of this rank; collective."""
    from megatron_mea.training.build import build_engine

    return build_engine(config=settings, device=torch.device("cpu"), initialized=initialized, teacher=teacher)


def train(*, engine, first: int, last: int) -> list[tuple[float, ...]]:
    """(loss, gradient norm) of the steps from `first` to `last`, and the divergence from a teacher or balance loss."""
    from megatron_mea.training.schedule import learning_rate

    results = []
    for step in range(first, last + 1):
        result = train_step(engine=engine, step=step, lr=learning_rate(engine.config, step))
        others = [value for value in (result.distillation_loss, result.balance_loss) if value is not None]
        results.append((result.loss, result.grad_norm, *others))

    return results


def state(engine) -> dict[str, torch.Tensor]:
    """Full master weights and moments, by name, as DeepSpeed gathers them; collective.

    The tied matrix of a later pipeline stage is left out, as it is in a checkpoint.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    tensors = {}
    for name, parameter in parameters_by_name(engine.model).items():
        if name == "model.embed_tokens.weight" and engine.grid.pipeline_rank > 0:
            continue

        full_tensor = parameter.spec.full_tensor
        tensors[name] = full_tensor(safe_get_full_fp32_param(parameter)).clone()
        for moment in optimizer_of(parameter.spec).state:
            tensors[f"{moment}.{name}"] = full_tensor(safe_get_full_optimizer_state(parameter, moment)).clone()

    return tensors


def set_state(*, engine, tensors: dict[str, torch.Tensor], step: int) -> None:
    """Loads full tensors, as `state` returns them, into the engine; collective."""
    for fragment in engine.state.fragments():
        for offsets, view in fragment.chunks():
            box = tuple(slice(first, first + size) for first, size in zip(offsets, view.shape, strict=True))
            view.copy_(tensors[fragment.name][box])

    engine.state.sync_after_load(step)
