"""The tokens of a .bin that changes, or whose disk fails, while it is read: a message that names it, and no SIGBUS."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mea.config.schema import TrainCorpus
from megatron_mea.data.corpora import Corpora
from megatron_mea.data.indexed import IndexedWriter
from megatron_mea.data.token_file import TokenFile
from megatron_mea.errors import RunError, UserError

TOKENS = np.arange(30_000, dtype=np.uint16)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A file of `TOKENS`."""
    path = tmp_path_factory.mktemp("tokens") / "corpus.bin"
    TOKENS.tofile(path)
    return path


BOUNDS = st.one_of(st.none(), st.integers(-40_000, 40_000))


@given(BOUNDS, BOUNDS)
def test_slices_are_those_of_an_array(path, start, stop):
    tokens = TokenFile(path, dtype=TOKENS.dtype, size=TOKENS.size)
    assert len(tokens) == tokens.size == TOKENS.size
    np.testing.assert_array_equal(tokens[start:stop], TOKENS[start:stop])
    np.testing.assert_array_equal(np.asarray(tokens), TOKENS)


def test_what_one_call_does_not_read_the_next_one_does(path, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:1000]], offset))
    np.testing.assert_array_equal(TokenFile(path, dtype=TOKENS.dtype, size=TOKENS.size)[5:], TOKENS[5:])


@pytest.mark.parametrize("size", [0, 30_001])
def test_a_file_that_is_cut_short_while_it_is_open_is_named(tmp_path, size):
    with IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        writer.add(TOKENS, np.full(300, 100))
        writer.commit()

    corpora = Corpora(
        corpora=[TrainCorpus(path=str(tmp_path / "corpus"))],
        seq_length=100,
        vocab_size=30_000,
        seed=None,
        key="data.train",
    )
    os.truncate(tmp_path / "corpus.bin", size)
    if size:
        assert corpora.batch(np.arange(149)).targets[-1, -1] == 14_900

    with pytest.raises(UserError) as raised:
        corpora.batch(np.array([150]))
    (problem,) = raised.value.problems
    assert problem.where == f"{tmp_path}/corpus.bin"
    assert problem.got == f"{size} bytes, fewer than when it was opened"
    assert problem.expected.startswith("the 60000 that its .idx announces")


def test_a_disk_that_fails_is_one_message(path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    tokens = TokenFile(path, dtype=TOKENS.dtype, size=TOKENS.size)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(RunError, match=r"corpus\.bin cannot be read: Input/output error$"):
        tokens[:10]
