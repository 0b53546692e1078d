"""Reading ahead: the same steps as without, what goes wrong is raised, and the thread ends."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from engines import config

from megatron_mea.config.schema import TrainCorpus
from megatron_mea.data.corpora import Corpora
from megatron_mea.data.indexed import IndexedWriter
from megatron_mea.errors import UserError
from megatron_mea.training.loader import AHEAD, Loader

SEQ = 12


@pytest.fixture
def corpora(tmp_path):
    """200 tokens in documents of 7; the id of each is its place."""
    with IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(203), np.full(29, 7))
        writer.commit()
    return Corpora([TrainCorpus(path=str(tmp_path / "corpus"))], SEQ, 203, 3, "data.train", document_mask=True)


def loaded(corpora: Corpora, rank: int, size: int, first: int = 1) -> list:
    loader = Loader(corpora, config(steps=5), SimpleNamespace(data_rank=rank, data_size=size), first)
    data = list(loader)
    loader.close()
    assert loader.waited > 0
    return data


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


def test_it_reads_ahead_and_stops_when_asked(corpora):
    loader = Loader(corpora, config(steps=1000), SimpleNamespace(data_rank=0, data_size=1), 1)
    next(iter(loader))
    while loader._ready.qsize() < AHEAD:
        time.sleep(0.01)
    loader.close()
    assert not any(thread.name == "data" for thread in threading.enumerate())
