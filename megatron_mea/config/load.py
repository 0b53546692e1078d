"""From a YAML file and `KEY=VALUE` overrides to a checked `Config`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_mea.config.checks import cross_checks
from megatron_mea.config.schema import Config, Model
from megatron_mea.errors import Problem, UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key which stands twice in one mapping (YAML would drop the first)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                where = f"{node.start_mark.name}, line {key_node.start_mark.line + 1}"
                raise UserError(where, f"the key {key!r} twice", "each key once", "remove one of the two")
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, merges, validates and resolves a configuration; nothing else is touched.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value` with a YAML value; later ones win.

    Raises:
        UserError: the file cannot be read, a key is unknown, a value has the wrong type or range, or
            keys contradict each other. All problems that can be seen at once are in one message.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    tree.setdefault("run", {})
    if isinstance(tree["run"], dict):
        tree["run"].setdefault("dir", f"runs/{Path(path).stem}")
    return parse_config(tree)


def parse_config(tree: dict[str, Any], needs_data: bool = True) -> Config:
    """Validates and resolves a configuration given as nested dictionaries.

    Args:
        needs_data: `data.train` must name something; that of an imported checkpoint does not.
    """
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError.of(_problems(error)) from None
    config = _resolve(config)
    problems = list(cross_checks(config, needs_data))
    if problems:
        raise UserError.of(problems)
    return config


def parse_model(tree: dict[str, Any]) -> Model:
    """The section `model`, validated and resolved by itself."""
    elsewhere = {"data": {"tokenizer": "none", "train": [], "seq_length": 1}, "run": {"dir": "none"}}
    return parse_config({"model": tree, **elsewhere}, needs_data=False).model


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, which loads to an equal `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as stream:
            tree = yaml.load(stream, _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(str(path), reason, "a readable YAML file") from None
    # PyYAML lets a ValueError through where a value looks like a date that does not exist.
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(str(path), f"not YAML: {error}", "valid YAML") from None
    if not isinstance(tree, dict):
        raise UserError(str(path), f"{type(tree).__name__} at the top", "sections such as `model:`, `data:`")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(override, "no `=`" if not equals else "no key", "KEY=VALUE, for example optimizer.lr=1e-3")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        raise UserError(key, repr(text), "a YAML value", "quote it: KEY='\"text\"'") from None
    *parents, name = key.split(".")
    node: Any = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(key, f"{parent!r} is not a section", "a dotted key of a section")
    node[name] = value


def _resolve(config: Config) -> Config:
    """Fills in what follows from other keys, so that equal configurations compare equal."""
    training = config.training
    if training.steps is not None and training.tokens is not None:
        raise UserError(
            "training.steps, training.tokens",
            f"both: {training.steps} and {training.tokens:g}",
            "one of the two",
            "set the other to null",
        )
    steps = training.steps or 1000
    if training.tokens is not None:
        steps = math.ceil(training.tokens / config.tokens_per_step)
    model = config.model
    heads = model.component_heads
    uniform = len(set(heads)) == 1 and len(heads) == model.num_hidden_layers
    resolved = {
        "num_component_heads": heads[0] if uniform else heads,
        "embedding_initializer_range": model.embedding_initializer_range or model.initializer_range,
    }
    model = model.model_copy(update=resolved)
    return config.model_copy(
        update={"model": model, "training": training.model_copy(update={"steps": steps, "tokens": None})}
    )


def _problems(error: ValidationError) -> Iterator[Problem]:
    seen: set[str] = set()
    for item in error.errors():
        # A union reports each of its members, with the member's name as one more step of the path.
        path = _known_path(item["loc"])
        where = ".".join(path)
        wrong_member = item["type"] == "int_type" and isinstance(item["input"], list)
        if where in seen or wrong_member:
            continue
        seen.add(where)
        if item["type"] == "extra_forbidden":
            yield Problem(where, "an unknown key", "keys of the configuration", f"did you mean {_nearest(path)}?")
        elif item["type"] == "missing":
            yield Problem(where, "nothing", "a value: the key is required")
        elif item["type"] in ("too_short", "too_long"):
            # Not the list itself, which may have thousands of entries.
            bound = "at least {min_length}" if item["type"] == "too_short" else "at most {max_length}"
            yield Problem(where, f"a list of {len(item['input'])}", bound.format_map(item["ctx"]))
        else:
            if item["type"].startswith("union_tag"):
                yield Problem(f"{where}.rope_type", repr(item["input"]), "linear, dynamic, yarn or llama3")
                continue
            allowed = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            if item["type"] == "string_type" and not isinstance(item["input"], (dict, list)):
                allowed += ": quote the value"
            yield Problem(where, repr(item["input"]), allowed)


def _nearest(path: list[str]) -> str:
    """The known key that an unknown one most likely meant: in its own section, else by its name, else by all."""
    section = ".".join(part for part in path[:-1] if not part.isdigit())
    keys = known_keys()
    for candidates, cutoff in (
        ({key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}, 0.6),
        ({key.rpartition(".")[2]: key for key in keys}, 0.0),
    ):
        matches = difflib.get_close_matches(path[-1], list(candidates), n=1, cutoff=cutoff)
        if matches:
            return candidates[matches[0]]
    return keys[0]


def _known_path(loc: tuple[int | str, ...]) -> list[str]:
    """The dotted path of a pydantic location, without the union members that pydantic adds."""
    tags = {"linear", "dynamic", "yarn", "llama3", "int", "float", "newest"}
    return [str(part) for part in loc if not (isinstance(part, str) and (part in tags or "[" in part))]


def known_keys() -> list[str]:
    """Every dotted key of the configuration, sections included."""
    return list(_walk(Config, ""))


def _walk(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in _sections_in(field.annotation):
            yield from _walk(kind, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _sections_in(argument)
