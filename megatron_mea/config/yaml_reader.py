"""YAML as a configuration may use it: PyYAML's safe loader within limits, without what YAML 1.1 reads unexpectedly."""

from __future__ import annotations

import re
from typing import Any

import yaml

from megatron_mea.errors import UserError

MAX_BYTES = 4 << 20
"""Of a file: a mixture of 10,000 corpora takes one."""
_MAX_DEPTH = 32
"""Sections, lists and mappings within one another."""
_MAX_NODES = 500_000
"""Values in all, those that an alias repeats counted each time."""
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class InvalidYaml(ValueError):
    """Text that is no YAML, or YAML beyond the limits; the message says what is wrong, and where."""


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text.

    Args:
        name: of the file or argument, for messages.

    Raises:
        InvalidYaml: it is no YAML, too deep or too large, or has a number that YAML 1.1 reads in another base.
        UserError: a mapping has a key twice.
    """
    if len(text) > MAX_BYTES:
        raise InvalidYaml(f"{len(text):,} characters, more than {MAX_BYTES:,}")

    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except (UserError, InvalidYaml):
        raise
    except Exception as error:
        # PyYAML lets many kinds through where a tag or a value such as a date does not fit.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidYaml(reason) from None


class _Loader(yaml.SafeLoader):
    """SafeLoader with limits, and without duplicate keys, of which YAML would silently take the last."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise InvalidYaml(f"more than {_MAX_DEPTH} levels")

        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count_nodes(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                where = f"{node.start_mark.name}, line {key_node.start_mark.line + 1}"
                raise UserError(
                    where=where, got=f"the key {key!r} twice", expected="each key once", hint="remove one of the two"
                )
            if isinstance(key, str):
                seen.add(key)

        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        _check_number(node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        _check_number(node)
        return super().construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _check_number(node: yaml.ScalarNode) -> None:
    """Raises InvalidYaml where YAML 1.1 reads a number in base 8 or 60 that nobody writes on purpose."""
    line = node.start_mark.line + 1
    if _LEADING_ZERO.fullmatch(node.value):
        raise InvalidYaml(f"line {line}: {node.value} has a leading zero, with which YAML reads it as octal")
    if _SEXAGESIMAL.fullmatch(node.value):
        raise InvalidYaml(f"line {line}: {node.value} is a number to the base 60 in YAML; quote it if it is text")


def _count_nodes(node: yaml.Node, counted: dict[int, int]) -> int:
    """Number of nodes that a node stands for, itself included; each is visited once."""
    if (number := counted.get(id(node))) is not None:
        if number == 0:
            raise InvalidYaml(f"line {node.start_mark.line + 1}: an alias of what it is a part of")
        return number

    counted[id(node)] = 0
    number = 1
    if isinstance(node, yaml.MappingNode):
        number += sum(_count_nodes(part, counted) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        number += sum(_count_nodes(part, counted) for part in node.value)
    if number > _MAX_NODES:
        raise InvalidYaml(f"more than {_MAX_NODES:,} values, those that aliases repeat counted each time")

    counted[id(node)] = number
    return number
