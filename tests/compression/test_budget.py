"""Which layers are compressed, and how far."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mea.compression.budget import allocate_heads, parse_layers
from megatron_mea.config import load_config
from megatron_mea.errors import UserError
from megatron_mea.plan.plan import as_json, make_plan

CONFIGS = Path(__file__).parents[2] / "configs/paper"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "layers", "expected"),
    [
        ("half", 48, list(range(12, 36))),
        ("deep", 48, list(range(4, 49))),
        ("full", 48, list(range(1, 49))),
        ("half", 36, list(range(9, 27))),
        ("half", 30, list(range(7, 22))),
        ("half", 3, [1]),
        ("5-7,2", 8, [5, 6, 7, 2]),
    ],
)
def test_layers_are_counted_from_one_as_in_the_paper(text, layers, expected):
    assert parse_layers(text, layers) == dict.fromkeys(expected)


def test_a_list_may_name_heads():
    assert parse_layers("2-3:1, 5:2,6", 8) == {2: 1, 3: 1, 5: 2, 6: None}


@pytest.mark.parametrize(
    ("text", "message"),
    [("deep", "no layer of 3"), ("0-2", "0-2"), ("3-2", "3-2"), ("2-4", "2-4"), ("some", "some"), ("1,1", "twice")],
)
def test_what_is_no_layer_is_refused(text, message):
    with pytest.raises(UserError, match="--layers") as raised:
        parse_layers(text, 3)
    assert message in str(raised.value)


@given(
    st.lists(st.dictionaries(st.integers(1, 4), st.floats(-1, 10), min_size=1), min_size=1, max_size=5),
    st.integers(0, 20),
)
def test_the_best_heads_are_those_of_all_combinations(costs, budget):
    fitting = [heads for heads in product(*costs) if sum(heads) <= budget]
    heads_by_layer = allocate_heads(costs, budget)
    if not fitting:
        assert heads_by_layer is None
        return

    def cost(heads):
        return sum(options[number] for options, number in zip(costs, heads, strict=True))

    assert sum(heads_by_layer) <= budget
    assert cost(heads_by_layer) == pytest.approx(min(map(cost, fitting)))


@pytest.mark.parametrize(
    ("name", "preset"), [("half", "half"), ("deep", "deep"), ("full", "full"), ("recovery", "full")]
)
def test_the_configurations_of_the_paper_are_what_compress_makes_and_can_be_planned(name, preset):
    config = load_config(CONFIGS / f"compression-{name}.yaml")
    layers = config.model.num_hidden_layers
    expected = [4 if layer in parse_layers(preset, layers) else 8 for layer in range(1, layers + 1)]
    assert config.model.component_heads == expected

    plan = as_json(make_plan(config, world_size=512))
    assert plan["steps"] == {"recovery": 14_902}.get(name, 328)
    assert config.schedule.warmup_steps < config.steps
    assert (config.optimizer.lr, config.schedule.min_lr_ratio) == (1.6e-5, 0)
