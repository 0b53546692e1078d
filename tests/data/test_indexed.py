"""The indexed format: what the writer writes is what the format says, and the reader takes what others wrote."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.indexed_by_hand import CODES, STRUCT, write_by_hand

from megatron_mea.data import indexed
from megatron_mea.data.indexed import IndexedReader, IndexedWriter, token_dtype
from megatron_mea.errors import RunError, UserError


@dataclass(frozen=True, kw_only=True)
class Parsed:
    code: int
    lengths: list[int]
    offsets: list[int]
    documents: list[int]
    tokens: list[int]


def parse(prefix: Path) -> Parsed:
    """Reads both files with `struct` alone, written from the description of the format and not from our reader."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"

    (version,) = struct.unpack_from("<Q", index, 9)
    (code,) = struct.unpack_from("<B", index, 17)
    sequences, boundaries = struct.unpack_from("<QQ", index, 18)
    assert version == 1

    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    offsets = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    documents = struct.unpack_from(f"<{boundaries}q", index, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * boundaries

    count = len(data) // struct.calcsize(STRUCT[code])
    tokens = struct.unpack(f"<{count}{STRUCT[code]}", data)
    return Parsed(
        code=code, lengths=list(lengths), offsets=list(offsets), documents=list(documents), tokens=list(tokens)
    )


def write_corpus(*, prefix: Path, dtype: str, documents: list[list[int]]) -> tuple[int, int]:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        flat = [token for document in documents for token in document]
        writer.add(np.asarray(flat, np.int64), np.asarray([len(document) for document in documents], np.int32))
        return writer.commit()


def finds_wrong_id(reader: IndexedReader, vocab_size: int, *, sample: int = 1 << 27) -> bool:
    """Whether `check_ids` finds an id beyond a vocabulary of `vocab_size`."""
    try:
        reader.check_ids(vocab_size=vocab_size, expected="allowed", sample=sample)
    except UserError:
        return True
    return False


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_golden_bytes(tmp_path: Path) -> None:
    # Bytes from the description of the format; megatron-core 0.16 and 0.19 wrote the same bytes for such corpora.
    assert write_corpus(prefix=tmp_path / "corpus", dtype="u2", documents=[[1, 2, 770], [65535]]) == (2, 4)
    assert (tmp_path / "corpus.bin").read_bytes().hex() == "010002000203ffff"

    index = [
        "4d4d494449445800 00",
        "0100000000000000 08 0200000000000000 0300000000000000",
        "03000000 01000000",
        "0000000000000000 0600000000000000",
        "0000000000000000 0100000000000000 0200000000000000",
    ]

    assert (tmp_path / "corpus.idx").read_bytes() == bytes.fromhex("".join(index))
    assert file_names(tmp_path) == ["corpus.bin", "corpus.idx"]


@pytest.mark.parametrize("dtype", CODES)
def test_written_files_follow_the_format(dtype: str, tmp_path: Path) -> None:
    documents = [[5, 6, 7], [], [127], list(range(100))]
    write_corpus(prefix=tmp_path / "corpus", dtype=dtype, documents=documents)
    size = np.dtype(dtype).itemsize
    offsets = [0, 3 * size, 3 * size, 4 * size]
    flat = [token for document in documents for token in document]

    assert parse(tmp_path / "corpus") == Parsed(
        code=CODES[dtype], lengths=[3, 0, 1, 100], offsets=offsets, documents=[0, 1, 2, 3, 4], tokens=flat
    )


def test_several_batches_are_one_corpus(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "corpus", np.dtype("i4")) as writer:
        writer.add(np.asarray([1, 2, 3]), np.asarray([2, 1]))
        writer.add(np.asarray([4]), np.asarray([1]))
        writer.add(np.asarray([], np.int64), np.asarray([], np.int64))
        assert writer.commit() == (3, 4)

    assert parse(tmp_path / "corpus") == Parsed(
        code=4, lengths=[2, 1, 1], offsets=[0, 8, 12], documents=[0, 1, 2, 3], tokens=[1, 2, 3, 4]
    )


@pytest.mark.parametrize("dtype", ["u2", "i4"])
def test_reader_takes_files_made_by_hand(dtype: str, tmp_path: Path) -> None:
    top = np.iinfo(dtype).max
    # Three documents: two sequences, none at all, and one empty sequence beside a full one.
    sequences = [[1, 2], [top, 0, 3], [], [9]]
    write_by_hand(prefix=tmp_path / "corpus", dtype=dtype, sequences=sequences, documents=[0, 2, 2, 4])
    reader = IndexedReader(tmp_path / "corpus")

    assert reader.dtype == np.dtype(dtype)
    assert reader.tokens[:].tolist() == [1, 2, top, 0, 3, 9]
    assert reader.lengths.tolist() == [2, 3, 0, 1]
    assert reader.document_indices.tolist() == [0, 2, 2, 4]

    reader.check_ids(top + 1, "")
    assert finds_wrong_id(reader, top)


def test_corpora_without_a_token_are_read(tmp_path: Path) -> None:
    write_by_hand(prefix=tmp_path / "nothing", dtype="u2", sequences=[], documents=[0])
    write_by_hand(prefix=tmp_path / "hollow", dtype="u2", sequences=[[], []], documents=[0, 1, 2])

    for name in ("nothing", "hollow"):
        reader = IndexedReader(tmp_path / name)
        assert reader.tokens.size == 0
        reader.check_ids(1, "")


def test_tokens_are_read_only(tmp_path: Path) -> None:
    write_corpus(prefix=tmp_path / "corpus", dtype="u2", documents=[[1, 2]])
    reader = IndexedReader(tmp_path / "corpus")
    with pytest.raises(TypeError, match="assignment"):
        reader.tokens[0] = 3
    # What is read is the caller's own.
    reader.tokens[:][0] = 3
    assert reader.tokens[:].tolist() == [1, 2]


@given(st.sampled_from(list(CODES)), st.lists(st.integers(0, 40), max_size=30), st.randoms(), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_round_trip(dtype: str, lengths: list[int], random: Random, batch: int) -> None:
    info = np.iinfo(dtype)
    documents = [[random.randint(max(info.min, 0), int(info.max)) for _ in range(n)] for n in lengths]

    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "corpus"
        with IndexedWriter(prefix, np.dtype(dtype)) as writer:
            for start in range(0, len(documents), batch):
                part = documents[start : start + batch]
                flat = np.asarray([token for document in part for token in document], np.int64)
                writer.add(flat, np.asarray(lengths[start : start + batch]))
            assert writer.commit() == (len(lengths), sum(lengths))

        reader, parsed = IndexedReader(prefix), parse(prefix)
        assert reader.dtype == np.dtype(dtype)
        assert reader.lengths.tolist() == parsed.lengths == lengths
        assert reader.document_indices.tolist() == parsed.documents == list(range(len(lengths) + 1))

        expected = [token for document in documents for token in document]
        assert reader.tokens[:].tolist() == parsed.tokens == expected


def test_token_dtype_is_megatrons_choice() -> None:
    assert [token_dtype(size) for size in (300, 65499, 65500, 200_000)] == ["u2", "u2", "i4", "i4"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("old", [False, True])
def test_an_exception_before_commit_changes_nothing(old: bool, tmp_path: Path) -> None:
    if old:
        write_corpus(prefix=tmp_path / "corpus", dtype="u2", documents=[[1, 2, 3]])

    before = {name: (tmp_path / name).read_bytes() for name in file_names(tmp_path)}

    def broken_off() -> None:
        with IndexedWriter(tmp_path / "corpus", np.dtype("i4")) as writer:
            writer.add(np.asarray([7, 8]), np.asarray([2]))
            assert len(file_names(tmp_path)) == len(before) + 2
            raise Stop

    with pytest.raises(Stop):
        broken_off()
    assert {name: (tmp_path / name).read_bytes() for name in file_names(tmp_path)} == before


@pytest.mark.parametrize("call", [1, 2])
def test_a_full_disk_at_commit_changes_nothing(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(prefix=tmp_path / "corpus", dtype="u2", documents=[[1, 2, 3]])
    before = {name: (tmp_path / name).read_bytes() for name in file_names(tmp_path)}
    calls = iter(range(1, 10))

    def fsync(_: int) -> None:
        if next(calls) == call:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match=rf"corpus\.{'bin' if call == 1 else 'idx'} cannot be written: No space"):
        write_corpus(prefix=tmp_path / "corpus", dtype="i4", documents=[[7, 8]])
    assert {name: (tmp_path / name).read_bytes() for name in file_names(tmp_path)} == before


def test_a_halted_exchange_never_pairs_old_with_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Same number of bytes, so no check of sizes could tell the pair from a whole one.
    write_corpus(prefix=tmp_path / "corpus", dtype="u2", documents=[[1, 2, 3], [4]])
    replace = Path.replace

    def halt(path: Path, target: str) -> Path:
        if str(target).endswith(".idx"):
            raise Stop
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", halt)
    with pytest.raises(Stop):
        write_corpus(prefix=tmp_path / "corpus", dtype="u2", documents=[[9], [8, 7, 6]])
    with pytest.raises(UserError, match=r"corpus\.idx"):
        IndexedReader(tmp_path / "corpus")


@pytest.mark.slow
def test_a_killed_writer_leaves_nothing_behind_the_next_one(tmp_path: Path) -> None:
    for name in ("corpus.bin.tmp-1", "corpus.idx.tmp-1", "corpus.bin.tmp-1.mine", "corpus2.bin.tmp-1"):
        (tmp_path / name).write_bytes(b"half")

    with IndexedWriter(tmp_path / "corpus", np.dtype("u2")) as live_writer:
        live_writer.add(np.asarray([1]), np.asarray([1]))
        assert len(file_names(tmp_path)) == 3
        # Another process must not remove the files of a live writer.
        script = (
            "import sys; from megatron_mea.data.indexed import *; IndexedWriter(sys.argv[1], np.dtype('u2')).__exit__()"
        )
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "corpus")], check=True)
        assert live_writer.commit() == (1, 1)

    assert file_names(tmp_path) == ["corpus.bin", "corpus.idx", "corpus2.bin.tmp-1"]


@pytest.mark.parametrize(("dtype", "token"), [("u2", 65536), ("u2", -1), ("i4", 2**31)])
def test_an_id_beyond_the_type_is_never_written(dtype: str, token: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(token)):
        write_corpus(prefix=tmp_path / "corpus", dtype=dtype, documents=[[token]])
    assert file_names(tmp_path) == []


def test_an_index_of_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_BLOCK_DOCUMENTS", 3)
    for count in (2, 3, 4, 6, 7):
        write_corpus(prefix=tmp_path / "corpus", dtype="u2", documents=[[7] * n for n in range(count)])
        parsed = parse(tmp_path / "corpus")
        assert parsed.offsets == [n * (n - 1) for n in range(count)]
        assert parsed.documents == list(range(count + 1))


@pytest.mark.parametrize("boundaries", [[1, 2, 3], [0, 1, 2], [0, 4], [0, 2, 1, 3], []])
def test_documents_that_do_not_divide_the_sequences_are_refused(boundaries: list[int], tmp_path: Path) -> None:
    write_by_hand(prefix=tmp_path / "corpus", dtype="u2", sequences=[[1], [2], [3]], documents=boundaries)
    with pytest.raises(UserError, match=r"corpus\.idx\n(.*\n)+.*documents that divide them in order"):
        IndexedReader(tmp_path / "corpus")


def test_overwriting_replaces_both(tmp_path: Path) -> None:
    write_corpus(prefix=tmp_path / "corpus", dtype="u2", documents=[[1] * 1000] * 3)
    reader = IndexedReader(tmp_path / "corpus")
    write_corpus(prefix=tmp_path / "corpus", dtype="i4", documents=[[70_000], [2, 3]])
    assert parse(tmp_path / "corpus") == Parsed(
        code=4, lengths=[1, 2], offsets=[0, 4], documents=[0, 1, 2], tokens=[70_000, 2, 3]
    )
    assert file_names(tmp_path) == ["corpus.bin", "corpus.idx"]
    # A run that has the old corpus open keeps reading it.
    assert reader.tokens[:].tolist() == [1] * 3000


@pytest.mark.parametrize("offsets", [(4, 0, 8), (0, 8, 4), (2, 6, 10)])
def test_sequences_in_another_order_are_refused(offsets: tuple[int, int, int], tmp_path: Path) -> None:
    write_by_hand(prefix=tmp_path / "corpus", dtype="u2", sequences=[[1, 2], [3, 4], [5, 6]], documents=[0, 1, 2, 3])
    raw = (tmp_path / "corpus.idx").read_bytes()
    assert raw.count(struct.pack("<3q", 0, 4, 8)) == 1

    (tmp_path / "corpus.idx").write_bytes(raw.replace(struct.pack("<3q", 0, 4, 8), struct.pack("<3q", *offsets)))
    with pytest.raises(UserError, match=r"corpus\.idx"):
        IndexedReader(tmp_path / "corpus")


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=400), st.integers(64, 500))
@settings(max_examples=40, deadline=None)
def test_check_of_ids_is_exact_within_the_sample(tokens: list[int], sample: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(prefix=Path(folder) / "corpus", dtype="u2", documents=[tokens])
        reader = IndexedReader(Path(folder) / "corpus")
        assert not finds_wrong_id(reader=reader, vocab_size=max(tokens) + 1, sample=sample)
        # Beyond the sample it may miss an id, but not those at both ends.
        sure = max(tokens) if len(tokens) <= sample else max(tokens[0], tokens[-1])
        assert finds_wrong_id(reader=reader, vocab_size=sure, sample=sample)


def test_a_negative_id_is_refused_and_named(tmp_path: Path) -> None:
    write_corpus(prefix=tmp_path / "corpus", dtype="i4", documents=[[5, -1, 7]])
    with pytest.raises(UserError, match=r"corpus\.bin\n.*token id -1\n.*what may stand there\n.*how to mend"):
        IndexedReader(tmp_path / "corpus").check_ids(
            vocab_size=100, expected="what may stand there", hint="how to mend"
        )


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four thousand million tokens, all 0, of which the disk holds none."""
    prefix = tmp_path_factory.mktemp("sparse") / "corpus"
    lengths, offsets = [1 << 30] * 4, [index << 31 for index in range(4)]
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 4, 5)
    Path(f"{prefix}.idx").write_bytes(header + struct.pack("<4i4q5q", *lengths, *offsets, *range(5)))
    with Path(f"{prefix}.bin").open("wb") as stream:
        stream.truncate(1 << 33)

    return prefix


# The two ends are in every sample, and 21 / 63 of the way between them is where its block 21 begins.
@pytest.mark.parametrize(("place", "seen"), [(0, True), (-1, True), ("block 21", True), (1 << 31, False)])
def test_check_of_ids_samples_a_huge_corpus(sparse: Path, place: int | str, seen: bool) -> None:
    total, sample = 1 << 32, 1 << 20
    at = (total - sample // 64) * 21 // 63 + 5 if place == "block 21" else int(place) % total

    with Path(f"{sparse}.bin").open("r+b") as stream:
        stream.seek(2 * at)
        stream.write(struct.pack("<H", 41_000))

    reader = IndexedReader(sparse)
    assert reader.tokens.size == total
    assert reader.tokens[at : at + 1] == 41_000
    assert finds_wrong_id(reader=reader, vocab_size=41_000, sample=sample) == seen
    assert not finds_wrong_id(reader=reader, vocab_size=41_001, sample=sample)

    with Path(f"{sparse}.bin").open("r+b") as stream:
        stream.seek(2 * at)
        stream.write(b"\0\0")


def test_a_start_looks_at_some_megabytes_of_a_huge_corpus(sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, fromfile = [], np.fromfile

    def counted(*arguments, **more) -> np.ndarray:
        seen.append(fromfile(*arguments, **more))
        return seen[-1]

    monkeypatch.setattr(np, "fromfile", counted)
    IndexedReader(sparse).check_ids(1, "")
    assert sum(block.nbytes for block in seen) < 5_000_000


@pytest.mark.parametrize("part", ["offsets", "documents"])
@pytest.mark.parametrize("entry", [5, 299_998])
def test_a_large_index_is_sampled_to_both_ends(part: str, entry: int, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "corpus", np.dtype("u2")) as writer:
        writer.add(np.zeros(300_000, np.int64), np.ones(300_000, np.int32))
        writer.commit()

    IndexedReader(tmp_path / "corpus")
    with (tmp_path / "corpus.idx").open("r+b") as stream:
        stream.seek(34 + (4 if part == "offsets" else 12) * 300_000 + 8 * entry)
        stream.write(struct.pack("<q", 7))

    with pytest.raises(UserError, match=r"corpus\.idx"):
        IndexedReader(tmp_path / "corpus")
