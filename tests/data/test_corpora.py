"""Windows of tokens by sample number, and the same samples in a step for every layout of the ranks."""

from __future__ import annotations

import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mea.config.load import parse_config
from megatron_mea.config.schema import Config, TrainCorpus
from megatron_mea.data.corpora import Batch, Corpora
from megatron_mea.data.indexed import IndexedWriter
from megatron_mea.data.windows import open_windows
from megatron_mea.errors import UserError
from megatron_mea.training.loader import rank_samples

LENGTH = 8
VOCABULARY = 20_000


def write(prefix: Path, tokens: np.ndarray, dtype: str = "u2") -> str:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        writer.add(tokens, np.asarray([tokens.size]))
        writer.commit()
    return str(prefix)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two corpora in which no id comes twice: 41 windows and the most that can be left out, 20 and nothing left."""
    folder = tmp_path_factory.mktemp("corpora")
    first = np.arange(42 * LENGTH)
    return [write(folder / "a", first), write(folder / "b", 10_000 + np.arange(20 * LENGTH + 1), "i4")]


def opened(paths: list[str], seed: int | None = 1, weights: tuple[float, ...] = (2, 1)) -> Corpora:
    corpora = [TrainCorpus(path=path, weight=weight) for path, weight in zip(paths, weights, strict=False)]
    return Corpora(corpora, LENGTH, VOCABULARY, seed, "data.train")


def test_windows_are_cut_side_by_side(paths: list[str]) -> None:
    corpora = opened(paths)
    samples = np.arange(200)
    batch = corpora.batch(samples)
    assert batch.input_ids.shape == batch.targets.shape == batch.position_ids.shape == (200, LENGTH)
    assert batch.input_ids.dtype == batch.targets.dtype == np.int64
    tokens = [np.arange(42 * LENGTH), 10_000 + np.arange(20 * LENGTH + 1)]
    for row, (corpus, window) in enumerate(zip(*corpora.order.locate(samples), strict=True)):
        expected = tokens[corpus][window * LENGTH : window * LENGTH + LENGTH + 1]
        assert batch.input_ids[row].tolist() == expected[:-1].tolist()
        assert batch.targets[row].tolist() == expected[1:].tolist()
        assert batch.position_ids[row].tolist() == list(range(LENGTH))


@pytest.mark.parametrize(("index", "windows", "left_out"), [(0, 41, LENGTH - 1), (1, 20, 0)])
def test_an_epoch_has_every_token_as_target_once(paths: list[str], index: int, windows: int, left_out: int) -> None:
    corpora = opened(paths[index : index + 1])
    for epoch in range(3):
        targets = corpora.batch(np.arange(windows) + epoch * windows).targets.ravel()
        first = 10_000 * index + 1
        assert np.sort(targets).tolist() == list(range(first, first + windows * LENGTH))
        assert corpora.tokens == 1 + windows * LENGTH + left_out


def test_validation_reads_front_to_back(paths: list[str]) -> None:
    corpora = opened(paths[:1], seed=None)
    assert corpora.batch(np.arange(41)).input_ids.ravel().tolist() == list(range(41 * LENGTH))


def same(left: Batch, right: Batch) -> bool:
    return np.array_equal(left.input_ids, right.input_ids) and np.array_equal(left.targets, right.targets)


def test_paths_do_not_matter_but_seed_order_and_weights_do(paths: list[str], tmp_path: Path) -> None:
    base, samples = opened(paths), np.arange(100)
    batch = base.batch(samples)
    moved = [write(tmp_path / "elsewhere", np.arange(42 * LENGTH), "i4")]
    moved.append(write(tmp_path / "other", 10_000 + np.arange(20 * LENGTH + 1)))
    other = opened(moved)
    assert same(other.batch(samples), batch)
    assert other.fingerprint() == base.fingerprint()
    for changed in (opened(paths, seed=2), opened(paths[::-1]), opened(paths, weights=(3, 1))):
        assert not same(changed.batch(samples), batch)
    assert opened(paths[::-1]).fingerprint() != base.fingerprint()
    assert opened(paths, weights=(3, 1)).fingerprint() != base.fingerprint()


def test_fingerprint_sees_another_text_of_the_same_size(paths: list[str], tmp_path: Path) -> None:
    changed = np.arange(42 * LENGTH)
    changed[17] += 1
    assert opened([write(tmp_path / "a", changed), paths[1]]).fingerprint() != opened(paths).fingerprint()


def test_fingerprint_sees_other_borders_where_they_decide(tmp_path: Path) -> None:
    """The same .bin with another .idx: as many documents, and other ones; then one document more."""
    tokens, prints = np.arange(42 * LENGTH), {}
    for name, lengths in {"a": [100, 100, 136], "b": [100, 101, 135], "c": [100, 100, 100, 36], "d": [336]}.items():
        with IndexedWriter(tmp_path / name, np.dtype("u2" if name < "c" else "i4")) as writer:
            writer.add(tokens, np.asarray(lengths))
            writer.commit()
        corpus = [TrainCorpus(path=str(tmp_path / name))]
        prints[name] = [Corpora(corpus, LENGTH, VOCABULARY, 1, "data.train", mask).fingerprint() for mask in (0, 1)]
    # Without the mask all of them give the same samples.
    assert all(found[0] == prints["a"][0] for found in prints.values())
    masked = [found[1] for found in prints.values()]
    assert all(masked[i] != masked[j] for i in range(4) for j in range(i))


def configuration(batch: int, micro: int, steps: int, path: str = "nowhere") -> Config:
    return parse_config(
        {
            "model": {
                "vocab_size": 300,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "max_position_embeddings": LENGTH,
            },
            "data": {"tokenizer": "nowhere", "train": [{"path": path}], "seq_length": LENGTH},
            "schedule": {"warmup_steps": 1},
            "training": {"steps": steps, "global_batch_size": batch, "micro_batch_size": micro, "precision": "fp32"},
            "run": {"dir": "nowhere"},
        }
    )


def reassembled(step: int, config: Config, size: int) -> list[int]:
    """The global batch out of what the ranks get, micro-batch by micro-batch."""
    ranks = [rank_samples(step, config, rank, size) for rank in range(size)]
    micro = config.training.micro_batch_size
    for samples in ranks:
        assert samples.shape == (config.training.global_batch_size // micro // size, micro)
    return np.stack(ranks, axis=1).ravel().tolist()


@given(st.integers(1, 10**6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(2, 10**6))
@settings(max_examples=80, deadline=None)
def test_ranks_share_the_global_batch(step: int, size: int, micro: int, rounds: int, steps: int) -> None:
    batch = size * micro * rounds
    config = configuration(batch, micro, steps)
    assert reassembled(step, config, size) == list(range((step - 1) * batch, step * batch))


def test_layout_micro_batch_steps_and_paths_do_not_matter(paths: list[str]) -> None:
    corpora = opened(paths)
    expected = None
    for size, micro in ((1, 1), (1, 24), (2, 3), (3, 4), (4, 6), (12, 2), (24, 1)):
        for steps, path in ((20, "a"), (5000, "b/c")):
            config = configuration(24, micro, steps, path)
            batch = corpora.batch(np.asarray(reassembled(11, config, size)))
            expected = expected or batch
            assert same(batch, expected)


@pytest.mark.parametrize("count", [1, LENGTH])
def test_a_corpus_without_a_window_is_refused(count: int, tmp_path: Path) -> None:
    path = write(tmp_path / "short", np.arange(count))
    with pytest.raises(UserError, match=rf"{count} tokens(.|\n)*data.seq_length = {LENGTH}"):
        opened([path])


def test_one_window_is_enough(tmp_path: Path) -> None:
    corpora = opened([write(tmp_path / "one", np.arange(LENGTH + 1))])
    assert corpora.batch(np.arange(3)).targets.tolist() == [list(range(1, LENGTH + 1))] * 3


@pytest.mark.parametrize(("largest", "good"), [(VOCABULARY - 1, True), (VOCABULARY, False)])
def test_ids_beyond_the_vocabulary_are_refused(largest: int, good: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "ids", np.asarray([*range(20), largest, *range(20)]))
    if good:
        opened([path])
    else:
        with pytest.raises(UserError, match=f"token id {VOCABULARY}(.|\n)*vocab_size = {VOCABULARY}"):
            opened([path])


def test_require_counts_the_batches_that_there_are(paths: list[str]) -> None:
    # 41 windows: ten batches of four, and not eleven.
    corpora = opened(paths[:1], seed=None)
    corpora.require(40, 10, 4)
    with pytest.raises(UserError, match=r"enough for 10 global batches of 4(.|\n)*evaluation\.batches = 11"):
        corpora.require(44, 11, 4)


def test_shares_name_the_weight_given_and_the_share_it_comes_to(paths: list[str]) -> None:
    assert opened(paths, weights=(3, 4e-5)).shares() == [
        f"{paths[0]}: 336 tokens, weight 3.0, 99.99% of the samples",
        f"{paths[1]}: 161 tokens, weight 4e-05, 0.01% of the samples",
    ]


def open_many(path: str, soft: int, hard: int) -> int | str:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        return len(opened([path] * 200, weights=(1,) * 200).readers)
    except UserError as error:
        return str(error)


def test_more_corpora_than_files_may_be_open(paths: list[str]) -> None:
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        assert pool.submit(open_many, paths[0], 100, 1000).result() == 200
        found = pool.submit(open_many, paths[0], 100, 300).result()
    assert found.startswith("error: data.train\n  found:   200 corpora: Too many open files\n")


def test_describe_names_corpus_and_window(paths: list[str]) -> None:
    corpora = opened(paths[:1], seed=None)
    assert corpora.describe(np.asarray([3, 5])) == f"{paths[0]} window 3, {paths[0]} window 5"


class TestWindows:
    def test_of_a_sample_other_windows_are_not_looked_at(self, tmp_path):
        """A calibration takes some thousand tokens of training data, of which there may be a terabyte."""
        tokens = np.arange(101) % 10
        tokens[35] = 10
        path = write(tmp_path / "corpus", tokens)
        windows = open_windows([path], "--data", 10, 4, 10, False, tokens=40)
        assert windows.places == [(0, [0, 20, 50, 70], 10)]
        with pytest.raises(UserError, match="token id 10"):
            open_windows([path], "--data", 10, 4, 10, False, tokens=100)
