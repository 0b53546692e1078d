"""tools/scaling.py and tools/bench/layouts.py: their arithmetic, and the pages that show it."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "bench"))

import layouts
import scaling

from megatron_mea.cluster.plan import make_plan
from megatron_mea.config import load_config
from megatron_mea.config.layout import Layout, check_layout, possible_layouts

ROOT = Path(__file__).parents[1]
ASSUMED = scaling.Machine()


def rows(page: str) -> list[list[str]]:
    """The cells of every table row of a page in docs/."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


@pytest.mark.parametrize("pipeline", [1, 2, 8])
@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
def test_the_stages_make_up_the_plan(pipeline, recomputation):
    config = next(
        config
        for config in scaling.candidates("1B", 8, 64)
        if config.parallel.pipeline_model_parallel_size == pipeline
        and config.training.activation_checkpointing == recomputation
    )
    plan = make_plan(config)
    assert len(plan.stage_flops) == pipeline
    assert sum(plan.stage_flops) == pytest.approx(plan.flops.total)


def walked(stages: list[float], micro_batches: int) -> float:
    """When the last stage is done with the last micro-batch, if each goes through all stages in turn."""
    done = [0.0] * len(stages)
    for _ in range(micro_batches):
        before = 0.0
        for stage, seconds in enumerate(stages):
            before = done[stage] = max(before, done[stage]) + seconds
    return done[-1]


@pytest.mark.parametrize("stages", [[2.0], [1.0, 1.0, 1.0, 1.0], [1.0, 3.0, 2.0], [1.0, 1.0, 1.5]])
@pytest.mark.parametrize("micro_batches", [1, 2, 16])
def test_a_pipeline_waits_for_its_slowest_stage(stages, micro_batches):
    work, idle = scaling.pipeline_seconds(stages, micro_batches)
    assert work + idle == pytest.approx(walked(stages, micro_batches))
    if len(set(stages)) == 1:
        bubble = Layout(1, len(stages), 1, micro_batches).pipeline_bubble
        assert idle / (work + idle) == pytest.approx(bubble)


COMMANDS = re.findall(r"^megatron-mea plan (.*)$", (ROOT / "docs" / "cluster-settings.md").read_text(), re.M)


@pytest.mark.parametrize(("column", "command"), enumerate(COMMANDS, 1))
def test_seconds_are_those_of_the_settings_for_clusters(column, command):
    """docs/cluster-settings.md did the arithmetic by hand."""
    path, *overrides, _, world_size = shlex.split(command)
    config = load_config(ROOT / path, overrides)
    found = scaling.estimate(config, int(world_size), ASSUMED)
    assert found is not None
    said = [(row[0], row[column]) for row in rows("cluster-settings.md") if len(row) == 5]
    (compute,) = (cell for label, cell in said if label == "seconds a step at 40 %")
    assert found.compute == pytest.approx(float(compute), rel=0.005)
    data, tensor = (cell for label, cell in said if label == "takes, seconds")
    assert data.startswith(f"{found.traffic['data']:.3f} at ")
    assert tensor == "-" if found.traffic["tensor"] == 0 else tensor.startswith(f"{found.traffic['tensor']:.2f} at ")
    (one_card,) = (cell for label, cell in said if label == "takes with one card, seconds")
    if one_card != "-":
        cards = scaling.NODE // found.plan.layout.tensor
        slow = scaling.group_seconds(found.plan, "data", scaling.Machine(card=ASSUMED.card / cards))
        assert one_card == f"{slow:.2f}"


def test_a_call_costs_what_is_said():
    plan = make_plan(next(config for config in scaling.candidates("1B", 8, 64) if config.parallel.zero_stage == 1), 8)
    calls = sum(row.count for row in plan.communication if row.group == "data")
    free, dear = (scaling.group_seconds(plan, "data", scaling.Machine(call=call)) for call in (0.0, 1.0))
    assert calls > 0
    assert dear - free == pytest.approx(calls)


@pytest.mark.parametrize(("model", "gpus"), [("1B", 8), ("1B", 512), ("8B", 64)])
def test_the_page_shows_what_the_tool_prints(model, gpus, capsys):
    scaling.fastest([model], [gpus], scaling.BATCH, ASSUMED)
    printed = capsys.readouterr().out.splitlines()
    names, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (printed[0], printed[2]))
    shown = [each for each in rows("scaling.md") if len(each) == len(names) and each[:2] == [model, f"{gpus:,}"]]
    # The last cell compares with the rows before.
    assert [each[:-1] for each in shown] == [row[:-1]]


@pytest.mark.parametrize("processes", layouts.CASES)
def test_every_layout_of_the_processes_is_a_case(processes):
    cases = dict(layouts.all_layouts(processes))
    assert len(cases) == len(list(layouts.all_layouts(processes)))
    found = [check_layout(config, processes) for config in cases.values()]
    assert set(found) == set(possible_layouts(layouts.case(layouts.layout()), processes))


def test_what_is_off_is_shown():
    def shown(*numbers: int) -> str:
        return layouts.agreement([layouts.Compared(0, "data", "all_reduce", *numbers)._asdict()])

    assert shown(2, 2, 100, 100) == "="
    assert shown(2, 2, 100, 90) == "0.900"
    assert shown(2, 3, 100, 100) == "1.000"
    assert shown(0, 3, 0, 100) == "inf"


def test_time_is_planned_by_flops():
    result = {
        "case": "made up",
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
