"""The configuration: documentation and schema agree, numbers are numbers, what is written loads again."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_mea.config import dump_config, load_config
from megatron_mea.config.checks import config_warnings, start_checks
from megatron_mea.config.keys import known_keys, meant_keys
from megatron_mea.config.load import parse_config
from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.config.schema import Config
from megatron_mea.config.synonyms import KEY_SYNONYMS, VALUE_SYNONYMS
from megatron_mea.errors import Problem, UserError
from megatron_mea.training.schedule import learning_rate

ROOT = Path(__file__).parents[2]
ONE_PROCESS = ParallelDims(tp=1, pp=1, dp=1, num_micro_batches=1)
MINIMAL = {"data": {"tokenizer": "t", "train": [{"path": "p"}]}, "run": {"dir": "r"}}


def parse(**sections) -> Config:
    """The minimal configuration with the keys of `sections`."""
    updated = {name: {**MINIMAL.get(name, {}), **keys} for name, keys in sections.items()}
    return parse_config({**MINIMAL, **updated})


def test_the_documentation_lists_every_key_with_its_default():
    text = (ROOT / "docs/configuration.md").read_text()
    documented = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    documented["data"] |= MINIMAL["data"]
    documented["run"] |= MINIMAL["run"]
    keys = {f"{section}.{key}" for section, tree in documented.items() for key in tree}

    assert keys == {key for key in known_keys() if key.count(".") == 1}
    assert parse_config(documented) == parse_config(MINIMAL)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_that_ships_is_valid_and_has_no_warnings(path):
    assert config_warnings(load_config(path), ONE_PROCESS) == []


@given(
    lr=st.floats(1e-9, 1.0),
    steps=st.integers(2, 10**6),
    text=st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=60),
    beta=st.floats(0, 0.999),
)
def test_a_written_configuration_loads_to_an_equal_one(lr, steps, text, beta):
    config = parse(
        optimizer={"lr": lr, "betas": [beta, 0.9]},
        training={"steps": steps},
        schedule={"warmup_steps": steps - 1},
        data={"tokenizer": text},
        model={"rope_scaling": {"rope_type": "linear", "factor": 2}},
    )

    assert parse_config(yaml.safe_load(dump_config(config))) == config


@given(mantissa=st.integers(1, 999), exponent=st.integers(-9, 9))
def test_exponents_are_numbers_in_files_and_overrides(tmp_path_factory, mantissa, exponent):
    text = f"{mantissa}e{exponent}"
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + f"optimizer: {{lr: {text}}}\n")
    assert load_config(path).optimizer.lr == float(text)
    assert load_config(path, ["optimizer.lr=1", f"optimizer.lr={text}"]).optimizer.lr == float(text)


def test_overrides_are_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"data": MINIMAL["data"]}))
    overrides = [
        "data.train=[{path: a, weight: 2}, {path: b}]",
        "model.num_hidden_layers=2",
        "model.num_component_heads=[1, 2]",
        "training.tokens=1e6",
        "evaluation.interval=1e2",
        "schedule.warmup_steps=3",
        "logging.tensorboard=false",
    ]
    config = load_config(path, overrides)

    assert [corpus.weight for corpus in config.data.train] == [2, 1]
    assert config.model.component_heads == [1, 2]
    assert config.steps == math.ceil(1e6 / (64 * 1024))
    assert config.evaluation.interval == 100
    assert config.logging.tensorboard is False
    assert config.run.dir == "runs/c"


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("optimizer.learning_rate", 1, "optimizer.lr"),
        ("optimizer.weight_decy", 1, "optimizer.weight_decay"),
        ("optimizer.Weight-Decay", 1, "optimizer.weight_decay"),
        ("training.lr", 1, "optimizer.lr"),
        ("training.batch_size", 1, "training.global_batch_size"),
        ("training.interval", 1, "evaluation.interval or checkpoint.interval or logging.interval"),
        ("training.steps_", 1, "training.steps"),
        ("schedule.steps", 1, "training.steps"),
        ("parallel.tp", 1, "parallel.tensor_model_parallel_size"),
        ("model.num_layers", 1, "model.num_hidden_layers"),
        ("micro_batchsize", {}, "training.micro_batch_size"),
        ("lr", {}, "optimizer.lr"),
        ("modle", {}, "model"),
        ("optim", {"lr": 1}, "optimizer"),
        ("eval", {"batches": 1}, "evaluation"),
        ("job", {"dump_folder": "x"}, "run.dir"),
        ("data.train", [{"paht": "x"}], "data.train.path"),
        ("model.rope_scaling", {"rope_type": "yarn", "fator": 2}, "model.rope_scaling.factor"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, value, nearest):
    section, _, name = key.partition(".")
    with pytest.raises(UserError) as error:
        parse(**{section: {name: value} if name else value})
    assert any(problem.hint == f"did you mean {nearest}?" for problem in error.value.problems)


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("model.attention_variant", "mae", "mea"),
        ("model.attention_variant", "GQA", "plain"),
        ("model.rope_scaling", {"rope_type": "ntk", "factor": 2}, "dynamic"),
        ("training.precision", "bfloat16", "bf16"),
        ("training.activation_checkpointing", True, "full"),
        ("schedule.kind", "Cosin", "cosine"),
    ],
)
def test_an_unknown_choice_names_the_nearest(key, value, nearest):
    section, _, name = key.partition(".")
    with pytest.raises(UserError) as error:
        parse(**{section: {name: value}})
    assert [problem.hint for problem in error.value.problems] == [f"did you mean {nearest}?"]


def test_the_old_spelling_of_rope_type_is_known():
    with pytest.raises(UserError) as error:
        parse(model={"rope_scaling": {"type": "linear", "factor": 2}})
    assert [problem.hint for problem in error.value.problems] == ["write rope_type in place of type"]


@pytest.mark.parametrize(("key", "has"), [("model.xyzzy", "model has vocab_size, "), ("job", "the configuration has ")])
def test_an_unknown_key_that_resembles_none_names_its_siblings(key, has):
    section, _, name = key.partition(".")
    with pytest.raises(UserError) as error:
        parse(**{section: {name: 1} if name else {}})
    assert error.value.problems[0].hint.startswith(has)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optimizer.name", []),
        ("optimizer.type", []),
        ("run.name", []),
        ("schedule.type", []),
        ("data.num_workers", []),
        ("checkpoint.path", []),
        ("data.path", ["data.train"]),
        ("context_parallel_size", ["parallel.context_parallel_size"]),
        ("data_parallel_size", []),
        ("parallel.context_parallel_siz", ["parallel.context_parallel_size"]),
        ("parallel.data_parallel_size", []),
        ("parallel.dp", []),
        ("parallel.cp", ["parallel.context_parallel_size"]),
        ("parallel.ep", ["parallel.expert_model_parallel_size"]),
        ("parallel.tensor_parallel_siz", ["parallel.tensor_model_parallel_size"]),
        ("expert_model_parallel_sizes", ["parallel.expert_model_parallel_size"]),
        ("weight", ["training.distillation.weight"]),
        ("hidden", []),
        ("stepss", ["training.steps"]),
        ("intervall", ["evaluation.interval", "checkpoint.interval", "logging.interval"]),
        ("model.hidden", ["model.hidden_size"]),
        ("optimizer.learning_rat", ["optimizer.lr"]),
        ("training.max_step", ["training.steps"]),
        ("rms_norm_epss", ["model.rms_norm_eps"]),
        ("logging.profiles", ["logging.profile"]),
    ],
)
def test_a_key_that_only_looks_like_another_is_not_offered(key, meant):
    assert meant_keys(key.split(".")) == meant


def test_synonyms():
    """Each names one key that exists, and stands there in the form in which unknown keys are looked up."""
    words = [word for names in KEY_SYNONYMS.values() for word in names.split()]
    assert len(words) >= 60
    assert len(words) == len(set(words))
    assert set(KEY_SYNONYMS) <= set(known_keys())
    assert not set(words) & {key.rpartition(".")[2] for key in known_keys()}
    for key, names in KEY_SYNONYMS.items():
        for word in names.split():
            assert meant_keys(["training", word.upper().replace("_", "-")]) == [key]


def test_synonyms_of_values():
    schema = str(Config.model_json_schema())
    for value, names in VALUE_SYNONYMS.items():
        assert f"'{value}'" in schema
        assert names == names.lower()


class TestSchedule:
    @given(
        steps=st.integers(2, 5000),
        share=st.floats(0, 0.99),
        floor=st.floats(0, 1),
        kind=st.sampled_from(["cosine", "constant", "wsd"]),
    )
    def test_endpoints_and_bounds(self, steps, share, floor, kind):
        warmup = int(steps * share)
        decay = {"decay_steps": max((steps - warmup) // 2, 1)} if kind == "wsd" else {}
        config = parse(
            optimizer={"lr": 2.0},
            training={"steps": steps},
            schedule={"kind": kind, "warmup_steps": warmup, "min_lr_ratio": floor} | decay,
        )
        rates = [learning_rate(config, step) for step in range(1, steps + 1)]

        assert all(0 <= rate <= 2.0 * (1 + 1e-12) for rate in rates)

        if warmup:
            assert rates[0] == pytest.approx(2.0 / warmup)
            assert rates[warmup - 1] == pytest.approx(2.0)
        assert rates[-1] == pytest.approx(2.0 if kind == "constant" else 2.0 * floor)
        assert rates[max(warmup - 1, 0) :] == sorted(rates[max(warmup - 1, 0) :], reverse=True)

    def test_wsd_falls_linearly(self):
        config = parse(
            optimizer={"lr": 1.0},
            training={"steps": 10},
            schedule={"kind": "wsd", "warmup_steps": 2, "min_lr_ratio": 0, "decay_steps": 4},
        )
        rates = [learning_rate(config, step) for step in range(1, 11)]

        assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])

    def test_cosine_at_half_way(self):
        config = parse(optimizer={"lr": 1.0}, training={"steps": 12}, schedule={"warmup_steps": 2, "min_lr_ratio": 0.1})
        assert learning_rate(config, 7) == pytest.approx(0.55)


def test_small_embeddings_beside_a_head_norm_are_warned_of():
    wide = {"hidden_size": 128, "num_hidden_layers": 4, "head_dim": 16, "num_attention_heads": 8}
    (warning,) = config_warnings(
        parse(model=wide | {"initializer_range": 0.06, "embedding_initializer_range": 0.02}), ONE_PROCESS
    )

    assert "model.embedding_initializer_range" in warning
    assert "0.24" in warning  # 0.06 / sqrt(8) * sqrt(128)

    for remedy in (
        {"embedding_initializer_range": 0.6},
        {"head_norm_init": 0.1, "embedding_initializer_range": 0.02},
        {"attention_variant": "plain"},
    ):
        assert config_warnings(parse(model=wide | {"initializer_range": 0.06} | remedy), ONE_PROCESS) == []

    # Stored weights know no initialisation.
    began = {"dir": "run", "init_from": "model"}
    assert config_warnings(parse(model=wide | {"embedding_initializer_range": 0.02}, run=began), ONE_PROCESS) == []


def test_an_error_travels_between_ranks():
    error = UserError.from_problems(
        [Problem(where="a", got=1, expected="2"), Problem(where="b", got=3, expected="4", hint="mend")], "a footer"
    )
    unpickled = pickle.loads(pickle.dumps(error))

    assert str(unpickled) == str(error)
    assert unpickled.problems == error.problems


@given(st.integers(1, 50), st.one_of(st.none(), st.integers(1, 50)))
def test_checkpoints_to_keep_are_checkpoints(interval, keep_every):
    """Checked where a run starts; what an older program began otherwise is read by reports and exports."""
    config = parse(checkpoint={"interval": interval, "keep_every": keep_every})
    problems = [(problem.where, problem.got) for problem in start_checks(config)]
    saved = {interval * count for count in range(1, 51)}
    assert problems == ([] if keep_every is None or keep_every in saved else [("checkpoint.keep_every", keep_every)])
