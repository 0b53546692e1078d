"""Runs that older versions wrote: they resume with the losses of their time, whatever keys they lack."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.old_runs import unpack
from support.runs import ROOT, environment

from megatron_mea.checkpoint.folder import COMPLETE, FORMAT_VERSION, META, CheckpointMetadata, seal
from megatron_mea.checkpoint.resume import check_resume
from megatron_mea.checkpoint.run_config import load_run_config
from megatron_mea.cli import main
from megatron_mea.config import load
from megatron_mea.config.load import complete_config
from megatron_mea.config.variants import VARIANTS
from megatron_mea.errors import UserError
from megatron_mea.experiments.sweep import _has_ended, combinations
from megatron_mea.run_folder import RunFolder

CHECKPOINT = "run/checkpoints/step_00000002"
RESUME = """
import os, sys
from megatron_mea.cli import main
for folder in sys.argv[1:]:
    os.chdir(folder)
    assert main(["train", "run.yaml"]) == 0
"""


def losses(path: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in map(json.loads, path.read_text().splitlines())}


@pytest.mark.slow
def test_the_run_of_every_variant_goes_on_as_it_did(tmp_path):
    """In one process, which spares the imports."""
    folders = [tmp_path / variant for variant in VARIANTS]
    for folder in folders:
        folder.mkdir()
        unpack(folder.name, folder)

    command = [sys.executable, "-c", RESUME, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"resuming from {CHECKPOINT}\n") == len(folders)
    for folder in folders:
        assert {path.name for path in (folder / "run/checkpoints").iterdir()} == {"step_00000002", "step_00000004"}
        expected = losses(folder / "expected.jsonl")
        assert losses(folder / "run/metrics.jsonl") == pytest.approx(expected, rel=1e-5), folder.name
        assert len(expected) == 4

        rows, old_rows = ((folder / name).read_bytes() for name in ("run/metrics.jsonl", "expected.jsonl"))
        assert rows.splitlines()[:2] == old_rows.splitlines()[:2], "the steps before it are not repeated"


@pytest.fixture
def old_run(tmp_path, monkeypatch) -> Path:
    """The unpacked run of `mea`, in the current folder."""
    unpack("mea", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: dict | None) -> None:
    """Updates sections of the configuration that a run is started with; None removes one."""
    file = folder / "run.yaml"
    tree = yaml.safe_load(file.read_text())
    for section, fields in changes.items():
        if fields is None:
            del tree[section]
        else:
            tree[section] |= fields

    file.write_text(yaml.safe_dump(tree))


def edit_metadata(folder: Path, change) -> None:
    """Changes meta.json in place, with a new checksum."""
    checkpoint = folder / CHECKPOINT
    contents = json.loads((checkpoint / META).read_text())
    change(contents)
    (checkpoint / META).write_text(json.dumps(contents))
    (checkpoint / COMPLETE).unlink()
    seal(checkpoint)


def test_keys_that_the_configuration_does_not_name_are_the_checkpoints(old_run):
    config, lines = load_run_config("run.yaml")
    assert lines == [], "it names all that is not the default"

    model = config.model
    edit_config(old_run, model=None, training={"seed": 7})
    inherited, lines = load_run_config("run.yaml", ["model.hidden_size=99"])
    assert inherited.model == model.model_copy(update={"hidden_size": 99})
    assert inherited.training.seed == 7
    assert "model.num_component_heads = [1, 2], as in its checkpoint: the configuration does not name it" in lines
    assert "hidden_size" not in str(lines)
    assert "rope_theta" not in str(lines), "the checkpoint has the default"


def test_what_is_taken_over_is_printed(old_run, capsys):
    edit_config(old_run, model=None)
    assert main(["plan", "run.yaml", "--json"]) == 0
    output = capsys.readouterr()
    assert "model.qk_norm = True, as in its checkpoint" in output.err
    assert json.loads(output.out)["parameters"]["head_combination"] == 2 * (1 * 2 + 2 * 2)


def test_an_unknown_key_of_the_checkpoint_is_no_key_that_may_change(old_run, capsys):
    edit_metadata(old_run, lambda meta: meta["config"]["model"].update(num_experts=8))
    assert main(["train", "run.yaml"]) == 2
    assert "model.num_experts" in capsys.readouterr().err


def test_a_key_that_the_checkpoint_lacks_has_its_off_value(old_run):
    """Not the default, where that does more than the program did without the key."""
    lacking = ("qk_norm", "hlc_mixes"), ("document_mask",), ("replica_check_interval", "distillation")

    def forget(meta: dict) -> None:
        for section, keys in zip(("model", "data", "training"), lacking, strict=True):
            for key in keys:
                del meta["config"][section][key]

    edit_metadata(old_run, forget)
    stored = CheckpointMetadata.read(old_run / CHECKPOINT).config
    assert (stored["model"]["qk_norm"], stored["model"]["hlc_mixes"]) == (False, "both")
    assert stored["data"]["document_mask"] is False
    assert stored["training"]["replica_check_interval"] == 1000
    assert stored["training"]["distillation"] is None

    config, lines = load_run_config("run.yaml")
    assert not config.data.document_mask
    assert lines == ["data.document_mask = False, as in its checkpoint: the configuration does not name it"]


def test_a_key_of_a_nested_section_that_the_checkpoint_lacks(old_run):
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    edit_metadata(old_run, lambda meta: meta["config"]["model"].update(rope_scaling=yarn))
    for overrides in ([], [f"model.rope_scaling={json.dumps(yarn)}"]):
        config, _ = load_run_config("run.yaml", overrides)
        metadata = CheckpointMetadata.read(old_run / CHECKPOINT)
        assert metadata.config["model"]["rope_scaling"]["truncate"] is True
        assert check_resume(metadata=metadata, config=config, fingerprint=None) == []


def test_a_whole_section_may_be_missing():
    assert complete_config({})["optimizer"]["grad_clip"] == 1.0
    assert "data" not in complete_config({}), "a required key has no off value"


@pytest.mark.parametrize("name", [META, COMPLETE])
@pytest.mark.parametrize("verb", [["train", "run.yaml"], ["plan", "run.yaml"], ["inspect", "run"]])
def test_a_newer_format_is_refused_by_its_number(name, verb, old_run, capsys):
    """And is not damage: the folder keeps its name."""
    file = old_run / CHECKPOINT / name
    if name == META:
        edit_metadata(old_run, lambda meta: meta.update(format_version=FORMAT_VERSION + 6))
    else:
        file.write_text(json.dumps({"format_version": FORMAT_VERSION + 6, "blake3": {}}))

    assert main(verb) == 2
    error = capsys.readouterr().err
    assert f"{name}" in error
    assert f"got:      format version {FORMAT_VERSION + 6}" in error
    assert (old_run / CHECKPOINT).is_dir()


def test_files_carry_the_version_of_their_format(old_run):
    edit_metadata(old_run, lambda meta: None)
    assert json.loads((old_run / CHECKPOINT / COMPLETE).read_text())["format_version"] == FORMAT_VERSION

    metadata = CheckpointMetadata.read(old_run / CHECKPOINT)
    metadata.write(old_run)
    assert json.loads((old_run / META).read_text())["format_version"] == FORMAT_VERSION


def test_what_the_program_decides_is_stored_as_a_number(old_run, monkeypatch):
    """A program that would decide otherwise resumes with what was decided, also where the key is older than neither."""
    stored = json.loads((old_run / CHECKPOINT / META).read_text())["config"]
    assert stored["model"]["embedding_initializer_range"] == stored["model"]["initializer_range"]
    assert stored["training"]["steps"] == 4
    assert "embedding_initializer_range" not in (old_run / "run.yaml").read_text()

    def decide_otherwise(config):
        return (resolved := resolve(config)).model_copy(
            update={"model": resolved.model.model_copy(update={"embedding_initializer_range": 0.5})}
            if config.model.embedding_initializer_range is None
            else {}
        )

    resolve = load._resolve
    monkeypatch.setattr(load, "_resolve", decide_otherwise)
    config, lines = load_run_config("run.yaml")
    assert config.model.embedding_initializer_range == 0.02
    assert lines == [
        "model.embedding_initializer_range = 0.02, as in its checkpoint: the configuration does not name it"
    ]


def test_a_key_that_the_program_decides_and_the_checkpoint_lacks(old_run):
    edit_metadata(old_run, lambda meta: meta["config"]["model"].pop("embedding_initializer_range"))
    config, lines = load_run_config("run.yaml")
    assert lines == []
    metadata = CheckpointMetadata.read(old_run / CHECKPOINT)
    assert check_resume(metadata=metadata, config=config, fingerprint=None) == []


@pytest.mark.parametrize("value", ["7", "false", "''", "[]", "null"])
def test_what_stands_in_the_place_of_a_section_is_refused_by_its_key(value, old_run):
    with pytest.raises(UserError, match="model"):
        load_run_config("run.yaml", [f"model={value}"])


def test_a_change_is_refused_by_the_keys_that_the_user_wrote(old_run, capsys):
    edit_config(old_run, model=None)
    assert main(["train", "run.yaml", "model.attention_variant=plain"]) == 2
    error = capsys.readouterr().err
    assert "model.attention_variant\n  got:      plain\n  expected: mea, as in the checkpoint of step 2" in error


def test_contents_that_are_none_are_refused_and_not_read(old_run, capsys):
    for change in (
        lambda meta: meta.update(config=[]),
        lambda meta: meta["config"].pop("data"),
        lambda meta: meta.update(format_version="2"),
        lambda meta: meta.update(format_version=1.5),
    ):
        original = (old_run / CHECKPOINT / META).read_text()
        edit_metadata(old_run, change)
        assert main(["plan", "run.yaml"]) == 2
        assert "meta.json\n  got:      unreadable" in capsys.readouterr().err
        (old_run / CHECKPOINT / META).write_text(original)


def test_a_run_folder_that_cannot_be_read_has_no_checkpoint_for_a_plan(old_run):
    config, lines = load_run_config("run.yaml", ["run.dir=run.yaml/below"])
    assert (config.model.attention_variant, lines) == ("mea", [])


def test_a_sweep_prints_what_its_runs_take_over(old_run):
    edit_config(old_run, model={"qk_norm": False})
    shutil.copytree("run", "sweep/mea-lr0.01")
    options = {"learning_rates": ["0.01"], "seeds": [], "variants": []}
    (config,), lines = combinations(path="run.yaml", overrides=[], out=Path("sweep"), **options)
    assert not config.model.qk_norm, "the file names it, so it is refused when the run starts"
    assert lines == []

    tree = yaml.safe_load(Path("run.yaml").read_text())
    del tree["model"]["qk_norm"]
    Path("run.yaml").write_text(yaml.safe_dump(tree))
    (config,), lines = combinations(path="run.yaml", overrides=[], out=Path("sweep"), **options)
    assert config.model.qk_norm
    assert lines == ["mea-lr0.01: model.qk_norm = True, as in its checkpoint: the configuration does not name it"]


def test_a_diverged_run_of_an_older_sweep_has_ended(old_run):
    """Although its configuration lacks the keys that came later."""
    config, _ = load_run_config("run.yaml", ["run.dir=diverged"])
    path = RunFolder(config.run.dir).job_config
    path.parent.mkdir(parents=True)
    stored = config.model_dump(mode="json")
    del stored["model"]["qk_norm"], stored["training"]["distillation"]
    path.write_text(yaml.safe_dump(stored))
    RunFolder("diverged").diverged.touch()
    assert not _has_ended(config), "qk_norm is on"
    assert _has_ended(config.model_copy(update={"model": config.model.model_copy(update={"qk_norm": False})}))


@pytest.mark.slow
def test_local_sh_checks_the_configuration_that_train_reads(old_run):
    """The heads of the checkpoint decide, which the file does not name; with the defaults it has eight."""
    edit_config(old_run, model=None)
    script = (ROOT / "launch/check_layout.py").read_text()
    for overrides, status in (([], 0), (["parallel.tensor_model_parallel_size=3"], 2)):
        command = [sys.executable, "-", "1" if status == 0 else "3", "run.yaml", *overrides]
        done = subprocess.run(command, input=script, capture_output=True, text=True, env=environment(), check=False)
        assert done.returncode == status, done.stderr
        if status:
            assert "a divisor of model.num_attention_heads = 2" in done.stderr
