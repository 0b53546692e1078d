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
from megatron_mea.checkpoint.tensors import MOMENTS, Fragment
from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.config.schema import Config
from megatron_mea.data.corpora import IGNORE_INDEX, Batch
from megatron_mea.errors import RunError
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.grid import Grid
from megatron_mea.parallel.parameter import parameters_by_name
from megatron_mea.parallel.zero import zero_optimization
from megatron_mea.training.pipeline_stage import ModelWithLoss, PipelineStage
from megatron_mea.training.teacher import Teacher


class NonFiniteError(RunError):
    """A loss or gradient that is not finite; raised before any parameter has changed.

    `micro_batches` maps the index of each micro-batch of this rank that is not finite to the first parameter, in the
    order of the backward pass, whose gradient shows it; None where that cannot be told.
    """

    def __init__(self, message: str, micro_batches: Mapping[int, str | None] | None = None) -> None:
        super().__init__(message)
        self.micro_batches = dict(micro_batches or {})


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Loss (nats a target) before the update, gradient norm before clipping, and whether a rank wants to stop.

    `distillation_loss` is the divergence from a teacher, without its weight and T^2; None without a teacher.
    """

    loss: float
    grad_norm: float
    should_stop: bool
    distillation_loss: float | None = None


class Engine:
    """A decoder and its optimizer under DeepSpeed, on any number of tensor and data ranks.

    Args:
        config: the full configuration.
        model: initialised, on the CPU.
        device: of this rank.
        grid: coordinates and process groups of this rank.
        teacher: this rank's part of the teacher, on its device.
    """

    def __init__(
        self, *, config: Config, model: Decoder, device: torch.device, grid: Grid, teacher: Teacher | None = None
    ) -> None:
        import deepspeed

        self.config, self.model, self.device, self.grid = config, model, device, grid
        self.stage = PipelineStage(decoder=model, is_last=grid.is_last_stage, teacher=teacher)

        # DeepSpeed's bfloat16 optimizer prints memory figures, its pipeline the layers.
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
                config=_deepspeed_config(
                    config=config,
                    dims=grid.dims,
                    num_elements=sum(p.numel() for p in model.parameters()),
                ),
                dist_init_required=False,
                **self._deepspeed_arguments(),
            )

        self._init_optimizer_state()

    def train_step(
        self, batches: Sequence[Batch], *, num_targets: int, lr: float, stop_requested: Callable[[], bool] = bool
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches; collective.

        Args:
            batches: the micro-batches of this rank, `grid.dims.num_micro_batches`.
            num_targets: of the global batch.
            lr: learning rate of this step.
            stop_requested: whether this rank was asked to stop, called after forward and backward (default: never);
                `StepResult.should_stop` is the same on all ranks.

        Raises:
            NonFiniteError: the loss or the gradient is not finite, on any rank; nothing was updated.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        # DeepSpeed divides by the micro-batches and averages over data parallelism: this undoes both, so that the
        # gradient is that of the sum over all targets divided by their number.
        dims = self.grid.dims
        loss_sums = self._run_step(batches, dims.num_micro_batches * dims.dp / num_targets)
        totals = torch.cat([loss_sums, torch.full_like(loss_sums[:1], float(stop_requested()))])
        dist.all_reduce(totals)

        norm = self.engine.get_global_grad_norm()
        norm = norm.double() if isinstance(norm, torch.Tensor) else torch.full_like(totals[0], norm)
        # One copy to the host for all of them, since the host waits for the device here.
        *total_losses, num_stop_requests, grad_norm = torch.cat([totals, norm.reshape(1)]).tolist()
        # Every rank of a tensor group has the loss of the same samples.
        loss, divergence = (total / (self.grid.tp.size * num_targets) for total in total_losses)

        # DeepSpeed skips an update whose gradient is not finite, without a word.
        if self.optimizer.overflow or not all(map(_is_finite, (loss, divergence, grad_norm))):
            cause = "gradient is not finite" if _is_finite(divergence) else f"distillation loss is {divergence}"
            problem = f"{loss:.6g} but the {cause}" if _is_finite(loss) else str(loss)
            raise NonFiniteError(f"the loss is {problem}", self._locate_nonfinite(batches))

        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            should_stop=num_stop_requests > 0,
            distillation_loss=None if self.stage.teacher is None else divergence,
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], count: int) -> float:
        """Mean cross-entropy (nats a target) over `count` micro-batches of every data-parallel rank; collective."""
        num_targets = 0

        def count_targets() -> Iterator[Batch]:
            nonlocal num_targets
            for batch in islice(batches, count):
                num_targets += int((batch.targets != IGNORE_INDEX).sum())
                yield batch

        loss_sum = self._evaluate(count_targets(), count)

        # Every tensor rank of the last stage has seen the loss, and the targets, of the same samples.
        num_scored = num_targets if self.grid.is_last_stage else 0
        totals = torch.stack([loss_sum, torch.full_like(loss_sum, float(num_scored))])
        dist.all_reduce(totals)
        total_loss, total_targets = totals.tolist()
        return total_loss / total_targets

    def _deepspeed_arguments(self) -> dict[str, Any]:
        """The arguments of deepspeed.initialize that say what to train and who takes part."""
        return {"model": ModelWithLoss(self.stage), "mpu": self.grid.mpu}

    def _run_step(self, batches: Sequence[Batch], loss_scale: float) -> torch.Tensor:
        """Forward, backward of the objective times `loss_scale`, and update.

        Returns:
            (2,) float64: this rank's sums of cross-entropy and divergence, as `PipelineStage.compute_loss` has them.
        """
        loss_sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        folds = self._step_folds(batches)
        for index, batch in enumerate(batches):
            folded = None if folds is None else folds.for_micro_batch(index)
            input_ids, position_ids, targets = self._to_device(batch)
            loss, micro_batch_sums = self.engine(input_ids, position_ids, targets, folded=folded)
            loss_sums += micro_batch_sums

            self.engine.backward(loss * loss_scale)
            self.engine.step()

        return loss_sums

    def _step_folds(self, batches: Sequence[Batch]) -> StepFolds | None:
        """Weights folded once for all micro-batches of a step; None where that does not pay."""
        tokens, hidden_size = batches[0].input_ids.size, self.config.model.hidden_size
        pays = self.grid.dims.folds_once_per_step(tokens=tokens, hidden_size=hidden_size)
        return None if not pays else StepFolds([block.self_attn for block in self.model.blocks], len(batches))

    def _evaluate(self, batches: Iterator[Batch], count: int) -> torch.Tensor:
        """The sum of this rank's cross-entropies (nats), a float64 scalar."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.engine.eval()
        for batch in batches:
            input_ids, position_ids, targets = self._to_device(batch)
            _, micro_batch_sums = self.engine(input_ids, position_ids, targets)
            loss_sum += micro_batch_sums[0]

        self.engine.train()
        return loss_sum

    def _locate_nonfinite(self, batches: Sequence[Batch]) -> dict[int, str | None]:
        """Replays the micro-batches without DeepSpeed, which has dropped the gradients, to find those not finite.

        Returns:
            as `NonFiniteError.micro_batches`.
        """
        nonfinite: dict[int, str | None] = {}
        for index, batch in enumerate(batches):
            loss, gradients = self._replay(batch)
            names: list[str | None] = [] if loss.isfinite() else [None]
            names += [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            if names:
                # Backward runs through the parameters from the last to the first.
                nonfinite[index] = names[-1]

        return nonfinite

    def _replay(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Forward and backward of a micro-batch: its loss, and the gradients by name of parameter."""
        input_ids, position_ids, targets = self._to_device(batch)
        loss, _ = self.stage.compute_loss(self.stage((input_ids, position_ids)), targets)
        # With ZeRO 3 no rank holds full parameters between the passes, so there is nothing to differentiate.
        return loss, {} if self.grid.dims.shards_parameters else self._gradients(loss)[0]

    def _gradients(
        self, output: torch.Tensor, gradient: torch.Tensor | None = None, *, inputs: Sequence[torch.Tensor] = ()
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Gradients of `output`, weighted by `gradient`, with respect to the parameters, by name, and to the inputs."""
        parameters = parameters_by_name(self.model)
        gradients = torch.autograd.grad(output, [*parameters.values(), *inputs], gradient, allow_unused=True)
        by_name = {name: grad for name, grad in zip(parameters, gradients, strict=False) if grad is not None}
        return by_name, list(gradients[len(parameters) :])

    def fragments(self, *, moments: bool = True, owned: bool = False) -> Iterator[Fragment]:
        """Views of the float32 master weights and moments that this rank holds; not collective.

        Args:
            moments: include Adam's moments.
            owned: only those that this rank saves, so that all ranks together yield every element once.
        """
        for index, (name, parameter) in enumerate(parameters_by_name(self.model).items()):
            spec = parameter.spec
            # Tensor ranks take turns in saving replicated parameters; a tied matrix is saved by the first stage.
            is_saver = spec.shard_dim is not None or index % spec.tp.size == spec.tp.rank
            if owned and not (is_saver and not getattr(parameter, "ds_pipe_replicated", False)):
                continue

            for moment in (None, *MOMENTS) if moments else (None,):
                start, values = self._local_state(parameter, moment)
                yield Fragment(
                    name=f"{moment}.{name}" if moment else name,
                    global_shape=spec.global_shape,
                    global_offset=spec.global_offset,
                    local_shape=spec.local_shape,
                    start=start,
                    values=values,
                )

    def sync_after_load(self, step: int) -> None:
        """After loading `fragments`: refreshes the weights from the float32 masters, sets Adam's step; collective."""
        for adam_state in self.optimizer.optimizer.state.values():
            adam_state["step"].fill_(step)

        if not self.grid.dims.shards_parameters:
            self.optimizer.update_lp_params()
            return

        for parameter in parameters_by_name(self.model).values():
            _, master = self._local_state(parameter, None)
            parameter.ds_tensor.data.view(-1)[: len(master)].copy_(master)

        # ZeRO 3 leaves small parameters gathered between the steps.
        if persistent := self.optimizer.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def full_weight(self, name: str) -> torch.Tensor:
        """The full float32 master weight of a parameter; collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = parameters_by_name(self.model)[name]
        return parameter.spec.full_tensor(safe_get_full_fp32_param(parameter))

    def _local_state(self, parameter: torch.nn.Parameter, moment: str | None) -> tuple[int, torch.Tensor]:
        """(start, values) of this rank's part of a flattened parameter: master weights (moment None) or a moment."""
        if self.grid.dims.shards_parameters:
            values, _ = self.optimizer._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=moment
            )
            start = parameter.ds_tensor.numel() * self.optimizer._get_param_partition_rank(parameter)
            # The last partitions are padded.
            return start, values.data[: max(0, parameter.ds_numel - start)]

        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, torch.empty(0, device=self.device)

        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment).data

    def _init_optimizer_state(self) -> None:
        """Creates Adam's state before its first update, and links DeepSpeed's view of each parameter to it.

        DeepSpeed links after the update of the first parameter group, when the others have no state yet, so their
        moments would stay out of reach.
        """
        adam = self.optimizer.optimizer
        if self.grid.dims.shards_parameters:
            partitions = self.optimizer.fp32_partitioned_groups_flat
        else:
            partitions = [partition for group in adam.param_groups for partition in group["params"]]

        fused = any(group["fused"] for group in adam.param_groups)
        for partition in partitions:
            step = torch.zeros((), device=partition.device if fused else "cpu")
            adam.state[partition] = {"step": step} | {m: torch.zeros_like(partition) for m in MOMENTS}

        if not self.grid.dims.shards_parameters:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _to_device(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Token ids, position ids and targets, each (batch, seq)."""
        tensors = [torch.tensor(array) for array in (batch.input_ids, batch.position_ids, batch.targets)]
        if self.device.type == "cuda":
            # From pinned memory the copy is asynchronous.
            tensors = [tensor.pin_memory() for tensor in tensors]

        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)


def _parameter_groups(config: Config, model: Decoder) -> list[dict]:
    """AdamW's parameter groups: matrices decay, norms and biases do not, head combinations as `decay_hlc` says."""
    decayed, exempt = [], []
    for parameter in parameters_by_name(model).values():
        spec = parameter.spec
        decays = spec.kind == "matrix" and (spec.component != "hlc" or config.optimizer.decay_hlc)
        (decayed if decays else exempt).append(parameter)

    return [
        {"params": decayed, "weight_decay": config.optimizer.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]


def _deepspeed_config(*, config: Config, dims: ParallelDims, num_elements: int) -> dict:
    """DeepSpeed's configuration, for a model of `num_elements` parameters on this rank."""
    training = config.training
    settings: dict = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": dims.num_micro_batches,
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_optimization": zero_optimization(stage=dims.zero_stage, num_elements=num_elements),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        # Every tensor rank sends its activations to the next stage; sequence parallelism has sharded them already.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if training.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        if not dims.shards_parameters:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}

    return settings


def _is_finite(value: float) -> bool:
    return value - value == 0.0
