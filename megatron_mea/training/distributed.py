"""The process group of a run: joining and leaving it, the grid of ranks, and timeouts of collectives."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.config.schema import Config
from megatron_mea.errors import MachineError, UserError
from megatron_mea.parallel.grid import ContextGroup, Grid, TensorGroup
from megatron_mea.training.rank_env import RankEnv

START_MINUTES = 30.0
"""Minutes for which the watchdog waits until the first step has warmed everything up."""
SAVE_MINUTES = 60.0
"""Minutes that a checkpoint may take: a disk may be slow or busy."""
_COLLECTIVE_TIMEOUT = timedelta(days=365)
"""After which a collective gives up: never. The watchdog ends a rank that hangs, and tells a job that was suspended
from one that hangs, which gloo and NCCL do not."""
_DYNAMO_DISABLE = "TORCHDYNAMO_DISABLE"
"""Environment variable with which torch.compile returns functions as they are."""


def choose_device(rank_env: RankEnv) -> torch.device:
    """The device of this rank: a GPU where torch can use one.

    Raises:
        UserError: the node has fewer GPUs than ranks; or torch is made for GPUs and finds none in a SLURM job, where
            training would be slow without a word.
    """
    if not torch.cuda.is_available():
        if torch.version.cuda and os.environ.get("SLURM_STEP_ID") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            got = f"no GPU that torch {torch.__version__} can use on {socket.gethostname()}"
            hint = "look at nvidia-smi there; to train on CPUs set CUDA_VISIBLE_DEVICES to nothing (launch/site.env)"
            raise UserError(where="environment", got=got, expected="as many GPUs as ranks on every node", hint=hint)

        return torch.device("cpu")

    num_gpus = torch.cuda.device_count()
    # A scheduler may show each rank its own GPU only, which then is number 0.
    if rank_env.local_rank >= num_gpus > 1:
        raise UserError(
            where="environment",
            got=f"LOCAL_RANK={rank_env.local_rank} with {num_gpus} GPUs",
            expected="a GPU for each rank",
        )

    return torch.device("cuda", rank_env.local_rank if num_gpus > 1 else 0)


def start_distributed(rank_env: RankEnv) -> torch.device:
    """Joins the process group (NCCL on GPUs, gloo elsewhere) and returns this rank's device."""
    device = choose_device(rank_env)
    rank_env.export()
    on_gpu = device.type == "cuda"
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    # DeepSpeed announces its defaults on every rank, and uses names that torch has deprecated.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    _import_muon()

    if on_gpu:
        torch.cuda.set_device(device)
        # DeepSpeed takes it for the number of the device.
        os.environ["LOCAL_RANK"] = str(device.index)

    # On a CPU DeepSpeed would compile a shared-memory all-reduce for minutes, and hang on another job's lock.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with port_errors(rank_env):
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            # gloo's sends and receives keep the timeout that their group was made with.
            timeout=_COLLECTIVE_TIMEOUT,
            distributed_port=rank_env.master_port,
        )
    return device


@contextlib.contextmanager
def port_errors(rank_env: RankEnv) -> Iterator[None]:
    """Turns torch's error about a port that rank 0 cannot listen on into one that names MASTER_PORT.

    Raises:
        UserError: whoever started the ranks has chosen that port.
        MachineError: a SLURM job has, and may find it free the next time.
    """
    try:
        yield
    except dist.DistNetworkError as error:
        if "failed to listen" not in str(error):
            raise

        reason = "already in use" if "EADDRINUSE" in str(error) else str(error).partition("\n")[0]
        problem = UserError(
            where="MASTER_PORT",
            got=f"{rank_env.master_port} on {socket.gethostname()}: {reason}",
            expected="a port that nobody listens on",
            hint="choose another one, or unset MASTER_PORT: launch/local.sh finds a free one. "
            f"`ss -ltnp sport = {rank_env.master_port}` shows who has it",
        )
        raise (MachineError(str(problem)) if "SLURM_JOB_ID" in os.environ else problem) from None


def _import_muon() -> None:
    """Imports the Muon optimizer, which DeepSpeed imports later whichever optimizer trains, without torch's compiler.

    Its module calls torch.compile on import, which takes a second to load the compiler for functions that nobody calls.
    """
    previous = os.environ.get(_DYNAMO_DISABLE)
    os.environ[_DYNAMO_DISABLE] = "1"
    try:
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        # torch asks whenever it is to compile something: from here on it does.
        del os.environ[_DYNAMO_DISABLE]
        if previous is not None:
            os.environ[_DYNAMO_DISABLE] = previous


def build_grid(config: Config) -> Grid:
    """The coordinates of this rank and its process groups; collective. Tensor and then context ranks are neighbours.

    To DeepSpeed context ranks are data ranks, since both hold the same parameters and other tokens. Its own sequence
    parallelism is not used: with ZeRO 3 it partitions over data ranks alone, and trains wrong numbers without a word.
    """
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

    dims = ParallelDims.from_config(config, dist.get_world_size())
    topology = PipeModelDataParallelTopology(num_pp=dims.pp, num_mp=dims.tp, num_dp=dims.dp_cp)
    # It prints its topology.
    with contextlib.redirect_stdout(io.StringIO()):
        mpu = PipelineParallelGrid(topology)

    tp = TensorGroup(
        size=dims.tp,
        rank=mpu.get_slice_parallel_rank(),
        group=mpu.get_slice_parallel_group(),
        sequence_parallel=dims.sequence_parallel,
    )

    data_rank, context_rank = divmod(mpu.get_data_parallel_rank(), dims.cp)
    cp = ContextGroup(size=dims.cp, rank=context_rank, group=_context_group(dims) if dims.cp > 1 else None)

    embedding_group = None
    if dims.pp > 1:
        # The distance between a rank of the first stage and its counterpart in the last.
        distance = (dims.pp - 1) * dims.dp_cp * dims.tp
        # Every rank takes part in making every group.
        groups = [(first, dist.new_group([first, first + distance])) for first in range(dims.dp_cp * dims.tp)]
        embedding_group = next((group for first, group in groups if dist.get_rank() in (first, first + distance)), None)

    return Grid(
        tp=tp,
        cp=cp,
        dims=dims,
        data_rank=data_rank,
        pipeline_rank=mpu.get_pipe_parallel_rank(),
        embedding_group=embedding_group,
        mpu=mpu,
    )


def _context_group(dims: ParallelDims) -> Any:
    """The process group of this rank's context group; collective over all ranks, which make every group."""
    span = dims.cp * dims.tp
    firsts = [start + tensor_rank for start in range(0, dims.world_size, span) for tensor_rank in range(dims.tp)]
    groups = {first: dist.new_group(list(range(first, first + span, dims.tp))) for first in firsts}
    rank = dist.get_rank()
    return groups[rank - rank % span + rank % dims.tp]


def writers_group() -> Any:
    """A new gloo group of all ranks for the threads that write checkpoints; collective."""
    return dist.new_group(backend="gloo")


def leave_timeouts_to_watchdog() -> None:
    """Has the collectives of all process groups wait for as long as the watchdog lets them."""
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in list(_world.pg_map):
        _set_pg_timeout(_COLLECTIVE_TIMEOUT, group)


def stop_distributed() -> None:
    """Leaves the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
