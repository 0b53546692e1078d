"""Where a run begins: at an earlier step on purpose, with weights from elsewhere, and when another job writes there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from runs import command, environment, interrupt, rows, train
from safetensors.torch import load_file, save_file

from megatron_mea.checkpoint.folder import checkpoints_of
from megatron_mea.checkpoint.tensors import read_tensors, tensor_shapes, weight_shapes

SETTINGS = {
    "training.steps": 12,
    "evaluation.interval": 4,
    "checkpoint.interval": 4,
    "checkpoint.keep": 5,
    "logging.tensorboard": True,
}


@pytest.fixture
def refused(config, capfd):
    """Runs a command that is refused before processes meet, and returns what it says."""
    from megatron_mea.cli import main

    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}

    def refused(name: str, *overrides: str) -> str:
        capfd.readouterr()
        assert main(["train", str(config), f"run.dir={config.parent / name}", *overrides]) == 2
        return capfd.readouterr().err

    yield refused
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def board(run: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("loss")
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def test_going_back_on_purpose(config, whole, refused):
    run = config.parent / "back"
    shutil.copytree(whole, run)
    for step in ("5", "13"):
        assert "newest, or a step with a checkpoint: 4, 8, 12" in refused("back", f"run.resume_from={step}")
    shard = next((run / "checkpoints/step_00000008").glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"?")
    damaged = command(config, "back", "run.resume_from=8")
    done = subprocess.run(damaged, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert f"8, whose checkpoint is damaged ({shard.name} does not match its checksum)" in done.stderr
    assert names(run) == {f"step_{step:08d}" for step in (4, 8, 12)}
    shard.write_bytes(content)
    assert (run / "FINISHED").exists()

    # Another rate from there on: what came after is set aside, its rows are dropped.
    changed = ["run.resume_from=4", "optimizer.lr=0.02"]
    status, output = interrupt(config, "back", 14, signal.SIGTERM, *changed, "training.steps=100000")
    assert status == 0
    assert "going back to step 4" in output
    assert "changed since then: optimizer.lr: 0.01 -> 0.02" in output
    left = checkpoints_of(run)[-1][0]
    assert left >= 14
    assert {"later-step_00000008", "later-step_00000012"} <= names(run)
    assert [row["step"] for row in rows(config, "back")] == list(range(left + 1))
    assert rows(config, "back")[:5] == rows(config, "whole")[:5]
    assert rows(config, "back")[5] != rows(config, "whole")[5]

    # The same command goes on, and does not go back again.
    output = train(config, "back", *changed, f"training.steps={left + 2}")
    assert f"resuming from {run}/checkpoints/step_{left:08d}" in output
    assert "is finished" in train(config, "back", *changed, f"training.steps={left + 2}")
    found = {row["step"]: row["loss"] for row in rows(config, "back")[1:]}
    assert list(found) == list(range(1, left + 3))
    assert board(run) == pytest.approx(found, rel=1e-6)


def test_going_back_without_a_change_repeats_the_run(config, whole):
    run = config.parent / "again"
    shutil.copytree(whole, run)
    # A line that is none costs itself alone.
    metrics = run / "metrics.jsonl"
    first, rest = metrics.read_text().split("\n", 1)
    metrics.write_text(f"{first}\ngarbage\n{rest}")
    train(config, "again", "run.resume_from=8")
    assert rows(config, "again") == rows(config, "whole")
    assert (run / "FINISHED").exists()
    first, second = (
        read_tensors(folder, tensor_shapes(folder))
        for folder in (run / "checkpoints/step_00000012", whole / "checkpoints/step_00000012")
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


class TestInitFrom:
    """Weights alone."""

    @pytest.fixture(scope="class")
    def exported(self, whole, tmp_path_factory) -> Path:
        from megatron_mea.cli import main

        out = tmp_path_factory.mktemp("export") / "model"
        assert main(["export", str(whole), str(out)]) == 0
        return out

    def test_a_new_run_begins_with_the_weights(self, config, whole, exported):
        """From a checkpoint on two processes, from an export on one: the moments and the schedule begin anew."""
        last = rows(config, "whole")[-1]["validation_loss"]
        cut = ["training.steps=2", "parallel.tensor_model_parallel_size=2", f"run.init_from={whole}"]
        train(config, "continued", *cut, processes=2)
        train(config, "from-export", f"run.init_from={exported}", "training.steps=2")
        for name in ("continued", "from-export"):
            found = rows(config, name)
            assert [row["step"] for row in found] == [0, 1, 2]
            assert found[0]["validation_loss"] == pytest.approx(last, rel=1e-5)
            assert found[1]["loss"] == pytest.approx(rows(config, "continued")[1]["loss"], rel=1e-6)
        # One step of Adam from moments of zero moves every parameter by the rate at most.
        source = whole / "checkpoints/step_00000012"
        run = config.parent / "from-export"
        shutil.rmtree(run)
        output = train(config, "from-export", f"run.init_from={exported}", "training.steps=2", "checkpoint.interval=1")
        assert "resuming" not in output
        before, after = (
            read_tensors(folder, weight_shapes(folder)) for folder in (source, run / "checkpoints/step_00000001")
        )
        moved = max((after[name] - before[name]).abs().max().item() for name in before)
        rate = rows(config, "from-export")[1]["lr"]
        assert 0.5 * rate < moved < 1.2 * rate
        # Without a whole checkpoint of its own it begins with the weights again; no git program is needed.
        for folder in (run / "checkpoints").iterdir():
            (folder / "__0_0.distcp").write_bytes(b"")
        (run / "FINISHED").unlink()
        done = subprocess.run(
            command(config, "from-export", f"run.init_from={exported}", "training.steps=2", "checkpoint.interval=1"),
            env=environment() | {"PATH": "/nonexistent"},
            capture_output=True,
            text=True,
        )
        assert "the run begins anew" in done.stdout, done.stderr
        assert rows(config, "from-export")[0]["validation_loss"] == pytest.approx(last, rel=1e-5)
        # Once it has a checkpoint of its own it goes on from that.
        train(config, "from-export", f"run.init_from={config.parent}/nothing", "training.steps=3")
        assert [row["step"] for row in rows(config, "from-export")] == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["model.intermediate_size=40"], "model.layers.0.mlp.gate_proj.weight of shape (32, 16) in"),
            (
                ["model.attention_variant=mea_no_norm"],
                "model.attention_variant\n  found:   mea_no_norm\n  allowed: mea, as in",
            ),
            (["model.qk_norm=true"], "without model.layers.0.self_attn.q_norm.weight"),
            (["model.num_hidden_layers=1"], "model.layers.1.mlp.up_proj.weight in"),
            (["model.num_attention_heads=4", "model.head_dim=4"], "model.head_dim\n  found:   4\n  allowed: 8, as in"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_what_does_not_fit_is_named(self, config, whole, exported, refused, overrides, message):
        for source in (whole, exported):
            assert message in refused("refused", f"run.init_from={source}", *overrides)
        assert not (config.parent / "refused").exists()

    def test_other_sources(self, config, whole, exported, refused, tmp_path):
        """Nothing, a damaged checkpoint, another architecture, no safetensors; another RoPE is a warning."""
        copy = tmp_path / "checkpoint"
        shutil.copytree(whole / "checkpoints/step_00000004", copy)
        (copy / "__0_0.distcp").write_bytes(b"")
        assert "does not match its checksum" in refused("refused", f"run.init_from={copy}")
        assert "no such folder" in refused("refused", f"run.init_from={tmp_path}/none")
        model = tmp_path / "model"
        shutil.copytree(exported, model)
        description = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(description | {"model_type": "gpt2"}))
        assert "model_type = gpt2" in refused("refused", f"run.init_from={model}")
        (model / "config.json").write_text(json.dumps(description))
        (model / "model.safetensors").rename(model / "model.bin")
        assert "without model.safetensors" in refused("refused", f"run.init_from={model}")
        assert not (config.parent / "refused").exists()
        (model / "model.bin").rename(model / "model.safetensors")
        base = "model.rope_theta=10000"
        output = train(config, "rope", f"run.init_from={model}", base, "training.steps=2")
        assert "warning: model.rope_parameters is {'rope_type': 'default', 'rope_theta': 10000.0}" in output

    @pytest.mark.parametrize("name", [".metadata", "tokenizer/tokenizer_config.json"])
    def test_damage_is_said_once_whoever_finds_it(self, config, whole, name, tmp_path):
        """Before processes meet each rank verifies a share: both read .metadata, and the second one that tokenizer."""
        copy = tmp_path / "checkpoint"
        shutil.copytree(whole / "checkpoints/step_00000004", copy)
        (copy / name).write_bytes((copy / name).read_bytes()[:-1] + b"?")
        refused = command(config, "refused", f"run.init_from={copy}", processes=2)
        done = subprocess.run(refused, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("megatron-mea: ")
        assert done.stderr.count("error: ") == 1
        assert f"error: run.init_from\n  found:   {copy}: {name} does not match its checksum\n" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (config.parent / "refused").exists()

    def test_a_llama_in_two_files(self, tiny, config, refused, tmp_path):
        """What other models compute as we do, and another precision."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        settings = {key: value for key, value in tiny.tree()["model"].items() if key != "num_component_heads"}
        llama = LlamaForCausalLM(LlamaConfig(**settings, rms_norm_eps=1e-5, rope_theta=10000.0)).bfloat16()
        llama.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
        assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 1
        plain = ["model.attention_variant=plain", "model.num_component_heads=null", "model.rope_theta=10000"]
        output = train(
            config,
            "llama",
            f"run.init_from={tmp_path}/llama",
            *plain,
            "training.steps=2",
            "checkpoint.interval=1",
            "optimizer.lr=1e-8",
        )
        assert "warning: model." not in output
        folder = config.parent / "llama/checkpoints/step_00000001"
        for name, tensor in read_tensors(folder, weight_shapes(folder)).items():
            torch.testing.assert_close(tensor, llama.state_dict()[name].float(), rtol=0, atol=1e-7)
        file = next((tmp_path / "llama").glob("*-00001-of-*.safetensors"))
        save_file(load_file(file) | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(16)}, file)
        message = refused("no-llama", f"run.init_from={tmp_path}/llama", *plain)
        assert "model.layers.0.self_attn.o_proj.bias in" in message


def test_of_two_jobs_the_later_one_writes_the_run(config):
    """The older one stops within a step, saves nothing, and says who has the folder."""
    long = ["training.steps=100000", "checkpoint.interval=10", "evaluation.interval=100000"]
    run = config.parent / "shared"
    older = subprocess.Popen(
        command(config, "shared", *long), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list((run / "checkpoints").glob("step_*")):
        assert older.poll() is None
        time.sleep(0.05)
    younger = subprocess.Popen(command(config, "shared", *long), env=environment(), stdout=subprocess.PIPE, text=True)
    _, message = older.communicate(timeout=60)
    assert older.returncode == 1
    assert message.startswith(f"megatron-mea: {run} was taken over by process {younger.pid} on "), message
    assert "saves nothing" in message
    began = len(rows(config, "shared"))
    deadline = time.monotonic() + 60
    while len(rows(config, "shared")) < began + 20:
        assert younger.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    younger.send_signal(signal.SIGUSR2)
    output, _ = younger.communicate(timeout=60)
    assert younger.returncode == 0
    assert f"warning: process {older.pid} on" in output
    steps = [row["step"] for row in rows(config, "shared")]
    assert steps == list(range(len(steps)))
    assert not list((run / "checkpoints").glob(".tmp*"))
