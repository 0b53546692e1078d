"""Reads a YAML file and `KEY=VALUE` overrides into a checked `Config`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_mea.config.checks import cross_checks
from megatron_mea.config.keys import nested_sections, unknown_key_hints
from megatron_mea.config.schema import Config, Model, OffValue
from megatron_mea.config.synonyms import VALUE_SYNONYMS
from megatron_mea.config.yaml_reader import MAX_BYTES, InvalidYaml, parse_yaml
from megatron_mea.errors import Problem, UserError, did_you_mean, shorten


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, merges, validates and resolves a configuration; touches no other file.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value` with a YAML value; later ones win.

    Raises:
        UserError: the file cannot be read, a key is unknown, a value has the wrong type or range, or
            keys contradict each other. All problems that can be seen at once are in one message.
    """
    return parse_config(read_tree(path, overrides))


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads and merges a YAML file and overrides as `load_config` does; `run.dir` is filled in, nothing is validated.

    Raises:
        UserError: the file cannot be read, or an override names no key.
    """
    tree = _read_yaml(Path(path))
    problems = []
    for override in overrides:
        try:
            _apply_override(tree, override)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError.from_problems(problems)

    tree.setdefault("run", {})
    if isinstance(tree["run"], dict):
        tree["run"].setdefault("dir", f"runs/{Path(path).stem}")

    return tree


def parse_config(tree: dict[str, Any], *, needs_data: bool = True) -> Config:
    """Validates and resolves a configuration from nested dictionaries.

    Args:
        needs_data: whether `data.train` must name a corpus; an imported checkpoint's names none.

    Raises:
        UserError: as `load_config`.
    """
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError.from_problems(_validation_problems(error)) from None

    config = _resolve(config)
    problems = list(cross_checks(config, needs_data=needs_data))
    if problems:
        raise UserError.from_problems(problems)

    return config


def parse_model(tree: dict[str, Any]) -> Model:
    """Validates and resolves the section `model` by itself."""
    placeholders = {"data": {"tokenizer": "none", "train": [], "seq_length": 1}, "run": {"dir": "none"}}
    return parse_config({"model": tree, **placeholders}, needs_data=False).model


def complete_config(tree: dict[str, Any]) -> dict[str, Any]:
    """The configuration that an older program wrote, with the keys that it did not know at their off values.

    A key's off value is the one with which the program does what it did without the key: the default, or `OffValue`.
    What such values leave to the program is decided as for a new run. What is no valid configuration stays as it is.
    """
    complete = _complete_section(Config, tree)
    try:
        return _resolve(Config.model_validate(complete)).model_dump(mode="json")
    except (ValidationError, UserError):
        return complete


def _complete_section(section: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    complete = dict(tree)
    for name, field in section.model_fields.items():
        if list(nested_sections(field.annotation)) == [field.annotation]:
            # A section by itself, not one of a list or of a union.
            if name in tree or not field.is_required():
                complete[name] = _complete_section(field.annotation, tree.get(name) or {})
        elif name not in tree and not field.is_required():
            off_values = [item.value for item in field.metadata if isinstance(item, OffValue)]
            complete[name] = off_values[0] if off_values else field.get_default()

    return complete


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, which loads to an equal `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(where=str(path), got="no regular file", expected="a readable YAML file")
        with path.open(encoding="utf-8") as stream:
            # One more than allowed shows that there are more.
            tree = parse_yaml(stream.read(MAX_BYTES + 1), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(where=str(path), got=reason, expected="a readable YAML file") from None
    except InvalidYaml as error:
        raise UserError(where=str(path), got=f"not YAML: {error}", expected="valid YAML") from None
    except ValueError as error:
        # A name that no file can have.
        raise UserError(where=ascii(str(path)), got=str(error), expected="a readable YAML file") from None

    if not isinstance(tree, dict):
        raise UserError(
            where=str(path), got=f"{type(tree).__name__} at the top", expected="sections such as `model:`, `data:`"
        )

    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(
            where=override,
            got="no `=`" if not equals else "no key",
            expected="KEY=VALUE, for example optimizer.lr=1e-3",
        )

    try:
        value = parse_yaml(text, key)
    except InvalidYaml as error:
        got = f"{shorten(text)} ({error})"
        raise UserError(where=key, got=got, expected="a YAML value", hint="quote it: KEY='\"text\"'") from None

    *parents, name = key.split(".")
    node: Any = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(where=key, got=f"{parent!r} is not a section", expected="a dotted key of a section")

    node[name] = value


def _resolve(config: Config) -> Config:
    """Fills in the values that follow from other keys, so that equal configurations compare equal."""
    training = config.training
    if training.steps is not None and training.tokens is not None:
        raise UserError(
            where="training.steps, training.tokens",
            got=f"both: {training.steps} and {training.tokens:g}",
            expected="one of the two",
            hint="set the other to null",
        )

    steps = training.steps or 1000
    if training.tokens is not None:
        steps = math.ceil(training.tokens / config.tokens_per_step)

    model = config.model
    by_layer = {"num_component_heads": model.component_heads}
    if model.has_hlc and model.hlc_form == "latent":
        by_layer |= {"key_latent_dim": model.key_latent_dims, "value_latent_dim": model.value_latent_dims}

    model = model.model_copy(
        update={
            **{key: _one_if_equal(sizes, model.num_hidden_layers) for key, sizes in by_layer.items()},
            "embedding_initializer_range": model.embedding_initializer_range or model.initializer_range,
        }
    )

    training = training.model_copy(update={"steps": steps, "tokens": None})
    return config.model_copy(update={"model": model, "training": training})


def _one_if_equal(sizes: list[int], num_layers: int) -> int | list[int]:
    """The size that all layers have, or the sizes."""
    return sizes[0] if len(set(sizes)) == 1 and len(sizes) == num_layers else sizes


def _validation_problems(error: ValidationError) -> Iterator[Problem]:
    """One problem for each wrong key of a pydantic error."""
    seen: set[str] = set()
    for item in error.errors():
        # A union reports each of its members, with the member's name as one more step of the path.
        path = _key_path(item["loc"])
        if item["type"] == "extra_forbidden":
            # A key of the user's may look like a union member.
            path = [*_key_path(item["loc"][:-1]), str(item["loc"][-1])]
        where = ".".join(part or "''" for part in path)
        is_member = len(item["loc"]) > len(path)
        is_other_member = is_member and item["type"] == "int_type" and isinstance(item["input"], list)
        if where in seen or is_other_member:
            continue
        seen.add(where)

        if item["type"] == "extra_forbidden":
            for key, hint in unknown_key_hints(path, item["input"]):
                yield Problem(where=key, got="an unknown key", expected="keys of the configuration", hint=hint)
        elif item["type"] == "missing":
            yield Problem(where=where, got="nothing", expected="a value: the key is required")
        elif item["type"] in ("too_short", "too_long"):
            # Not the list itself, which may have thousands of entries.
            bound = "at least {min_length}" if item["type"] == "too_short" else "at most {max_length}"
            yield Problem(where=where, got=f"a list of {len(item['input'])}", expected=bound.format_map(item["ctx"]))
        else:
            if item["type"].startswith("union_tag"):
                got = item["ctx"].get("tag", item["input"])
                hint = did_you_mean(str(got), ("linear", "dynamic", "yarn", "llama3"), VALUE_SYNONYMS)
                if isinstance(got, dict) and "type" in got:
                    # An older spelling of transformers.
                    hint = "write rope_type in place of type"
                yield Problem(
                    where=f"{where}.rope_type",
                    got=shorten(got),
                    expected="linear, dynamic, yarn or llama3",
                    hint=hint,
                )
                continue

            expected = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            if item["type"] == "string_type" and not isinstance(item["input"], (dict, list)):
                expected += ": quote the value"
            # The choices of a Literal; other types have no `expected` in their context.
            choices = re.findall("'([^']*)'", item.get("ctx", {}).get("expected", ""))
            hint = did_you_mean(str(item["input"]), choices, VALUE_SYNONYMS) if choices else ""
            yield Problem(where=where, got=shorten(item["input"]), expected=expected, hint=hint)


def _key_path(loc: tuple[int | str, ...]) -> list[str]:
    """The dotted path of a pydantic location, without the union members that pydantic adds."""
    union_members = {"linear", "dynamic", "yarn", "llama3", "int", "float", "newest"}
    return [str(part) for part in loc if not (isinstance(part, str) and (part in union_members or "[" in part))]
