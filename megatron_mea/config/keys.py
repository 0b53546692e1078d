"""The configuration's keys by their dotted names, and which of them an unknown one stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
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
    return [key for key in _settable_keys() if key in _lists() or key not in _parents()]


def _settable_keys() -> list[str]:
    """Dotted keys that an override can name: all but the sections at the top, and the keys of a list's entries."""
    return [key for key in known_keys() if "." in key and key.rpartition(".")[0] not in _lists()]


def _lists() -> set[str]:
    return {key for key, field in _fields().items() if get_origin(field.annotation) is list}


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
    elif sections := _similar(names[-1], _names(_sections(".".join(names[:-1]))), 0.55):
        yield dotted, f"did you mean {sections[0]}?"
    else:
        for name, nested in list(value.items())[:_MAX_HINTS]:
            yield from unknown_key_hints([*path, str(name)], nested)


def meant_keys(path: Sequence[str]) -> list[str]:
    """Keys that an unknown one may stand for: of its name, called so by others, or most similar."""
    section, name = ".".join(path[:-1]), path[-1]
    # Few names of one section resemble another by chance; among all names, and those of other trainers, many do.
    siblings = _names(_children(section)) | (_synonyms(_children(section)) if section else {})
    near = _similar(name, siblings, 0.6 if section else 0.75)
    if meant := namesakes(name) or near:
        return meant

    return [key for like in _similar(name, _names(_settable_keys()), 0.75) for key in namesakes(_last_part(like))]


def _key_hint(path: Sequence[str]) -> str:
    if meant := meant_keys(path):
        return f"did you mean {' or '.join(meant)}?"

    section = ".".join(path[:-1])
    section = section if _children(section) else ""
    names = [_last_part(key) for key in _children(section)]
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
    keys = [key for key in _settable_keys() if _last_part(key) == name]
    depth = min((key.count(".") for key in keys), default=0)
    return [key for key in keys if key.count(".") == depth] or [
        key for key, words in KEY_SYNONYMS.items() if name in words.split()
    ]


def _last_part(key: str) -> str:
    return key.rpartition(".")[2]


def _names(keys: Sequence[str]) -> dict[str, str]:
    return {_last_part(key): key for key in keys}


def _synonyms(keys: Sequence[str]) -> dict[str, str]:
    return {word: key for key in keys for word in KEY_SYNONYMS.get(key, "").split()}


def _similar(name: str, names: Mapping[str, str], cutoff: float) -> list[str]:
    """The key of that of `names` which resembles `name` most; none for a name of two letters, which resemble many."""
    name = _normalised(name)
    matches = get_close_matches(name, names, n=3, cutoff=cutoff) if len(name) > 2 else []
    return [names[word] for word in matches if _differ_slightly(name, word)][:1]


def _differ_slightly(name: str, other: str) -> bool:
    """Whether the parts that two names do not share are alike: context_parallel_size is no tensor_parallel_size."""
    parts, others = name.split("_"), other.split("_")
    rest = "_".join(part for part in parts if part not in others)
    other_rest = "_".join(part for part in others if part not in parts)
    return not rest or not other_rest or SequenceMatcher(None, rest, other_rest).ratio() > 0.5


def _normalised(name: str) -> str:
    return name[:_MAX_LENGTH].lower().replace("-", "_")


def _dotted_fields(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield prefix + name, field
        for nested in nested_sections(field.annotation):
            yield from _dotted_fields(nested, f"{prefix}{name}.")
