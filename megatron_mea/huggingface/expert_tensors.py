"""Names on disk of the experts' stacks of matrices: one tensor for each expert, as Qwen3-MoE's files have them.

In memory a layer has `mlp.experts.gate_up_proj` (experts, 2 width, hidden), gate_proj's rows before up_proj's, and
`mlp.experts.down_proj` (experts, hidden, width). Readers and writers of Hugging Face folders take the names from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

_KINDS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""The matrices of an expert in each stack, in the order of their rows."""
_STACKED = re.compile(rf"(.+\.mlp\.experts)\.({'|'.join(_KINDS)})")
_SEPARATE = re.compile(r"(.+\.mlp\.experts)\.(0|[1-9]\d{0,8})\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True, kw_only=True)
class ExpertMatrix:
    """A matrix of one expert: its name on disk, and the box (1, rows, columns) of the stack that it is."""

    name: str
    offsets: tuple[int, int, int]
    shape: tuple[int, int, int]


class Expert(NamedTuple):
    """Where a name on disk belongs: the layer's prefix, the expert's number, and gate, up or down."""

    prefix: str
    index: int
    kind: str

    @property
    def stack(self) -> str:
        """The name of the stack that it is part of."""
        return next(f"{self.prefix}.{stack}" for stack, kinds in _KINDS.items() if self.kind in kinds)


def expert_matrices(name: str, shape: tuple[int, ...]) -> Iterator[ExpertMatrix]:
    """The matrices of a stack, expert after expert; none where the name is no stack's."""
    match = _STACKED.fullmatch(name)
    if match is None or len(shape) != 3:
        return

    prefix, stack = match.groups()
    num_experts, rows, columns = shape
    kinds = _KINDS[stack]
    height = rows // len(kinds)
    for expert in range(num_experts):
        for number, kind in enumerate(kinds):
            yield ExpertMatrix(
                name=f"{prefix}.{expert}.{kind}_proj.weight",
                offsets=(expert, number * height, 0),
                shape=(1, height, columns),
            )


def parse_expert_name(name: str) -> Expert | None:
    """Takes a name on disk apart; None where it is not an expert's."""
    match = _SEPARATE.fullmatch(name)
    return Expert(match[1], int(match[2]), match[3]) if match else None


def stack_shapes(shapes: Iterable[tuple[str, tuple[int, ...]]], num_experts: int) -> dict[str, tuple[int, ...]]:
    """The stacks that (name, shape) pairs of tensors on disk make up: names and shapes in memory.

    A stack is left out whose matrices are not all there, of experts 0 to num_experts - 1, in one shape.
    """
    layers: dict[str, dict[tuple[int, str], tuple[int, ...]]] = {}
    for name, shape in shapes:
        if (expert := parse_expert_name(name)) and expert.index < num_experts:
            layers.setdefault(expert.prefix, {})[expert.index, expert.kind] = shape

    stacks = {}
    for prefix, matrices in layers.items():
        for stack, kinds in _KINDS.items():
            of_kinds = [shape for (_, kind), shape in matrices.items() if kind in kinds]
            if len(of_kinds) == num_experts * len(kinds) and len(set(of_kinds)) == 1 and len(of_kinds[0]) == 2:
                rows, columns = of_kinds[0]
                stacks[f"{prefix}.{stack}"] = (num_experts, rows * len(kinds), columns)

    return stacks


def first_missing(
    name: str, shape: tuple[int, ...], present: Mapping[str, tuple[int, ...]]
) -> tuple[str, tuple[int, ...]]:
    """The first matrix of a stack that is missing, or has another shape; any other tensor by its own name."""
    wrong = (item for item in expert_matrices(name, shape) if present.get(item.name) != item.shape[1:])
    matrix = next(wrong, None)
    return (matrix.name, matrix.shape[1:]) if matrix else (name, shape)
