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


def write_corpus(prefix: Path, tokens: np.ndarray, *, dtype: str = "u2") -> str:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        writer.add(tokens, np.asarray([tokens.size]))
        writer.commit()
    return str(prefix)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two corpora in which no id comes twice: 41 windows and the most that can be left out, 20 and nothing left."""
    folder = tmp_path_factory.mktemp("corpora")
    first = np.arange(42 * LENGTH)
    return [
        write_corpus(folder / "a", first),
        write_corpus(prefix=folder / "b", tokens=10_000 + np.arange(20 * LENGTH + 1), dtype="i4"),
    ]


def open_corpora(paths: list[str], *, seed: int | None = 1, weights: tuple[float, ...] = (2, 1)) -> Corpora:
    corpora = [TrainCorpus(path=path, weight=weight) for path, weight in zip(paths, weights, strict=False)]
    return Corpora(corpora=corpora, seq_length=LENGTH, vocab_size=VOCABULARY, seed=seed, key="data.train")


def test_windows_are_cut_side_by_side(paths: list[str]) -> None:
    corpora = open_corpora(paths)
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
    corpora = open_corpora(paths[index : index + 1])
    for epoch in range(3):
        targets = corpora.batch(np.arange(windows) + epoch * windows).targets.ravel()
        first = 10_000 * index + 1
        assert np.sort(targets).tolist() == list(range(first, first + windows * LENGTH))
        assert corpora.tokens == 1 + windows * LENGTH + left_out


def test_validation_reads_front_to_back(paths: list[str]) -> None:
    corpora = open_corpora(paths[:1], seed=None)
    assert corpora.batch(np.arange(41)).input_ids.ravel().tolist() == list(range(41 * LENGTH))


def equal_batches(left: Batch, right: Batch) -> bool:
    return np.array_equal(left.input_ids, right.input_ids) and np.array_equal(left.targets, right.targets)


def test_paths_do_not_matter_but_seed_order_and_weights_do(paths: list[str], tmp_path: Path) -> None:
    base, samples = open_corpora(paths), np.arange(100)
    batch = base.batch(samples)
    moved_paths = [write_corpus(prefix=tmp_path / "elsewhere", tokens=np.arange(42 * LENGTH), dtype="i4")]
    moved_paths.append(write_corpus(tmp_path / "other", 10_000 + np.arange(20 * LENGTH + 1)))
    other = open_corpora(moved_paths)

    assert equal_batches(other.batch(samples), batch)
    assert other.fingerprint() == base.fingerprint()
    for changed in (open_corpora(paths, seed=2), open_corpora(paths[::-1]), open_corpora(paths, weights=(3, 1))):
        assert not equal_batches(changed.batch(samples), batch)
    assert open_corpora(paths[::-1]).fingerprint() != base.fingerprint()
    assert open_corpora(paths, weights=(3, 1)).fingerprint() != base.fingerprint()


def test_fingerprint_sees_another_text_of_the_same_size(paths: list[str], tmp_path: Path) -> None:
    changed = np.arange(42 * LENGTH)
    changed[17] += 1
    assert (
        open_corpora([write_corpus(tmp_path / "a", changed), paths[1]]).fingerprint()
        != open_corpora(paths).fingerprint()
    )


def test_fingerprint_sees_other_borders_where_they_decide(tmp_path: Path) -> None:
    """The same .bin with other .idx: as many documents of other lengths, then one document more."""
    tokens, prints = np.arange(42 * LENGTH), {}
    for name, lengths in {"a": [100, 100, 136], "b": [100, 101, 135], "c": [100, 100, 100, 36], "d": [336]}.items():
        with IndexedWriter(tmp_path / name, np.dtype("u2" if name < "c" else "i4")) as writer:
            writer.add(tokens, np.asarray(lengths))
            writer.commit()

        corpus = [TrainCorpus(path=str(tmp_path / name))]
        prints[name] = [
            Corpora(
                corpora=corpus, seq_length=LENGTH, vocab_size=VOCABULARY, seed=1, key="data.train", document_mask=mask
            ).fingerprint()
            for mask in (0, 1)
        ]

    # Without the mask borders do not change the samples.
    assert all(unmasked == prints["a"][0] for unmasked, _ in prints.values())

    masked = [fingerprint for _, fingerprint in prints.values()]
    assert all(masked[i] != masked[j] for i in range(4) for j in range(i))


def configuration(*, batch: int, micro: int, steps: int, path: str = "nowhere") -> Config:
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


def global_batch_samples(*, step: int, config: Config, size: int) -> list[int]:
    """Samples of the global batch, joined from those of the ranks, micro-batch by micro-batch."""
    ranks = [rank_samples(step=step, config=config, rank=rank, data_parallel_size=size) for rank in range(size)]
    micro = config.training.micro_batch_size
    for samples in ranks:
        assert samples.shape == (config.training.global_batch_size // micro // size, micro)
    return np.stack(ranks, axis=1).ravel().tolist()


@given(st.integers(1, 10**6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(2, 10**6))
@settings(max_examples=80, deadline=None)
def test_ranks_share_the_global_batch(step: int, size: int, micro: int, rounds: int, steps: int) -> None:
    batch = size * micro * rounds
    config = configuration(batch=batch, micro=micro, steps=steps)
    assert global_batch_samples(step=step, config=config, size=size) == list(range((step - 1) * batch, step * batch))


def test_layout_micro_batch_steps_and_paths_do_not_matter(paths: list[str]) -> None:
    corpora = open_corpora(paths)
    expected = None

    for size, micro in ((1, 1), (1, 24), (2, 3), (3, 4), (4, 6), (12, 2), (24, 1)):
        for steps, path in ((20, "a"), (5000, "b/c")):
            config = configuration(batch=24, micro=micro, steps=steps, path=path)
            batch = corpora.batch(np.asarray(global_batch_samples(step=11, config=config, size=size)))
            expected = expected or batch
            assert equal_batches(batch, expected)


@pytest.mark.parametrize("count", [1, LENGTH])
def test_a_corpus_without_a_window_is_refused(count: int, tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "short", np.arange(count))
    with pytest.raises(UserError, match=rf"{count} tokens(.|\n)*data.seq_length = {LENGTH}"):
        open_corpora([path])


def test_one_window_is_enough(tmp_path: Path) -> None:
    corpora = open_corpora([write_corpus(tmp_path / "one", np.arange(LENGTH + 1))])
    assert corpora.batch(np.arange(3)).targets.tolist() == [list(range(1, LENGTH + 1))] * 3


@pytest.mark.parametrize(("largest", "good"), [(VOCABULARY - 1, True), (VOCABULARY, False)])
def test_ids_beyond_the_vocabulary_are_refused(largest: int, good: bool, tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "ids", np.asarray([*range(20), largest, *range(20)]))
    if good:
        open_corpora([path])
    else:
        with pytest.raises(UserError, match=f"token id {VOCABULARY}(.|\n)*vocab_size = {VOCABULARY}"):
            open_corpora([path])


def test_require_counts_the_batches_that_there_are(paths: list[str]) -> None:
    # 41 windows: ten batches of four, and not eleven.
    corpora = open_corpora(paths[:1], seed=None)
    corpora.require_batches(samples=40, batches=10, batch_size=4)
    with pytest.raises(UserError, match=r"enough for 10 global batches of 4(.|\n)*evaluation\.batches = 11"):
        corpora.require_batches(samples=44, batches=11, batch_size=4)


def test_shares_name_the_weight_given_and_the_share_it_comes_to(paths: list[str]) -> None:
    assert open_corpora(paths, weights=(3, 4e-5)).shares() == [
        f"{paths[0]}: 336 tokens, weight 3.0, 99.99% of the samples",
        f"{paths[1]}: 161 tokens, weight 4e-05, 0.01% of the samples",
    ]


def open_many(path: str, *, soft: int, hard: int) -> int | str:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        return len(open_corpora([path] * 200, weights=(1,) * 200).readers)
    except UserError as error:
        return str(error)


@pytest.mark.slow
def test_more_corpora_than_files_may_be_open(paths: list[str]) -> None:
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        assert pool.submit(open_many, paths[0], soft=100, hard=1000).result() == 200
        error = pool.submit(open_many, paths[0], soft=100, hard=300).result()
    assert error.startswith("error: data.train\n  got:      200 corpora: Too many open files\n")


def test_describe_names_corpus_and_window(paths: list[str]) -> None:
    corpora = open_corpora(paths[:1], seed=None)
    assert corpora.describe(np.asarray([3, 5])) == f"{paths[0]} window 3, {paths[0]} window 5"


class TestWindows:
    def test_windows_outside_of_a_sample_are_not_read(self, tmp_path):
        """A calibration takes some thousand tokens of training data, of which there may be a terabyte."""
        tokens = np.arange(101) % 10
        tokens[35] = 10
        path = write_corpus(tmp_path / "corpus", tokens)
        windows = open_windows(
            paths=[path], where="--data", window=10, batch=4, vocab_size=10, document_mask=False, tokens=40
        )

        assert windows.locations == [(0, [0, 20, 50, 70], 10)]

        with pytest.raises(UserError, match="token id 10"):
            open_windows(
                paths=[path], where="--data", window=10, batch=4, vocab_size=10, document_mask=False, tokens=100
            )
