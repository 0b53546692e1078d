"""The training engine: a decoder and its optimizer under DeepSpeed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from megatron_mea.attention.folds import StepFolds
from megatron_mea.config.schema import Config
from megatron_mea.data.corpora import IGNORE_INDEX, Batch
from megatron_mea.model.decoder import Decoder
from megatron_mea.optimizers import build_optimizer, parameter_groups
from megatron_mea.parallel.grid import Grid
from megatron_mea.parallel.parameter import parameters_by_name
from megatron_mea.parallel.zero import deepspeed_config
from megatron_mea.training.loader import to_device
from megatron_mea.training.nonfinite import NonFiniteError, locate_nonfinite
from megatron_mea.training.pipeline_stage import NUM_LOSS_TERMS, ModelWithLoss, PipelineStage
from megatron_mea.training.router_totals import RouterTotals
from megatron_mea.training.step_result import StepResult
from megatron_mea.training.teacher import Teacher
from megatron_mea.training.zero_state import ZeroState


class Engine:
    """A decoder and its optimizer under DeepSpeed, on any number of tensor, context and data ranks.

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
                model_parameters=parameter_groups(parameters_by_name(model).values(), config.optimizer),
                optimizer=partial(build_optimizer, settings=config.optimizer, device=device),
                config=deepspeed_config(
                    config=config,
                    dims=grid.dims,
                    num_elements=sum(p.numel() for p in model.parameters()),
                ),
                dist_init_required=False,
                **self._deepspeed_arguments(),
            )

        self.state = ZeroState(self.optimizer, model=model, dims=grid.dims)
        self.routers = RouterTotals(model, sequences=config.training.global_batch_size, device=device)

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

        # DeepSpeed divides by the micro-batches and averages over data and context ranks: this undoes both, so that
        # the gradient is that of the sum over all targets divided by their number.
        dims = self.grid.dims
        loss_sums = self._run_step(batches, dims.num_micro_batches * dims.dp_cp / num_targets)
        stop = torch.full_like(loss_sums[:1], float(stop_requested()))
        totals = torch.cat([loss_sums, stop, self.routers.pop_local()])
        dist.all_reduce(totals)
        totals, router_totals = totals.tensor_split([NUM_LOSS_TERMS + 1])

        norm = self.engine.get_global_grad_norm()
        norm = norm.double() if isinstance(norm, torch.Tensor) else torch.full_like(totals[0], norm)
        # One copy to the host for all of them, since the host waits for the device here.
        values = torch.cat([totals, norm.reshape(1), self.routers.end_step(router_totals)]).tolist()
        *total_losses, num_stop_requests, grad_norm = values[: NUM_LOSS_TERMS + 2]
        # Every rank of a tensor group has the loss of the same samples.
        loss, divergence = (total / (self.grid.tp.size * num_targets) for total in total_losses)

        if self.state.skipped_update or not all(map(_is_finite, (loss, divergence, grad_norm))):
            cause = "gradient is not finite" if _is_finite(divergence) else f"distillation loss is {divergence}"
            problem = f"{loss:.6g} but the {cause}" if _is_finite(loss) else str(loss)
            micro_batches = locate_nonfinite(batches, stage=self.stage, grid=self.grid, device=self.device)
            raise NonFiniteError(f"the loss is {problem}", micro_batches)

        return StepResult(
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            distillation_loss=None if self.stage.teacher is None else divergence,
            **self.routers.fields(values[NUM_LOSS_TERMS + 2 :]),
            should_stop=num_stop_requests > 0,
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

        # Every tensor rank of the last stage has seen the loss of the same samples, every context rank of a part.
        num_scored = num_targets / self.grid.cp.size if self.grid.is_last_stage else 0
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
            (NUM_LOSS_TERMS,) float64: this rank's sums, as `PipelineStage.compute_loss` has them.
        """
        loss_sums = torch.zeros(NUM_LOSS_TERMS, dtype=torch.float64, device=self.device)
        folds = self._step_folds(batches)
        for index, batch in enumerate(batches):
            folded = None if folds is None else folds.for_micro_batch(index)
            input_ids, position_ids, targets = to_device(batch, device=self.device, cp=self.grid.cp)
            loss, micro_batch_sums = self.engine(input_ids, position_ids, targets, folded=folded)
            loss_sums += micro_batch_sums

            self.engine.backward(loss * loss_scale)
            self.engine.step()

        return loss_sums

    def _step_folds(self, batches: Sequence[Batch]) -> StepFolds | None:
        """Weights folded once for all micro-batches of a step; None where that does not pay."""
        tokens, hidden_size = batches[0].input_ids.size // self.grid.cp.size, self.config.model.hidden_size
        pays = self.grid.dims.folds_once_per_step(tokens=tokens, hidden_size=hidden_size)
        return None if not pays else StepFolds([block.self_attn for block in self.model.blocks], len(batches))

    def _evaluate(self, batches: Iterator[Batch], count: int) -> torch.Tensor:
        """The sum of this rank's cross-entropies (nats), a float64 scalar."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.engine.eval()
        for batch in batches:
            input_ids, position_ids, targets = to_device(batch, device=self.device, cp=self.grid.cp)
            _, micro_batch_sums = self.engine(input_ids, position_ids, targets)
            loss_sum += micro_batch_sums[0]

        self.engine.train()
        return loss_sum


def _is_finite(value: float) -> bool:
    return value - value == 0.0
