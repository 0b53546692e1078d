"""A run that begins with an imported checkpoint, on several layouts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hf_folders import edit_config_json, save_stock_model
from support.runs import command, environment, rows, train

from megatron_mea.cli import main
from megatron_mea.config import load_config
from megatron_mea.data.begin_token import tokens_around
from megatron_mea.data.tokenizer import copy_tokenizer, load_tokenizer
from megatron_mea.huggingface.weights import open_weights

pytestmark = pytest.mark.slow

SETTINGS = {
    "model.num_component_heads": None,
    "model.attention_variant": "mea_no_norm",
    "model.num_attention_heads": 4,
    "model.rms_norm_eps": 1e-6,
    "model.max_position_embeddings": 128,
    "training.steps": 2,
    "evaluation.interval": 10,
    "checkpoint.interval": 10,
}


@pytest.fixture(scope="module")
def imported(tiny, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("imported")
    source = save_stock_model("llama", root / "llama")
    copy_tokenizer(tiny.tokenizer, source)
    assert main(["import", str(source), str(root / "checkpoint")]) == 0
    return root / "checkpoint"


@pytest.fixture(scope="module")
def expected(config, imported) -> float:
    """Validation loss of the source itself, as a plain model."""
    plain = ["model.attention_variant=plain", f"run.init_from={imported.parent / 'llama'}", "training.steps=1"]
    train(config, "source", *plain, "schedule.warmup_steps=0")
    return rows(config, "source")[0]["validation_loss"]


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor_model_parallel_size=2", "parallel.zero_stage=3"],
        ["parallel.pipeline_model_parallel_size=2"],
    ],
    ids=["tensor", "pipeline"],
)
def test_trains_at_once_on_any_layout(layout, config, imported, expected):
    """Before the first step its loss is the source's on the same windows, and afterwards it falls."""
    name = layout[0].partition(".")[2]
    train(config, name, f"run.init_from={imported}", *layout, processes=2)
    logged = rows(config, name)
    assert [row["step"] for row in logged] == [0, 1, 2]
    assert logged[0]["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert logged[2]["validation_loss"] < expected


def test_a_run_does_not_go_on_from_it(config, imported):
    """It holds no moments: it is no checkpoint of a run."""
    place = config.parent / "resumed/checkpoints/step_00000000"
    place.parent.mkdir(parents=True)
    shutil.copytree(imported, place)
    done = subprocess.run(command(config, "resumed"), env=environment(), capture_output=True, text=True)

    assert done.returncode == 2
    assert "error: run.dir" in done.stderr
    assert "run.init_from" in done.stderr


def test_weights_that_are_not_finite_are_refused_before_the_first_step(config, imported, tmp_path):
    """On all ranks, whichever holds them: here the second stage."""
    source = tmp_path / "llama"
    shutil.copytree(imported.parent / "llama", source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = torch.inf
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    overrides = ["model.attention_variant=plain", "parallel.pipeline_model_parallel_size=2", f"run.init_from={source}"]
    done = subprocess.run(
        command(config, "infinite", *overrides, processes=2), env=environment(), capture_output=True, text=True
    )

    assert done.returncode == 2
    assert done.stderr.count("error: run.init_from") == 1
    assert f"model.layers.1.mlp.up_proj.weight in {source}/model.safetensors" in done.stderr
    assert not (config.parent / "infinite/metrics.jsonl").exists()


@pytest.fixture
def printed(capsys, tmp_path) -> Callable[..., tuple[Path, list[str]]]:
    """printed(source, *options): a file with the settings that an import prints, and its warnings."""

    def run(source: Path, *options: str) -> tuple[Path, list[str]]:
        capsys.readouterr()
        assert main(["import", str(source), str(tmp_path / "imported"), *options]) == 0
        captured = capsys.readouterr()
        file = tmp_path / "printed.yaml"
        file.write_text(captured.out.partition("settings:\n")[2])
        return file, [line for line in captured.err.splitlines() if line.startswith("warning: ")]

    return run


WARNINGS = (
    "keys that a llama does not have are ignored: x",
    "pad_token_id = -1 is ignored",
    "attention_dropout = 0.1 is ignored",
    "brings code of its own",
    "is in float64",
    "the tokenizer has 386 ids, and the model only 384",
    "normalises the output of every head",
)


def test_what_is_printed_begins_a_run_whatever_was_warned_of(tiny, printed, tmp_path):
    """All warnings at once, except for that of a folder without a tokenizer.

    The tokenizer puts a begin token before a text, which the documents of the run do not have: nor has the run's.
    """
    source = save_stock_model("llama", tmp_path / "llama", dtype=torch.float64)
    tokenizer = load_tokenizer(tiny.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<padding>", "additional_special_tokens": ["<more>"]})
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained(source)
    edit_config_json(
        source, x=1, pad_token_id=-1, attention_dropout=0.1, auto_map={"AutoModelForCausalLM": "modeling.Model"}
    )
    settings, warnings = printed(source, "--variant", "mea")
    assert len(warnings) == len(WARNINGS)
    assert all(any(text in warning for warning in warnings) for text in WARNINGS)

    arguments = [f"data.train=[{{path: {tiny.train}}}]", "training.steps=1", "training.global_batch_size=4"]
    arguments += ["training.precision=fp32", "schedule.warmup_steps=0", f"run.dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mea", "train", str(settings), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "the rows that are added to the embeddings, 2, are the mean of the others" in done.stdout + done.stderr
    assert "documents of data.train begin with nothing" in done.stdout + done.stderr

    before, after = (
        load_tokenizer(tmp_path / name) for name in ("imported/tokenizer", "run/checkpoints/step_00000001/tokenizer")
    )
    assert len(before) == len(after) == 386
    assert (tokens_around(before), tokens_around(after)) == (([1], []), ([], []))


def test_without_a_tokenizer_one_has_to_be_named(tiny, printed, tmp_path):
    source = save_stock_model("llama", tmp_path / "llama")
    settings, (warning,) = printed(source)
    assert "has no tokenizer" in warning
    assert "tokenizer:" not in settings.read_text()

    overrides = [f"data.train=[{{path: {tiny.train}}}]", f"data.tokenizer={tiny.tokenizer}"]
    assert main(["plan", str(settings), *overrides]) == 0
    assert open_weights(tmp_path / "imported", load_config(settings, overrides).model).warnings == []
