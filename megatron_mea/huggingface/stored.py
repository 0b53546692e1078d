"""The tensors of a Hugging Face folder, in safetensors alone, read in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_mea.checkpoint.tensors import Fragment, rows_of
from megatron_mea.errors import Problem, UserError

_TYPES = ("F32", "BF16", "F16", "F64")
_PICKLES = (".bin", ".pt", ".pth")
_NAMED = 16
"""Names in a message, of thousands where a folder holds something else."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, its shape, and its type as safetensors calls it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(path: Path, where: str) -> dict[str, Stored]:
    """Every tensor in the safetensors that transformers would load; reads names and shapes.

    Args:
        where: the key or argument that named the folder, for messages.

    Raises:
        UserError: there are no safetensors, or they cannot be read, or they hold something else than floating point.
    """
    found: dict[str, Stored] = {}
    for file in _files(path, where):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                    # transformers 4 stored these constants, which follow from config.json, in early Llamas.
                    if name.endswith(".rotary_emb.inv_freq"):
                        continue
                    if name in found:
                        raise UserError(where, f"{name} in {found[name].file} and in {file}", "each tensor once")
                    one = tensors.get_slice(name)
                    found[name] = Stored(file, tuple(one.get_shape()), one.get_dtype())
        except (OSError, SafetensorError) as error:
            raise UserError(where, f"{file}, unreadable ({error})", "whole safetensors") from None
    for name, one in found.items():
        if one.dtype not in _TYPES:
            raise UserError(where, f"{name} in {one.file}, of type {one.dtype}", f"one of {', '.join(_TYPES)}")
    return found


def check_names(
    path: Path, where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], by: str
) -> list[Problem]:
    """What a folder lacks, has in another shape, or has beyond what is `expected`; `by` says what expects it."""
    problems = []
    for name in expected:
        if name not in found:
            problems.append(Problem(where, f"{path} without {name}", f"{name} of shape {expected[name]}"))
        elif found[name] != expected[name]:
            said = f"{name} of shape {found[name]} in {path}"
            problems.append(Problem(where, said, f"{expected[name]}, by {by}"))
    unknown = (name for name in found if name not in expected)
    problems += [Problem(where, f"{name} in {path}", f"only what {by} describes") for name in unknown]
    more = len(problems) - _NAMED
    if more > 0:
        problems[_NAMED:] = [Problem(where, f"{more} more such tensors", "none")]
    return problems


def without_tied_head(path: Path, where: str, found: dict[str, Stored], tied: bool) -> dict[str, Stored]:
    """Some folders with tied embeddings hold the one matrix twice; it is taken once, where the two are equal.

    Raises:
        UserError: they differ.
    """
    if not (tied and _EMBEDDING in found and _HEAD in found):
        return found
    shape = found[_EMBEDDING].shape
    equal = (
        len(shape) == 2
        and found[_HEAD].shape == shape
        and all(
            torch.equal(*(read_piece(found, name, offsets, size) for name in (_EMBEDDING, _HEAD)))
            for offsets, size in rows_of(shape, 1 << 24)
        )
    )
    if not equal:
        said = f"{_HEAD} in {path}, other than {_EMBEDDING}"
        raise UserError(where, said, "equal matrices, or tie_word_embeddings: false in config.json")
    return {name: one for name, one in found.items() if name != _HEAD}


def read_piece(
    found: Mapping[str, Stored], name: str, offsets: tuple[int, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """float32 copy of a box of a tensor; the file is mapped for as long as it takes."""
    piece = torch.empty(shape)
    with safe_open(found[name].file, framework="pt") as tensors:
        piece.copy_(tensors.get_slice(name)[_box(offsets, shape)])
    return piece


def read_stored(found: Mapping[str, Stored], fragments: Iterable[Fragment]) -> None:
    """Fills fragments of the tensors."""
    for fragment in fragments:
        with safe_open(found[fragment.name].file, framework="pt") as tensors:
            whole = tensors.get_slice(fragment.name)
            for offsets, view in fragment.pieces():
                view.copy_(whole[_box(offsets, view.shape)])


def _box(offsets: Iterable[int], shape: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(offsets, shape, strict=True))


def _files(path: Path, where: str) -> list[Path]:
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        allowed = f"{single.name}, or {index.name} and the files that it names"
        pickles = sorted({file.name for suffix in _PICKLES for file in path.glob(f"*{suffix}")})
        mend = f"{pickles[0]} may run code and is not read: where you trust it, load and save it with transformers 5"
        raise UserError(where, f"{path} without {single.name}", allowed, mend if pickles else "")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        # Nothing outside of the folder is read, whatever the index says.
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{outside[0]!r} is no name of a file in the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(where, f"{index}, unreadable ({error})", "an index of safetensors") from None
    return [path / name for name in names]
