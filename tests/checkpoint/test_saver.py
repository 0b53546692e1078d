"""Saving in the background: fragments, copies, failures, and the lease of the run folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.distributed import run_distributed
from support.engines import config, layout, new_engine, state, train

from megatron_mea.checkpoint import folder
from megatron_mea.checkpoint.lease import Lease
from megatron_mea.checkpoint.tensors import Fragment, read_tensors, tensor_shapes
from megatron_mea.parallel.grid import TensorGroup
from megatron_mea.parallel.parameter import ParameterSpec, constant


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple),
    shard_dim=st.sampled_from([None, 0, 1]),
    tensor=st.integers(1, 5),
    cuts=st.lists(st.floats(0, 1), max_size=4),
)
def test_fragments_make_up_the_tensor_once(shape, shard_dim, tensor, cuts):
    """However a tensor group shards and pads it, and wherever its flattened shards are cut into fragments."""
    if shard_dim is not None and shard_dim >= len(shape):
        shard_dim = None

    expected = torch.arange(1.0, 1 + np.prod(shape)).view(shape)
    actual, counts = torch.zeros(shape), torch.zeros(shape)
    for rank in range(tensor if shard_dim is not None else 1):
        spec = ParameterSpec(
            name="name",
            global_shape=shape,
            component="mlp",
            kind="matrix",
            initialize=constant(0),
            tp=TensorGroup(size=tensor, rank=rank),
            shard_dim=shard_dim,
        )
        shard = spec.local_shard(expected)
        assert tuple(shard.shape) == spec.local_shape

        flat = shard.flatten()
        bounds = sorted({0, len(flat), *(int(cut * len(flat)) for cut in cuts)})
        for start, stop in pairwise(bounds):
            fragment = Fragment(
                name="name",
                global_shape=shape,
                global_offset=spec.global_offset,
                local_shape=spec.local_shape,
                start=start,
                values=flat[start:stop],
            )
            chunks = list(fragment.chunks())
            assert len(chunks) <= 3
            for offsets, view in chunks:
                box = tuple(slice(first, first + size) for first, size in zip(offsets, view.shape, strict=True))
                actual[box] = view
                counts[box] += 1

    assert torch.equal(actual, expected)
    assert torch.equal(counts, torch.ones(shape))


def new_saver(run_dir: Path, *, lease: Lease | None = None, **settings):
    """The saver of this rank; collective."""
    from megatron_mea.checkpoint.saver import Saver
    from megatron_mea.config.schema import Checkpoint
    from megatron_mea.training.distributed import writers_group

    tokenizer = run_dir / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    return Saver(
        run_dir=run_dir,
        settings=Checkpoint(**settings),
        tokenizer=tokenizer,
        group=writers_group(),
        lease=lease,
        log=lambda line: None,
    )


def metadata(step: int) -> folder.CheckpointMetadata:
    return folder.CheckpointMetadata(
        step=step, samples=8 * step, tokens=96 * step, config={}, data=[], layout={}, versions={}, validation_loss=None
    )


def checks_on_this_rank(root: Path) -> None:
    from megatron_mea.checkpoint import saver as saver_module
    from megatron_mea.errors import RunError
    from megatron_mea.training.distributed import start_distributed, stop_distributed
    from megatron_mea.training.rank_env import RankEnv

    torch.set_num_threads(1)
    start_distributed(RankEnv.from_environment())
    rank = torch.distributed.get_rank()
    engine = new_engine(config(parallel=layout()))

    # Training draws no random number, so that there is no random state to save.
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    train(engine=engine, first=1, last=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]

    # A checkpoint holds the state at the call of `save`, whatever training does while the disk is slow.
    saver, may_write = new_saver(run_dir=root / "slow", keep=1, keep_every=2), threading.Event()
    write_fragments = saver_module.write_fragments

    def write_slowly(**arguments: object) -> None:
        may_write.wait()
        write_fragments(**arguments)

    saver_module.write_fragments = write_slowly
    expected = {2: state(engine)}
    saver.save(metadata(2), engine.state.fragments(owned=True))
    train(engine=engine, first=3, last=3)
    assert folder.complete_checkpoints(root / "slow") == []
    assert not saver.failed

    # A second save waits for the first.
    threading.Timer(0.5, may_write.set).start()
    expected[3] = state(engine)
    saver.save(metadata(3), engine.state.fragments(owned=True))
    assert [step for step, _ in folder.complete_checkpoints(root / "slow")] == [2]
    train(engine=engine, first=4, last=4)
    expected[4] = state(engine)
    for step in (4, 5):
        saver.save(metadata(step), engine.state.fragments(owned=True))
    saver.wait()
    torch.distributed.barrier()

    # The oldest are removed, except multiples of 2.
    checkpoints = dict(folder.complete_checkpoints(root / "slow"))
    assert list(checkpoints) == [2, 4, 5]
    for step in (2, 4):
        assert folder.find_corruption(checkpoints[step]) is None
        tensors = read_tensors(checkpoints[step], tensor_shapes(checkpoints[step]))
        assert tensors.keys() == expected[step].keys()
        assert all(torch.equal(tensor, expected[step][name]) for name, tensor in tensors.items())

    saver_module.write_fragments = write_fragments

    # Without async_save the checkpoint is complete when `save` returns.
    saver = new_saver(root / "blocking", async_save=False)
    saver.save(metadata(1), engine.state.fragments(owned=True))
    torch.distributed.barrier()
    assert [step for step, _ in folder.complete_checkpoints(root / "blocking")] == [1]

    # A failure of a rank ends the save on all, with its reason; earlier checkpoints stay.
    sha256, disk_usage = folder.sha256, shutil.disk_usage

    def broken_disk(path: Path) -> str:
        if rank == 1:
            raise OSError(5, "Input/output error")

        return sha256(path)

    patches = [
        (folder, "sha256", broken_disk, "written: rank 1: [Errno 5] Input/output error"),
        (
            shutil,
            "disk_usage",
            lambda path: disk_usage(path)._replace(free=9),
            "has 0.000 GB free, and it needs 0.001 GB",
        ),
    ]
    for module, name, broken, reason in patches:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, broken)
            saver = new_saver(root / "blocking")
            saver.save(metadata(9), engine.state.fragments(owned=True))
            with pytest.raises(RunError, match="the checkpoint of step 9 could not be written: ") as error:
                saver.wait()
            assert reason in str(error.value)
            assert saver.failed
            torch.distributed.barrier()

        assert [path.name for path in (root / "blocking/checkpoints").iterdir()] == ["step_00000001"]
        with pytest.raises(RunError, match="the checkpoint of step 9 could not be written: "):
            saver.save(metadata(10), engine.state.fragments(owned=True))

    # A job that has lost the lease publishes nothing.
    lease = Lease(root / "blocking") if rank == 0 else None
    if lease:
        assert lease.take() is None

    saver = new_saver(root / "blocking", lease=lease)
    saver.save(metadata(2), engine.state.fragments(owned=True))
    saver.wait()
    torch.distributed.barrier()

    if rank == 0:
        Lease(root / "blocking").take()
    saver.save(metadata(3), engine.state.fragments(owned=True))
    with pytest.raises(RunError, match="was taken over by process"):
        saver.wait()
    assert [step for step, _ in folder.complete_checkpoints(root / "blocking")] == [1, 2]
    stop_distributed()


@pytest.mark.slow
def test_saver(tmp_path):
    run_distributed(checks_on_this_rank, 2, tmp_path)


@pytest.mark.slow
def test_lease(tmp_path):
    """The job that took it last holds it; a previous holder that has ended or is known to be dead is not named."""
    first, second = Lease(tmp_path), Lease(tmp_path)
    assert first.take() is None
    assert first.new_holder() == ""
    previous = second.take()
    assert previous is not None
    assert previous.startswith(f"process {os.getpid()} on ")

    # What was read a moment ago is reused on request.
    assert first.new_holder(cached=True) == ""
    assert first.new_holder().startswith(f"process {os.getpid()} on ")
    assert first.new_holder(cached=True) != ""

    first.end()
    assert json.loads((tmp_path / ".lease").read_text())["token"] == second.token
    second.end()
    third = Lease(tmp_path)
    assert third.take() is None

    # A killed job leaves its lease, with a process id that is free.
    state_on_disk = json.loads((tmp_path / ".lease").read_text())
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / ".lease").write_text(json.dumps(state_on_disk | {"pid": dead.pid}))
    assert Lease(tmp_path).take() is None
    (tmp_path / ".lease").write_text(json.dumps(state_on_disk | {"host": "elsewhere", "job": "17"}))
    assert Lease(tmp_path).take().startswith("job 17, process ")

    for garbage in ("", "{", "[]", "{}"):
        (tmp_path / ".lease").write_text(garbage)
        assert Lease(tmp_path).take() is None
