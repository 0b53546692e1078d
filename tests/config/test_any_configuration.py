"""Any YAML as a configuration: a value or one message, within limits (hypothesis; longer with `--full`)."""

from __future__ import annotations

import contextlib
import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.limits import within_limits

from megatron_mea.config import Config
from megatron_mea.config.keys import known_keys
from megatron_mea.config.layout import check_layout
from megatron_mea.config.load import dump_config, load_config
from megatron_mea.errors import UserError
from megatron_mea.plan.plan import as_json, as_text, make_plan

KEYS = known_keys()
BOUNDS = [0, 1, 2, 3, 8, -1, 255, 1 << 20, 10_000, 10**12, 2**31, 2**63, 2**64, 1e-300, 1e300, 0.5]
COUNTS = [
    *(f"model.{name}" for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")),
    *(f"model.num_{name}_heads" for name in ("attention", "key_value", "component")),
    *("model.head_dim", "model.max_position_embeddings", "data.seq_length", "parallel.zero_stage"),
    *("parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"),
    *("training.steps", "training.global_batch_size", "training.micro_batch_size"),
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(BOUNDS)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["mea", "plain", "wsd", "bf16", "full", "newest", "1e6", "x" * 300, "a\x00b", "../x", "\x1b[31m"]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=4),
    max_leaves=6,
)


def write(folder, tree: object) -> str:
    path = folder / "any.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


def read(path: str) -> Config | None:
    """The configuration of a file, or None where it is refused."""
    with within_limits():
        try:
            return load_config(path)
        except UserError as error:
            problems = error.problems

    assert all(problem.where and problem.expected for problem in problems)
    return None


def changed(tree: dict, key: str, value: object) -> None:
    """Sets a dotted key; what stands in its way is replaced."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(tree.setdefault(section, {}), dict):
            tree[section] = {}
        tree = tree[section]

    tree[name] = value


@given(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=3), data=st.data())
def test_any_value_of_any_key(keys, data, tiny, tmp_path_factory):
    """What is accepted reads back as the same."""
    tree = yaml.safe_load(tiny.config.read_text())
    for key in keys:
        changed(tree, key, data.draw(st.sampled_from(BOUNDS) | VALUES, label=key))

    folder = tmp_path_factory.getbasetemp()
    config = read(write(folder, tree))
    if config is not None:
        (folder / "again.yaml").write_text(dump_config(config), encoding="utf-8")
        assert load_config(folder / "again.yaml") == config


@given(keys=st.lists(st.sampled_from(COUNTS), min_size=1, max_size=2, unique=True), data=st.data())
def test_any_count_can_be_planned(keys, data, tiny, tmp_path_factory):
    tree = yaml.safe_load(tiny.config.read_text())
    for key in keys:
        changed(tree, key, data.draw(st.sampled_from([1, 2, 4, 8, 12, 64, 1000, 10_000, 1 << 20, 10**12]), label=key))

    config = read(write(tmp_path_factory.getbasetemp(), tree))
    if config is None:
        return

    # A thousand layers, each read from a module on the meta device, take a second.
    with within_limits(seconds=10), contextlib.suppress(UserError):
        check_layout(config, None)
        plan = make_plan(config, world_size=None)
        assert as_text(plan)
        json.dumps(as_json(plan), allow_nan=False)


@given(tree=VALUES)
def test_any_tree(tree, tmp_path_factory):
    read(write(tmp_path_factory.getbasetemp(), tree))


@pytest.mark.parametrize("text", ["model: {a: &a [*a]}", "%YAML 9.9\n---\na: 1", "--- 1\n--- 2", "\t", "? [a, b]\n: c"])
def test_odd_files(text, tmp_path):
    (tmp_path / "odd.yaml").write_text(text)
    assert read(str(tmp_path / "odd.yaml")) is None


@given(raw=st.binary(max_size=200))
def test_any_bytes(raw, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(raw)
    read(str(path))
