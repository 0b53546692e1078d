"""The training engine: a decoder and its optimizer under DeepSpeed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from megatron_mea.attention.folds import StepFolds
from megatron_mea.attention.hlc import folding_serves_a_step
from megatron_mea.checkpoint.tensors import MOMENTS, Fragment
from megatron_mea.config.schema import Config
from megatron_mea.data.corpora import IGNORE, Batch
from megatron_mea.errors import RunError
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.grid import Grid
from megatron_mea.parallel.parameter import named_specs
from megatron_mea.training.stage import Stage, Whole
from megatron_mea.training.teacher import Teacher

BUCKET = 500_000_000
"""Numbers in a bucket of gradients at most, DeepSpeed's default."""


class NonFiniteError(RunError):
    """A loss or gradient that is not finite; raised before any parameter has changed.

    `micro_batches` maps the numbers of this rank's micro-batches that are not finite to the first parameter, in
    the order of the backward pass, whose gradient shows it; None where that cannot be told.
    """

    def __init__(self, message: str, micro_batches: Mapping[int, str | None] | None = None) -> None:
        super().__init__(message)
        self.micro_batches = dict(micro_batches or {})


@dataclass(frozen=True)
class StepResult:
    """Loss (nats a target) before the update, gradient norm before clipping, and whether a rank wants to stop.

    `distillation_loss` is the divergence from a teacher, without its weight and T^2; None without a teacher.
    """

    loss: float
    grad_norm: float
    stop: bool
    distillation_loss: float | None = None


class Engine:
    """A decoder and its optimizer under DeepSpeed, on any number of tensor and data ranks.

    Args:
        config: the whole configuration.
        model: initialised, on the CPU.
        device: of this rank.
        grid: where this rank stands.
        teacher: this rank's part of it, on its device.
    """

    def __init__(
        self, config: Config, model: Decoder, device: torch.device, grid: Grid, teacher: Teacher | None = None
    ) -> None:
        import deepspeed

        self.config, self.model, self.device, self.grid = config, model, device, grid
        self.stage = Stage(model, grid.is_last_stage, teacher)
        self.accumulation = config.training.global_batch_size // (config.training.micro_batch_size * grid.data_size)
        # Its bfloat16 optimizer prints memory figures, its pipeline the layers.
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model_parameters=_parameter_groups(config, model),
                optimizer=lambda groups: torch.optim.AdamW(
                    groups,
                    lr=config.optimizer.lr,
                    betas=tuple(config.optimizer.betas),
                    eps=config.optimizer.eps,
                    fused=device.type == "cuda",
                ),
                config=_deepspeed_config(config, self.accumulation, sum(p.numel() for p in model.parameters())),
                dist_init_required=False,
                **self._module(),
            )
        self._make_moments()

    def train_step(
        self, batches: Sequence[Batch], targets: int, lr: float, stop: Callable[[], bool] = bool
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Args:
            batches: `accumulation` micro-batches.
            targets: how many targets the global batch has.
            lr: the rate of this step.
            stop: whether this rank was asked to stop, as seen when the step is done (default: never); the result is the
                same on all.

        Raises:
            NonFiniteError: the loss or the gradient is not finite, on any rank; nothing was updated.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # DeepSpeed divides by the micro-batches and averages over data parallelism: this undoes both, so that the
        # gradient is that of the sum over all targets divided by their number.
        sums = self._run(batches, self.accumulation * self.grid.data_size / targets)
        total = torch.cat([sums, torch.full_like(sums[:1], float(stop()))])
        dist.all_reduce(total)
        norm = self.engine.get_global_grad_norm()
        norm = norm.double() if isinstance(norm, torch.Tensor) else torch.full_like(total[0], norm)
        # In one piece, since the host waits for the device here.
        *sums, stops, grad_norm = torch.cat([total, norm.reshape(1)]).tolist()
        # Every rank of a tensor group has the loss of the same samples.
        mean, divergence = (each / (self.grid.tensor.size * targets) for each in sums)
        # DeepSpeed skips an update whose gradient is not finite, without a word.
        if self.optimizer.overflow or not all(map(_is_finite, (mean, divergence, grad_norm))):
            also = "gradient is not finite" if _is_finite(divergence) else f"distillation loss is {divergence}"
            found = f"{mean:.6g} but the {also}" if _is_finite(mean) else str(mean)
            raise NonFiniteError(f"the loss is {found}", self._not_finite(batches))
        return StepResult(mean, grad_norm, stops > 0, None if self.stage.teacher is None else divergence)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], count: int) -> float:
        """Mean cross-entropy (nats a target) over `count` micro-batches of every data-parallel rank."""
        targets = 0

        def counted() -> Iterator[Batch]:
            nonlocal targets
            for batch in islice(batches, count):
                targets += int((batch.targets != IGNORE).sum())
                yield batch

        loss = self._evaluate(counted(), count)
        # Every tensor rank of the last stage has seen the loss, and the targets, of the same samples.
        seen = targets if self.grid.is_last_stage else 0
        total = torch.stack([loss, torch.full_like(loss, float(seen))])
        dist.all_reduce(total)
        loss_sum, seen = total.tolist()
        return loss_sum / seen

    def _module(self) -> dict[str, Any]:
        """The arguments of deepspeed.initialize that say what to train and who takes part."""
        return {"model": Whole(self.stage), "mpu": self.grid.mpu}

    def _run(self, batches: Sequence[Batch], scale: float) -> torch.Tensor:
        """Forward, backward of what is minimised times `scale`, and update; this rank's sums of `Stage.objective`."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        folds = self._step_folds(batches)
        for index, batch in enumerate(batches):
            loss, sums = self.engine(*self._to_device(batch), folds and folds.of(index))
            total += sums
            self.engine.backward(loss * scale)
            self.engine.step()
        return total

    def _step_folds(self, batches: Sequence[Batch]) -> StepFolds | None:
        """Where one fold for the whole step pays."""
        grid, zero_stage = self.grid, self.config.parallel.zero_stage
        sizes = (len(batches), batches[0].input_ids.size, self.config.model.hidden_size)
        if not folding_serves_a_step(*sizes, grid.tensor.size, grid.pipeline_size, zero_stage):
            return None
        return StepFolds([block.self_attn for block in self.model.blocks], len(batches))

    def _evaluate(self, batches: Iterator[Batch], count: int) -> torch.Tensor:
        """The sum of this rank's cross-entropies, float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.engine.eval()
        for batch in batches:
            total += self.engine(*self._to_device(batch))[1][0]
        self.engine.train()
        return total

    def _not_finite(self, batches: Sequence[Batch]) -> dict[int, str | None]:
        """Repeats the micro-batches without DeepSpeed, which has dropped the gradients, to find the bad ones."""
        found: dict[int, str | None] = {}
        for index, batch in enumerate(batches):
            loss, gradients = self._repeat(batch)
            bad: list[str | None] = [] if loss.isfinite() else [None]
            bad += [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            if bad:
                found[index] = bad[-1]
        return found

    def _repeat(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and gradients, by name, of a micro-batch."""
        input_ids, position_ids, targets = self._to_device(batch)
        loss, _ = self.stage.objective(self.stage((input_ids, position_ids)), targets)
        # With ZeRO 3 the parameters are not there to take a gradient of.
        return loss, {} if self._partitions_parameters else self._gradients(loss)[0]

    def _gradients(
        self, output: torch.Tensor, gradient: torch.Tensor | None = None, inputs: Sequence[torch.Tensor] = ()
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Gradients with respect to the parameters, by name, and to the inputs."""
        named = named_specs(self.model)
        found = torch.autograd.grad(output, [*named.values(), *inputs], gradient, allow_unused=True)
        by_name = {name: each for name, each in zip(named, found, strict=False) if each is not None}
        return by_name, list(found[len(named) :])

    def fragments(self, moments: bool = True, owned: bool = False) -> Iterator[Fragment]:
        """What this rank holds of the float32 master weights and of their moments, as views; not collective.

        Args:
            moments: Adam's as well.
            owned: only what this rank is to save, so that all ranks together give every number once.
        """
        for index, (name, parameter) in enumerate(named_specs(self.model).items()):
            spec = parameter.spec
            # What a tensor group repeats is dealt out among its ranks; a tied matrix is the first stage's.
            mine = spec.shard_dim is not None or index % spec.tp.size == spec.tp.rank
            if owned and not (mine and not getattr(parameter, "ds_pipe_replicated", False)):
                continue
            for moment in (None, *MOMENTS) if moments else (None,):
                full = f"{moment}.{name}" if moment else name
                yield Fragment(full, spec.shape, spec.offsets, spec.local_shape, *self._partition(parameter, moment))

    def loaded(self, updates: int) -> None:
        """Makes the working copies and Adam's count follow what was written into `fragments`; collective."""
        for moments in self.optimizer.optimizer.state.values():
            moments["step"].fill_(updates)
        if not self._partitions_parameters:
            self.optimizer.update_lp_params()
            return
        for parameter in named_specs(self.model).values():
            _, numbers = self._partition(parameter, None)
            parameter.ds_tensor.data.view(-1)[: len(numbers)].copy_(numbers)
        # Small parameters are kept whole between the steps.
        if kept := self.optimizer.persistent_parameters:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def weight(self, name: str) -> torch.Tensor:
        """The whole float32 master of one parameter; collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = named_specs(self.model)[name]
        return parameter.spec.whole(safe_get_full_fp32_param(parameter))

    @property
    def _partitions_parameters(self) -> bool:
        return self.config.parallel.zero_stage == 3

    def _partition(self, parameter: torch.nn.Parameter, moment: str | None) -> tuple[int, torch.Tensor]:
        """Where this rank's part of a flattened parameter begins, and its master weights (moment None) or a moment."""
        if self._partitions_parameters:
            numbers, _ = self.optimizer._get_fp32_opt_state_partition(parameter, False, moment)
            start = parameter.ds_tensor.numel() * self.optimizer._get_param_partition_rank(parameter)
            # The last parts are padded.
            return start, numbers.data[: max(0, parameter.ds_numel - start)]
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, torch.empty(0, device=self.device)
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment).data

    def _make_moments(self) -> None:
        """Makes Adam's state before its first update, and links DeepSpeed's per-parameter view to it.

        DeepSpeed links after the update of the first parameter group, when the others have no state yet, so
        their moments would never be found again.
        """
        inner = self.optimizer.optimizer
        if self._partitions_parameters:
            partitions = self.optimizer.fp32_partitioned_groups_flat
        else:
            partitions = [partition for group in inner.param_groups for partition in group["params"]]
        fused = any(group["fused"] for group in inner.param_groups)
        for partition in partitions:
            step = torch.zeros((), device=partition.device if fused else "cpu")
            inner.state[partition] = {"step": step} | {m: torch.zeros_like(partition) for m in MOMENTS}
        if not self._partitions_parameters:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _to_device(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        tensors = [torch.tensor(array) for array in (batch.input_ids, batch.position_ids, batch.targets)]
        if self.device.type == "cuda":
            # From pinned memory the copy waits for nothing and nothing waits for it.
            tensors = [each.pin_memory() for each in tensors]
        return tuple(each.to(self.device, non_blocking=True) for each in tensors)


def _parameter_groups(config: Config, model: Decoder) -> list[dict]:
    """Matrices are decayed; norms and biases are not, head combinations where `decay_hlc` says so."""
    decayed, exempt = [], []
    for parameter in named_specs(model).values():
        kind = parameter.spec.kind
        matrix = kind == "matrix" or (kind == "hlc" and config.optimizer.decay_hlc)
        (decayed if matrix else exempt).append(parameter)
    return [
        {"params": decayed, "weight_decay": config.optimizer.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]


def _deepspeed_config(config: Config, accumulation: int, numbers: int) -> dict:
    training = config.training
    settings: dict = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.grad_clip,
        # Stage 0 loses the gradient norm and is no cheaper than stage 1, so it runs as stage 1.
        # Its bucket of gradients is allocated whole: 2 GB, were it not for the bound.
        "zero_optimization": {
            "stage": max(config.parallel.zero_stage, 1),
            "reduce_bucket_size": min(BUCKET, numbers),
            # Gradients are averaged while the backward pass goes on. ZeRO 1 averages after the last backward pass of a
            # step, which DeepSpeed's bfloat16 optimizer and its pipeline do not overlap.
            "overlap_comm": config.parallel.zero_stage >= 2,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        # Between stages every tensor rank hands on what it has, which sequence parallelism has cut already.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if training.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        if config.parallel.zero_stage < 3:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _is_finite(value: float) -> bool:
    return value - value == 0.0
