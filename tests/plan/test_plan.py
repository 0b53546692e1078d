"""`plan`: its formulas against FLOPs that torch counts, bytes that autograd saves and calls that processes make."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.models import name_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from megatron_mea.attention.folds import StepFolds
from megatron_mea.cli import main
from megatron_mea.config import Config, dump_config, load_config
from megatron_mea.config.checks import config_warnings
from megatron_mea.config.layout import check_layout
from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.model.decoder import Decoder
from megatron_mea.model.moe import Router, RouterLosses
from megatron_mea.parallel.grid import NO_CP, NO_TP, ContextGroup, TensorGroup
from megatron_mea.parallel.parameter import parameters_by_name
from megatron_mea.plan.activations import stage_activations, step_folds
from megatron_mea.plan.flops import attention_flops, combination_flops, flops_per_token
from megatron_mea.plan.plan import Plan, as_json, make_plan
from megatron_mea.plan.workload import Workload

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))

import layouts as bench
import local_ranks
from memory import LiveTensors

ROOT = Path(__file__).parents[2]
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


def config(*, model: dict | None = None, parallel: dict | None = None, seq: int = 64, **training) -> Config:
    training = {"global_batch_size": 8, "micro_batch_size": 2} | training
    return local_ranks.make_config(
        model=MODEL | (model or {}), training=training, parallel=parallel or {}, seq_length=seq
    )


def layout(*, tensor: int = 1, pipeline: int = 1, context: int = 1, sequence: bool = False) -> dict:
    return bench.layout(tensor=tensor, pipeline=pipeline, context=context, sequence=sequence)


EXPERTS = {"num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 96}
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
    "gated": {"attention_variant": "gated"},
    "gated heads": {"attention_variant": "gated", "gate_width": "head", "num_key_value_heads": 2},
    "latent": {"hlc_form": "latent", "key_latent_dim": 20, "value_latent_dim": 12, "num_component_heads": None},
    "experts": EXPERTS,
    "experts in some layers": EXPERTS | {"moe_intermediate_size": 48, "mlp_only_layers": [1], "norm_topk_prob": False},
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    """The total is the decoder's, the parts make it up, and the ranks of a layout hold it between them."""
    settings = config(model=MODELS[name])
    expected = sum(parameter.numel() for parameter in Decoder(settings.model).parameters())
    parameters = make_plan(settings).parameters
    assert parameters.total == expected

    parts = ("embedding", "head", "attention", "head_combination", "feed_forward", "router", "experts", "norms")
    assert sum(getattr(parameters, part) for part in parts) == expected

    settings = config(model=MODELS[name], parallel=layout(tensor=2, pipeline=2))
    workload = Workload(config=settings, dims=ParallelDims.from_config(settings, 4))
    local_numels: dict[str, list[int]] = {}
    for stage in range(2):
        for rank in range(2):
            for parameter in workload.stage(stage, rank).parameters:
                local_numels.setdefault(parameter.name, []).append(parameter.local_numel)

    full_parameters = parameters_by_name(Decoder(settings.model))
    assert local_numels.keys() == full_parameters.keys()

    for key, numels in local_numels.items():
        full_numel = full_parameters[key].numel()
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            # 1,001 ids are padded to equal shards.
            full_numel += 128
        # A tied matrix is on both ends of the pipeline.
        copies = 2 if key == "model.embed_tokens.weight" and settings.model.tie_word_embeddings else 1
        assert sum(numels) in (copies * full_numel, 2 * copies * full_numel), key
        assert max(numels) in (full_numel, full_numel // 2), key


def flop_counter() -> FlopCounterMode:
    """Counts grouped products too, which torch does not."""

    def grouped_mm(x: tuple[int, ...], matrix: tuple[int, ...], *_: object, **__: object) -> int:
        return 2 * x[0] * x[1] * matrix[-1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_mm})


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seq", [16, 128])
def test_flops_equal_those_that_torch_counts(name, seq):
    """Both forms of the head combination: 32 tokens are combined, 256 are folded."""
    settings = config(model=MODELS[name], seq=seq)
    decoder = Decoder(settings.model)
    ids = torch.zeros(2, seq, dtype=torch.long)
    positions = torch.arange(seq).expand(2, seq)
    planned = make_plan(settings).flops
    with sdpa_kernel(SDPBackend.MATH):
        with flop_counter() as forward:
            loss = decoder(ids, positions, ids)
        with flop_counter() as backward:
            loss.backward()

    assert forward.get_total_flops() / (2 * seq) == pytest.approx(planned.forward)
    assert backward.get_total_flops() / (2 * seq) == pytest.approx(planned.backward)

    for kind in ("selective", "full"):
        planned = make_plan(config(model=MODELS[name], seq=seq, activation_checkpointing=kind)).flops
        decoder = Decoder(settings.model, activation_checkpointing=kind)
        with sdpa_kernel(SDPBackend.MATH), flop_counter() as forward_and_backward:
            decoder(ids, positions, ids).backward()
        assert forward_and_backward.get_total_flops() / (2 * seq) == pytest.approx(planned.total), kind
        assert planned.recomputation > 0


def test_flops_of_a_context_rank(group_of_two):
    """Those of a token, and the combination of the other ranks' components, which every rank repeats."""
    for name in ("mea", "fewer components", "plain"):
        for kind in ("none", "selective", "full"):
            settings = config(model=MODELS[name], parallel=layout(context=2), seq=128, activation_checkpointing=kind)
            workload = Workload(config=settings, dims=ParallelDims.from_config(settings, 2))
            cp = ContextGroup(size=2, rank=0, group=group_of_two)
            decoder = Decoder(settings.model, cp=cp, activation_checkpointing=kind)
            positions = torch.arange(128).expand(2, 128)
            ids = torch.zeros(2, 64, dtype=torch.long)
            with flop_counter() as counter:
                decoder(ids, positions, ids).backward()

            # The CPU's kernels are not counted.
            flops, layers = flops_per_token(workload), range(settings.model.num_hidden_layers)
            passes = 3 if kind == "none" else 4
            attention = passes * len(layers) * attention_flops(workload)
            repeated = passes * sum(
                combination_flops(workload=workload, layer=layer, side=side)
                for layer in layers
                for side in ("k", "v")
                if workload.kv_projection(layer, side).form == "components"
            )
            counted = counter.get_total_flops() / workload.tokens
            assert counted == pytest.approx(flops.total - attention + repeated), (name, kind)
            assert (repeated > 0) == (name == "fewer components")


def saved_for_backward(
    settings: Config, tp: TensorGroup, *, cp: ContextGroup = NO_CP, folded_before: bool = False
) -> int:
    """Bytes of the storages that autograd holds between the passes, parameters and the loss excluded."""
    training = settings.training
    decoder = Decoder(
        config=settings.model,
        tp=tp,
        cp=cp,
        activation_checkpointing=training.activation_checkpointing,
        router_losses=RouterLosses(balance=training.balance, balance_coef=1.0, z_coef=training.router_z_loss_coef),
    )
    if settings.training.precision == "bf16":
        decoder.to(torch.bfloat16)

    parameter_storages = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameter_storages:
            saved[tensor.untyped_storage().data_ptr()] = tensor

        return tensor

    shape = (settings.training.micro_batch_size, settings.data.seq_length)
    positions = torch.arange(shape[1]).expand(shape)
    ids = cp.shard(torch.zeros_like(positions), dim=1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        folds = StepFolds([block.self_attn for block in decoder.blocks], 2) if folded_before else None
        decoder.logits(decoder.forward_hidden(ids, positions, folded=folds and folds.for_micro_batch(0)))

    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def choose_experts(monkeypatch: pytest.MonkeyPatch, *, balanced: bool) -> None:
    """Routers choose all experts equally often, or the first ones, which rank 0 holds, for every token."""
    original_forward = Router.forward

    def forward(self: Router, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = original_forward(self, hidden_states)
        if balanced:
            return weights, (torch.arange(chosen.numel()) % self.config.num_experts).view_as(chosen)
        return weights, torch.arange(chosen.shape[-1]).expand_as(chosen)

    monkeypatch.setattr(Router, "forward", forward)


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
def test_activations_are_those_that_autograd_saves(name, seq, tensor, sequence, group_of_two, monkeypatch):
    choose_experts(monkeypatch, balanced=True)
    settings = config(model=MODELS[name], parallel=layout(tensor=tensor, sequence=sequence), seq=seq)
    tp = TensorGroup(size=2, rank=0, group=group_of_two, sequence_parallel=sequence) if tensor == 2 else NO_TP
    dims = replace(ParallelDims.from_config(settings, tensor), num_micro_batches=1)
    workload = Workload(config=settings, dims=dims, device="cpu")
    planned = stage_activations(workload, workload.stages[0])
    assert planned == pytest.approx(saved_for_backward(settings, tp), rel=0.03)

    # Several micro-batches may share a fold.
    workload = Workload(config=settings, dims=replace(dims, num_micro_batches=4), device="cpu")
    stage, shares_folds = workload.stages[0], workload.folds_once_per_step
    assert shares_folds == (tensor == 2 and settings.model.has_hlc)

    # Sums of gradients are not in the graph.
    folded_numel = workload.local_composites * settings.model.head_dim * settings.model.hidden_size
    num_folds = (settings.model.mixes_keys + settings.model.mixes_values) * len(stage.blocks) * shares_folds
    planned = stage_activations(workload, stage) + step_folds(workload, stage) - 4 * folded_numel * num_folds
    actual = saved_for_backward(settings=settings, tp=tp, folded_before=shares_folds)
    assert planned == pytest.approx(actual, rel=0.03)


@pytest.mark.parametrize(
    ("name", "seq", "tensor"),
    [
        (name, *case)
        for name in MODELS
        for case in ((128, 1), (512, 1), (512, 2))
        if case[1] == 1 or name != "talking heads"
    ],
)
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_activations_of_a_context_rank(name, seq, tensor, checkpointing, group_of_two, monkeypatch):
    """Keys and values of all tokens beside queries of half of them."""
    choose_experts(monkeypatch, balanced=True)
    parallel = layout(tensor=tensor, context=2, sequence=tensor > 1)
    settings = config(model=MODELS[name], parallel=parallel, seq=seq, activation_checkpointing=checkpointing)
    tp = TensorGroup(size=2, rank=0, group=group_of_two, sequence_parallel=True) if tensor == 2 else NO_TP
    cp = ContextGroup(size=2, rank=0, group=group_of_two)
    dims = replace(ParallelDims.from_config(settings, 2 * tensor), num_micro_batches=1)
    workload = Workload(config=settings, dims=dims, device="cpu")
    planned = stage_activations(workload, workload.stages[0])
    actual = saved_for_backward(settings, tp, cp=cp)
    if checkpointing == "selective":
        # cos and sin of all tokens and of this rank's are arguments of checkpoints, which autograd does not save.
        actual += 2 * (workload.full_tokens + workload.tokens) * workload.head_bytes
    assert planned == pytest.approx(actual, rel=0.03)


@pytest.mark.parametrize("model", [{}, MODELS["gated"], MODELS["gated heads"]], ids=name_of)
@pytest.mark.parametrize(
    "training", [{"precision": "bf16"}, {"micro_batch_size": 1}, {"activation_checkpointing": "selective"}]
)
def test_activations_of_other_trainings(training, model, group_of_two):
    for tensor, tp in ((1, NO_TP), (2, TensorGroup(size=2, rank=0, group=group_of_two, sequence_parallel=True))):
        settings = config(model=model, parallel=layout(tensor=tensor, sequence=tensor > 1), seq=256, **training)
        dims = replace(ParallelDims.from_config(settings, tensor), num_micro_batches=1)
        workload = Workload(config=settings, dims=dims, device="cpu")
        planned = stage_activations(workload, workload.stages[0])
        assert planned == pytest.approx(saved_for_backward(settings, tp), rel=0.03)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(
    "training",
    [
        {"precision": "bf16"},
        {"router_z_loss_coef": 0.1, "balance": "none"},
        {"activation_checkpointing": "selective"},
    ],
)
def test_activations_of_experts(training, balanced, group_of_two, monkeypatch):
    """All choices on one rank are the worst case; with 99 features experts are computed in a loop."""
    choose_experts(monkeypatch, balanced=balanced)
    for tensor, tp in ((1, NO_TP), (2, TensorGroup(size=2, rank=0, group=group_of_two, sequence_parallel=True))):
        parallel = layout(tensor=tensor, sequence=tensor > 1)
        settings = config(model=EXPERTS | {"moe_intermediate_size": 99}, parallel=parallel, seq=256, **training)
        dims = replace(ParallelDims.from_config(settings, tensor), num_micro_batches=1)
        workload = Workload(config=settings, dims=dims, device="cpu", expert_load="mean" if balanced else "worst")
        planned = stage_activations(workload, workload.stages[0])
        assert planned == pytest.approx(saved_for_backward(settings, tp), rel=0.01)


def test_a_gpu_keeps_the_keys_and_values_of_all_tokens_once():
    """A context rank saves half of everything else, with documents and without."""
    saved = {}
    for context, document_mask in ((1, True), (2, True), (2, False)):
        settings = config(model=MODELS["plain"], parallel=layout(context=context), seq=512)
        data = settings.data.model_copy(update={"document_mask": document_mask})
        settings = settings.model_copy(update={"data": data})
        workload = Workload(config=settings, dims=ParallelDims.from_config(settings, context))
        saved[context, document_mask] = stage_activations(workload, workload.stages[0])

    sizes, layers = workload.attention_sizes, len(workload.stages[0].blocks)
    assert saved[2, True] == saved[1, True] // 2 + layers * sizes.key_bytes + workload.full_tokens * 8 // 2
    assert saved[2, False] == saved[2, True]


@pytest.mark.slow
def test_two_context_ranks_need_less_memory(group_of_two):
    """16,384 tokens, with full recomputation: live tensors of a forward and backward pass."""
    model = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_component_heads": 1, "head_dim": 32}
    model |= {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 64}
    settings = config(model=model, seq=16384, activation_checkpointing="full")
    positions = torch.arange(16384).unsqueeze(0)
    peaks = []
    for cp in (NO_CP, ContextGroup(size=2, rank=0, group=group_of_two)):
        with LiveTensors() as live:
            decoder = Decoder(settings.model, cp=cp, activation_checkpointing="full")
            ids = cp.shard(torch.zeros_like(positions), dim=1)
            decoder(ids, positions, ids).backward()
        peaks.append(live.peak)

    assert peaks[1] <= 0.75 * peaks[0]


def test_activation_checkpointing_saves_the_inputs_of_blocks():
    none, selective, full = (
        make_plan(config(seq=256, activation_checkpointing=kind), device="cpu").memory[0].activations
        for kind in ("none", "selective", "full")
    )
    assert full < none / 2 < selective < 0.9 * none


CASES = {name: bench.CASES[2][name] for name in ("dp2, ZeRO 1", "dp2, ZeRO 2", "dp2, ZeRO 3", "pp2, tied")} | {
    "combined": bench.case(layout(tensor=2)),
    "folded": bench.case(
        parallel=layout(tensor=2, sequence=True),
        model={"qk_norm": True},
        seq_length=160,
        activation_checkpointing="full",
    ),
}


@pytest.mark.slow
def test_communication_is_what_processes_send(teacher):
    """Bytes and calls of every group and collective, of a training step on two processes."""
    folded = {"seq_length": 160, "distillation": teacher}
    cases = CASES | {
        "pp2, distilled": bench.case(layout(tensor=1, pipeline=2), distillation=teacher),
        "folded, distilled": bench.case(layout(tensor=2), **folded),
        "sequence parallel, distilled": bench.case(layout(tensor=2, sequence=True), **folded),
    }
    experts = EXPERTS | {"num_hidden_layers": 2}
    cases |= {
        "experts": bench.case(layout(tensor=2), model=experts),
        "experts, recomputed": bench.case(
            layout(tensor=2, sequence=True), model=experts, activation_checkpointing="full"
        ),
        "experts, ZeRO 3": bench.case(bench.layout(zero=3), model=experts),
        "experts, pp2": bench.case(layout(pipeline=2), model=experts | {"mlp_only_layers": [0]}),
    }
    half = {"num_component_heads": 2}
    context = layout(context=2)
    cases |= {
        "cp2": bench.case(context, model={"qk_norm": True, "num_component_heads": [4, 2, 1, 4]}),
        "cp2, ZeRO 3, selective": bench.case(
            bench.layout(context=2, zero=3), model=half, activation_checkpointing="selective"
        ),
        "cp2, full, experts": bench.case(context, model=half | experts, activation_checkpointing="full"),
        "cp2, differential, distilled": bench.case(
            context, model={"attention_variant": "differential"}, distillation=teacher
        ),
    }
    ranks = local_ranks.launch(bench.measure_cases, 2, cases)
    for index, (name, settings) in enumerate(cases.items()):
        counts = [measured[index].counts for measured in ranks]
        rows = bench.compare(make_plan(settings, world_size=2), counts)
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
    case = bench.case(layout(tensor=2))
    taught_case = bench.case(layout(tensor=2), distillation=teacher)
    student_plan, taught_plan = make_plan(case), make_plan(taught_case)
    # ZeRO 2 does not let micro-batches share a fold, and a teacher does not either.
    teacher_plan = make_plan(bench.case(bench.layout(tensor=2, zero=2), model=TEACHER))
    assert taught_plan.parameters == student_plan.parameters
    assert taught_plan.flops.teacher == teacher_plan.flops.forward > 0
    assert taught_plan.flops.total == student_plan.flops.total + teacher_plan.flops.forward
    assert taught_plan.memory[0].teacher == teacher_plan.memory[0].weights
    assert taught_plan.memory[0].total > student_plan.memory[0].total + teacher_plan.memory[0].weights

    path = tmp_path / "taught.yaml"
    path.write_text(dump_config(taught_case))
    assert main(["plan", str(path)]) == 0
    assert "teacher" in capsys.readouterr().out

    for override, words in (
        ("training.distillation.teacher=nowhere", "nowhere: no such folder"),
        ("model.vocab_size=1024", "vocab_size = 1536"),
        ("parallel.pipeline_model_parallel_size=6", "at most its num_hidden_layers = 5"),
    ):
        assert main(["plan", str(path), override, "model.num_hidden_layers=6"]) == 2
        message = capsys.readouterr().err
        assert "error: training.distillation.teacher\n" in message
        assert words in message


def plan_json(capsys, *arguments: str) -> dict:
    """Output of `plan --json`."""
    assert main(["plan", *arguments, "--json"]) == 0

    return json.loads(capsys.readouterr().out)


def test_json_and_text_name_the_numbers(capsys):
    plan = plan_json(capsys, QUICKSTART, "parallel.tensor_model_parallel_size=2", "--world-size", "4")
    assert (plan["steps"], plan["tokens_per_step"], plan["tokens"]) == (500, 2048, 1_024_000)
    assert plan["layout"] == {"tensor": 2, "pipeline": 1, "context": 1, "data": 2}
    assert plan["parameters"]["total"] == 1_217_792
    assert plan["pipeline_bubble"] == 0
    assert plan["cache_bytes_per_token"] == 4 * 2 * 2 * 16 * 2

    (stage,) = plan["memory_per_rank_bytes"]
    at_rest = stage["weights"] + stage["gradients"] + stage["master_and_moments"]
    assert stage["activations"] < stage["passes"] <= stage["activations"] + stage["logits"] + stage["buffers"]
    assert stage["total"] == at_rest + max(stage["passes"], stage["reduction"])
    assert main(["plan", QUICKSTART]) == 0

    text = capsys.readouterr().out
    names = ("FLOPs a token", "memory of a rank", "communication", "bubble", "cache of the exported model: 512 bytes")
    for words in ("1,217,792", "1,024,000 tokens", *names):
        assert words in text


def test_experts_are_named_in_json_and_text(capsys):
    overrides = ["model.num_experts=16", "model.num_experts_per_tok=2", "model.moe_intermediate_size=64"]
    overrides += ["parallel.tensor_model_parallel_size=2"]
    plan = plan_json(capsys, QUICKSTART, *overrides)
    parameters = plan["parameters"]
    assert parameters["experts"] == 4 * 16 * 3 * 128 * 64
    assert parameters["router"] == 4 * 16 * 128
    assert parameters["active"] == parameters["total"] - parameters["experts"] * 14 // 16

    # A token's two choices on one rank, instead of one on each.
    (even,), (worst,) = plan["memory_per_rank_bytes"], plan["memory_per_rank_worst_case_bytes"]
    rows = 8 * 128
    assert worst["activations"] - even["activations"] == 4 * rows * (2 * 128 + 4 * 64 + 1) * 4
    assert worst["total"] > even["total"]

    assert main(["plan", QUICKSTART, *overrides]) == 0
    text = capsys.readouterr().out
    for words in (
        "active for a token",
        "experts",
        "router",
        "where as many choices of experts as can fall on one rank",
    ):
        assert words in text


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_that_ships_is_planned(path, capsys):
    # tests/compression/test_healing.py plans with the teacher.
    overrides = ["training.distillation=null"] if load_config(path).training.distillation else []
    assert plan_json(capsys, str(path), *overrides)["parameters"]["total"] > 0


COMMANDS = re.findall(r"^megatron-mea plan (.*)$", CLUSTER_SETTINGS, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_settings_for_clusters_fit_have_no_warnings_and_say_what_plan_says(command, capsys):
    path, *overrides, _, world_size = shlex.split(command)
    config = load_config(ROOT / path, overrides)
    assert config_warnings(config, check_layout(config, int(world_size))) == []

    plan = plan_json(capsys, str(ROOT / path), *overrides, "--world-size", world_size)
    (stage,) = plan["memory_per_rank_bytes"]
    assert stage["total"] < 65 * 2**30

    # Tensor ranks share a node of 8.
    tensor, pipeline, _, data = plan["layout"].values()
    assert tensor <= 8

    table = CLUSTER_SETTINGS.partition("## What `plan` says")[2].partition("##")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    documented = {label: cells[COMMANDS.index(command)] for label, *cells in rows}
    memory_keys = {
        "memory of a rank, GiB: weights": "weights",
        "gradients (float32 sums and bfloat16)": "gradients",
        "master and moments": "master_and_moments",
        "activations": "activations",
        "logits": "logits",
    }
    expected = {label: f"{stage[part] / 2**30:.2f}" for label, part in memory_keys.items()} | {
        "GPUs = tensor x pipeline x data": f"{world_size} = {tensor} x {pipeline} x {data}",
        "micro-batches a step x samples": f"{plan['micro_batches']} x {config.training.micro_batch_size}",
        "pipeline bubble": f"{plan['pipeline_bubble']:g}",
        "steps": f"{plan['steps']:,}",
        "tokens": f"{plan['tokens']:,}",
        "parameters": f"{plan['parameters']['total']:,}",
        "parameters on a rank": f"{plan['parameters']['per_rank'][0]:,}",
        "**total**": f"**{stage['total'] / 2**30:.2f}**",
        "FLOPs a token": f"{plan['flops_per_token']['total']:.3e}".replace("e+0", "e").replace("e+", "e"),
        "FLOPs in all": f"{plan['flops_total']:.3e}".replace("e+", "e"),
        "checkpoint on the disk, GB": f"{plan['checkpoint_bytes'] / 1e9:.1f}",
        "host memory of a rank for its copy, GB": f"{plan['checkpoint_copy_per_rank_bytes'] / 1e9:.2f}",
    }
    assert {label: documented[label] for label in expected} == expected

    for row in plan["communication_per_step"]:
        (cell,) = (
            cell for label, cell in documented.items() if label.startswith(row["group"]) and row["collective"] in label
        )
        assert re.findall(r"[\d.,]+", cell) == [f"{row['bytes'] / 1e9:.2f}", f"{row['count']:,}"]


def test_pipeline(capsys):
    """Bubble (p - 1) / (m + p - 1); the first stage holds the activations of p micro-batches, the last those of one."""
    plan = plan_json(capsys, QUICKSTART, "parallel.pipeline_model_parallel_size=2", "training.micro_batch_size=2")
    assert plan["micro_batches"] == 8
    assert plan["pipeline_bubble"] == pytest.approx(1 / 9)

    first, last = plan["memory_per_rank_bytes"]
    assert first["activations"] > 1.5 * last["activations"]
    assert first["logits"] == 0 < last["logits"]


def test_a_large_model_is_planned_without_memory(tmp_path, capsys):
    """70 billion parameters on 1,024 ranks."""
    settings = config(
        model={
            "vocab_size": 128_256,
            "hidden_size": 8192,
            "intermediate_size": 28_672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        parallel=bench.layout(tensor=8, pipeline=8, sequence=True),
        seq=4096,
        precision="bf16",
        micro_batch_size=1,
        global_batch_size=1024,
        activation_checkpointing="full",
    )
    plan: Plan = make_plan(settings, world_size=1024)
    # Llama 3 70B has 70.55 billion; here are 80 x (2 x 8 x 8 + 128) more, of combinations and head norms.
    assert plan.parameters.total == 70_553_706_496 + 80 * (2 * 8 * 8 + 128)
    assert plan.dims.dp == 16
    assert max(stage.total for stage in plan.memory) < 80e9
    assert json.loads(json.dumps(as_json(plan)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.vocab_siz=7"], "vocab_siz"),
        (["parallel.tensor_model_parallel_size=3"], "parallel.tensor_model_parallel_size"),
        (["parallel.tensor_model_parallel_size=2", "--world-size", "3"], "3 processes"),
        (["--world-size", "0"], "--world-size"),
    ],
)
def test_what_cannot_work_is_refused(arguments, words, capsys):
    assert main(["plan", QUICKSTART, *arguments]) == 2
    assert words in capsys.readouterr().err
