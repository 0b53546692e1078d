"""Prefetching: the steps are those of the corpora, errors are raised in the consumer, and the thread ends."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.distributed import run_distributed
from support.engines import config

from megatron_mea.cli import main
from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.config.schema import TrainCorpus
from megatron_mea.data.corpora import Batch, Corpora
from megatron_mea.data.indexed import IndexedWriter
from megatron_mea.errors import UserError
from megatron_mea.training.loader import PREFETCH_DEPTH, DataStallTimer, Prefetcher, training_steps, validation_batches

SEQ = 12


@pytest.fixture
def corpora(tmp_path):
    """203 tokens in documents of 7; the id of a token is its position."""
    with IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(203), np.full(29, 7))
        writer.commit()

    return Corpora(
        corpora=[TrainCorpus(path=str(tmp_path / "corpus"))],
        seq_length=SEQ,
        vocab_size=203,
        seed=3,
        key="data.train",
        document_mask=True,
    )


def load_steps(*, corpora: Corpora, rank: int, size: int, first: int = 1) -> list:
    """`StepData` of the steps from `first` to 5 for a data rank."""
    stall_timer = DataStallTimer()
    loader = Prefetcher(
        training_steps(corpora=corpora, config=config(steps=5), grid=grid(rank, size), first=first), stall_timer
    )
    steps = list(loader)
    loader.close()
    assert stall_timer.seconds > 0
    return steps


def grid(rank: int = 0, size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(data_rank=rank, dims=ParallelDims(dp=size))


def test_the_steps_do_not_depend_on_the_ranks(corpora):
    steps = load_steps(corpora=corpora, rank=0, size=1)
    assert [data.step for data in steps] == [1, 2, 3, 4, 5]
    assert [data.step for data in load_steps(corpora=corpora, rank=0, size=1, first=4)] == [4, 5]

    steps_by_rank = [load_steps(corpora=corpora, rank=rank, size=2) for rank in range(2)]
    for expected, *ranks in zip(steps, *steps_by_rank, strict=True):
        assert {data.num_targets for data in (expected, *ranks)} == {expected.num_targets}
        assert expected.num_targets == sum(int((batch.targets >= 0).sum()) for batch in expected.batches)
        # Ranks take the micro-batches in turn.
        hashes = [micro for turn in zip(*(data.hashes() for data in ranks), strict=True) for micro in turn]
        assert hashes == expected.hashes()
        assert len({digest for micro in hashes for digest in micro}) == 8


def test_errors_are_raised_by_the_iteration(corpora):
    corpora.vocab_size = 100
    with pytest.raises(UserError, match="token id"):
        load_steps(corpora=corpora, rank=0, size=1)


def test_a_batch_without_targets_is_refused(tmp_path):
    with IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(100), np.ones(100, np.int32))
        writer.commit()

    corpora = Corpora(
        corpora=[TrainCorpus(path=str(tmp_path / "corpus"))],
        seq_length=SEQ,
        vocab_size=100,
        seed=3,
        key="data.train",
        document_mask=True,
    )
    with pytest.raises(UserError, match="documents of one token"):
        load_steps(corpora=corpora, rank=0, size=1)


def num_data_threads() -> int:
    return sum(thread.name == "data" for thread in threading.enumerate())


def test_it_reads_ahead_until_closed(corpora):
    loader = Prefetcher(
        training_steps(corpora=corpora, config=config(steps=1000), grid=grid(), first=1), DataStallTimer()
    )
    next(iter(loader))
    while loader._ready.qsize() < PREFETCH_DEPTH:
        time.sleep(0.01)

    loader.close()
    assert num_data_threads() == 0


@pytest.mark.parametrize("items", [(), (1, 2, 3), itertools.count()])
def test_the_thread_ends_when_its_consumer_fails(items):
    def fail() -> None:
        with contextlib.closing(Prefetcher(items, DataStallTimer())) as prefetcher:
            next(iter(prefetcher), None)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert num_data_threads() == 0


def test_validation_reads_its_batches_front_to_back(corpora):
    batches_by_rank = [
        list(validation_batches(corpora=corpora, config=config(), grid=grid(rank, 2))) for rank in range(2)
    ]
    batches = [batch for turn in zip(*batches_by_rank, strict=True) for batch in turn]
    expected = list(validation_batches(corpora=corpora, config=config(), grid=grid()))
    assert [batch.input_ids.tolist() for batch in batches] == [batch.input_ids.tolist() for batch in expected]
    assert len(expected) == 16 * 4


def slow_validation_on_rank_1(config: str, folder: Path) -> None:
    os.chdir(folder)
    if os.environ["RANK"] == "1":
        read_batch = Corpora.batch

        def slow(self: Corpora, samples: np.ndarray) -> Batch:
            time.sleep(0.5 if self.key == "data.validation" else 0)
            return read_batch(self, samples)

        Corpora.batch = slow

    assert main(["train", config]) == 0


@pytest.mark.slow
def test_a_row_has_the_stall_of_the_slowest_rank_and_of_validation(tiny, tmp_path):
    """Two slow batches before the first step and two after every second step; the second of two is read ahead a bit."""
    run_distributed(slow_validation_on_rank_1, 2, str(tiny.config), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    wait_seconds = {row["step"]: row["data_wait_seconds"] for row in rows[1:]}
    assert min(wait_seconds[1], wait_seconds[2], wait_seconds[4]) > 0.8
    assert wait_seconds[3] < 0.4
