"""Reading ahead: the same steps as without, what goes wrong is raised, and the thread ends."""

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
from distributed import run_distributed
from engines import config

from megatron_mea.cli import main
from megatron_mea.config.schema import TrainCorpus
from megatron_mea.data.corpora import Batch, Corpora
from megatron_mea.data.indexed import IndexedWriter
from megatron_mea.errors import UserError
from megatron_mea.training.loader import AHEAD, ReadAhead, Waiting, training_steps, validation_batches

SEQ = 12


@pytest.fixture
def corpora(tmp_path):
    """200 tokens in documents of 7; the id of each is its place."""
    with IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(203), np.full(29, 7))
        writer.commit()
    return Corpora([TrainCorpus(path=str(tmp_path / "corpus"))], SEQ, 203, 3, "data.train", document_mask=True)


def loaded(corpora: Corpora, rank: int, size: int, first: int = 1) -> list:
    waiting = Waiting()
    loader = ReadAhead(training_steps(corpora, config(steps=5), grid(rank, size), first), waiting)
    data = list(loader)
    loader.close()
    assert waiting.seconds > 0
    return data


def grid(rank: int = 0, size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(data_rank=rank, data_size=size)


def test_the_steps_do_not_depend_on_the_ranks(corpora):
    whole = loaded(corpora, 0, 1)
    assert [data.step for data in whole] == [1, 2, 3, 4, 5]
    assert [data.step for data in loaded(corpora, 0, 1, first=4)] == [4, 5]
    parts = [loaded(corpora, rank, 2) for rank in range(2)]
    for one, *several in zip(whole, *parts, strict=True):
        assert {data.targets for data in (one, *several)} == {one.targets}
        assert one.targets == sum(int((batch.targets >= 0).sum()) for batch in one.batches)
        # Micro-batches are dealt out in turn.
        dealt = [micro for turn in zip(*(data.hashes() for data in several), strict=True) for micro in turn]
        assert dealt == one.hashes()
        assert len({digest for micro in dealt for digest in micro}) == 8


def test_what_goes_wrong_is_raised_by_the_iteration(corpora):
    corpora.vocab_size = 100
    with pytest.raises(UserError, match="token id"):
        loaded(corpora, 0, 1)


def test_nothing_to_foretell(tmp_path):
    with IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(100), np.ones(100, np.int32))
        writer.commit()
    corpora = Corpora([TrainCorpus(path=str(tmp_path / "corpus"))], SEQ, 100, 3, "data.train", document_mask=True)
    with pytest.raises(UserError, match="documents of one token"):
        loaded(corpora, 0, 1)


def threads() -> int:
    return sum(thread.name == "data" for thread in threading.enumerate())


def test_it_reads_ahead_and_stops_when_asked(corpora):
    loader = ReadAhead(training_steps(corpora, config(steps=1000), grid(), 1), Waiting())
    next(iter(loader))
    while loader._ready.qsize() < AHEAD:
        time.sleep(0.01)
    loader.close()
    assert threads() == 0


@pytest.mark.parametrize("items", [(), (1, 2, 3), itertools.count()])
def test_the_thread_ends_when_its_consumer_fails(items):
    def fail() -> None:
        with contextlib.closing(ReadAhead(items, Waiting())) as ahead:
            next(iter(ahead), None)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert threads() == 0


def test_validation_reads_its_batches_front_to_back(corpora):
    parts = [list(validation_batches(corpora, config(), grid(rank, 2))) for rank in range(2)]
    dealt = [micro for turn in zip(*parts, strict=True) for micro in turn]
    whole = list(validation_batches(corpora, config(), grid()))
    assert [micro.input_ids.tolist() for micro in dealt] == [micro.input_ids.tolist() for micro in whole]
    assert len(whole) == 16 * 4


def slow_validation_on_rank_1(config: str, folder: Path) -> None:
    os.chdir(folder)
    if os.environ["RANK"] == "1":
        batch = Corpora.batch

        def slow(self: Corpora, samples: np.ndarray) -> Batch:
            time.sleep(0.5 if self.key == "data.validation" else 0)
            return batch(self, samples)

        Corpora.batch = slow
    assert main(["train", config]) == 0


def test_a_row_has_the_waiting_of_the_slowest_rank_and_of_validation(tiny, tmp_path):
    """Two batches before the first step and two after each second one, of which the second is read ahead a bit."""
    run_distributed(slow_validation_on_rank_1, 2, str(tiny.config), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    waited = {row["step"]: row["data_wait_seconds"] for row in rows[1:]}
    assert min(waited[1], waited[2], waited[4]) > 0.8
    assert waited[3] < 0.4
