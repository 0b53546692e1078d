"""Distillation: a frozen teacher beside the model, on every kind of layout against a plain float64 loop."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support import runs
from support.distributed import run_distributed
from support.engines import (
    config,
    layout,
    new_engine,
    plain_training,
    rank_batches,
    set_state,
    state,
    train,
    train_step,
)
from support.models import SMALL
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_mea.checkpoint.tensors import read_tensors, tensor_shapes
from megatron_mea.config import Config, load_config
from megatron_mea.data.tokenizer import copy_tokenizer, train_tokenizer
from megatron_mea.errors import UserError
from megatron_mea.huggingface.model_folder import ModelFolder
from megatron_mea.parallel.grid import NO_TP, TensorGroup
from megatron_mea.parallel.layers import IGNORE_INDEX, kl_divergence_sum
from megatron_mea.parallel.parameter import parameters_by_name
from megatron_mea.training.teacher import open_teacher, tokenizer_warnings

STEPS = 6
OTHER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8, "num_attention_heads": 4}
"""Sizes in which the teacher differs from SMALL; its vocabulary is the same 37."""


def llama(folder: Path, **changes) -> Path:
    torch.manual_seed(5)
    sizes = {key: value for key, value in (SMALL | OTHER).items() if key != "initializer_range"}
    LlamaForCausalLM(LlamaConfig(**sizes | {"initializer_range": 0.3} | changes)).save_pretrained(folder)
    return folder


def llama_logits(folder: Path) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The logits of transformers' Llama in float64, with attention inside documents."""
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").double()

    @torch.no_grad()
    def logits(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        document = (position_ids == 0).cumsum(1)
        visible = (document.unsqueeze(2) == document.unsqueeze(1)).tril()
        mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -math.inf)
        return model(input_ids, attention_mask=mask.unsqueeze(1), position_ids=position_ids).logits

    return logits


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return llama(tmp_path_factory.mktemp("teacher") / "llama")


def settings(teacher: Path, *, parallel: dict | None = None, checkpointing: str = "none", **changes) -> Config:
    """Full recomputation goes with a document mask and a length at which heads combine as weights."""
    distillation = {"teacher": str(teacher), "weight": 0.7, "temperature": 2.0} | changes.pop("distillation", {})
    training = {"distillation": distillation, "activation_checkpointing": checkpointing}
    document_mask = checkpointing == "full"
    return config(
        parallel=parallel,
        model={},
        steps=STEPS,
        seq_length=24 if document_mask else 12,
        document_mask=document_mask,
        training=training | changes,
    )


CASES = {
    1: {"alone": (layout(), "none")},
    2: {
        "tp 2": (layout(tensor=2), "none"),
        "tp 2, sequence parallel": (layout(tensor=2, sequence=True), "full"),
        "pp 2": (layout(pipeline=2), "full"),
        "dp 2, ZeRO 1": (layout(), "none"),
        "dp 2, ZeRO 3": (layout(zero=3), "full"),
        "cp 2": (layout(context=2), "full"),
    },
    4: {
        "tp 2 x dp 2, ZeRO 2": (layout(tensor=2, zero=2), "none"),
        "pp 2 x dp 2": (layout(pipeline=2), "none"),
        "tp 2 x pp 2": (layout(tensor=2, pipeline=2), "full"),
        "tp 2 x pp 2, sequence parallel": (layout(tensor=2, zero=1, sequence=True, pipeline=2), "full"),
        "tp 4, sequence parallel": (layout(tensor=4, sequence=True), "none"),
    },
}
"""By number of processes: `parallel`, and activation checkpointing."""


def new_student(settings: Config):
    """The engine of this rank, with its teacher; collective."""
    return new_engine(settings, teacher=open_teacher(settings))


def checks_on_this_rank(teacher: Path) -> dict[str, tuple]:
    """(curve, validation loss, weights at the end) by case."""
    from megatron_mea.training.distributed import start_distributed, stop_distributed
    from megatron_mea.training.rank_env import RankEnv

    torch.set_num_threads(1)
    rank_env = RankEnv.from_environment()
    start_distributed(rank_env)
    cases = CASES[rank_env.world_size]

    results = {}
    for name, (parallel, checkpointing) in cases.items():
        engine = new_student(settings(teacher=teacher, parallel=parallel, checkpointing=checkpointing))
        passes = record_teacher_passes(engine)

        def validate(engine=engine) -> float:
            return engine.evaluate(iter(rank_batches(engine, STEPS + 1)), engine.grid.dims.num_micro_batches)

        validate()
        curve = train(engine=engine, first=1, last=STEPS - 1)
        validate()
        curve += train(engine=engine, first=STEPS, last=STEPS)
        validation = validate()
        assert len(passes) == STEPS * engine.grid.dims.num_micro_batches, "validation runs the model alone"
        weights = {key: tensor.numpy() for key, tensor in state(engine).items() if not key.startswith("exp_avg")}
        results[name] = curve, validation, weights

    check_state(teacher, cases)
    check_nonfinite(teacher, cases)
    if rank_env.world_size == 2:
        check_divergence()
        student = settings(teacher)
        another = open_teacher(student)
        another.source.folder = Path(str(rank_env.rank))
        with pytest.raises(UserError, match="0 and 1, on different ranks"):
            new_engine(student, teacher=another)

    stop_distributed()
    return results


def record_teacher_passes(engine) -> list[None]:
    """A list that grows with every forward pass of the teacher."""
    passes, forward_hidden = [], engine.stage.teacher.forward_hidden

    def recorded(*arguments):
        passes.append(None)
        return forward_hidden(*arguments)

    engine.stage.teacher.forward_hidden = recorded
    return passes


def check_state(teacher: Path, cases: dict) -> None:
    """The state holds the model only; in bfloat16 it resumes bit for bit in a new engine."""
    for parallel, checkpointing in list(cases.values())[-3::2]:
        bf16 = settings(teacher=teacher, parallel=parallel, checkpointing=checkpointing, precision="bf16")
        engine = new_student(bf16)
        assert engine.stage.teacher.dtype == torch.bfloat16
        parameter_ids = {id(parameter) for parameter in engine.engine.module.parameters()}
        assert parameter_ids == {id(parameter) for parameter in engine.model.parameters()}

        train(engine=engine, first=1, last=3)
        saved = gather_state(engine)
        expected = train(engine=engine, first=4, last=STEPS)
        reloaded = new_student(bf16)
        set_state(engine=reloaded, tensors=saved, step=3)
        assert train(engine=reloaded, first=4, last=STEPS) == expected


def gather_state(engine) -> dict[str, torch.Tensor]:
    """The state of all stages, on all ranks; collective."""
    stages: list[dict] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(stages, state(engine))
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def check_nonfinite(teacher: Path, cases: dict) -> None:
    """Teacher outputs or gradients that are not finite stop the step and leave the engine unchanged."""
    from megatron_mea.training.nonfinite import NonFiniteError

    broken = "model.layers.0.mlp.up_proj.weight"
    for name, (parallel, checkpointing) in cases.items():
        if "dp 2, ZeRO 1" in name:
            continue

        engine = new_student(settings(teacher=teacher, parallel=parallel, checkpointing=checkpointing))
        before, micro_batches = state(engine), list(range(engine.grid.dims.num_micro_batches))
        block = engine.stage.teacher.decoder.blocks[0]
        hook = block.register_forward_hook(lambda module, inputs, output: output * math.inf)
        with pytest.raises(NonFiniteError, match="but the distillation loss is nan") as error:
            train_step(engine=engine, step=1, lr=1e-3)
        assert list(error.value.micro_batches) == micro_batches
        hook.remove()

        if engine.grid.dims.pp > 1:
            parameter = parameters_by_name(engine.model).get(broken)
            hook = parameter.register_hook(lambda gradient: gradient * math.nan) if parameter is not None else None
            with pytest.raises(NonFiniteError, match="but the gradient is not finite") as error:
                train_step(engine=engine, step=1, lr=1e-3)
            assert error.value.micro_batches == dict.fromkeys(micro_batches, broken)
            if hook is not None:
                hook.remove()

        assert all(torch.equal(tensor, before[key]) for key, tensor in state(engine).items())
        train(engine=engine, first=1, last=1)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.full)])
def test_layouts(world_size, teacher):
    references = {
        checkpointing: plain_training(
            settings(teacher=teacher, parallel=None, checkpointing=checkpointing), llama_logits(teacher)
        )
        for checkpointing in ("none", "full")
    }
    results = run_distributed(checks_on_this_rank, world_size, teacher)

    for name, (_, checkpointing) in CASES[world_size].items():
        expected_curve, expected_validation, expected_weights = references[checkpointing]
        weights: dict[str, np.ndarray] = {}
        for result in results:
            curve, validation, rank_weights = result[name]
            np.testing.assert_allclose(curve, expected_curve, rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(validation, expected_validation, rtol=1e-5, err_msg=name)
            weights |= rank_weights

        assert weights.keys() == expected_weights.keys()
        for key, expected in expected_weights.items():
            np.testing.assert_allclose(weights[key], expected, rtol=0, atol=1e-5, err_msg=f"{name} {key}")


def check_divergence() -> None:
    """Value and gradient over a sharded vocabulary, whose last shard may be shorter, against torch on full logits."""
    tp = TensorGroup(size=2, rank=torch.distributed.get_rank(), group=torch.distributed.group.WORLD)
    random = np.random.default_rng(0)
    for seed in range(200):
        vocabulary, temperature = int(random.integers(4, 50)), float(random.uniform(0.2, 5))
        generator = torch.Generator().manual_seed(seed)
        # Some probabilities underflow.
        scale = 3.0 if seed % 5 else 300.0
        logits, teacher_logits = torch.randn(2, 7, vocabulary, generator=generator, dtype=torch.float64) * scale
        targets = torch.randint(vocabulary, (7,), generator=generator).masked_fill(
            torch.arange(7) == seed % 8, IGNORE_INDEX
        )
        for group in (NO_TP, tp):
            local_range = group.local_range(vocabulary)
            full_logits = logits.clone().requires_grad_()
            local_logits = logits[:, local_range].clone().requires_grad_()

            log_probs, teacher_log_probs = (
                (tensor / temperature).log_softmax(-1)[targets != IGNORE_INDEX]
                for tensor in (full_logits, teacher_logits)
            )
            expected = F.kl_div(log_probs, teacher_log_probs, reduction="sum", log_target=True)
            expected.backward()
            divergence = kl_divergence_sum(
                local_logits, teacher_logits[:, local_range], targets, temperature=temperature, tp=group
            )
            divergence.backward()

            torch.testing.assert_close(divergence, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(local_logits.grad, full_logits.grad[:, local_range], rtol=1e-10, atol=1e-13)


def test_a_teacher_that_lacks_a_tensor_is_refused(teacher, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors")

    with pytest.raises(UserError) as error:
        open_teacher(settings(copy))
    (problem,) = error.value.problems
    assert (problem.where, problem.got) == ("training.distillation.teacher", f"{copy} without lm_head.weight")


def test_another_tokenizer_is_a_warning(tiny, tmp_path):
    train_tokenizer(sources=[str(tiny.train.with_suffix(".jsonl"))], vocab_size=380, out=tmp_path / "other")
    run = load_config(tiny.config)
    for number, (tokenizer, num_warnings) in enumerate(((tiny.tokenizer, 0), (tmp_path / "other", 1), (None, 0))):
        teacher = llama(tmp_path / f"teacher-{number}")
        if tokenizer is not None:
            copy_tokenizer(tokenizer, teacher)

        assert len(tokenizer_warnings(run, ModelFolder.locate(teacher))) == num_warnings


@pytest.mark.slow
class TestRuns:
    """End-to-end runs through the commands."""

    @pytest.fixture(scope="class")
    def distillation_config(self, tiny, tmp_path_factory) -> Path:
        """A configuration with a teacher of another architecture, whose run `whole` of four steps is finished."""
        folder = tmp_path_factory.mktemp("taught")
        teacher = llama(folder / "llama", vocab_size=384)
        copy_tokenizer(tiny.tokenizer, teacher)
        settings = {"training.distillation": {"teacher": str(teacher)}, "checkpoint.interval": 1}
        path = tiny.write_config(folder / "taught.yaml", **settings)
        runs.train(path, "whole")
        return path

    def test_an_interrupted_run_resumes_bit_for_bit(self, distillation_config):
        folder = distillation_config.parent
        shutil.copytree(folder / "whole", folder / "resumed")
        output = runs.train(distillation_config, "resumed", "run.resume_from=2")
        assert "warning" not in output.replace("warning: going back", "")

        expected = runs.rows(distillation_config, "whole")
        assert runs.rows(distillation_config, "resumed") == expected
        assert all(row["distillation_loss"] > 0 for row in expected[1:])
        assert "distillation_loss" not in expected[0]

        shapes = tensor_shapes(folder / "whole/checkpoints/step_00000004")
        assert not any("teacher" in name for name in shapes)
        checkpoints = (folder / name / "checkpoints/step_00000004" for name in ("whole", "resumed"))
        whole, resumed = (read_tensors(checkpoint, shapes) for checkpoint in checkpoints)
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())

    def test_the_teacher_may_be_a_run_and_how_it_teaches_may_change(self, distillation_config):
        """A run that starts from the weights of its teacher does not diverge from it."""
        folder = distillation_config.parent
        overrides = [f"training.distillation.teacher={folder}/whole", f"run.init_from={folder}/whole"]
        overrides += ["training.distillation.weight=1", "training.steps=3", "optimizer.lr=1e-9"]
        output = runs.train(distillation_config, "self", *overrides)
        assert "another tokenizer" not in output

        metrics = runs.rows(distillation_config, "self")
        expected = runs.rows(distillation_config, "whole")[-1]["validation_loss"]
        assert metrics[0]["validation_loss"] == pytest.approx(expected)
        assert all(abs(row["distillation_loss"]) < 1e-6 for row in metrics[1:])

        output = runs.train(distillation_config, "self", "training.distillation.temperature=3", "training.steps=4")
        assert "changed since then: training.distillation.temperature: 1.0 -> 3.0" in output
        assert "changed since then: training.distillation.weight: 1.0 -> 0.5" in output
        assert runs.rows(distillation_config, "self")[-1]["distillation_loss"] > 0.01
