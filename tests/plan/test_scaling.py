"""tools/scaling.py and tools/bench/layouts.py: their arithmetic, and the pages that show its results."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import astuple
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))

import layouts
import scaling

from megatron_mea.config import Config, load_config
from megatron_mea.config.layout import check_layout, possible_layouts
from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.plan.plan import make_plan

ROOT = Path(__file__).parents[2]
MACHINE = scaling.Machine()


def table_rows(page: str) -> list[list[str]]:
    """The cells of every table row of a page in docs/."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


@pytest.mark.parametrize("pipeline", [1, 2, 8])
@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
def test_the_stages_make_up_the_plan(pipeline, recomputation):
    config = next(
        config
        for config in scaling.candidates(model="1B", gpus=8, batch=64)
        if config.parallel.pipeline_model_parallel_size == pipeline
        and config.training.activation_checkpointing == recomputation
    )
    plan = make_plan(config)
    assert len(plan.stage_flops) == pipeline
    assert sum(plan.stage_flops) == pytest.approx(plan.flops.total)


def simulated_seconds(stage_seconds: list[float], micro_batches: int) -> float:
    """When the last stage is done with the last micro-batch, if each goes through all stages in turn."""
    done = [0.0] * len(stage_seconds)
    for _ in range(micro_batches):
        previous_done = 0.0
        for stage, seconds in enumerate(stage_seconds):
            previous_done = done[stage] = max(previous_done, done[stage]) + seconds

    return done[-1]


@pytest.mark.parametrize("stage_seconds", [[2.0], [1.0, 1.0, 1.0, 1.0], [1.0, 3.0, 2.0], [1.0, 1.0, 1.5]])
@pytest.mark.parametrize("micro_batches", [1, 2, 16])
def test_a_pipeline_waits_for_its_slowest_stage(stage_seconds, micro_batches):
    compute, idle = scaling.pipeline_seconds(stage_seconds, micro_batches)
    assert compute + idle == pytest.approx(simulated_seconds(stage_seconds, micro_batches))

    if len(set(stage_seconds)) == 1:
        dims = ParallelDims(pp=len(stage_seconds), num_micro_batches=micro_batches)
        assert idle / (compute + idle) == pytest.approx(dims.pipeline_bubble)


COMMANDS = re.findall(r"^megatron-mea plan (.*)$", (ROOT / "docs" / "cluster-settings.md").read_text(), re.M)


@pytest.mark.parametrize(("column", "command"), enumerate(COMMANDS, 1))
def test_seconds_are_those_of_the_settings_for_clusters(column, command):
    """docs/cluster-settings.md did the arithmetic by hand."""
    path, *overrides, _, world_size = shlex.split(command)
    config = load_config(ROOT / path, overrides)
    estimate = scaling.estimate(config=config, gpus=int(world_size), machine=MACHINE)
    assert estimate is not None

    documented = [(row[0], row[column]) for row in table_rows("cluster-settings.md") if len(row) == 5]
    (compute,) = (cell for label, cell in documented if label == "seconds a step at 40 %")
    assert estimate.compute == pytest.approx(float(compute), rel=0.005)

    data, tensor = (cell for label, cell in documented if label == "takes, seconds")
    tensor_seconds = estimate.traffic["tensor"]
    assert data.startswith(f"{estimate.traffic['data']:.3f} at ")
    assert tensor == "-" if tensor_seconds == 0 else tensor.startswith(f"{tensor_seconds:.2f} at ")

    (one_card,) = (cell for label, cell in documented if label == "takes with one card, seconds")
    if one_card != "-":
        cards = scaling.GPUS_PER_NODE // estimate.plan.dims.tp
        slow_machine = scaling.Machine(card=MACHINE.card / cards)
        seconds = scaling.group_seconds(plan=estimate.plan, group="data", machine=slow_machine)
        assert one_card == f"{seconds:.2f}"


def test_a_call_costs_what_is_said():
    candidates = scaling.candidates(model="1B", gpus=8, batch=64)
    config = next(config for config in candidates if config.parallel.zero_stage == 1)
    plan = make_plan(config, world_size=8)
    without_latency, with_latency = (
        scaling.group_seconds(plan=plan, group="data", machine=scaling.Machine(call=call)) for call in (0.0, 1.0)
    )

    calls = sum(row.count for row in plan.communication if row.group == "data")
    assert calls > 0
    assert with_latency - without_latency == pytest.approx(calls)


def test_context_ranks_gather_inside_a_node_and_share_a_sequence():
    overrides = ["parallel.context_parallel_size=4", "training.global_batch_size=64"]
    config = load_config(str(ROOT / "configs/mea-8b.yaml"), overrides)
    alone = config.model_copy(update={"parallel": config.parallel.model_copy(update={"context_parallel_size": 1})})
    estimate, estimate_alone = (scaling.estimate(config=each, gpus=64, machine=MACHINE) for each in (config, alone))
    assert estimate is not None
    assert estimate_alone is not None
    # Every rank does a 64th of the work in both.
    assert estimate.compute == pytest.approx(estimate_alone.compute, rel=1e-3)

    size = sum(row.bytes for row in estimate.plan.communication if row.group == "context")
    assert estimate.traffic["context"] == pytest.approx(size * 3 / 4 / MACHINE.nvlink)
    assert estimate_alone.traffic["context"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("model", "gpus"), [("1B", 8), ("1B", 512), ("8B", 64), ("30B-A3B", 512)])
def test_the_page_shows_what_the_tool_prints(model, gpus, capsys):
    scaling.fastest(models=[model], gpu_counts=[gpus], batch=scaling.BATCH, machine=MACHINE)
    printed = capsys.readouterr().out.splitlines()
    names, expected = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (printed[0], printed[2]))

    documented = [row for row in table_rows("scaling.md") if len(row) == len(names) and row[:2] == [model, f"{gpus:,}"]]
    # The last cell compares with the rows before.
    assert [row[:-1] for row in documented] == [expected[:-1]]


@pytest.mark.parametrize("processes", layouts.CASES)
def test_every_layout_of_the_processes_is_a_case(processes):
    cases = dict(layouts.all_layouts(processes))
    assert len(cases) == len(list(layouts.all_layouts(processes)))

    sizes = {astuple(check_layout(config, processes))[:4] for config in cases.values()}
    possible = possible_layouts(layouts.case(layouts.layout(context=2)), processes)
    assert sizes == {astuple(dims)[:4] for dims in possible}


def test_what_is_off_is_shown():
    def agreement(*, calls: tuple[int, int], sizes: tuple[int, int]) -> str:
        """The cell for counted and planned `calls` and `sizes`."""
        row = layouts.Compared(
            stage=0,
            group="data",
            collective="all_reduce",
            calls=calls[0],
            planned_calls=calls[1],
            bytes=sizes[0],
            planned_bytes=sizes[1],
        )
        return layouts.agreement([row._asdict()])

    assert agreement(calls=(2, 2), sizes=(100, 100)) == "="
    assert agreement(calls=(2, 2), sizes=(100, 90)) == "0.900"
    assert agreement(calls=(2, 3), sizes=(100, 100)) == "1.000"
    assert agreement(calls=(0, 3), sizes=(0, 100)) == "inf"


def test_time_is_planned_by_flops():
    result = {
        "case": "invented",
        "peak_bytes": [2_000_000],
        "planned_peak_bytes": [1_000_000],
        "cpu_seconds_computing": 4.0,
        "cpu_seconds_sending": 0.5,
        "planned_flops": 300.0,
        "collectives": [],
    }
    (line,) = layouts.lines(result, speed=100.0)
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[-7:] == ["2.0", "1.0", "0.500", "4.00", "3.00", "0.75", "0.50"]


@pytest.mark.parametrize("row", [row for row in table_rows("moe.md") if len(row) == 11 and row[0].isdigit()], ids=str)
def test_the_page_of_experts_shows_what_is_planned(row):
    gpus, sizes, zero_stage, recomputation = row[:4]
    tensor, pipeline, _ = (int(size) for size in sizes.split(" x "))
    overrides = [
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.pipeline_model_parallel_size={pipeline}",
        f"parallel.sequence_parallel={str(tensor > 1).lower()}",
        f"parallel.zero_stage={zero_stage}",
        f"training.activation_checkpointing={recomputation}",
    ]
    config = load_config(str(ROOT / "configs/paper/qwen3-30b-a3b-full.yaml"), overrides)
    estimate = scaling.estimate(config=config, gpus=int(gpus), machine=MACHINE)
    assert estimate is not None

    worst = max(stage.total for stage in estimate.plan.worst_case_memory)
    seconds = [estimate.seconds, estimate.compute, estimate.idle, estimate.traffic["tensor"], estimate.traffic["data"]]
    cells = [gpus, f"{tensor} x {pipeline} x {estimate.plan.dims.dp}", zero_stage, recomputation]
    cells += [f"{size / 2**30:.1f}" for size in (estimate.memory, worst)]
    assert row == cells + [f"{value:.1f}" for value in seconds]


STEP_TOKENS = 4_194_304
LONG_ROWS = [row for row in table_rows("long-context.md") if len(row) == 10 and row[0] in {"32k", "128k", "1M"}]
MEMORY_ROWS = [row for row in table_rows("long-context.md") if len(row) == 9 and row[0][0].isdigit()]


def long_context_config(tokens: str, sizes: str, *overrides: str) -> Config:
    """configs/mea-8b.yaml with windows of this length, on this layout (tensor x context x data)."""
    tensor, context, _ = (int(size) for size in sizes.split(" x "))
    length = {"32k": 1 << 15, "128k": 1 << 17, "1M": 1 << 20}[tokens]
    layout = [
        f"data.seq_length={length}",
        f"model.max_position_embeddings={length}",
        f"training.global_batch_size={STEP_TOKENS // length}",
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.sequence_parallel={str(tensor > 1).lower()}",
        f"parallel.context_parallel_size={context}",
    ]
    return load_config(str(ROOT / "configs/mea-8b.yaml"), [*layout, *overrides])


@pytest.mark.parametrize("row", LONG_ROWS, ids=str)
def test_the_recipes_for_long_contexts_show_what_is_planned(row):
    tokens, gpus, sizes, zero_stage, recomputation, *cells = row
    zero_and_recomputation = (f"parallel.zero_stage={zero_stage}", f"training.activation_checkpointing={recomputation}")
    config = long_context_config(tokens, sizes, *zero_and_recomputation)
    estimate = scaling.estimate(config=config, gpus=int(gpus), machine=MACHINE)
    assert estimate is not None
    assert estimate.plan.dims.dp == int(sizes.rpartition(" ")[2])

    seconds = [f"{estimate.traffic[group]:.2f}" for group in ("tensor", "context", "data")]
    assert cells == [f"{estimate.memory / 2**30:.1f}", f"{estimate.seconds:,.1f}", *seconds]


@pytest.mark.parametrize("row", MEMORY_ROWS, ids=str)
def test_the_memory_of_long_contexts_is_what_is_planned(row):
    where, sizes, zero_and_recomputation, components, *cells = row
    tokens, gpus = where.split(", ")
    zero_stage, recomputation = zero_and_recomputation.split(", ")
    overrides = (
        f"parallel.zero_stage={zero_stage}",
        f"training.activation_checkpointing={recomputation}",
        f"model.num_component_heads={components}",
    )
    (stage,) = make_plan(long_context_config(tokens, sizes, *overrides), world_size=int(gpus)).memory
    parts = (stage.weights, stage.gradients, stage.master_and_moments, stage.peak_forward_backward, stage.total)
    assert cells == [f"{size / 2**30:.1f}" for size in parts]
