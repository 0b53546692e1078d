"""Entries of a `.idx`: right values, or a message that names the file and the entry, whatever stands in them."""

from __future__ import annotations

import re
import struct
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from support.foreign import examples
from support.indexed_by_hand import write_by_hand
from support.limits import traced_memory_below, within_limits

from megatron_mea.data import index_entries
from megatron_mea.data.corpora import read_window
from megatron_mea.data.indexed import IndexedReader
from megatron_mea.data.windows import open_windows
from megatron_mea.errors import UserError

HEADER = 34


class Reference:
    """A `.idx` as `struct` alone reads it, and whether it describes a `.bin` of `size` bytes."""

    def __init__(self, raw: bytes, size: int) -> None:
        self.is_valid = False
        if len(raw) < HEADER or raw[:9] != b"MMIDIDX\0\0":
            return

        version, code, sequences, boundaries = struct.unpack_from("<QBQQ", raw, 9)
        self.itemsize = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}.get(code, 0)
        if version != 1 or not self.itemsize or len(raw) != HEADER + 12 * sequences + 8 * boundaries:
            return

        lengths = struct.unpack_from(f"<{sequences}i", raw, HEADER)
        self.offsets = struct.unpack_from(f"<{sequences}q", raw, HEADER + 4 * sequences)
        self.documents = struct.unpack_from(f"<{boundaries}q", raw, HEADER + 12 * sequences)
        ends = [offset + self.itemsize * length for offset, length in zip(self.offsets, lengths, strict=True)]
        self.is_valid = (
            min(lengths, default=0) >= 0
            and [0, *ends] == [*self.offsets, size]
            and self.documents[:1] == (0,)
            and self.documents[-1] == sequences
            and sorted(self.documents) == list(self.documents)
        )

    def document_starts(self, start: int, stop: int) -> list[int]:
        """One entry of the index after the other."""
        begins = {self.offsets[index] // self.itemsize for index in self.documents if index < len(self.offsets)}
        return sorted(begin for begin in begins if start <= begin < stop)


def write_corpus(folder: str | Path, *, seed: int, documents: int, single: bool) -> Path:
    """A corpus whose documents have one sequence each (`single`), or up to three; some are empty."""
    random = Random(seed)
    counts = [1 if single else random.randrange(4) for _ in range(documents)]
    sequences = [[7] * random.randrange(6) for _ in range(sum(counts))]
    borders = np.cumsum([0, *counts]).tolist()
    write_by_hand(prefix=Path(folder, "corpus"), dtype="u2", sequences=sequences, documents=borders)
    return Path(folder, "corpus")


def document_starts(prefix: Path, start: int, stop: int) -> list[int] | None:
    """What our reader gives, within some megabytes; None where it refuses one of the two files."""
    with within_limits(), traced_memory_below(5_000_000):
        try:
            return IndexedReader(prefix).index.document_starts(start, stop).tolist()
        except UserError as error:
            return None if error.problems[0].where in (f"{prefix}.idx", f"{prefix}.bin") else []


@given(st.integers(0, 1 << 20), st.integers(0, 30), st.booleans(), st.data())
@examples(300)
def test_any_bytes_of_an_index_give_the_right_values_or_a_message(seed, documents, single, data) -> None:
    """Of a small index all is read when it is opened."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_corpus(folder, seed=seed, documents=documents, single=single)
        index, size = Path(f"{prefix}.idx"), Path(f"{prefix}.bin").stat().st_size
        raw = bytearray(index.read_bytes())
        for _ in range(data.draw(st.integers(0, 2))):
            place = data.draw(st.integers(0, len(raw)))
            raw[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))

        index.write_bytes(raw)
        reference, start = Reference(bytes(raw), size), data.draw(st.integers(0, size // 2))
        starts = document_starts(prefix, start, start + 9)
        assert (starts is None) != reference.is_valid
        assert starts is None or starts == reference.document_starts(start, start + 9)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large index 64 entries are read when it is opened, and windows read few at a time."""
    monkeypatch.setattr(index_entries, "SAMPLE_ENTRIES", 64)
    monkeypatch.setattr(index_entries, "_CHUNK", 5)


ENTRIES = st.one_of(st.integers(-3, 800), st.integers(-(1 << 63), (1 << 63) - 1))


@given(st.integers(0, 1 << 20), st.booleans(), st.data())
@examples(200)
def test_a_damaged_entry_never_moves_a_document(seed, single, data) -> None:
    """An index of which a sample is read when it is opened: an entry, or some in a row, have other values."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        sampled.__wrapped__(patch)
        prefix = write_corpus(folder, seed=seed, documents=200, single=single)
        index, size = Path(f"{prefix}.idx"), Path(f"{prefix}.bin").stat().st_size
        raw = bytearray(index.read_bytes())
        intact = Reference(bytes(raw), size)
        assert intact.is_valid

        sequences, borders = len(intact.offsets), len(intact.documents)
        width, begin, count = data.draw(
            st.sampled_from([(4, 0, sequences), (8, 4 * sequences, sequences), (8, 12 * sequences, borders)])
        )
        number, value = data.draw(st.integers(0, count - 1)), data.draw(ENTRIES)
        entry = HEADER + begin + width * number
        raw[entry : entry + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        index.write_bytes(raw)

        damaged = Reference(bytes(raw), size)
        # One that no document refers to decides on nothing; one that is as good as another is right.
        right = damaged if damaged.is_valid else intact
        start = data.draw(st.integers(0, size // 2))
        starts = document_starts(prefix, start, start + 30)
        event("refused" if starts is None else "right")
        assert starts is None or starts == right.document_starts(start, start + 30)


@pytest.mark.parametrize(
    ("array", "value", "got"),
    [
        ("lengths", -4, "sequence 150 of -4 tokens at byte 900, and the next one at byte 906"),
        ("lengths", 2, "sequence 150 of 2 tokens at byte 900, and the next one at byte 906"),
        ("offsets", 904, "sequence 149 of 3 tokens at byte 894, and the next one at byte 904"),
        ("documents", 151, "document 150 that begins with sequence 151"),
    ],
)
@pytest.mark.usefixtures("sampled")
def test_damage_between_the_sampled_entries_is_named_where_it_is_used(array, value, got, tmp_path) -> None:
    prefix, count = tmp_path / "corpus", 300
    write_by_hand(prefix=prefix, dtype="u2", sequences=[[1, 2, 3]] * count, documents=list(range(count + 1)))
    width, begin = {"lengths": (4, 0), "offsets": (8, 4 * count), "documents": (8, 12 * count)}[array]
    with Path(f"{prefix}.idx").open("r+b") as stream:
        stream.seek(HEADER + begin + 150 * width)
        stream.write(value.to_bytes(width, "little", signed=True))

    reader = IndexedReader(prefix)
    assert reader.index.document_starts(0, 30).tolist() == list(range(0, 30, 3))

    with pytest.raises(UserError) as caught:
        read_window(reader=reader, start=440, length=30, document_mask=True)
    (problem,) = caught.value.problems
    assert (problem.where, problem.got) == (f"{prefix}.idx", got)
    assert "300 sequences that follow one another" in problem.expected
    assert "megatron-mea inspect" in problem.hint

    settings = {"paths": [str(prefix)], "where": "--data", "window": 10, "batch": 1, "vocab_size": 9}
    with pytest.raises(UserError, match=re.escape(got)):
        open_windows(**settings, document_mask=True)
    assert len(open_windows(**settings, document_mask=False)), "without the mask no entry decides"


@pytest.mark.usefixtures("sampled")
def test_a_hole_among_documents_of_several_sequences(tmp_path) -> None:
    """A part of a file that was never copied reads as zeros, which rise nowhere."""
    prefix, count = tmp_path / "corpus", 1000
    write_by_hand(prefix=prefix, dtype="u2", sequences=[[1]] * 2 * count, documents=list(range(0, 2 * count + 1, 2)))
    reader = IndexedReader(prefix)
    # In no sampled entry.
    first = (count - 1) * 20 // 63 + 2
    with Path(f"{prefix}.idx").open("r+b") as stream:
        stream.seek(HEADER + 12 * 2 * count + 8 * first)
        stream.write(bytes(8 * 10))

    reader = IndexedReader(prefix)
    for start in (2 * first - 5, 2 * first + 4, 2 * first + 15):
        with pytest.raises(UserError, match=r"corpus\.idx"):
            reader.index.document_starts(start, start + 10)


@pytest.mark.usefixtures("sampled")
def test_any_number_of_empty_documents_begins_at_one_token(tmp_path) -> None:
    sequences = [[1, 2], *[[]] * 400, [3], [4, 5]]
    for documents in (range(len(sequences) + 1), [0, 0, 0, *range(1, len(sequences) + 1)]):
        write_by_hand(prefix=tmp_path / "corpus", dtype="i8", sequences=sequences, documents=list(documents))
        reader = IndexedReader(tmp_path / "corpus")
        assert reader.index.document_starts(0, 5).tolist() == [0, 2, 3]
        assert reader.index.document_starts(1, 3).tolist() == [2]
        assert reader.index.document_starts(4, 5).tolist() == []


@pytest.mark.parametrize("counts", [(1 << 63, 1), (1 << 40, 1 << 40), ((1 << 64) - 1, (1 << 64) - 1), (0, 1 << 61)])
def test_absurd_counts_take_no_memory(counts, tmp_path) -> None:
    write_by_hand(prefix=tmp_path / "corpus", dtype="u2", sequences=[[1]], documents=[0, 1])
    with (tmp_path / "corpus.idx").open("r+b") as stream:
        stream.seek(18)
        stream.write(struct.pack("<QQ", *counts))

    with traced_memory_below(1_000_000), pytest.raises(UserError, match="that its header announces"):
        IndexedReader(tmp_path / "corpus")


@pytest.mark.usefixtures("sampled")
def test_documents_that_a_damaged_entry_hides_are_not_left_out(tmp_path):
    """A later sequence's number makes a window end before its documents begin: none of them would be looked at."""
    prefix = tmp_path / "corpus"
    write_by_hand(prefix=prefix, dtype="u2", sequences=[[1, 2, 3]] * 300, documents=list(range(0, 301, 2)))
    index, size = Path(f"{prefix}.idx"), Path(f"{prefix}.bin").stat().st_size
    raw = index.read_bytes()
    right = Reference(raw, size)
    outcomes = set()
    for number in range(1, 144):
        entry = HEADER + 12 * 300 + 8 * number
        index.write_bytes(raw[:entry] + (2 * number + 12).to_bytes(8, "little") + raw[entry + 8 :])
        starts, begin = document_starts(prefix, 6 * number, 6 * number + 30), 6 * number
        assert starts is None or starts == right.document_starts(begin, begin + 30), number
        outcomes.add(starts is None)

    assert True in outcomes
