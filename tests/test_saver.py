"""Saving behind the training: what is copied when, what fails how, and who may write."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_distributed
from engines import config, layout, new_engine, state, train
from hypothesis import given
from hypothesis import strategies as st

from megatron_mea.checkpoint import folder
from megatron_mea.checkpoint.lease import LEASE, Lease
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
    """However a tensor group cuts and pads it, and wherever its flattened parts are cut."""
    if shard_dim is not None and shard_dim >= len(shape):
        shard_dim = None
    whole = torch.arange(1.0, 1 + np.prod(shape)).view(shape)
    found, times = torch.zeros(shape), torch.zeros(shape)
    for rank in range(tensor if shard_dim is not None else 1):
        spec = ParameterSpec("name", shape, "matrix", constant(0), TensorGroup(tensor, rank), shard_dim)
        local = spec.local(whole)
        assert tuple(local.shape) == spec.local_shape
        flat = local.flatten()
        places = sorted({0, len(flat), *(int(cut * len(flat)) for cut in cuts)})
        for start, stop in pairwise(places):
            fragment = Fragment("name", shape, spec.offsets, spec.local_shape, start, flat[start:stop])
            pieces = list(fragment.pieces())
            assert len(pieces) <= 3
            for offsets, view in pieces:
                box = tuple(slice(first, first + size) for first, size in zip(offsets, view.shape, strict=True))
                found[box] = view
                times[box] += 1
    assert torch.equal(found, whole)
    assert torch.equal(times, torch.ones(shape))


def savers(engine, run_dir: Path, lease: Lease | None = None, **settings) -> Iterator:
    """A new saver each time; collective."""
    from megatron_mea.checkpoint.saver import Saver
    from megatron_mea.config.schema import Checkpoint
    from megatron_mea.training.processes import writers_group

    tokenizer = run_dir / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    while True:
        yield Saver(run_dir, Checkpoint(**settings), tokenizer, writers_group(), lease, lambda line: None)


def meta(step: int) -> folder.Meta:
    return folder.Meta(step, 8 * step, 96 * step, {}, [], {}, {}, None)


def checks_on_this_rank(root: Path) -> None:
    from megatron_mea.checkpoint import saver as module
    from megatron_mea.errors import RunError
    from megatron_mea.training.processes import start_distributed, stop_distributed
    from megatron_mea.training.ranks import Ranks

    torch.set_num_threads(1)
    start_distributed(Ranks.from_environment())
    rank = torch.distributed.get_rank()
    engine = new_engine(config(layout()))
    # Training draws no random number, so that there is no random state to save.
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    train(engine, 1, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]

    # What is saved is what stood when `save` returned, whatever training does while the disk is slow.
    saver, slow = next(savers(engine, root / "slow", keep=1, keep_every=2)), threading.Event()
    write = module.write_fragments

    def write_slowly(*arguments: object) -> None:
        slow.wait()
        write(*arguments)

    module.write_fragments = write_slowly
    expected = {2: state(engine)}
    saver.save(meta(2), engine.fragments(owned=True))
    train(engine, 3, 3)
    assert folder.checkpoints_of(root / "slow") == []
    assert not saver.failed
    # A second save waits for the first.
    threading.Timer(0.5, slow.set).start()
    expected[3] = state(engine)
    saver.save(meta(3), engine.fragments(owned=True))
    assert [step for step, _ in folder.checkpoints_of(root / "slow")] == [2]
    train(engine, 4, 4)
    expected[4] = state(engine)
    for step in (4, 5):
        saver.save(meta(step), engine.fragments(owned=True))
    saver.wait()
    torch.distributed.barrier()
    # The oldest are removed, but for multiples of 2.
    found = dict(folder.checkpoints_of(root / "slow"))
    assert list(found) == [2, 4, 5]
    for step in (2, 4):
        assert folder.damage(found[step]) is None
        tensors = read_tensors(found[step], tensor_shapes(found[step]))
        assert tensors.keys() == expected[step].keys()
        assert all(torch.equal(tensor, expected[step][name]) for name, tensor in tensors.items())
    module.write_fragments = write

    # Without async_save it is written when `save` returns.
    saver = next(savers(engine, root / "blocking", async_save=False))
    saver.save(meta(1), engine.fragments(owned=True))
    torch.distributed.barrier()
    assert [step for step, _ in folder.checkpoints_of(root / "blocking")] == [1]

    # What one rank cannot do ends the save on all, with its reason; what stood before still stands.
    digest, usage = folder.sha256, shutil.disk_usage

    def broken_disk(path: Path) -> str:
        if rank == 1:
            raise OSError(5, "Input/output error")
        return digest(path)

    patches = [
        (folder, "sha256", broken_disk, "written: rank 1: [Errno 5] Input/output error"),
        (shutil, "disk_usage", lambda path: usage(path)._replace(free=9), "has 0.000 GB free, and it needs 0.001 GB"),
    ]
    for place, name, broken, reason in patches:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, broken)
            saver = next(savers(engine, root / "blocking"))
            saver.save(meta(9), engine.fragments(owned=True))
            with pytest.raises(RunError, match="the checkpoint of step 9 could not be written: ") as error:
                saver.wait()
            assert reason in str(error.value)
            assert saver.failed
            torch.distributed.barrier()
        assert [path.name for path in (root / "blocking/checkpoints").iterdir()] == ["step_00000001"]
        with pytest.raises(RunError, match="the checkpoint of step 9 could not be written: "):
            saver.save(meta(10), engine.fragments(owned=True))

    # A job that has lost the folder to another one publishes nothing there.
    lease = Lease(root / "blocking") if rank == 0 else None
    if lease:
        assert lease.take() is None
    saver = next(savers(engine, root / "blocking", lease))
    saver.save(meta(2), engine.fragments(owned=True))
    saver.wait()
    torch.distributed.barrier()
    if rank == 0:
        Lease(root / "blocking").take()
    saver.save(meta(3), engine.fragments(owned=True))
    with pytest.raises(RunError, match="was taken over by process"):
        saver.wait()
    assert [step for step, _ in folder.checkpoints_of(root / "blocking")] == [1, 2]
    stop_distributed()


def test_saver(tmp_path):
    run_distributed(checks_on_this_rank, 2, tmp_path)


def test_lease(tmp_path):
    """The one that came last has it; a job that has ended or is known to be dead is not spoken of."""
    first, second = Lease(tmp_path), Lease(tmp_path)
    assert first.take() is None
    assert first.lost_to() == ""
    told = second.take()
    assert told is not None
    assert told.startswith(f"process {os.getpid()} on ")
    # A look that is a moment old is trusted unless asked otherwise.
    assert first.lost_to(now=False) == ""
    assert first.lost_to().startswith(f"process {os.getpid()} on ")
    assert first.lost_to(now=False) != ""
    first.end()
    assert json.loads((tmp_path / LEASE).read_text())["token"] == second.token
    second.end()
    third = Lease(tmp_path)
    assert third.take() is None
    # A job that was killed leaves its lease, and a process id that nobody has.
    left = json.loads((tmp_path / LEASE).read_text())
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / LEASE).write_text(json.dumps(left | {"pid": dead.pid}))
    assert Lease(tmp_path).take() is None
    (tmp_path / LEASE).write_text(json.dumps(left | {"host": "elsewhere", "job": "17"}))
    assert Lease(tmp_path).take().startswith("job 17, process ")
    for garbage in ("", "{", "[]", "{}"):
        (tmp_path / LEASE).write_text(garbage)
        assert Lease(tmp_path).take() is None
