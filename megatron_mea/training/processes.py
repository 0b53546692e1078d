"""Processes that train together: joining, the grid they form, timeouts, leaving."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import warnings
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from megatron_mea.config.schema import Config
from megatron_mea.errors import UserError
from megatron_mea.parallel.grid import Grid, TensorGroup
from megatron_mea.training.ranks import Ranks

START_MINUTES = 30.0
"""Patience of collectives and of the watchdog until the first step has warmed everything."""
SAVE_MINUTES = 60.0
"""Patience for a checkpoint: a disk may be slow or busy."""
_LATER = 1.0
"""Minutes by which a collective gives up later than the watchdog, which says more."""
_NO_COMPILER = "TORCHDYNAMO_DISABLE"
"""Environment variable with which torch.compile returns functions as they are."""


def choose_device(ranks: Ranks) -> torch.device:
    """The device of this rank: a GPU where torch can use one.

    Raises:
        UserError: the node has fewer GPUs than ranks; or torch is made for GPUs and finds none in a SLURM job, where
            training would be slow without a word.
    """
    if not torch.cuda.is_available():
        if torch.version.cuda and os.environ.get("SLURM_STEP_ID") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            found = f"no GPU that torch {torch.__version__} can use on {socket.gethostname()}"
            mend = "look at nvidia-smi there; to train on CPUs set CUDA_VISIBLE_DEVICES to nothing (launch/site.env)"
            raise UserError("environment", found, "as many GPUs as ranks on every node", mend)
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # A scheduler may show each rank its own GPU only, which then is number 0.
    if ranks.local_rank >= visible > 1:
        raise UserError("environment", f"LOCAL_RANK={ranks.local_rank} with {visible} GPUs", "a GPU for each rank")
    return torch.device("cuda", ranks.local_rank if visible > 1 else 0)


def start_distributed(ranks: Ranks) -> torch.device:
    """Joins the process group (NCCL on GPUs, gloo elsewhere) and returns this rank's device."""
    device = choose_device(ranks)
    ranks.export()
    cuda = device.type == "cuda"
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed announces its defaults on every rank, and uses names that torch has deprecated.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    _import_muon()
    if cuda:
        torch.cuda.set_device(device)
        # DeepSpeed takes it for the number of the device.
        os.environ["LOCAL_RANK"] = str(device.index)
    # On a CPU DeepSpeed would compile a shared-memory all-reduce for minutes, and hang on another job's lock.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(minutes=START_MINUTES),
        distributed_port=ranks.master_port,
    )
    return device


def _import_muon() -> None:
    """Imports the optimizer Muon, as DeepSpeed does later whichever one trains, but without torch's compiler.

    It asks for torch.compile while it is imported, which loads the compiler: a second, for functions that nobody calls.
    """
    given = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        # torch asks whenever it is to compile something: from here on it does.
        del os.environ[_NO_COMPILER]
        if given is not None:
            os.environ[_NO_COMPILER] = given


def build_grid(config: Config) -> Grid:
    """Where this rank stands, and its process groups; collective. Tensor ranks are neighbours, to share a node."""
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

    parallel = config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    data = dist.get_world_size() // (tensor * stages)
    topology = PipeModelDataParallelTopology(num_pp=stages, num_mp=tensor, num_dp=data)
    # It prints its topology.
    with contextlib.redirect_stdout(io.StringIO()):
        mpu = PipelineParallelGrid(topology)
    group = TensorGroup(
        tensor, mpu.get_slice_parallel_rank(), mpu.get_slice_parallel_group(), parallel.sequence_parallel
    )
    ends = None
    if stages > 1:
        last = (stages - 1) * data * tensor
        # Every rank takes part in making every group.
        pairs = [(first, dist.new_group([first, first + last])) for first in range(data * tensor)]
        ends = next((made for first, made in pairs if dist.get_rank() in (first, first + last)), None)
    return Grid(group, mpu.get_data_parallel_rank(), data, mpu.get_pipe_parallel_rank(), stages, ends, mpu)


def writers_group() -> Any:
    """Where the threads that write checkpoints meet; collective."""
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=SAVE_MINUTES + _LATER))


def shorten_timeouts(minutes: float, but: Any) -> None:
    """Sets the time after which a collective gives up; long only until the first step has warmed everything.

    Args:
        minutes: of the watchdog, which is to speak first.
        but: a process group that keeps its own.
    """
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in list(_world.pg_map):
        if group is not but:
            _set_pg_timeout(timedelta(minutes=minutes + _LATER), group)


def stop_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
