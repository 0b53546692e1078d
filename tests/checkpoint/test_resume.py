"""Starts of a run: from an earlier step, with the weights of another model, and while another job writes the folder."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import command, environment, interrupt, rows, train

from megatron_mea.checkpoint.folder import complete_checkpoints
from megatron_mea.checkpoint.tensors import read_tensors, tensor_shapes, weight_shapes

pytestmark = pytest.mark.slow

SETTINGS = {
    "training.steps": 12,
    "evaluation.interval": 4,
    "checkpoint.interval": 4,
    "checkpoint.keep": 5,
    "logging.tensorboard": True,
}


@pytest.fixture
def refused(config, capfd):
    """Runs a command that is refused before processes meet; returns its stderr."""
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


def checkpoint_names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def tensorboard_losses(run: Path) -> dict[int, float]:
    """Losses by step, none of which is there twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("loss")
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def test_going_back(config, whole, refused):
    run = config.parent / "back"
    shutil.copytree(whole, run)
    for step in ("5", "13"):
        assert "newest, or a step with a checkpoint: 4, 8, 12" in refused("back", f"run.resume_from={step}")

    shard = next((run / "checkpoints/step_00000008").glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"?")
    go_back = command(config, "back", "run.resume_from=8")
    result = subprocess.run(go_back, env=environment(), capture_output=True, text=True)
    assert result.returncode == 2
    assert f"8, whose checkpoint is damaged ({shard.name} does not match its checksum)" in result.stderr
    assert checkpoint_names(run) == {f"step_{step:08d}" for step in (4, 8, 12)}
    shard.write_bytes(content)
    assert (run / "FINISHED").exists()

    # With another learning rate: later checkpoints are quarantined, later rows are removed.
    overrides = ["run.resume_from=4", "optimizer.lr=0.02"]
    status, output = interrupt(
        config, "back", *overrides, "training.steps=100000", step=14, signal_number=signal.SIGTERM
    )
    assert status == 0
    assert "going back to step 4" in output
    assert "changed since then: optimizer.lr: 0.01 -> 0.02" in output

    newest_step = complete_checkpoints(run)[-1][0]
    assert newest_step >= 14
    assert {"later-step_00000008", "later-step_00000012"} <= checkpoint_names(run)
    assert [row["step"] for row in rows(config, "back")] == list(range(newest_step + 1))
    assert rows(config, "back")[:5] == rows(config, "whole")[:5]
    assert rows(config, "back")[5] != rows(config, "whole")[5]

    # The same command resumes, and does not go back a second time.
    output = train(config, "back", *overrides, f"training.steps={newest_step + 2}")
    assert f"resuming from {run}/checkpoints/step_{newest_step:08d}" in output
    assert "is finished" in train(config, "back", *overrides, f"training.steps={newest_step + 2}")
    losses = {row["step"]: row["loss"] for row in rows(config, "back")[1:]}
    assert list(losses) == list(range(1, newest_step + 3))
    assert tensorboard_losses(run) == pytest.approx(losses, rel=1e-6)


def test_going_back_without_a_change_repeats_the_run(config, whole):
    run = config.parent / "repeated"
    shutil.copytree(whole, run)

    # A line that is no row is removed, and the others stay.
    metrics = run / "metrics.jsonl"
    first, rest = metrics.read_text().split("\n", 1)
    metrics.write_text(f"{first}\ngarbage\n{rest}")

    train(config, "repeated", "run.resume_from=8")
    assert rows(config, "repeated") == rows(config, "whole")
    assert (run / "FINISHED").exists()
    actual, expected = (
        read_tensors(folder, tensor_shapes(folder))
        for folder in (run / "checkpoints/step_00000012", whole / "checkpoints/step_00000012")
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


class TestInitFrom:
    """`run.init_from`: weights without moments and step."""

    @pytest.fixture(scope="class")
    def exported(self, whole, tmp_path_factory) -> Path:
        from megatron_mea.cli import main

        out = tmp_path_factory.mktemp("export") / "model"
        assert main(["export", str(whole), str(out)]) == 0
        return out

    def test_a_new_run_begins_with_the_weights(self, config, whole, exported):
        """From a checkpoint on two processes, from an export on one: the moments and the schedule begin anew."""
        validation_loss = rows(config, "whole")[-1]["validation_loss"]
        overrides = ["training.steps=2", "parallel.tensor_model_parallel_size=2", f"run.init_from={whole}"]
        train(config, "from-checkpoint", *overrides, processes=2)
        train(config, "from-export", f"run.init_from={exported}", "training.steps=2")
        for name in ("from-checkpoint", "from-export"):
            metrics = rows(config, name)
            assert [row["step"] for row in metrics] == [0, 1, 2]
            assert metrics[0]["validation_loss"] == pytest.approx(validation_loss, rel=1e-5)
            assert metrics[1]["loss"] == pytest.approx(rows(config, "from-checkpoint")[1]["loss"], rel=1e-6)

        # A step of Adam from moments of zero moves every parameter by the learning rate at most.
        source = whole / "checkpoints/step_00000012"
        run = config.parent / "from-export"
        shutil.rmtree(run)
        output = train(config, "from-export", f"run.init_from={exported}", "training.steps=2", "checkpoint.interval=1")
        assert "resuming" not in output
        before, after = (
            read_tensors(folder, weight_shapes(folder)) for folder in (source, run / "checkpoints/step_00000001")
        )
        change = max((after[name] - before[name]).abs().max().item() for name in before)
        lr = rows(config, "from-export")[1]["lr"]
        assert 0.5 * lr < change < 1.2 * lr

        # Without an intact checkpoint the run starts from the weights again; no git program is needed.
        for folder in (run / "checkpoints").iterdir():
            (folder / "__0_0.distcp").write_bytes(b"")
        (run / "FINISHED").unlink()
        result = subprocess.run(
            command(config, "from-export", f"run.init_from={exported}", "training.steps=2", "checkpoint.interval=1"),
            env=environment() | {"PATH": "/nonexistent"},
            capture_output=True,
            text=True,
        )
        assert "the run begins anew" in result.stdout, result.stderr
        assert rows(config, "from-export")[0]["validation_loss"] == pytest.approx(validation_loss, rel=1e-5)

        # With a checkpoint it resumes from that.
        train(config, "from-export", f"run.init_from={config.parent}/nothing", "training.steps=3")
        assert [row["step"] for row in rows(config, "from-export")] == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["model.intermediate_size=40"], "model.layers.0.mlp.gate_proj.weight of shape (32, 16) in"),
            (
                ["model.attention_variant=mea_no_norm"],
                "model.attention_variant\n  got:      mea_no_norm\n  expected: mea, as in",
            ),
            (["model.qk_norm=true"], "model.qk_norm\n  got:      True\n  expected: False, as in"),
            (["model.num_hidden_layers=1"], "model.num_hidden_layers\n  got:      1\n  expected: 2, as in"),
            (
                ["model.num_attention_heads=4", "model.head_dim=4"],
                "model.head_dim\n  got:      4\n  expected: 8, as in",
            ),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_mismatches_are_named(self, config, whole, exported, refused, overrides, message):
        for source in (whole, exported):
            assert message in refused("refused", f"run.init_from={source}", *overrides)
        assert not (config.parent / "refused").exists()

    def test_other_sources(self, config, whole, exported, refused, tmp_path):
        """A missing folder, a damaged checkpoint, another architecture, no safetensors; another RoPE is a warning."""
        copy = tmp_path / "checkpoint"
        shutil.copytree(whole / "checkpoints/step_00000004", copy)
        (copy / "__0_0.distcp").write_bytes(b"")
        assert "does not match its checksum" in refused("refused", f"run.init_from={copy}")
        assert "no such folder" in refused("refused", f"run.init_from={tmp_path}/none")

        model = tmp_path / "model"
        shutil.copytree(exported, model)
        hf_config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(hf_config | {"model_type": "gpt2"}))
        assert "model_type = gpt2" in refused("refused", f"run.init_from={model}")
        (model / "config.json").write_text(json.dumps(hf_config))
        (model / "model.safetensors").rename(model / "model.bin")
        assert "without model.safetensors" in refused("refused", f"run.init_from={model}")
        assert not (config.parent / "refused").exists()

        (model / "model.bin").rename(model / "model.safetensors")
        output = train(config, "rope", f"run.init_from={model}", "model.rope_theta=10000", "training.steps=2")
        assert "warning: model.rope_parameters is {'rope_type': 'default', 'rope_theta': 10000.0}" in output

    @pytest.mark.parametrize("name", [".metadata", "tokenizer/tokenizer_config.json"])
    def test_damage_is_reported_once_whichever_rank_finds_it(self, config, whole, name, tmp_path):
        """Before processes meet each rank verifies a share: both read .metadata, and the second one that tokenizer."""
        copy = tmp_path / "checkpoint"
        shutil.copytree(whole / "checkpoints/step_00000004", copy)
        (copy / name).write_bytes((copy / name).read_bytes()[:-1] + b"?")

        arguments = command(config, "refused", f"run.init_from={copy}", processes=2)
        result = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=120)
        assert result.returncode == 2, result.stderr
        assert result.stderr.startswith("megatron-mea: ")
        assert result.stderr.count("error: ") == 1
        assert f"error: run.init_from\n  got:      {copy}: {name} does not match its checksum\n" in result.stderr
        assert "Traceback" not in result.stderr
        assert not (config.parent / "refused").exists()

    def test_a_llama_in_two_files(self, tiny, config, refused, tmp_path):
        """A sharded export of another library's model, in bfloat16."""
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


def test_the_later_of_two_jobs_writes_the_run(config):
    """The older job stops within a step, saves nothing, and names the new holder of the folder."""
    overrides = ["training.steps=100000", "checkpoint.interval=10", "evaluation.interval=100000"]
    run = config.parent / "shared"
    older = subprocess.Popen(
        command(config, "shared", *overrides),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((run / "checkpoints").glob("step_*")):
        assert older.poll() is None
        time.sleep(0.05)

    younger = subprocess.Popen(
        command(config, "shared", *overrides), env=environment(), stdout=subprocess.PIPE, text=True
    )
    _, message = older.communicate(timeout=60)
    assert older.returncode == 1
    assert message.startswith(f"megatron-mea: {run} was taken over by process {younger.pid} on "), message
    assert "saves nothing" in message

    num_rows = len(rows(config, "shared"))
    deadline = time.monotonic() + 60
    while len(rows(config, "shared")) < num_rows + 20:
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
