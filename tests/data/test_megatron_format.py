"""Interchange with megatron-core's own `IndexedDataset` and its builder: each reads what the other wrote."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mea.data.indexed import IndexedReader, IndexedWriter
from megatron_mea.data.prepare import prepare
from megatron_mea.data.tokenizer import train_tokenizer

REASON = "megatron-core is not installed: pip install -e '.[test,megatron]'"
megatron: Any = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason=REASON)

DTYPES = ["u2", "i4"]


def corpus(dtype: str) -> list[list[list[int]]]:
    """Documents of sequences of ids: 2000 random ones, both ends of the type, and empty ones at either end."""
    random, top = np.random.default_rng(0), int(np.iinfo(dtype).max)
    random_documents = [random.integers(0, top + 1, size).tolist() for size in random.integers(1, 60, 2000)]
    return [[[]], [[0, top]], *([ids] for ids in random_documents), [[]], [[7]], [[]]]


def write_with_ours(*, prefix: Path, dtype: str, documents: list[list[list[int]]]) -> None:
    """Writes by our writer, in batches of 300 documents of one sequence each."""
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for start in range(0, len(documents), 300):
            part = [sequence for document in documents[start : start + 300] for sequence in document]
            lengths = np.asarray([len(sequence) for sequence in part], np.int32)
            writer.add(np.asarray([token for sequence in part for token in sequence], np.int64), lengths)
        writer.commit()


def write_with_megatron(*, prefix: Path, dtype: str, documents: list[list[list[int]]]) -> None:
    """Writes by Megatron's builder, with its two ways to add a document in turn."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
    for index, document in enumerate(documents):
        if index % 2:
            for sequence in document:
                builder.add_item(torch.tensor(sequence, dtype=torch.int64))
            builder.end_document()
        else:
            flat = torch.tensor([token for sequence in document for token in sequence], dtype=torch.int64)
            builder.add_document(flat, [len(sequence) for sequence in document])

    builder.finalize(f"{prefix}.idx")


def read_by_megatron(prefix: Path, *, mmap: bool = True) -> tuple[np.dtype, list[list[list[int]]]]:
    dataset = megatron.IndexedDataset(str(prefix), mmap=mmap)
    sequences = [dataset[i].tolist() for i in range(len(dataset))]
    bounds = dataset.document_indices.tolist()
    documents = [sequences[begin:end] for begin, end in pairwise(bounds)]
    return np.dtype(dataset.index.dtype), documents


def read_by_us(prefix: Path) -> tuple[np.dtype, list[list[list[int]]]]:
    reader = IndexedReader(prefix)
    sequences = [part.tolist() for part in np.split(np.asarray(reader.tokens), np.cumsum(reader.lengths)[:-1])]
    bounds = reader.document_indices.tolist()
    return reader.dtype, [sequences[begin:end] for begin, end in pairwise(bounds)]


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_reads_ours(dtype: str, mmap: bool, tmp_path: Path) -> None:
    write_with_ours(prefix=tmp_path / "corpus", dtype=dtype, documents=corpus(dtype))
    assert read_by_megatron(tmp_path / "corpus", mmap=mmap) == (np.dtype(dtype), corpus(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_megatrons(dtype: str, tmp_path: Path) -> None:
    write_with_megatron(prefix=tmp_path / "corpus", dtype=dtype, documents=corpus(dtype))
    assert read_by_us(tmp_path / "corpus") == (np.dtype(dtype), corpus(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_write_the_same_bytes(dtype: str, tmp_path: Path) -> None:
    write_with_ours(prefix=tmp_path / "ours", dtype=dtype, documents=corpus(dtype))
    write_with_megatron(prefix=tmp_path / "theirs", dtype=dtype, documents=corpus(dtype))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_documents_of_several_sequences(dtype: str, tmp_path: Path) -> None:
    # Megatron's `preprocess_data.py --split-sentences` writes such files; a document may also hold no sequence.
    documents = [[[1, 2], [3], []], [], [[]], [[4], [5, 6, 7]], []]
    write_with_megatron(prefix=tmp_path / "corpus", dtype=dtype, documents=documents)
    assert read_by_megatron(tmp_path / "corpus")[1] == documents
    assert read_by_us(tmp_path / "corpus") == (np.dtype(dtype), documents)


def test_megatron_joins_ours(tmp_path: Path) -> None:
    # Megatron's `merge_datasets.py` joins shards in this way.
    documents = corpus("u2")
    write_with_ours(prefix=tmp_path / "a", dtype="u2", documents=documents[:900])
    write_with_ours(prefix=tmp_path / "b", dtype="u2", documents=documents[900:])
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "both.bin"), dtype=np.uint16)
    for name in "ab":
        builder.add_index(str(tmp_path / name))

    builder.finalize(str(tmp_path / "both.idx"))
    assert read_by_us(tmp_path / "both") == (np.dtype("u2"), documents)


def test_megatron_reads_what_prepare_writes(tmp_path: Path) -> None:
    texts = [f"In the beginning was the word, and it was number {i}." for i in range(300)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(sources=[str(tmp_path / "corpus.jsonl")], vocab_size=300, out=tmp_path / "tokenizer")
    documents, tokens, _ = prepare(
        sources=[str(tmp_path / "corpus.jsonl")], tokenizer_folder=tmp_path / "tokenizer", prefix=tmp_path / "out"
    )
    dtype, actual = read_by_megatron(tmp_path / "out")

    assert (dtype, actual) == read_by_us(tmp_path / "out")
    assert dtype == np.uint16
    assert len(actual) == documents == 300
    assert sum(len(sequence) for document in actual for sequence in document) == tokens
    assert all(len(document) == 1 and document[0][-1] == 2 for document in actual)
