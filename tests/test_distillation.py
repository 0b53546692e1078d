"""Distillation: a frozen teacher beside the model, on every kind of layout against a plain float64 loop."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from distributed import run_distributed
from engines import batches_of, config, layout, new_engine, plain_training, set_state, state, train, train_step
from models import SMALL
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_mea.checkpoint.tensors import read_tensors, tensor_shapes
from megatron_mea.config import Config, load_config
from megatron_mea.data.tokenizer import copy_tokenizer, train_tokenizer
from megatron_mea.errors import UserError
from megatron_mea.huggingface.weights import StoredModel
from megatron_mea.parallel.grid import ALONE, TensorGroup
from megatron_mea.parallel.layers import IGNORE, divergence_sum
from megatron_mea.parallel.parameter import named_specs
from megatron_mea.training.teacher import foreign_tokenizer, open_teacher

STEPS = 6
OTHER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8, "num_attention_heads": 4}
"""Sizes in which the teacher differs from SMALL; its vocabulary is the same 37."""


def llama(folder: Path, **changes) -> Path:
    torch.manual_seed(5)
    sizes = {key: value for key, value in (SMALL | OTHER).items() if key != "initializer_range"}
    LlamaForCausalLM(LlamaConfig(**sizes | {"initializer_range": 0.3} | changes)).save_pretrained(folder)
    return folder


def llama_logits(folder: Path) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """transformers' own, in float64; a token sees what stands before it in its document."""
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").double()

    @torch.no_grad()
    def logits(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        document = (position_ids == 0).cumsum(1)
        seen = (document.unsqueeze(2) == document.unsqueeze(1)).tril()
        mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)
        return model(input_ids, attention_mask=mask.unsqueeze(1), position_ids=position_ids).logits

    return logits


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return llama(tmp_path_factory.mktemp("teacher") / "llama")


def settings(teacher: Path, parallel: dict | None = None, checkpointing: str = "none", **changes) -> Config:
    """Half of the cases mask documents, in both forms of the head combination."""
    distillation = {"teacher": str(teacher), "weight": 0.7, "temperature": 2.0} | changes.pop("distillation", {})
    training = {"distillation": distillation, "activation_checkpointing": checkpointing}
    masked = checkpointing == "full"
    return config(parallel, {}, STEPS, 24 if masked else 12, masked, training | changes)


CASES = {
    1: {"alone": (layout(), "none")},
    2: {
        "tp 2": (layout(2), "none"),
        "tp 2, sequence parallel": (layout(2, sequence=True), "full"),
        "pp 2": (layout(pipeline=2), "full"),
        "dp 2, ZeRO 1": (layout(), "none"),
        "dp 2, ZeRO 3": (layout(zero=3), "full"),
    },
    4: {
        "tp 2 x dp 2, ZeRO 2": (layout(2, 2), "none"),
        "pp 2 x dp 2": (layout(pipeline=2), "none"),
        "tp 2 x pp 2": (layout(2, pipeline=2), "full"),
        "tp 2 x pp 2, sequence parallel": (layout(2, 1, True, 2), "full"),
        "tp 4, sequence parallel": (layout(4, sequence=True), "none"),
    },
}
"""By number of processes: `parallel`, and activation checkpointing."""


def taught(settings: Config):
    return new_engine(settings, teacher=open_teacher(settings))


def checks_on_this_rank(teacher: Path) -> dict[str, tuple]:
    """Curves, a validation loss and the weights afterwards, of each case."""
    from megatron_mea.training.processes import start_distributed, stop_distributed
    from megatron_mea.training.ranks import Ranks

    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    start_distributed(ranks)
    cases = CASES[ranks.world_size]
    results = {}
    for name, (parallel, checkpointing) in cases.items():
        engine = taught(settings(teacher, parallel, checkpointing))
        passes = count_passes(engine)

        def validate(engine=engine) -> float:
            return engine.evaluate(iter(batches_of(engine, STEPS + 1)), engine.accumulation)

        validate()
        curve = train(engine, 1, STEPS - 1)
        validate()
        curve += train(engine, STEPS, STEPS)
        validation = validate()
        assert len(passes) == STEPS * engine.accumulation, "validation runs the model alone"
        weights = {key: tensor.numpy() for key, tensor in state(engine).items() if not key.startswith("exp_avg")}
        results[name] = curve, validation, weights
    check_state(teacher, cases)
    check_what_is_not_finite(teacher, cases)
    if ranks.world_size == 2:
        check_divergence()
        how = settings(teacher)
        with pytest.raises(UserError, match="0 and 1, on different ranks"):
            new_engine(how, teacher=replace(open_teacher(how), folder=Path(str(ranks.rank))))
    stop_distributed()
    return results


def count_passes(engine) -> list[None]:
    passes, run = [], engine.stage.teacher.run

    def counted(*arguments):
        passes.append(None)
        return run(*arguments)

    engine.stage.teacher.run = counted
    return passes


def check_state(teacher: Path, cases: dict) -> None:
    """Nothing but the model is in the state; in bfloat16 it goes on bit for bit in a fresh engine."""
    for parallel, checkpointing in list(cases.values())[-3::2]:
        half = settings(teacher, parallel, checkpointing, precision="bf16")
        engine = taught(half)
        assert engine.stage.teacher.dtype == torch.bfloat16
        own = {id(parameter) for parameter in engine.engine.module.parameters()}
        assert own == {id(parameter) for parameter in engine.model.parameters()}
        train(engine, 1, 3)
        saved = whole_state(engine)
        expected = train(engine, 4, STEPS)
        fresh = taught(half)
        set_state(fresh, saved, updates=3)
        assert train(fresh, 4, STEPS) == expected


def whole_state(engine) -> dict[str, torch.Tensor]:
    stages: list[dict] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(stages, state(engine))
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def check_what_is_not_finite(teacher: Path, cases: dict) -> None:
    """A teacher that computes nonsense, and a gradient that is none, stop the step and leave the engine as it was."""
    from megatron_mea.training.engine import NonFiniteError

    broken = "model.layers.0.mlp.up_proj.weight"
    for name in [each for each in cases if "dp 2, ZeRO 1" not in each]:
        engine = taught(settings(teacher, *cases[name]))
        before, everywhere = state(engine), list(range(engine.accumulation))
        block = engine.stage.teacher.decoder.layers[1]
        hook = block.register_forward_hook(lambda module, inputs, output: output * math.inf)
        with pytest.raises(NonFiniteError, match="but the distillation loss is nan") as error:
            train_step(engine, 1, 1e-3)
        assert list(error.value.micro_batches) == everywhere
        hook.remove()
        if engine.grid.pipeline_size > 1:
            parameter = named_specs(engine.model).get(broken)
            hook = parameter.register_hook(lambda gradient: gradient * math.nan) if parameter is not None else None
            with pytest.raises(NonFiniteError, match="but the gradient is not finite") as error:
                train_step(engine, 1, 1e-3)
            assert error.value.micro_batches == dict.fromkeys(everywhere, broken)
            if hook is not None:
                hook.remove()
        assert all(torch.equal(tensor, before[key]) for key, tensor in state(engine).items())
        train(engine, 1, 1)


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.full)])
def test_layouts(world_size, teacher):
    expected = {how: plain_training(settings(teacher, None, how), llama_logits(teacher)) for how in ("none", "full")}
    ranks = run_distributed(checks_on_this_rank, world_size, teacher)
    for name, (_, checkpointing) in CASES[world_size].items():
        curve, validation, weights = expected[checkpointing]
        found: dict[str, np.ndarray] = {}
        for rank in ranks:
            np.testing.assert_allclose(rank[name][0], curve, rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(rank[name][1], validation, rtol=1e-5, err_msg=name)
            found |= rank[name][2]
        assert found.keys() == weights.keys()
        for key, wanted in weights.items():
            np.testing.assert_allclose(found[key], wanted, rtol=0, atol=1e-5, err_msg=f"{name} {key}")


def check_divergence() -> None:
    """Value and gradient over a cut vocabulary, whose last part may be shorter, against torch's own in one piece."""
    tp = TensorGroup(2, torch.distributed.get_rank(), torch.distributed.group.WORLD)
    random = np.random.default_rng(0)
    for seed in range(200):
        vocabulary, temperature = int(random.integers(4, 50)), float(random.uniform(0.2, 5))
        generator = torch.Generator().manual_seed(seed)
        # Some probabilities underflow.
        scale = 3.0 if seed % 5 else 300.0
        ours, theirs = torch.randn(2, 7, vocabulary, generator=generator, dtype=torch.float64) * scale
        targets = torch.randint(vocabulary, (7,), generator=generator).masked_fill(torch.arange(7) == seed % 8, IGNORE)
        for group in (ALONE, tp):
            expected, found = ours.clone().requires_grad_(), ours[:, group.span(vocabulary)].clone().requires_grad_()
            logs = [(logits / temperature).log_softmax(-1)[targets != IGNORE] for logits in (expected, theirs)]
            wanted = F.kl_div(*logs, reduction="sum", log_target=True)
            wanted.backward()
            part = group.span(vocabulary)
            divergence = divergence_sum(found, theirs[:, part], targets, temperature, group)
            divergence.backward()
            torch.testing.assert_close(divergence, wanted, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.grad, expected.grad[:, part], rtol=1e-10, atol=1e-13)


def test_a_teacher_that_lacks_a_tensor_is_refused(teacher, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(UserError) as refused:
        open_teacher(settings(copy))
    (problem,) = refused.value.problems
    assert (problem.where, problem.found) == ("training.distillation.teacher", f"{copy} without lm_head.weight")


def test_another_tokenizer_is_told(tiny, tmp_path):
    train_tokenizer([str(tiny.train.with_suffix(".jsonl"))], 380, tmp_path / "other")
    run = load_config(tiny.config)
    for folder, warnings in ((tiny.tokenizer, 0), (tmp_path / "other", 1), (tmp_path, 0)):
        stored = StoredModel(run.model, {}, lambda fragments: None, folder)
        assert len(foreign_tokenizer(run, stored)) == warnings


class TestRuns:
    """Through the commands."""

    @pytest.fixture(scope="class")
    def taught(self, tiny, tmp_path_factory) -> Path:
        """A configuration with a teacher of another architecture, whose four steps have been done without a break."""
        folder = tmp_path_factory.mktemp("taught")
        teacher = llama(folder / "llama", vocab_size=384)
        copy_tokenizer(tiny.tokenizer, teacher)
        settings = {"training.distillation": {"teacher": str(teacher)}, "checkpoint.interval": 1}
        path = tiny.write_config(folder / "taught.yaml", **settings)
        runs.train(path, "whole")
        return path

    def test_a_run_that_is_interrupted_goes_on_bit_for_bit(self, taught):
        folder = taught.parent
        shutil.copytree(folder / "whole", folder / "again")
        output = runs.train(taught, "again", "run.resume_from=2")
        assert "warning" not in output.replace("warning: going back", "")
        whole, again = runs.rows(taught, "whole"), runs.rows(taught, "again")
        assert whole == again
        assert all(row["distillation_loss"] > 0 for row in whole[1:])
        assert "distillation_loss" not in whole[0]
        shapes = tensor_shapes(folder / "whole/checkpoints/step_00000004")
        assert not any("teacher" in name for name in shapes)
        last = (folder / name / "checkpoints/step_00000004" for name in ("whole", "again"))
        first, second = (read_tensors(checkpoint, shapes) for checkpoint in last)
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    def test_the_teacher_may_be_a_run_and_how_it_teaches_may_change(self, taught):
        """What learns from what it is does not diverge from it."""
        folder = taught.parent
        own = [f"training.distillation.teacher={folder}/whole", f"run.init_from={folder}/whole"]
        own += ["training.distillation.weight=1", "training.steps=3", "optimizer.lr=1e-9"]
        output = runs.train(taught, "own", *own)
        assert "another tokenizer" not in output
        found = runs.rows(taught, "own")
        assert found[0]["validation_loss"] == pytest.approx(runs.rows(taught, "whole")[-1]["validation_loss"])
        assert all(abs(row["distillation_loss"]) < 1e-6 for row in found[1:])
        output = runs.train(taught, "own", "training.distillation.temperature=3", "training.steps=4")
        assert "changed since then: training.distillation.temperature: 1.0 -> 3.0" in output
        assert "changed since then: training.distillation.weight: 1.0 -> 0.5" in output
        assert runs.rows(taught, "own")[-1]["distillation_loss"] > 0.01
