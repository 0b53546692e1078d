"""Possible and refused layouts, the table in the message, and the split of layers over pipeline stages."""

from __future__ import annotations

import itertools
import re
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import SMALL, small_model

from megatron_mea.config import Config
from megatron_mea.config.checks import config_warnings
from megatron_mea.config.layout import check_layout, check_teacher, possible_layouts
from megatron_mea.config.load import parse_config
from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.config.schema import Distillation, Model
from megatron_mea.errors import UserError
from megatron_mea.model.decoder import Decoder
from megatron_mea.model.flops import layer_flops
from megatron_mea.model.stages import balanced_partition, pipeline_stages


def config(*, parallel: dict | None = None, batch: int = 8, micro: int = 2, **model) -> Config:
    return parse_config(
        {
            "model": SMALL | {"attention_variant": "mea", "num_component_heads": 2} | model,
            "parallel": parallel or {},
            "data": {"tokenizer": "none", "train": [{"path": "none"}], "seq_length": 12},
            "schedule": {"warmup_steps": 2},
            "training": {"steps": 6, "global_batch_size": batch, "micro_batch_size": micro},
            "run": {"dir": "none"},
        }
    )


def sizes(tensor: int, *, pipeline: int = 1, zero: int = 1) -> dict:
    return {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "zero_stage": zero}


def refusal(settings: Config, world: int) -> tuple[list[str], str]:
    """The keys that a refusal names, and the text behind its problems."""
    with pytest.raises(UserError) as error:
        check_layout(settings, world)
    text = str(error.value)
    return [problem.where for problem in error.value.problems], text[text.rindex("expected:") :].partition("\n")[2]


TENSOR, PIPELINE = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
REFUSED = {
    "heads": (config(parallel=sizes(3)), 3, TENSOR),
    "composite heads": (config(parallel=sizes(4), num_attention_heads=24, num_key_value_heads=6), 4, TENSOR),
    "layers": (config(parallel=sizes(1, pipeline=4)), 4, PIPELINE),
    "ZeRO with a pipeline": (config(parallel=sizes(tensor=1, pipeline=2, zero=2)), 2, "parallel.zero_stage"),
    "processes": (config(parallel=sizes(2)), 3, f"{TENSOR} x {PIPELINE}"),
    "batch": (config(), 3, "training.global_batch_size"),
    "talking heads": (
        config(parallel=sizes(2), attention_variant="talking_heads", num_component_heads=None),
        2,
        TENSOR,
    ),
    "pairs of heads": (
        config(parallel=sizes(4), attention_variant="differential", num_component_heads=None),
        4,
        TENSOR,
    ),
    "sequence": (config(parallel={"sequence_parallel": True}), 1, "parallel.sequence_parallel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_a_table_of_what_can(name):
    settings, world, key = REFUSED[name]
    keys, table = refusal(settings, world)
    assert key in keys
    assert f"of {world} processes" in table

    rows = re.findall(r"^ +(\d+) +(\d+) +(\d+) +(\d+)  (.*)$", table, re.MULTILINE)
    layouts = [tuple(map(int, row[:4])) for row in rows]
    assert layouts == [
        (dims.tp, dims.pp, dims.dp, dims.num_micro_batches) for dims in possible_layouts(settings, world)
    ]
    assert all(row[4] == ("0, 1" if row[1] != "1" else "0, 1, 2, 3") for row in rows)

    if not layouts:
        world_sizes = [int(size) for size in re.search(r"^  ([\d, ]+)$", table, re.MULTILINE).group(1).split(", ")]
        assert world_sizes == [size for size in range(1, 2 * world + 1) if possible_layouts(settings, size)]


def context(size: int, *, tensor: int = 1, seq_length: int = 12, sequence: bool = False) -> Config:
    settings = config(parallel=sizes(tensor) | {"context_parallel_size": size, "sequence_parallel": sequence})
    return settings.model_copy(update={"data": settings.data.model_copy(update={"seq_length": seq_length})})


CONTEXT = "parallel.context_parallel_size"


@pytest.mark.parametrize(
    ("settings", "world", "keys"),
    [
        (context(4), 4, [CONTEXT]),
        (context(12), 12, [CONTEXT]),
        (context(7, seq_length=2**20), 8, [CONTEXT, f"{TENSOR} x {PIPELINE} x {CONTEXT}"]),
        (context(2, tensor=4, sequence=True), 8, ["data.seq_length"]),
        (context(3), 4, [f"{TENSOR} x {PIPELINE} x {CONTEXT}"]),
        (context(2), 6, ["training.global_batch_size"]),
        # More context ranks than processes.
        (context(6), 2, [f"{TENSOR} x {PIPELINE} x {CONTEXT}"]),
    ],
    ids=["chunks", "too many", "neither", "sequence parallel", "processes", "batch", "few processes"],
)
def test_a_sequence_that_cannot_be_shared_is_refused_with_a_table_of_what_can(settings, world, keys):
    refused_keys, table = refusal(settings, world)
    assert refused_keys == keys
    rows = re.findall(r"^ +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)  0", table, re.MULTILINE)
    layouts = [tuple(map(int, row)) for row in rows]
    assert "tensor  pipeline  context  data" in table
    assert layouts == [
        (dims.tp, dims.pp, dims.cp, dims.dp, dims.num_micro_batches) for dims in possible_layouts(settings, world)
    ]
    assert {row[2] for row in layouts} > {1}


def test_every_row_with_context_ranks_works_and_nothing_else():
    """Against an enumeration of all sizes, with and without sequence parallelism."""
    for world, sequence in itertools.product((1, 2, 4, 6, 8, 12), (False, True)):
        asked = context(2, seq_length=24, tensor=2, sequence=sequence)
        possible = {(dims.tp, dims.pp, dims.cp) for dims in possible_layouts(asked, world)}
        for tensor, pipeline, size in itertools.product(range(1, 9), range(1, 4), range(1, 13)):
            parallel = sizes(tensor=tensor, pipeline=pipeline) | {"context_parallel_size": size}
            settings = config(parallel=parallel | {"sequence_parallel": sequence})
            settings = settings.model_copy(update={"data": asked.data})
            works = True
            try:
                dims = check_layout(settings, world)
            except UserError:
                works = False

            assert works == ((tensor, pipeline, size) in possible)
            if works:
                assert dims.world_size == world == dims.tp * dims.pp * dims.cp * dims.dp
                assert dims.num_micro_batches * dims.dp * 2 == 8

            data = world // (tensor * pipeline * size)
            expected = tensor in (1, 2, 4) and world == data * tensor * pipeline * size and 4 % max(data, 1) == 0
            expected = expected and (size == 1 or 24 % (2 * size) == 0)
            expected = expected and (not sequence or (tensor > 1 and 24 // size % tensor == 0))
            assert works == expected, (world, sequence, tensor, pipeline, size)


def test_without_a_number_of_processes_one_copy_of_the_model_has_as_many_as_it_needs():
    dims = check_layout(context(3, tensor=2))
    assert (dims.world_size, dims.tp, dims.pp, dims.cp, dims.dp, dims.dp_cp) == (6, 2, 1, 3, 1, 3)


@pytest.mark.parametrize("world", [4096, 99_999, 10**9 + 7])
def test_any_number_of_processes_is_answered(world):
    """From the divisors of heads and batch, not from all pairs of numbers, of which there are too many to try."""
    keys, table = refusal(config(), world)
    assert keys == ["training.global_batch_size"]
    # Tensor 1, 2, 4 (8 x 8 ranks would want more than 37 ids), pipeline 1 to 3, data 1, 2, 4.
    assert table.rstrip().endswith("\n  1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48")


def test_of_many_possible_numbers_the_nearest_are_named():
    _, table = refusal(config(batch=2**20, num_hidden_layers=1000), 99_991)
    sizes, _, count = re.search(r"^  ([\d, ]+)( \(the nearest of (\d+)\))$", table, re.MULTILINE).groups()
    named = [int(size) for size in sizes.split(", ")]
    assert len(named) == 64 < int(count)
    assert min(named) < 99_991 < max(named)


def test_every_row_of_the_table_works_and_nothing_else():
    """Against an enumeration of all sizes."""
    for world in range(1, 17):
        possible = {(dims.tp, dims.pp) for dims in possible_layouts(config(), world)}
        for tensor in range(1, 17):
            for pipeline in range(1, 17):
                works = True
                try:
                    dims = check_layout(config(parallel=sizes(tensor, pipeline=pipeline)), world)
                except UserError:
                    works = False

                assert works == ((tensor, pipeline) in possible)
                if works:
                    assert dims.tp * dims.pp * dims.dp == world
                    assert dims.num_micro_batches * dims.dp * 2 == 8

                # 8 query heads, 4 composite heads and 40 features in 3 layers, 4 micro-batches
                data = world // (tensor * pipeline)
                expected = tensor in (1, 2, 4, 8) and 40 % tensor == 0 and pipeline <= 3
                expected = expected and world == data * tensor * pipeline and 4 % max(data, 1) == 0
                # a vocabulary of 37 in parts of equal size leaves the last of 8 ranks some
                assert works == (expected and tensor * tensor <= 37)


def test_a_pipeline_with_few_micro_batches_is_warned_of():
    (warning,) = config_warnings(config(head_norm_init=0.1), ParallelDims(tp=1, pp=4, dp=1, num_micro_batches=4))
    assert "4 micro-batches in a pipeline of 4 stages" in warning
    assert "43%" in warning
    assert not config_warnings(config(head_norm_init=0.1), ParallelDims(tp=1, pp=4, dp=1, num_micro_batches=8))
    assert not config_warnings(config(head_norm_init=0.1), ParallelDims(tp=1, pp=1, dp=1, num_micro_batches=1))


@pytest.mark.parametrize(
    ("seq_length", "context", "document_mask", "words"),
    [
        (16384, 8, True, []),
        (4096 + 64, 2, True, ["chunks of 1,040 tokens"]),
        (4096 + 64, 2, False, []),
        (16384, 16, True, ["1,024 tokens of a sequence"]),
        (4160, 4, True, ["1,040 tokens of a sequence", "a multiple of 2 x 128 x 4 = 1,024"]),
        (64, 1, True, []),
    ],
)
def test_context_groups_that_are_slow_are_warned_of(seq_length, context, document_mask, words):
    settings = config(head_norm_init=0.1)
    data = settings.data.model_copy(update={"seq_length": seq_length, "document_mask": document_mask})
    warnings = config_warnings(settings.model_copy(update={"data": data}), ParallelDims(cp=context))
    assert len(warnings) == len(words)
    for warning, part in zip(warnings, words, strict=True):
        assert f"parallel.context_parallel_size = {context} " in warning
        assert part in warning


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_stages_are_contiguous_and_the_largest_is_as_small_as_can_be(layers, data):
    count = data.draw(st.integers(1, len(layers)))
    parts = balanced_partition(layers, count)
    assert [index for part in parts for index in part] == list(range(len(layers)))
    assert len(parts) == count
    assert all(parts)

    def largest(cuts: tuple[int, ...]) -> int:
        ends = (0, *cuts, len(layers))
        return max(sum(layers[a:b]) for a, b in pairwise(ends))

    best = min(largest(cuts) for cuts in combinations(range(1, len(layers)), count - 1))
    assert max(sum(layers[index] for index in part) for part in parts) == best


def test_work_of_layers():
    """A matrix costs 2 FLOPs an element, scores and values 4 seq_length H d; of experts those of a token."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "mlp_only_layers": [0]}
    model = small_model(num_component_heads=[1, 2, 3], **experts)
    embedding, *blocks, head = layer_flops(model, seq_length=100)
    assert (embedding, head) == (0, 2 * 37 * 24)

    attention = 4 * 24 * 48 + 4 * 100 * 48
    # A component head of keys and of values has 6 x 24 weights and 4 combination entries for each of 6 features.
    component = 2 * 2 * (6 * 24 + 6 * 4)
    dense, routed = 6 * 24 * 40, 2 * 24 * 4 + 2 * 6 * 24 * 10
    assert blocks == [attention + h * component + inner for h, inner in ((1, dense), (2, routed), (3, routed))]


QWEN3_30B_A3B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "attention_variant": "plain",
    "qk_norm": True,
}


@pytest.mark.parametrize(("count", "expected", "by_parameters"), [(2, 1.02, 1.06), (4, 1.02, 1.2), (8, 1.09, 1.46)])
def test_no_stage_has_much_more_work_than_the_mean(count, expected, by_parameters):
    """The head costs as much as three blocks of 128 experts, and has half of the parameters of one."""
    _, *blocks, head = layer_flops(Model(**QWEN3_30B_A3B), seq_length=4096)
    blocks[-1] += head

    def slowest(parts: list[range]) -> float:
        return max(sum(blocks[index] for index in part) for part in parts) * count / sum(blocks)

    stages = pipeline_stages(Model(**QWEN3_30B_A3B), count, seq_length=4096)
    assert slowest([stage.blocks for stage in stages]) <= expected

    # Blocks have equal numbers of parameters, and neither end has enough of its own to lose one.
    size = 48 // count
    assert slowest([range(start, start + size) for start in range(0, 48, size)]) > by_parameters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_ends_keep_a_block_however_large_the_vocabulary(tied, count):
    """DeepSpeed's gradient norm fails on a rank whose only parameters are a norm and a tied matrix."""
    model = small_model(vocab_size=50_000, num_hidden_layers=4, tie_word_embeddings=tied)
    stages = pipeline_stages(model, count, seq_length=12)
    assert [block for stage in stages for block in stage.blocks] == list(range(4))
    assert all(stage.blocks for stage in stages)
    assert [stage.embedding for stage in stages] == [True] + [False] * (count - 1)
    assert [stage.head for stage in stages] == [False] * (count - 1) + [True]


def test_stages_hold_the_parameters_of_the_full_model():
    model = small_model(tie_word_embeddings=True)
    names = [
        [parameter.spec.name for parameter in Decoder(model, stage=stage).parameters()]
        for stage in pipeline_stages(model, 3, seq_length=12)
    ]
    tied = "model.embed_tokens.weight"
    assert names[0][0] == tied

    names[-1].remove(tied)
    joined = [name for stage in names for name in stage]
    assert joined == [parameter.spec.name for parameter in Decoder(model).parameters()]


def test_a_teacher_must_fit_the_layout():
    settings = config(parallel=sizes(4, pipeline=3), num_key_value_heads=8)
    distilled = settings.training.model_copy(update={"distillation": Distillation(teacher="big")})
    settings = settings.model_copy(update={"training": distilled})
    check_teacher(settings, settings.model)

    with pytest.raises(UserError) as refused:
        check_teacher(settings, small_model(num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=2))
    assert {problem.where for problem in refused.value.problems} == {"training.distillation.teacher"}
    assert [(problem.got, problem.expected) for problem in refused.value.problems] == [
        (
            f"big, on {TENSOR} = 4",
            "a divisor of its num_attention_heads = 6: ranks hold equal parts of the query heads",
        ),
        (f"big, on {TENSOR} = 4", "a divisor or a multiple of its num_key_value_heads = 3"),
        (f"big, on {PIPELINE} = 3", "at most its num_hidden_layers = 2"),
    ]
