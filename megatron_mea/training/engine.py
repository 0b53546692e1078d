"""The training engine: everything that knows DeepSpeed stands here."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_mea.config.schema import Config
from megatron_mea.data.corpora import Batch
from megatron_mea.errors import RunError, UserError
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.grid import Grid, TensorGroup
from megatron_mea.parallel.parameter import named_specs
from megatron_mea.training.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


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
    """Loss (nats a target) before the update, gradient norm before clipping, and whether a rank wants to stop."""

    loss: float
    grad_norm: float
    stop: bool


def start_distributed(ranks: Ranks) -> torch.device:
    """Joins the process group (NCCL on GPUs, gloo elsewhere) and returns this rank's device."""
    ranks.export()
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed announces its defaults on every rank, and uses names that torch has deprecated.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    device = torch.device("cpu")
    if cuda:
        visible = torch.cuda.device_count()
        # A scheduler may show each rank its own GPU only, which then is number 0.
        if ranks.local_rank >= visible > 1:
            raise UserError("environment", f"LOCAL_RANK={ranks.local_rank} with {visible} GPUs", "a GPU for each rank")
        device = torch.device("cuda", ranks.local_rank if visible > 1 else 0)
        torch.cuda.set_device(device)
    # On a CPU DeepSpeed would compile a shared-memory all-reduce for minutes, and hang on another job's lock.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(minutes=30),
        distributed_port=ranks.master_port,
    )
    return device


def build_grid(config: Config) -> Grid:
    """The tensor and data groups of this rank; collective. Tensor ranks are neighbours, so they share a node."""
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

    parallel = config.parallel
    size = parallel.tensor_model_parallel_size
    topology = PipeModelDataParallelTopology(num_pp=1, num_mp=size, num_dp=dist.get_world_size() // size)
    # It prints its topology.
    with contextlib.redirect_stdout(io.StringIO()):
        mpu = PipelineParallelGrid(topology)
    tensor = TensorGroup(
        size, mpu.get_slice_parallel_rank(), mpu.get_slice_parallel_group(), parallel.sequence_parallel
    )
    return Grid(tensor, mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size(), mpu)


def shorten_timeouts(minutes: float) -> None:
    """Sets the time after which a collective gives up; long only until the first step has warmed everything."""
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in list(_world.pg_map):
        _set_pg_timeout(timedelta(minutes=minutes), group)


def stop_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Engine:
    """A decoder and its optimizer under DeepSpeed.

    Args:
        config: the whole configuration.
        model: initialised, on the CPU.
        device: of this rank.
        grid: where this rank stands.
    """

    def __init__(self, config: Config, model: Decoder, device: torch.device, grid: Grid) -> None:
        import deepspeed

        self.config, self.device, self.grid = config, device, grid
        self.accumulation = config.training.global_batch_size // (config.training.micro_batch_size * grid.data_size)
        # Its bfloat16 optimizer prints memory figures.
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                model_parameters=_parameter_groups(config, model),
                optimizer=lambda groups: torch.optim.AdamW(
                    groups,
                    lr=config.optimizer.lr,
                    betas=tuple(config.optimizer.betas),
                    eps=config.optimizer.eps,
                    fused=device.type == "cuda",
                ),
                config=_deepspeed_config(config, self.accumulation),
                dist_init_required=False,
                mpu=grid.mpu,
            )
        self.model: Decoder = self.engine.module
        self._make_moments()

    def train_step(self, batches: Sequence[Batch], lr: float, stop: bool) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Args:
            batches: `accumulation` micro-batches.
            lr: the rate of this step.
            stop: whether this rank was asked to stop; the answer is the same on all ranks.

        Raises:
            NonFiniteError: the loss or the gradient is not finite, on any rank; nothing was updated.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        targets = self.config.tokens_per_step
        losses = []
        for index, batch in enumerate(batches):
            loss = self.engine(*self._to_device(batch))
            losses.append(loss.detach().double())
            # DeepSpeed divides by the micro-batches and averages over data parallelism: undo both, so that
            # the gradient is that of the sum over all targets divided by their number.
            self.engine.backward(loss * (self.accumulation * self.grid.data_size / targets))
            if index + 1 < len(batches):
                self.engine.step()
        total = torch.stack([torch.stack(losses).sum(), torch.tensor(float(stop), device=self.device).double()])
        dist.all_reduce(total)
        loss_sum, stops = total.tolist()
        loss_sum /= self.grid.tensor.size  # every rank of a tensor group has the loss of the same samples
        if not _is_finite(loss_sum):
            raise NonFiniteError(f"the loss is {loss_sum / targets}", self._not_finite(batches))
        self.engine.step()
        # DeepSpeed skips an update whose norm is not finite, without a word.
        grad_norm = float(self.engine.get_global_grad_norm())
        if self.optimizer.overflow or not _is_finite(grad_norm):
            found = f"the loss is {loss_sum / targets:.6g} but the gradient is not finite"
            raise NonFiniteError(found, self._not_finite(batches))
        return StepResult(loss_sum / targets, grad_norm, stops > 0)

    def _not_finite(self, batches: Sequence[Batch]) -> dict[int, str | None]:
        """Repeats the micro-batches without DeepSpeed, which has dropped the gradients, to find the bad ones."""
        named = named_specs(self.model)
        found: dict[int, str | None] = {}
        for index, batch in enumerate(batches):
            loss = self.model(*self._to_device(batch))
            bad = [] if loss.isfinite() else [None]
            # With ZeRO 3 the parameters are not there to take a gradient of.
            if not self._partitions_parameters:
                gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
                pairs = zip(named, gradients, strict=True)
                bad += [name for name, gradient in pairs if gradient is not None and not gradient.isfinite().all()]
            if bad:
                found[index] = bad[-1]
        return found

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch]) -> float:
        """Mean cross-entropy (nats a target) over the micro-batches of all ranks."""
        self.engine.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in batches:
            total[0] += self.engine(*self._to_device(batch)).double()
            total[1] += batch.targets.size
        self.engine.train()
        dist.all_reduce(total)
        loss, count = total.tolist()
        return loss / count

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole float32 tensor) of master weights and moments; collective, the same order on all ranks.

        A moment of parameter `name` is called `exp_avg.name` and `exp_avg_sq.name`.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, parameter in named_specs(self.model).items():
            yield name, self.weight(name)
            for moment in MOMENTS:
                yield f"{moment}.{name}", parameter.spec.whole(safe_get_full_optimizer_state(parameter, moment))

    def weight(self, name: str) -> torch.Tensor:
        """The whole float32 master of one parameter; collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = named_specs(self.model)[name]
        return parameter.spec.whole(safe_get_full_fp32_param(parameter))

    def load_state(self, read: Callable[[str], torch.Tensor], updates: int) -> None:
        """Sets master weights, moments and the number of updates; `read` gives a tensor by its `state` name."""
        for moments in self.optimizer.optimizer.state.values():
            moments["step"].fill_(updates)
        for name, parameter in named_specs(self.model).items():
            master = parameter.spec.local(read(name)).to(self.device)
            self._set(parameter, None, master)
            for moment in MOMENTS:
                self._set(parameter, moment, parameter.spec.local(read(f"{moment}.{name}")).to(self.device))
            # The working copy does not follow the master by itself.
            if not self._partitions_parameters:
                parameter.data.copy_(master)

    @property
    def _partitions_parameters(self) -> bool:
        return self.config.parallel.zero_stage == 3

    def _set(self, parameter: torch.nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
        """Sets the master (moment None) or a moment of a parameter to this rank's part of the global tensor."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if not self._partitions_parameters:
            if moment is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)
            return
        # DeepSpeed's own way for stage 3 fails where a parameter does not divide into equal partitions.
        size, rank = parameter.ds_tensor.numel(), self.optimizer._get_param_partition_rank(parameter)
        mine = value.flatten()[rank * size : (rank + 1) * size]
        partition, _ = self.optimizer._get_fp32_opt_state_partition(parameter, False, moment)
        partition.data.zero_()
        partition.data[: mine.numel()].copy_(mine)
        if moment is None:
            parameter.ds_tensor.data[: mine.numel()].copy_(mine)

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
        arrays = (batch.input_ids, batch.position_ids, batch.targets)
        return tuple(torch.tensor(array).to(self.device, non_blocking=True) for array in arrays)


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


def _deepspeed_config(config: Config, accumulation: int) -> dict:
    training = config.training
    settings: dict = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.grad_clip,
        # Stage 0 loses the gradient norm and is no cheaper than stage 1, so it runs as stage 1.
        "zero_optimization": {"stage": max(config.parallel.zero_stage, 1)},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if training.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        if config.parallel.zero_stage < 3:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _is_finite(value: float) -> bool:
    return value - value == 0.0
