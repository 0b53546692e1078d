"""Prepared data written with `struct` alone, from the description of the format and not by our writer."""

from __future__ import annotations

import struct
from pathlib import Path

CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "u2": 8}
STRUCT = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def write_by_hand(*, prefix: Path, dtype: str, sequences: list[list[int]], documents: list[int]) -> None:
    """Writes PREFIX.bin and PREFIX.idx; `documents` are the sequence numbers at which documents begin."""
    letter = STRUCT[CODES[dtype]]
    size = struct.calcsize(letter)
    lengths = [len(sequence) for sequence in sequences]
    offsets = [size * sum(lengths[:i]) for i in range(len(lengths))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(documents))
    index += struct.pack(f"<{len(sequences)}i", *lengths) + struct.pack(f"<{len(sequences)}q", *offsets)
    Path(f"{prefix}.idx").write_bytes(index + struct.pack(f"<{len(documents)}q", *documents))
    flat = [token for sequence in sequences for token in sequence]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(flat)}{letter}", *flat))
