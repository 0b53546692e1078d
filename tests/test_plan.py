"""`plan`: its formulas against what torch counts, what autograd keeps and what processes send."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from megatron_mea.attention.folds import StepFolds
from megatron_mea.cli import main
from megatron_mea.cluster.activations import stage_activations, step_folds
from megatron_mea.cluster.plan import Plan, as_json, make_plan
from megatron_mea.cluster.setting import Setting
from megatron_mea.config import Config, dump_config, load_config
from megatron_mea.config.checks import handicaps
from megatron_mea.config.layout import Layout, check_layout
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.grid import ALONE, TensorGroup
from megatron_mea.parallel.parameter import named_specs

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "bench"))

import layouts as bench
import local_ranks

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
CLUSTER_SETTINGS = (ROOT / "docs" / "cluster-settings.md").read_text()
MODEL = {
    "vocab_size": 1001,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


def config(model: dict | None = None, parallel: dict | None = None, seq: int = 64, **training) -> Config:
    training = {"global_batch_size": 8, "micro_batch_size": 2} | training
    return local_ranks.make_config(MODEL | (model or {}), training, parallel or {}, seq)


def layout(tensor: int = 1, pipeline: int = 1, sequence: bool = False) -> dict:
    return bench.layout(tensor, pipeline, sequence=sequence)


MODELS = {
    "mea": {},
    "tied": {"tie_word_embeddings": True, "attention_bias": True},
    "fewer components": {"num_component_heads": [4, 2, 1], "qk_norm": True},
    "keys": {"hlc_mixes": "keys", "head_norm_affine": False},
    "plain": {"attention_variant": "plain"},
    "plain norm": {"attention_variant": "plain_norm", "qk_norm": True},
    "no norm": {"attention_variant": "mea_no_norm"},
    "differential": {"attention_variant": "differential"},
    "talking heads": {"attention_variant": "talking_heads", "qk_norm": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    """The total is the decoder's, the parts make it up, and the ranks of a layout hold it between them."""
    settings = config(MODELS[name])
    counted = sum(parameter.numel() for parameter in Decoder(settings.model).parameters())
    parameters = make_plan(settings).parameters
    assert parameters.total == counted
    parts = ("embedding", "head", "attention", "head_combination", "feed_forward", "norms")
    assert sum(getattr(parameters, part) for part in parts) == counted

    setting = Setting(config(MODELS[name], layout(2, 2)), Layout(2, 2, 1, 4))
    held: dict[str, list[int]] = {}
    for stage in range(2):
        for rank in range(2):
            for parameter in setting.stage(stage, rank).parameters:
                held.setdefault(parameter.name, []).append(parameter.size)
    specs = named_specs(Decoder(settings.model))
    assert held.keys() == specs.keys()
    for key, sizes in held.items():
        whole = specs[key].numel()
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            # Equal parts of 1,001 ids.
            whole += 128
        # A tied matrix lies on both ends.
        copies = 2 if key == "model.embed_tokens.weight" and settings.model.tie_word_embeddings else 1
        assert sum(sizes) in (copies * whole, 2 * copies * whole), key
        assert max(sizes) in (whole, whole // 2), key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seq", [16, 128])
def test_flops_equal_those_that_torch_counts(name, seq):
    """Both forms of the head combination: 32 tokens are combined, 256 are folded."""
    settings = config(MODELS[name], seq=seq)
    decoder = Decoder(settings.model)
    ids = torch.zeros(2, seq, dtype=torch.long)
    positions = torch.arange(seq).expand(2, seq)
    found = make_plan(settings).flops
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = decoder(ids, positions, ids)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    assert forward.get_total_flops() / (2 * seq) == pytest.approx(found.forward)
    assert backward.get_total_flops() / (2 * seq) == pytest.approx(found.backward)
    for kind in ("selective", "full"):
        recomputed = make_plan(config(MODELS[name], seq=seq, activation_checkpointing=kind)).flops
        decoder = Decoder(settings.model, kind)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
            decoder(ids, positions, ids).backward()
        assert both.get_total_flops() / (2 * seq) == pytest.approx(recomputed.total), kind
        assert recomputed.recomputation > 0


def kept_for_backward(settings: Config, tp: TensorGroup, folded_before: bool = False) -> int:
    """Bytes of the storages that autograd holds between the passes, parameters and the loss excluded."""
    decoder = Decoder(settings.model, settings.training.activation_checkpointing, tp)
    if settings.training.precision == "bf16":
        decoder.to(torch.bfloat16)
    own = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    shape = (settings.training.micro_batch_size, settings.data.seq_length)
    ids, positions = torch.zeros(shape, dtype=torch.long), torch.arange(shape[1]).expand(shape)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        folds = StepFolds([block.self_attn for block in decoder.blocks], 2) if folded_before else None
        decoder.logits(decoder.run(ids, positions, folds and folds.of(0)))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.fixture
def group_of_two():
    """A process group whose other rank never answers: collectives return at once, with wrong numbers."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "seq", "tensor", "sequence"),
    [
        (name, *case)
        for name in MODELS
        for case in ((64, 1, False), (256, 1, False), (64, 2, False), (256, 2, True))
        # Talking heads are not shared.
        if case[1] == 1 or name != "talking heads"
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_activations_are_those_that_autograd_keeps(name, seq, tensor, sequence, group_of_two):
    settings = config(MODELS[name], layout(tensor, sequence=sequence), seq)
    tp = TensorGroup(2, 0, group_of_two, sequence) if tensor == 2 else ALONE
    setting = Setting(settings, Layout(tensor, 1, 1, 1), "cpu")
    assert stage_activations(setting, setting.stages[0]) == pytest.approx(kept_for_backward(settings, tp), rel=0.03)
    # Several micro-batches may share a fold.
    setting = Setting(settings, Layout(tensor, 1, 1, 4), "cpu")
    stage, once = setting.stages[0], setting.folds_once_a_step
    assert once == (tensor == 2 and settings.model.has_hlc)
    # Sums of gradients are no part of the graph.
    rows = setting.composites * settings.model.head_dim * settings.model.hidden_size
    sides = settings.model.mixes_keys + settings.model.mixes_values
    sums = 4 * rows * sides * len(stage.blocks) * once
    planned = stage_activations(setting, stage) + step_folds(setting, stage) - sums
    assert planned == pytest.approx(kept_for_backward(settings, tp, once), rel=0.03)


@pytest.mark.parametrize("training", [{"precision": "bf16"}, {"micro_batch_size": 1}])
def test_activations_in_half_precision_and_of_one_sample(training, group_of_two):
    for tensor, tp in ((1, ALONE), (2, TensorGroup(2, 0, group_of_two, True))):
        settings = config({}, layout(tensor, sequence=tensor > 1), 256, **training)
        setting = Setting(settings, Layout(tensor, 1, 1, 1), "cpu")
        assert stage_activations(setting, setting.stages[0]) == pytest.approx(kept_for_backward(settings, tp), rel=0.03)


def test_activation_checkpointing_keeps_the_inputs_of_blocks():
    kept, some, once = (
        make_plan(config(seq=256, activation_checkpointing=kind), device="cpu").memory[0].activations
        for kind in ("none", "selective", "full")
    )
    assert once < kept / 2 < some < 0.9 * kept


CASES = {name: bench.CASES[2][name] for name in ("dp2, ZeRO 1", "dp2, ZeRO 2", "dp2, ZeRO 3", "pp2, tied")} | {
    "combined": bench.case(layout(2)),
    "folded": bench.case(layout(2, sequence=True), {"qk_norm": True}, 160, activation_checkpointing="full"),
}


def test_communication_is_what_processes_send(teacher):
    """Bytes and calls of every group and collective, of a training step on two processes."""
    long = {"seq_length": 160, "distillation": teacher}
    cases = CASES | {
        "pp2, distilled": bench.case(layout(1, 2), distillation=teacher),
        "folded, distilled": bench.case(layout(2), **long),
        "sequence parallel, distilled": bench.case(layout(2, sequence=True), **long),
    }
    ranks = local_ranks.launch(bench.measure_cases, 2, cases)
    for index, (name, settings) in enumerate(cases.items()):
        rows = bench.compare(make_plan(settings, 2), [measured[index].counts for measured in ranks])
        assert rows, name
        for row in rows:
            assert row.planned_bytes == pytest.approx(row.bytes, rel=0.05), (name, row)
            assert row.planned_calls == row.calls, (name, row)


TEACHER = {"hidden_size": 96, "head_dim": 8, "num_hidden_layers": 5, "num_component_heads": [4, 2, 1, 4, 2]}
"""Narrower than the models of CASES, so that of 192 tokens it folds heads where they combine them."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> dict:
    return local_ranks.random_teacher(bench.MODEL | TEACHER, tmp_path_factory.mktemp("teacher") / "mea")


def test_a_teacher_adds_its_weights_and_a_forward_pass(teacher, tmp_path, capsys):
    alone, taught = (make_plan(bench.case(layout(2), **more)) for more in ({}, {"distillation": teacher}))
    # ZeRO 2 does not let micro-batches share a fold, and a teacher does not either.
    by_itself = make_plan(bench.case(bench.layout(2, zero=2), TEACHER))
    assert taught.parameters == alone.parameters
    assert taught.flops.teacher == by_itself.flops.forward > 0
    assert taught.flops.total == alone.flops.total + by_itself.flops.forward
    assert taught.memory[0].teacher == by_itself.memory[0].weights
    assert taught.memory[0].total > alone.memory[0].total + by_itself.memory[0].weights
    (path := tmp_path / "taught.yaml").write_text(dump_config(bench.case(layout(2), distillation=teacher)))
    assert main(["plan", str(path)]) == 0
    assert "teacher" in capsys.readouterr().out
    for override, named in (
        ("training.distillation.teacher=nowhere", "nowhere: no such folder"),
        ("model.vocab_size=1024", "vocab_size = 1536"),
        ("parallel.pipeline_model_parallel_size=6", "at most its num_hidden_layers = 5"),
    ):
        assert main(["plan", str(path), override, "model.num_hidden_layers=6"]) == 2
        message = capsys.readouterr().err
        assert "error: training.distillation.teacher\n" in message
        assert named in message


def plan_of(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_and_text_name_the_numbers(capsys):
    found = plan_of(capsys, QUICKSTART, "parallel.tensor_model_parallel_size=2", "--world-size", "4")
    assert (found["steps"], found["tokens_per_step"], found["tokens"]) == (500, 2048, 1_024_000)
    assert found["layout"] == {"tensor": 2, "pipeline": 1, "data": 2}
    assert found["parameters"]["total"] == 1_217_792
    assert found["pipeline_bubble"] == 0
    (stage,) = found["memory_per_rank_bytes"]
    at_rest = stage["weights"] + stage["gradients"] + stage["master_and_moments"]
    assert stage["activations"] < stage["passes"] <= stage["activations"] + stage["logits"] + stage["buffers"]
    assert stage["total"] == at_rest + max(stage["passes"], stage["reduction"])
    assert main(["plan", QUICKSTART]) == 0
    text = capsys.readouterr().out
    for words in ("1,217,792", "1,024,000 tokens", "FLOPs a token", "memory of a rank", "communication", "bubble"):
        assert words in text


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_that_ships_is_planned(path, capsys):
    assert plan_of(capsys, str(path))["parameters"]["total"] > 0


COMMANDS = re.findall(r"^megatron-mea plan (.*)$", CLUSTER_SETTINGS, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_settings_for_clusters_fit_are_not_handicapped_and_say_what_plan_says(command, capsys):
    path, *overrides, _, world_size = shlex.split(command)
    config = load_config(ROOT / path, overrides)
    assert handicaps(config, check_layout(config, int(world_size))) == []
    found = plan_of(capsys, str(ROOT / path), *overrides, "--world-size", world_size)
    (stage,) = found["memory_per_rank_bytes"]
    assert stage["total"] < 65 * 2**30
    # Tensor ranks share a node of 8.
    tensor, pipeline, data = found["layout"].values()
    assert tensor <= 8
    table = CLUSTER_SETTINGS.partition("## What `plan` says")[2].partition("##")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    said = {label: cells[COMMANDS.index(command)] for label, *cells in rows}
    sizes = {
        "memory of a rank, GiB: weights": "weights",
        "gradients (float32 sums and bfloat16)": "gradients",
        "master and moments": "master_and_moments",
        "activations": "activations",
        "logits": "logits",
    }
    expected = {label: f"{stage[part] / 2**30:.2f}" for label, part in sizes.items()} | {
        "GPUs = tensor x pipeline x data": f"{world_size} = {tensor} x {pipeline} x {data}",
        "micro-batches a step x samples": f"{found['micro_batches']} x {config.training.micro_batch_size}",
        "pipeline bubble": f"{found['pipeline_bubble']:g}",
        "steps": f"{found['steps']:,}",
        "tokens": f"{found['tokens']:,}",
        "parameters": f"{found['parameters']['total']:,}",
        "parameters on a rank": f"{found['parameters']['per_rank'][0]:,}",
        "**total**": f"**{stage['total'] / 2**30:.2f}**",
        "FLOPs a token": f"{found['flops_per_token']['total']:.3e}".replace("e+0", "e").replace("e+", "e"),
        "FLOPs in all": f"{found['flops_total']:.3e}".replace("e+", "e"),
        "checkpoint on the disk, GB": f"{found['checkpoint_bytes'] / 1e9:.1f}",
        "host memory of a rank for its copy, GB": f"{found['checkpoint_copy_per_rank_bytes'] / 1e9:.2f}",
    }
    assert {label: said[label] for label in expected} == expected
    for row in found["communication_per_step"]:
        (cell,) = (
            cell for label, cell in said.items() if label.startswith(row["group"]) and row["collective"] in label
        )
        assert re.findall(r"[\d.,]+", cell) == [f"{row['bytes'] / 1e9:.2f}", f"{row['count']:,}"]


def test_pipeline(capsys):
    """Bubble (p - 1) / (m + p - 1); the first stage holds the activations of p micro-batches, the last those of one."""
    found = plan_of(capsys, QUICKSTART, "parallel.pipeline_model_parallel_size=2", "training.micro_batch_size=2")
    assert found["micro_batches"] == 8
    assert found["pipeline_bubble"] == pytest.approx(1 / 9)
    first, last = found["memory_per_rank_bytes"]
    assert first["activations"] > 1.5 * last["activations"]
    assert first["logits"] == 0 < last["logits"]


def test_a_large_model_is_planned_without_memory(tmp_path, capsys):
    """70 billion parameters on 1,024 ranks."""
    settings = config(
        {
            "vocab_size": 128_256,
            "hidden_size": 8192,
            "intermediate_size": 28_672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        bench.layout(8, 8, sequence=True),
        4096,
        precision="bf16",
        micro_batch_size=1,
        global_batch_size=1024,
        activation_checkpointing="full",
    )
    plan: Plan = make_plan(settings, 1024)
    # Llama 3 70B has 70.55 billion; here are 80 x (2 x 8 x 8 + 128) more, of combinations and head norms.
    assert plan.parameters.total == 70_553_706_496 + 80 * (2 * 8 * 8 + 128)
    assert plan.layout.data == 16
    assert max(stage.total for stage in plan.memory) < 80e9
    assert json.loads(json.dumps(as_json(plan)))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["model.vocab_siz=7"], "vocab_siz"),
        (["parallel.tensor_model_parallel_size=3"], "parallel.tensor_model_parallel_size"),
        (["parallel.tensor_model_parallel_size=2", "--world-size", "3"], "3 processes"),
        (["--world-size", "0"], "--world-size"),
    ],
)
def test_what_cannot_work_is_refused(arguments, named, capsys):
    assert main(["plan", QUICKSTART, *arguments]) == 2
    assert named in capsys.readouterr().err
