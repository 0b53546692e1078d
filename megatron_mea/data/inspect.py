"""Prepared data as text, for the verb `inspect`: all entries of its index and its checksums are verified."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from megatron_mea.data.indexed import IndexedReader
from megatron_mea.data.metadata import KINDS, DataMetadata
from megatron_mea.errors import UserError, shorten
from megatron_mea.progress import progress_bar

_CHUNK_BYTES = 1 << 22


def inspect_data(prefix: str) -> str:
    """Documents, tokens, lengths, dtype, origin and integrity of the data at PREFIX, as text.

    Raises:
        UserError: a file is missing or damaged.
    """
    metadata, reader = DataMetadata.read(prefix), IndexedReader(prefix)
    reader.index.check()
    counts = {"documents": reader.document_indices.size - 1, "tokens": int(reader.tokens.size)}
    if metadata is not None:
        _verify(prefix, metadata)
        noted = {name: getattr(metadata, name) for name in counts} | {"dtype": metadata.dtype}
        if noted != (actual := counts | {"dtype": str(reader.dtype)}):
            expected = f"{actual}, as its .idx says"
            raise UserError(where=str(DataMetadata.path(prefix)), got=str(noted), expected=expected)

    sizes = {kind: Path(f"{prefix}.{kind}").stat().st_size for kind in KINDS}
    rows = [
        ("prepared data", prefix),
        *((name, f"{count:,}") for name, count in counts.items()),
        ("lengths", _describe_lengths(reader)),
        ("dtype", str(reader.dtype)),
        ("size", ", ".join(f".{kind} {size:,} bytes" for kind, size in sizes.items())),
    ]
    if metadata is None:
        rows.append(("integrity", "all entries of the .idx fit; no PREFIX.meta.json holds checksums of the tokens"))
    else:
        recipe = metadata.recipe
        rows += [
            ("tokenizer", f"{shorten(recipe.tokenizer_folder)}, SHA-256 of its files {shorten(recipe.tokenizer)}"),
            ("input", f"{shorten(recipe.sources)}: {recipe.bytes:,} bytes in {recipe.files:,} file(s)"),
            ("options", shorten(recipe.options)),
            ("versions", shorten(metadata.versions)),
            ("integrity", "whole: both checksums hold, and all entries of the .idx fit"),
        ]

    return "\n".join(f"{key:<16} {value}" for key, value in rows)


def _verify(prefix: str, metadata: DataMetadata) -> None:
    """Raises UserError where one of the two files is not the one that was written; shows progress."""
    with progress_bar(desc="inspect", total=sum(metadata.sizes.values()), unit="B", unit_scale=True) as progress:
        # The index is the smaller one.
        for kind in reversed(KINDS):
            path, digest, size = Path(f"{prefix}.{kind}"), hashlib.sha256(), 0
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                    progress.update(len(chunk))

            got = ""
            if size != metadata.sizes[kind]:
                got, expected = f"{size:,} bytes", f"{metadata.sizes[kind]:,} bytes"
            elif digest.hexdigest() != metadata.sha256[kind]:
                got, expected = f"SHA-256 {digest.hexdigest()}", f"SHA-256 {shorten(metadata.sha256[kind])}"
            if got:
                expected += f", which {DataMetadata.path(prefix).name} holds"
                hint = "copy the file again, or run `megatron-mea prepare --force`"
                raise UserError(where=str(path), got=got, expected=expected, hint=hint)


def _describe_lengths(reader: IndexedReader) -> str:
    """Tokens of the documents, an end-of-document token included, of which thousands of millions may be."""
    values, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for lengths in reader.index.document_lengths():
        # There are few different ones: as many as n need n * n / 2 tokens.
        new_values, new_counts = np.unique(lengths, return_counts=True)
        values, places = np.unique(np.concatenate([values, new_values]), return_inverse=True)
        counts = np.bincount(places, np.concatenate([counts, new_counts])).astype(np.int64)

    total = int(counts.sum())
    if not total:
        return "no documents"

    # Of an even number the mean of the two in the middle.
    middle = values[np.searchsorted(np.cumsum(counts), [(total - 1) // 2, total // 2], side="right")].mean()
    mean = int(values @ counts) / total
    return f"min {values[0]:,}, median {middle:,.1f}, mean {mean:,.1f}, max {values[-1]:,} tokens a document"
