"""Runs with experts: their fields of the metrics, their state in checkpoints, resuming, exports, teachers."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from support.models import expert_cases, small_model
from support.runs import rows, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mea.checkpoint.folder import CheckpointMetadata, complete_checkpoints
from megatron_mea.cli import main
from megatron_mea.errors import UserError
from megatron_mea.experiments.runs import read_run
from megatron_mea.huggingface.model_folder import ModelFolder
from megatron_mea.model.decoder import Decoder
from megatron_mea.training.dead_experts import DeadExperts
from megatron_mea.training.router_totals import RouterTotals

EXPERTS = {
    "model.num_experts": 4,
    "model.num_experts_per_tok": 2,
    "model.moe_intermediate_size": 16,
    "model.mlp_only_layers": [0],
    "model.num_hidden_layers": 3,
    "training.balance": "batch",
    "training.router_z_loss_coef": 0.001,
}
SETTINGS = EXPERTS | {
    "training.steps": 6,
    "checkpoint.interval": 3,
    "evaluation.interval": 3,
    "logging.interval": 1,
    "logging.tensorboard": True,
}


@pytest.mark.slow
def test_fields_and_state(whole, config):
    trained = [row for row in rows(config, "whole") if "loss" in row]
    assert all(len(row["expert_load"]) == 2 and min(row["expert_load"]) >= 1 for row in trained)
    assert all(0.9 < row["balance_loss"] < 2 for row in trained)
    assert all("balance_loss" not in row for row in rows(config, "whole") if "loss" not in row)

    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert {"balance_loss", "expert_load/1", "expert_load/2"} <= set(events.Tags()["scalars"])

    metadata = CheckpointMetadata.read(complete_checkpoints(whole)[-1][1])
    model, training = metadata.config["model"], metadata.config["training"]
    per_step = training["global_batch_size"] * metadata.config["data"]["seq_length"] * model["num_experts_per_tok"]
    assert metadata.expert_counts.keys() == {"1", "2"}
    assert all(sum(counts) == per_step for counts in metadata.expert_counts.values())
    for counts, load in zip(metadata.expert_counts.values(), trained[-1]["expert_load"], strict=True):
        assert max(counts) / (per_step / 4) == pytest.approx(load)


@pytest.mark.slow
def test_a_run_that_resumes_goes_on_to_the_bit(whole, config, capsys):
    """Also with the previous step's counts, which its balance loss needs."""
    copy = whole.with_name("resumed")
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000006")
    (copy / "FINISHED").unlink()
    train(config, "resumed")
    assert rows(config, "resumed") == rows(config, "whole")


@pytest.mark.slow
def test_a_report_draws_balance_and_load(whole, config, tmp_path):
    assert main(["report", str(whole), "--out", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report-experts-mea.png").stat().st_size > 1000
    assert "the fullest expert of any layer" in (tmp_path / "report.html").read_text()

    run = read_run(whole)
    expected = [(max(row["expert_load"]), row["balance_loss"]) for row in rows(config, "whole") if "loss" in row]
    assert list(zip(run.expert_load, run.balance_loss, strict=True)) == expected


@pytest.mark.slow
def test_what_may_not_change(whole, config, capsys):
    for change in ("training.balance=sequence", "training.router_z_loss_coef=0.5", "model.router_aux_loss_coef=0.1"):
        assert main(["train", str(config), f"run.dir={whole}", "training.steps=9", change]) == 2
        assert change.partition("=")[0] in capsys.readouterr().err


@pytest.mark.slow
def test_export_and_teacher(whole, config, tmp_path, capsys):
    for target in ("transformers", "vllm"):
        assert main(["export", str(whole), str(tmp_path / target), "--target", target]) == 0
    assert main(["export", str(whole), str(tmp_path / "stock"), "--target", "stock"]) == 2
    ids = torch.arange(40).unsqueeze(0)
    models = [ModelFolder.locate(folder).as_transformers() for folder in (whole, tmp_path / "transformers")]
    assert torch.equal(*(model(ids).logits for model in models))
    assert main(["evaluate", str(whole)]) == 0

    # A teacher with experts, of a student with the same ones, that starts with its weights.
    distillation = f"training.distillation={{teacher: {tmp_path / 'transformers'}}}"
    train(config, "student", distillation, f"run.init_from={whole}", "training.steps=1", "schedule.warmup_steps=0")
    (row,) = [row for row in rows(config, "student") if "distillation_loss" in row]
    assert abs(row["distillation_loss"]) < 1e-5


def test_dead_experts_are_warned_of_once():
    routers = SimpleNamespace(layers=[1, 3], counts=torch.zeros(2, 4, dtype=torch.int64), top_k=2)
    callback = DeadExperts(routers)
    routers.counts = torch.tensor([[50, 50, 50, 50], [0, 100, 100, 0]])
    callback.on_update(None)
    # Too few to tell.
    assert callback.on_log(None) == []

    callback.on_update(None)
    (line,) = callback.on_log(None)
    assert "experts 0, 3 of layer 3" in line
    assert "no token of 200 " in line

    routers.counts = torch.tensor([[0, 400, 0, 400], [400, 0, 400, 0]])
    callback.on_update(None)
    assert [line.partition(": ")[0] for line in callback.on_log(None)] == [
        "no token of 400 chose experts 0, 2 of layer 1",
        "no token of 400 chose expert 1 of layer 3",
    ]


def test_counts_of_another_model_are_refused():
    decoder = Decoder(small_model(**expert_cases()[1]))
    routers = RouterTotals(decoder, sequences=8, device=torch.device("cpu"))
    state = {"0": [1, 0, 3, 0, 0, 0, 0, 4], "2": [8, 0, 0, 0, 0, 0, 0, 0]}
    routers.load_state(state)
    assert routers.state() == state
    for wrong in (
        {},
        {"0": state["0"]},
        state | {"2": [1]},
        state | {"2": [-1] * 8},
        state | {"2": [0] * 8},
        state | {"2": [2**70] * 8},
    ):
        with pytest.raises(UserError, match="expert_counts"):
            routers.load_state(wrong)
