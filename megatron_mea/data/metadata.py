"""PREFIX.meta.json: what `prepare` made PREFIX.bin and PREFIX.idx of, and their checksums.

Data of Megatron or of an older program has none, and is read all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mea import __version__
from megatron_mea.data.sources import input_files
from megatron_mea.data.tokenizer import tokenizer_fingerprint
from megatron_mea.errors import UserError, shorten
from megatron_mea.inputs import read_json_object

FORMAT_VERSION = 1
"""It rises where an older program would misread the file."""
KINDS = ("bin", "idx")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides on prepared data; two equal ones make the same bytes.

    Args:
        sources, tokenizer_folder: as the user named them, for people.
        files, bytes: number and size of the files that they consist of.
        inputs: SHA-256 of the path, size and time of change of each of these files, and of names on the hub.
        tokenizer: SHA-256 of the tokenizer's files.
        options: those of `prepare` that change documents or tokens.
    """

    sources: list[str]
    tokenizer_folder: str
    files: int
    bytes: int
    inputs: str
    tokenizer: str
    options: dict[str, Any]

    @classmethod
    def read(cls, *, sources: Sequence[str], tokenizer_folder: str | Path, options: Mapping[str, Any]) -> Recipe:
        """The recipe of a command; looks at files without reading them, those of the tokenizer aside."""
        stats = [(os.path.realpath(path), path.stat()) for path in input_files(sources)]
        names = [source for source in sources if not Path(source).exists()]
        facts = [names, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]]
        return cls(
            sources=[_as_text(source) for source in sources],
            tokenizer_folder=_as_text(tokenizer_folder),
            files=len(stats),
            bytes=sum(stat.st_size for _, stat in stats),
            inputs=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
            tokenizer=tokenizer_fingerprint(tokenizer_folder),
            options=dict(options),
        )

    def differences(self, other: Recipe) -> list[str]:
        """What `other` has otherwise, for a message; empty where both make the same data."""
        differences = []
        if self.inputs != other.inputs:
            sizes = [f"{recipe.bytes:,} bytes in {recipe.files:,} file(s)" for recipe in (self, other)]
            same_size = "files of the same size that were changed or moved since"
            differences.append(f"other input ({same_size if len(set(sizes)) == 1 else ', now '.join(sizes)})")
        if self.tokenizer != other.tokenizer:
            differences.append("another tokenizer")

        keys = sorted(key for key in self.options | other.options if self.options.get(key) != other.options.get(key))
        return differences + [f"{key} {self.options.get(key)!r}, now {other.options.get(key)!r}" for key in keys]


@dataclass(frozen=True, kw_only=True)
class DataMetadata:
    """The contents of PREFIX.meta.json.

    Args:
        dtype: of the tokens in PREFIX.bin.
        sizes: bytes of PREFIX.bin and PREFIX.idx, by "bin" and "idx".
        sha256: their checksums.
        versions: of the packages that decide on the tokens.
    """

    documents: int
    tokens: int
    dtype: str
    sizes: dict[str, int]
    sha256: dict[str, str]
    recipe: Recipe
    versions: dict[str, str]

    @staticmethod
    def path(prefix: str | Path) -> Path:
        """PREFIX.meta.json"""
        return Path(f"{prefix}.meta.json")

    def as_json(self) -> str:
        """The text of the file."""
        return json.dumps({"format_version": FORMAT_VERSION} | asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, prefix: str | Path) -> DataMetadata | None:
        """Reads PREFIX.meta.json; None where there is none.

        Raises:
            UserError: the file is unreadable, or a newer program wrote it.
        """
        path = cls.path(prefix)
        if not os.path.lexists(path):
            return None

        # Where there is none, nobody waits for pydantic.
        from pydantic import TypeAdapter

        try:
            contents = read_json_object(path)
            if (number := contents.pop("format_version", None)) != FORMAT_VERSION:
                raise ValueError(f"format version {shorten(number)}; this is megatron_mea {__version__}")

            metadata = TypeAdapter(cls).validate_json(json.dumps(contents), strict=True)
            if {*metadata.sizes} != {*KINDS} or {*metadata.sha256} != {*KINDS}:
                raise ValueError("not the facts of .bin and .idx")
            return metadata
        except (OSError, ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            expected = f"what `megatron-mea prepare` wrote, of format version {FORMAT_VERSION} at most"
            hint = "the data is read without the file, too; `megatron-mea prepare --force` makes both anew"
            raise UserError(where=str(path), got=f"unreadable ({reason})", expected=expected, hint=hint) from None


def _as_text(path: str | Path) -> str:
    """A path for JSON: the name of a file may be no Unicode."""
    return os.fsencode(path).decode(errors="replace")


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide on the tokens."""
    # Of data that is read nobody waits for it.
    from importlib.metadata import version

    return {"megatron_mea": __version__} | {name: version(name) for name in ("tokenizers", "transformers")}


def find_prepared(prefix: str | Path, recipe: Recipe) -> DataMetadata | None:
    """The metadata of data at PREFIX that `recipe` has made; None where the name is free, or its data is unfinished.

    Raises:
        UserError: other data stands there, or nobody knows what made it.
    """
    files = {kind: Path(f"{prefix}.{kind}") for kind in KINDS}
    existing = [kind for kind in KINDS if files[kind].exists()]
    # Without the two it may be somebody else's file, which would be replaced.
    metadata = DataMetadata.read(prefix)
    if not existing:
        return None

    if metadata is not None and len(existing) < len(KINDS):
        # Its writer was killed while it exchanged the files.
        return None

    got = "data that nobody has noted the making of"
    if metadata is not None:
        got = f"data of {'; '.join(differences)}" if (differences := metadata.recipe.differences(recipe)) else ""
        changed = [kind for kind in KINDS if files[kind].stat().st_size != metadata.sizes[kind]]
        got = got or (f"a .{changed[0]} of another size than was written" if changed else "")

    if got:
        expected = "a name that is free, or data of the same input, tokenizer and options, which is left as it is"
        raise UserError(
            where="--out",
            got=f"{prefix}, where {' and '.join(files[kind].name for kind in existing)} are: {got}",
            expected=expected,
            hint="--force makes it anew, and replaces what is there",
        )

    return metadata
