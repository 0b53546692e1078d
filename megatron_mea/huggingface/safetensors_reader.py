"""Reads the tensors of a Hugging Face folder in chunks, from safetensors alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open

from megatron_mea.checkpoint.tensors import Fragment, row_chunks
from megatron_mea.errors import Problem, UserError
from megatron_mea.huggingface.config_keys import CONFIG_JSON, MAX_NAMED
from megatron_mea.huggingface.expert_tensors import (
    ExpertMatrix,
    expert_matrices,
    first_missing,
    parse_expert_name,
    stack_shapes,
)
from megatron_mea.inputs import read_json_object

_DTYPES = ("F32", "BF16", "F16", "F64")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_DOWNLOAD_HINT = "a download may have stopped: `hf download NAME --local-dir HF_DIR` goes on with it"
_MAX_INDEX_BYTES = 64 << 20
"""That of a model with 91,000 tensors has 9 million."""
_NO_CONSTANTS: Mapping[str, torch.Tensor] = MappingProxyType({})
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a folder.

    Args:
        file: which it is in; of a stack of experts, the first expert.
        shape: of the full tensor.
        dtype: as safetensors calls it; of a stack whose experts differ, all of them.
        experts: of a stack that is stored as a tensor for each expert, these.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    experts: tuple[tuple[ExpertMatrix, StoredTensor], ...] = ()


def scan_safetensors(
    path: Path, where: str, *, constants: Mapping[str, torch.Tensor] = _NO_CONSTANTS
) -> dict[str, StoredTensor]:
    """Lists the tensors in the safetensors that transformers would load; reads names, shapes and dtypes.

    Args:
        where: the key or argument that named the folder, for messages.
        constants: what tensors that follow from config.json must be, where they are stored; they are not listed.

    Raises:
        UserError: there are no safetensors, or they cannot be read, or they hold something else than floating point, or
            other constants.
    """
    stored: dict[str, StoredTensor] = {}
    for file in _safetensors_files(path, where):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                    # transformers 4 stored it in early Llamas, and computes with what follows from config.json.
                    if name.endswith(".rotary_emb.inv_freq"):
                        continue
                    if name in constants:
                        _check_constant(tensors, name, expected=constants[name], file=file, where=where)
                        continue
                    if name in stored:
                        raise UserError(
                            where=where, got=f"{name} in {stored[name].file} and in {file}", expected="each tensor once"
                        )

                    tensor = tensors.get_slice(name)
                    stored[name] = StoredTensor(file=file, shape=tuple(tensor.get_shape()), dtype=tensor.get_dtype())
        except (OSError, SafetensorError) as error:
            raise UserError(where=where, got=f"{file}, unreadable ({error})", expected="whole safetensors") from None

    if problems := [
        Problem(
            where=where,
            got=f"{name} in {tensor.file}, of type {tensor.dtype}",
            expected=f"one of {', '.join(_DTYPES)}",
        )
        for name, tensor in stored.items()
        if tensor.dtype not in _DTYPES
    ]:
        raise UserError.from_problems(problems[:MAX_NAMED])

    return stored


def _check_constant(tensors: safe_open, name: str, *, expected: torch.Tensor, file: Path, where: str) -> None:
    """Raises UserError where a stored constant (n,) is another than config.json says."""
    shape, expected_by = tuple(tensors.get_slice(name).get_shape()), f"by {file.parent / CONFIG_JSON}"
    if shape != expected.shape:
        got = f"{name} of shape {shape} in {file}"
        raise UserError(where=where, got=got, expected=f"{tuple(expected.shape)}, {expected_by}")

    stored = tensors.get_tensor(name).to(expected.dtype)
    if (differing := (stored != expected).nonzero()).numel():
        index = int(differing[0])
        got = f"{name}[{index}] = {stored[index]:g} in {file}"
        raise UserError(where=where, got=got, expected=f"{expected[index]:g}, {expected_by}")


def scan_model(
    *,
    path: Path,
    where: str,
    num_layers: int,
    num_experts: int,
    tied: bool,
    constants: Mapping[str, torch.Tensor] = _NO_CONSTANTS,
) -> dict[str, StoredTensor]:
    """Lists the tensors of a folder as `scan_safetensors` does, the matrix of tied embeddings once.

    Args:
        num_layers: that config.json says; far too many are refused before specifications are made of each.
        num_experts: of a layer; the tensors of others keep their names.
        tied: whether the embeddings are.
        constants: as `scan_safetensors` takes them.

    Raises:
        UserError: there are fewer tensors than layers, the files cannot be read, or matrices that are tied differ.
    """
    tensors = scan_safetensors(path, where, constants=constants)
    if num_layers > len(tensors):
        raise UserError(
            where=where,
            got=f"{path / CONFIG_JSON}: num_hidden_layers = {num_layers}",
            expected=f"at most {len(tensors)}, as many as the safetensors have tensors",
        )

    return _without_tied_head(path=path, where=where, tensors=_stack_experts(tensors, num_experts), tied=tied)


def _stack_experts(tensors: dict[str, StoredTensor], num_experts: int) -> dict[str, StoredTensor]:
    """The tensors with the names and shapes that they have in memory, where experts are stacked."""
    stacked = {}
    shapes = ((name, tensor.shape) for name, tensor in tensors.items())
    for name, shape in stack_shapes(shapes, num_experts).items():
        if name in tensors:
            # Stored twice: the experts stay as they are, and are refused.
            continue

        experts = tuple((matrix, tensors[matrix.name]) for matrix in expert_matrices(name, shape))
        dtype = ", ".join(sorted({tensor.dtype for _, tensor in experts}))
        stacked[name] = StoredTensor(file=experts[0][1].file, shape=shape, dtype=dtype, experts=experts)

    members = {matrix.name for stack in stacked.values() for matrix, _ in stack.experts}
    return {name: tensor for name, tensor in tensors.items() if name not in members} | stacked


def check_tensors(
    *,
    path: Path,
    where: str,
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    expected_by: str,
) -> list[Problem]:
    """The tensors that a folder lacks, has in another shape than `expected`, or has beyond it.

    Args:
        expected_by: who expects them, for messages.
    """
    problems = []
    for name, shape in expected.items():
        if name not in shapes:
            name, shape = first_missing(name, shape, shapes)
        if name not in shapes:
            problems.append(Problem(where=where, got=f"{path} without {name}", expected=f"{name} of shape {shape}"))
        elif shapes[name] != shape:
            got = f"{name} of shape {shapes[name]} in {path}"
            problems.append(Problem(where=where, got=got, expected=f"{shape}, by {expected_by}"))

    for name in shapes:
        if name in expected:
            continue

        expert, allowed = parse_expert_name(name), f"only what {expected_by} describes"
        num_experts = expected.get(expert.stack, (0,))[0] if expert else 0
        if expert and expert.index < num_experts:
            # Of an incomplete stack the first that is missing is named, and not all others.
            if expert.stack not in shapes:
                continue
        elif num_experts:
            allowed = f"experts 0 to {num_experts - 1}, by {expected_by}"

        problems.append(Problem(where=where, got=f"{name} in {path}", expected=allowed))

    more = len(problems) - MAX_NAMED
    if more > 0:
        problems[MAX_NAMED:] = [Problem(where=where, got=f"{more} more such tensors", expected="none")]

    return problems


def _without_tied_head(
    *, path: Path, where: str, tensors: dict[str, StoredTensor], tied: bool
) -> dict[str, StoredTensor]:
    """Drops `lm_head.weight` of a model with tied embeddings, where a folder holds the matrix twice.

    Raises:
        UserError: the two differ.
    """
    if not (tied and _EMBEDDING in tensors and _HEAD in tensors):
        return tensors

    shape = tensors[_EMBEDDING].shape
    equal = len(shape) == 2 and tensors[_HEAD].shape == shape
    for offsets, size in row_chunks(shape, 1 << 24) if equal else ():
        rows = [Fragment.empty(name, shape, offsets=offsets, shape=size) for name in (_EMBEDDING, _HEAD)]
        fill_fragments(tensors, rows)
        equal = equal and torch.equal(rows[0].values, rows[1].values)

    if not equal:
        got = f"{_HEAD} in {path}, other than {_EMBEDDING}"
        raise UserError(where=where, got=got, expected="equal matrices, or tie_word_embeddings: false in config.json")

    return {name: tensor for name, tensor in tensors.items() if name != _HEAD}


def fill_fragments(tensors: Mapping[str, StoredTensor], fragments: Iterable[Fragment]) -> None:
    """Fills fragments of the tensors, a chunk at a time."""
    for fragment in fragments:
        tensor = tensors[fragment.name]
        with ExitStack() as stack:
            # A file is opened once, since its header lists every tensor in it.
            open_file = cache(lambda path, stack=stack: stack.enter_context(safe_open(path, framework="pt")))
            for offsets, view in fragment.chunks():
                if tensor.experts:
                    _fill_from_experts(tensor, offsets=offsets, view=view, open_file=open_file)
                else:
                    view.copy_(open_file(tensor.file).get_slice(fragment.name)[_slices(offsets, view.shape)])


def _fill_from_experts(
    tensor: StoredTensor, *, offsets: tuple[int, ...], view: torch.Tensor, open_file: Callable[[Path], safe_open]
) -> None:
    """Fills a view of a stack (experts, rows, columns) at these offsets from the tensors of its experts."""
    for matrix, stored, in_view, in_matrix in expert_parts(tensor, offsets=offsets, shape=view.shape):
        view[in_view].copy_(open_file(stored.file).get_slice(matrix.name)[in_matrix].unsqueeze(0))


def expert_parts(
    tensor: StoredTensor, *, offsets: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[ExpertMatrix, StoredTensor, tuple[slice, ...], tuple[slice, ...]]]:
    """The experts of a stack in a box of it: matrix, its tensor, and the part that both have, of the box and of it."""
    for matrix, stored in tensor.experts:
        # Counted in the stack.
        starts = tuple(map(max, offsets, matrix.offsets))
        stops = (
            min(offset + size, first + length)
            for offset, size, first, length in zip(offsets, shape, matrix.offsets, matrix.shape, strict=True)
        )
        common = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        if min(common) <= 0:
            continue

        in_box = _slices((start - offset for start, offset in zip(starts, offsets, strict=True)), common)
        in_matrix = _slices((start - first for start, first in zip(starts, matrix.offsets, strict=True)), common)
        yield matrix, stored, in_box, in_matrix[1:]


def _slices(offsets: Iterable[int], shape: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(offsets, shape, strict=True))


def _safetensors_files(path: Path, where: str) -> list[Path]:
    """The single file of a folder, else the shards that its index names."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if single.is_file():
        return [single]

    if not index.is_file():
        pickles = sorted({file.name for suffix in _PICKLE_SUFFIXES for file in path.glob(f"*{suffix}")})
        shards = sorted(file.name for file in path.glob("*.safetensors"))
        hint = _DOWNLOAD_HINT
        if pickles:
            hint = (
                f"{pickles[0]} may run code and is not read: where you trust it, load and save it with transformers 5"
            )
        raise UserError(
            where=where,
            got=f"{path} without {single.name}; *.safetensors there: {', '.join(shards[:MAX_NAMED]) or 'none'}",
            expected=f"{single.name}, or {index.name} and the *.safetensors that it names",
            hint=hint,
        )

    try:
        names = sorted(set(read_json_object(index, max_bytes=_MAX_INDEX_BYTES)["weight_map"].values()))
        # Nothing outside of the folder is read, whatever the index says.
        if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise ValueError(f"{outside[0]!r} is no name of safetensors in the folder")
        if not names:
            raise ValueError("it names no file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(where=where, got=f"{index}, unreadable ({error})", expected="an index of safetensors") from None

    if missing := [name for name in names if not (path / name).is_file()]:
        present = [name for name in names if name not in missing]
        raise UserError(
            where=where,
            got=f"{path} without {', '.join(missing[:MAX_NAMED])}; there: {', '.join(present[:MAX_NAMED]) or 'none'}",
            expected=f"every file that {index.name} names",
            hint=_DOWNLOAD_HINT,
        )

    return [path / name for name in names]
