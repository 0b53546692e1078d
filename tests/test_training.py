"""Whole runs through the commands: exact resume, several processes, signals, damaged checkpoints, export."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import command, environment, interrupt, rows, train
from safetensors.torch import load_file

from megatron_mea.checkpoint.folder import checkpoints_of, damage
from megatron_mea.checkpoint.tensors import read_tensors, tensor_shapes, weight_shapes

STEPS = 60


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run.yaml"
    return tiny.write_config(
        path,
        **{
            "training.steps": STEPS,
            "model.num_attention_heads": 4,
            "model.num_component_heads": 1,
            "training.global_batch_size": 8,
            "schedule.warmup_steps": 5,
            "evaluation.interval": 20,
            "checkpoint.interval": 30,
            "checkpoint.keep": 5,
            "logging.tensorboard": True,
            "logging.sample_hashes": True,
        },
    )


def scalars(config: Path, name: str) -> set[str]:
    """The names of what TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return set(EventAccumulator(str(config.parent / name / "tensorboard")).Reload().Tags()["scalars"])


def newest(config: Path, name: str) -> dict[str, torch.Tensor]:
    folder = checkpoints_of(config.parent / name)[-1][1]
    return read_tensors(folder, tensor_shapes(folder))


@pytest.fixture(scope="module")
def whole(config) -> Path:
    """An uninterrupted run of one process."""
    train(config, "whole")
    return config.parent / "whole"


def test_the_run_folder(config, whole):
    found = rows(config, "whole")
    assert [row["step"] for row in found] == list(range(STEPS + 1))
    assert found[0].keys() == {"step", "tokens", "validation_loss"}
    assert all(row["tokens"] == row["step"] * 8 * 32 for row in found)
    assert [row["step"] for row in found if "validation_loss" in row] == [0, 20, 40, 60]
    assert found[-1]["validation_loss"] < found[0]["validation_loss"] - 0.5
    assert found[5]["lr"] == 0.01
    assert found[-1]["lr"] == pytest.approx(0.001)
    assert (whole / "FINISHED").exists()
    assert (whole / "config.yaml").exists()
    assert [step for step, _ in checkpoints_of(whole)] == [30, 60]
    assert all(damage(folder) is None for _, folder in checkpoints_of(whole))
    assert not list((whole / "checkpoints").glob(".tmp*"))


def test_tensorboard_holds_the_same_scalars(config, whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(whole / "tensorboard")).Reload()
    losses = {event.step: event.value for event in board.Scalars("loss")}
    assert losses == pytest.approx({row["step"]: row["loss"] for row in rows(config, "whole")[1:]}, rel=1e-6)
    assert any(tag.startswith("hlc_condition/") for tag in board.Tags()["scalars"])


def test_the_resolved_configuration_starts_the_same_run(config, whole):
    output = subprocess.run(
        [sys.executable, "-m", "megatron_mea", "train", str(whole / "config.yaml")], capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    assert "is finished at step 60" in output.stdout


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_an_interrupted_run_equals_an_uninterrupted_one(config, whole, number):
    """Bit for bit: losses, norms, validation, and the parameters and moments at the end."""
    name = number.name
    status, _ = interrupt(config, name, 32, number)
    run = config.parent / name
    assert not (run / "FINISHED").exists()
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
        assert checkpoints_of(run)[-1][0] == 30
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 99, "lo')
    else:
        assert status == 0
        assert checkpoints_of(run)[-1][0] >= 32
    before = (run / "metrics.jsonl").read_bytes()
    resumed = checkpoints_of(run)[-1][0]
    output = train(config, name)
    assert f"resuming from {run}/checkpoints/step_{resumed:08d}" in output
    kept = b"".join(line for line in before.splitlines(keepends=True) if line.endswith(b"\n"))
    kept = b"".join(line for line in kept.splitlines(keepends=True) if json.loads(line)["step"] <= resumed)
    assert (run / "metrics.jsonl").read_bytes().startswith(kept)
    assert rows(config, name) == rows(config, "whole")
    ours, theirs = newest(config, name), newest(config, "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_a_run_killed_before_its_first_checkpoint_begins_anew(config, whole):
    interrupt(config, "early", 12, signal.SIGKILL)
    assert checkpoints_of(config.parent / "early") == []
    train(config, "early")
    assert rows(config, "early") == rows(config, "whole")


def test_ctrl_c_in_a_terminal_saves_and_goes_on(config):
    """A terminal signals local.sh and every rank, and local.sh passes it on: each rank hears it twice."""
    arguments = command(config, "terminal", "training.steps=100000", processes=2)
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True)
    metrics = config.parent / "terminal/metrics.jsonl"
    while not (metrics.exists() and '"step": 5,' in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "asked to stop: saved step" in output
    assert checkpoints_of(config.parent / "terminal")


def test_options_that_change_how_but_not_what(tiny, config, tmp_path, capsys):
    """No validation, a whole model's folder as the tokenizer, bf16, recomputation, determinism; then an export."""
    from megatron_mea.cli import main

    model = tmp_path / "model"
    shutil.copytree(tiny.tokenizer, model)
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(b"other weights")
    (model / ".cache").mkdir()
    output = train(
        config,
        "options",
        *("training.steps=6", "training.precision=bf16", "training.activation_checkpointing=full"),
        *("training.deterministic=true", "data.validation=[]", f"data.tokenizer={model}", "checkpoint.keep_every=5"),
        *("checkpoint.interval=1", "checkpoint.keep=1", "logging.interval=4", "logging.sample_hashes=false"),
    )
    run = config.parent / "options"
    assert [row["step"] for row in rows(config, "options")] == [4, 6]
    assert [step for step, _ in checkpoints_of(run)] == [5, 6]
    assert not any("bf16_optimizer" in line or line.startswith("MA ") for line in output.splitlines())
    assert main(["export", str(run), str(tmp_path / "export")]) == 0
    assert json.loads((tmp_path / "export/config.json").read_text())["model_type"] == "mea"
    assert not (tmp_path / "export/.cache").exists()


def test_two_processes_equal_one_to_rounding(config, whole):
    """Interrupted by a signal to local.sh, resumed on two; then longer, with another layout, on one."""
    status, output = interrupt(config, "two", 25, signal.SIGUSR2, processes=2)
    assert status == 0
    assert "asked to stop: saved step" in output
    train(config, "two", processes=2)
    expected = rows(config, "whole")
    found = rows(config, "two")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.pop("sample_hashes", None) == theirs.pop("sample_hashes", None)
        assert ours == pytest.approx(theirs, rel=1e-3)
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-4)

    output = train(config, "two", "training.steps=64", "training.micro_batch_size=4")
    assert "changed since then: training.micro_batch_size: 2 -> 4" in output
    assert [row["step"] for row in rows(config, "two")] == list(range(65))
    assert json.loads((config.parent / "two/FINISHED").read_text())["step"] == 64


def test_a_layout_changes_rounding_only(config, whole, tmp_path):
    """Three layouts, one after the other: what each saved the next one takes up, and the export is the same."""
    from megatron_mea.cli import main

    cut = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    status, _ = interrupt(config, "layout", 12, signal.SIGTERM, *cut, "parallel.zero_stage=2", processes=4)
    assert status == 0
    staged = "parallel.pipeline_model_parallel_size=2"
    status, output = interrupt(config, "layout", 32, signal.SIGUSR2, *cut, staged, processes=4)
    assert status == 0
    assert "changed since then: parallel.pipeline_model_parallel_size: 1 -> 2" in output
    assert scalars(config, "layout") == scalars(config, "whole")
    output = train(config, "layout", "parallel.zero_stage=3", processes=2)
    assert "changed since then: parallel.tensor_model_parallel_size: 2 -> 1" in output
    for ours, theirs in zip(rows(config, "layout"), rows(config, "whole"), strict=True):
        assert ours.get("sample_hashes") == theirs.get("sample_hashes")
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-4)
        assert ours.get("validation_loss", 0) == pytest.approx(theirs.get("validation_loss", 0), rel=1e-4)

    exported = []
    for name in ("layout", "whole"):
        out = tmp_path / name
        assert main(["export", str(config.parent / name), str(out)]) == 0
        exported.append(load_file(out / "model.safetensors"))
    assert exported[0].keys() == exported[1].keys()
    for name, expected in exported[1].items():
        torch.testing.assert_close(exported[0][name], expected, rtol=0, atol=2e-3, msg=name)


def test_a_damaged_checkpoint_is_set_aside(config, whole):
    run = config.parent / "damaged"
    shutil.copytree(whole, run)
    (run / "FINISHED").unlink()
    shard = next((run / "checkpoints/step_00000060").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (run / "checkpoints/.tmp-step_00000090").mkdir()
    output = train(config, "damaged")
    assert f"step_00000060 is damaged ({shard.name} does not match its checksum)" in output
    assert "resuming from" in output
    assert "step_00000030" in output
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step_00000030",
        "damaged-step_00000060",
        "step_00000060",
    }
    assert rows(config, "damaged") == rows(config, "whole")


def test_a_failing_rank_ends_the_run(config):
    """One rank leaves in the middle of training: the others are ended at once, and its status is returned."""
    site = config.parent / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, threading, time\n"
        "def leave():\n"
        "    while not os.path.exists(os.environ['STARTED']):\n"
        "        time.sleep(0.1)\n"
        "    os._exit(7)\n"
        "if os.environ.get('RANK') == '1':\n"
        "    threading.Thread(target=leave, daemon=True).start()\n"
    )
    started = config.parent / "failing/metrics.jsonl"
    done = subprocess.run(
        command(config, "failing", "training.steps=1000000", processes=2),
        env=environment() | {"PYTHONPATH": str(site), "STARTED": str(started)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 7
    assert time.time() - started.stat().st_mtime < 10


def test_what_one_rank_alone_finds_is_said_and_returned(config):
    """The others fail as well once it is gone, with less to say: its message and status are those of the run."""
    site = config.parent / "site-of-one"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from megatron_mea.data.corpora import Corpora\n"
        "    from megatron_mea.errors import UserError\n"
        "    batch, calls = Corpora.batch, []\n"
        "    def sometimes(self, samples):\n"
        "        calls.append(samples)\n"
        "        if len(calls) > 80:\n"
        "            raise UserError('train.bin', 'token id 999', 'ids below 384')\n"
        "        return batch(self, samples)\n"
        "    Corpora.batch = sometimes\n"
    )
    done = subprocess.run(
        command(config, "alone", processes=2),
        env=environment() | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("megatron-mea: rank 1: error: train.bin\n  found:   token id 999\n")
    assert not (config.parent / "alone/FINISHED").exists()


def test_a_layout_is_refused_before_a_rank_is_started(config, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/started\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        command(config, "refused", "parallel.pipeline_model_parallel_size=3", processes=3),
        env=environment() | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("megatron-mea: error: parallel.pipeline_model_parallel_size\n  found:   3\n")
    assert "no layout of 3 processes works" in done.stderr
    assert "-m megatron_mea" not in (tmp_path / "started").read_text()
    assert not (config.parent / "refused").exists()


class TestExport:
    """The exported folder in a process that has transformers but not this package."""

    @pytest.fixture(scope="class")
    def exported(self, whole, tmp_path_factory) -> Path:
        out = tmp_path_factory.mktemp("export") / "deep" / "model"
        done = subprocess.run(
            [sys.executable, "-m", "megatron_mea", "export", str(whole), str(out)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "real tokens differ from the trainer's by at most" in done.stdout
        return out

    def test_files(self, exported, whole):
        from safetensors.torch import load_file

        config = json.loads((exported / "config.json").read_text())
        assert config["model_type"] == "mea"
        assert config["architectures"] == ["MEAForCausalLM"]
        assert config["num_component_heads"] == [1, 1]
        assert config["rope_parameters"] == {"rope_theta": 500000.0, "rope_type": "default"}
        assert config["dtype"] == "float32"
        tensors = load_file(exported / "model.safetensors")
        folder = checkpoints_of(whole)[-1][1]
        expected = read_tensors(folder, weight_shapes(folder))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
        assert tensors["model.layers.1.self_attn.hlc_k.weight"].shape == (1, 2)
        umask = os.umask(0)
        os.umask(umask)
        assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o666 & ~umask}
        assert [path.name for path in exported.parent.iterdir()] == ["model"]

    def test_stands_alone(self, exported, tmp_path):
        """Greedy generation with left padding equals row by row; nothing of this package is importable."""
        script = tmp_path / "alone.py"
        script.write_text(
            "import sys\n"
            "class Absent:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name.partition('.')[0] == 'megatron_mea':\n"
            "            raise ModuleNotFoundError(name)\n"
            "sys.meta_path.insert(0, Absent())\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True, padding_side='left')\n"
            "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
            "texts = ['In the beginning', 'To be']\n"
            "def run(texts, **settings):\n"
            "    inputs = tokenizer(texts, return_tensors='pt', padding=True, return_token_type_ids=False)\n"
            "    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, **settings)\n"
            "    return [row[inputs['input_ids'].shape[1]:].tolist() for row in output]\n"
            "batch = run(texts)\n"
            "assert batch == run(texts, use_cache=False), batch\n"
            "assert batch == [run([text])[0] for text in texts], batch\n"
            "print(type(model).__name__, model.config.model_type, batch)\n"
        )
        done = subprocess.run(
            [sys.executable, str(script), str(exported)],
            env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("MEAForCausalLM mea")

    def test_evaluate_generate_and_inspect(self, exported, whole, tiny, tmp_path, capsys):
        from megatron_mea.cli import main

        out = tmp_path / "new" / "evaluation.json"
        assert main(["evaluate", str(whole), "--out", str(out)]) == 0
        result = json.loads(out.read_text())
        capsys.readouterr()
        assert main(["evaluate", str(exported), "--data", str(tiny.validation)]) == 0
        other = json.loads(capsys.readouterr().out)
        assert result["tokens"] == other["tokens"] == _independent_count(tiny.validation)
        # The checkpoint is evaluated in windows of its seq_length, the export in its whole context.
        assert result["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=0.05)
        assert result["cross_entropy"] == pytest.approx(_independent_loss(exported, tiny.validation), rel=1e-5)

        texts = []
        for model in (whole, exported):
            assert main(["generate", str(model), "--prompt", "And the", "--max-new-tokens", "5"]) == 0
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1]
        assert texts[0].startswith("And the")

        assert main(["inspect", str(whole)]) == 0
        shown = capsys.readouterr().out
        for text in ("step             60", "15,360", "model.layers.1.self_attn.hlc_v.weight", "(1, 2)", "whole"):
            assert text in shown

    def test_bfloat16(self, whole, tmp_path, capsys):
        from safetensors.torch import load_file

        from megatron_mea.cli import main

        assert main(["export", str(whole / "checkpoints/step_00000030"), str(tmp_path), "--dtype", "bf16"]) == 0
        tensors = load_file(tmp_path / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"

    def test_a_folder_that_lacks_a_tensor_is_refused(self, exported, tmp_path, capsys):
        from safetensors.torch import load_file, save_file

        from megatron_mea.cli import main

        folder = tmp_path / "model"
        shutil.copytree(exported, folder)
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.self_attn.hlc_k.weight"
        save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
        assert main(["generate", str(folder), "--prompt", "a"]) == 2
        assert f"missing keys: {name}" in capsys.readouterr().err
        save_file(tensors | {name: tensors[name][:, :1].clone()}, folder / "model.safetensors", {"format": "pt"})
        assert main(["generate", str(folder), "--prompt", "a"]) == 2
        assert name in capsys.readouterr().err
        (folder / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-9])
        assert main(["generate", str(folder), "--prompt", "a"]) == 2
        config = json.loads((exported / "config.json").read_text()) | {"attention_variant": "foo"}
        (folder / "config.json").write_text(json.dumps(config))
        capsys.readouterr()
        assert main(["generate", str(folder), "--prompt", "a"]) == 2
        assert "'foo'" in capsys.readouterr().err

    def test_a_wrong_export_is_noticed(self, whole, tmp_path, monkeypatch, capsys):
        from megatron_mea.cli import main
        from megatron_mea.huggingface import modeling_mea

        wrong = modeling_mea.MEAHeadCombination.forward
        monkeypatch.setattr(modeling_mea.MEAHeadCombination, "forward", lambda self, x: 2 * wrong(self, x))
        assert main(["export", str(whole), str(tmp_path / "out")]) == 1
        assert "logits differ from the trainer's" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def _tokens(prefix: Path) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.fromfile(f"{prefix}.bin", dtype=np.uint16).astype(np.int64))


def _documents(prefix: Path) -> list[torch.Tensor]:
    """Every document ends with the token that ends the last one."""
    tokens = _tokens(prefix)
    ends = (tokens == tokens[-1]).nonzero().flatten() + 1
    return list(tokens.tensor_split(ends[:-1]))


def _independent_count(prefix: Path) -> int:
    return sum(len(document) - 1 for document in _documents(prefix))


@torch.no_grad()
def _independent_loss(folder: Path, prefix: Path) -> float:
    """Cross-entropy of the documents, cut where windows of 32 tokens end, by the reference."""
    from reference import reference_logits
    from safetensors.torch import load_file

    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    total, place = 0.0, 0
    for document in _documents(prefix):
        start = 0
        while start < len(document) - 1:
            stop = min(start + 32 - (place + start) % 32, len(document) - 1)
            logits = reference_logits(tensors, config, document[None, start:stop])[0]
            total -= logits.log_softmax(-1).gather(-1, document[start + 1 : stop + 1, None]).sum().item()
            start = stop
        place += len(document)
    return total / _independent_count(prefix)
