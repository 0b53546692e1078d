"""The configuration's keys by their dotted names, and which of them an unknown one stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_mea.config.schema import Config
from megatron_mea.config.synonyms import KEY_SYNONYMS

_MAX_HINTS = 20
"""Keys of an unknown section that are looked at."""
_MAX_LENGTH = 100
"""Characters of a key that are compared with ours."""


@cache
def _fields() -> dict[str, FieldInfo]:
    return dict(_dotted_fields(Config, ""))


def known_keys() -> list[str]:
    """Every dotted key of the configuration, sections included."""
    return list(_fields())


def leaf_keys() -> list[str]:
    """Dotted keys that take one value; a list does, whatever its entries have for keys."""
    lists = {key for key, field in _fields().items() if get_origin(field.annotation) is list}
    leaves = [key for key in known_keys() if key in lists or key not in _parents()]
    return [key for key in leaves if key.rpartition(".")[0] not in lists]


def choices(key: str) -> list[str]:
    """The values of a key that has few of them, as YAML; empty for others."""
    # A key of a union has a field in each of its members.
    fields = [field for name, field in _dotted_fields(Config, "") if name == key]
    return [choice for field in fields for choice in _choices(field.annotation)]


def _choices(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))

    return [choice for argument in get_args(annotation) for choice in _choices(argument)]


def nested_sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a type consists of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from nested_sections(argument)


def unknown_key_hints(path: Sequence[str], value: object) -> Iterator[tuple[str, str]]:
    """(dotted key, hint) for an unknown key; for each key of an unknown section that resembles none of ours.

    Args:
        path: the parts of the key; numbers are entries of lists.
    """
    dotted = ".".join(part or "''" for part in path)
    names = [*(part for part in path[:-1] if not part.isdigit()), path[-1]]
    if not isinstance(value, dict) or not value:
        yield dotted, _key_hint(names)
    elif sections := _similar(names[-1], _sections(".".join(names[:-1])), 0.55):
        yield dotted, f"did you mean {sections[0]}?"
    else:
        for name, nested in list(value.items())[:_MAX_HINTS]:
            yield from unknown_key_hints([*path, str(name)], nested)


def meant_keys(path: Sequence[str]) -> list[str]:
    """Keys that an unknown one may stand for: of its name, called so by others, or most similar."""
    section, name = ".".join(path[:-1]), path[-1]
    return namesakes(name) or _similar(name, _children(section), 0.6) or _similar(name, known_keys(), 0.75)


def _key_hint(path: Sequence[str]) -> str:
    if meant := meant_keys(path):
        return f"did you mean {' or '.join(meant)}?"

    section = ".".join(path[:-1])
    section = section if _children(section) else ""
    names = [key.rpartition(".")[2] for key in _children(section)]
    return f"{section or 'the configuration'} has {', '.join(names)}"


def _children(section: str) -> list[str]:
    return [key for key in known_keys() if key.rpartition(".")[0] == section]


def _sections(parent: str) -> list[str]:
    """Dotted names of the sections directly in `parent`."""
    return [key for key in _children(parent) if key in _parents()]


def _parents() -> set[str]:
    return {key.rpartition(".")[0] for key in known_keys()}


def namesakes(name: str) -> list[str]:
    """Keys of that name in whatever section, of the least nested ones; else those that others call so."""
    name = _normalised(name)
    keys = [key for key in known_keys() if key.rpartition(".")[2] == name]
    depth = min((key.count(".") for key in keys), default=0)
    return [key for key in keys if key.count(".") == depth] or [
        key for key, words in KEY_SYNONYMS.items() if name in words.split()
    ]


def _similar(name: str, keys: Sequence[str], cutoff: float) -> list[str]:
    """The key whose own name, or whose name of another trainer, resembles `name` most."""
    names = {word: key for key in keys for word in [*KEY_SYNONYMS.get(key, "").split(), key.rpartition(".")[2]]}
    return [names[word] for word in get_close_matches(_normalised(name), names, n=1, cutoff=cutoff)]


def _normalised(name: str) -> str:
    return name[:_MAX_LENGTH].lower().replace("-", "_")


def _dotted_fields(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield prefix + name, field
        for nested in nested_sections(field.annotation):
            yield from _dotted_fields(nested, f"{prefix}{name}.")
