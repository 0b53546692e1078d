"""Checkpoints from any layout into any other: parameters and moments bit for bit, losses up to rounding."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from support.distributed import run_distributed
from support.engines import config, layout, new_engine, plain_training, state, train

from megatron_mea.checkpoint.folder import CheckpointMetadata, complete_checkpoints, find_corruption, folder_name
from megatron_mea.checkpoint.tensors import read_fragments
from megatron_mea.config import Config

pytestmark = pytest.mark.slow

STEPS, LEG = 60, 3
UNEVEN = {"num_component_heads": [1, 2, 3, 2, 4], "num_hidden_layers": 5}
"""No group divides h' or the vocabulary of 37, no pipeline the number of blocks."""
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "mlp_only_layers": [1]}
TIED = {"tie_word_embeddings": True, "num_hidden_layers": 5}

FOURS = {
    "dp 4, ZeRO 0": layout(zero=0),
    "tp 2 x pp 2": layout(tensor=2, pipeline=2),
    "dp 4, ZeRO 3": layout(zero=3),
    "tp 4": layout(tensor=4),
    "pp 2 x dp 2": layout(pipeline=2),
    "tp 2 x dp 2, ZeRO 3": layout(tensor=2, zero=3),
    "cp 2 x dp 2, ZeRO 3": layout(context=2, zero=3),
    "dp 4, ZeRO 2": layout(zero=2),
    "cp 2 x tp 2": layout(context=2, tensor=2),
    "pp 4": layout(pipeline=4, zero=0),
    "tp 2 x dp 2, ZeRO 1, sequence parallel": layout(tensor=2, zero=1, sequence=True),
    "dp 4, ZeRO 1": layout(),
    "tp 2 x pp 2, sequence parallel": layout(tensor=2, zero=1, sequence=True, pipeline=2),
}
PAIRS = {
    "tp 2": layout(tensor=2),
    "pp 2": layout(pipeline=2),
    "cp 2": layout(context=2),
    "dp 2, ZeRO 3": layout(zero=3),
    "dp 2, ZeRO 1": layout(),
}


def settings(parallel: dict, model: dict, *, precision: str = "fp32") -> Config:
    return config(parallel=parallel, model=model, steps=STEPS, training={"precision": precision})


def relay(root: Path, runs: list[tuple[str, Config]]) -> list[list[tuple[float, float]]]:
    """Resumes each run from the newest checkpoint of its name, trains a few steps and saves; returns the curves.

    The state that DeepSpeed gathers before a save is compared with that after the next load.
    """
    start()
    curves = []
    for name, run_config in runs:
        run_dir = root / name
        engine = new_engine(run_config, initialized=not complete_checkpoints(run_dir))
        step = load(engine, run_dir)
        curves.append(train(engine=engine, first=step + 1, last=step + LEG))
        save(engine=engine, run_dir=run_dir, step=step + LEG)

        # The same layout resumes bit for bit.
        expected = train(engine=engine, first=step + LEG + 1, last=step + LEG + 2)
        assert load(engine, run_dir) == step + LEG
        assert train(engine=engine, first=step + LEG + 1, last=step + LEG + 2) == expected

    stop()
    return curves


def start() -> None:
    from megatron_mea.training.distributed import start_distributed
    from megatron_mea.training.rank_env import RankEnv

    torch.set_num_threads(1)
    start_distributed(RankEnv.from_environment())


def stop() -> None:
    from megatron_mea.training.distributed import stop_distributed

    stop_distributed()


def save(*, engine, run_dir: Path, step: int) -> None:
    from megatron_mea.checkpoint.saver import Saver
    from megatron_mea.config.schema import Checkpoint
    from megatron_mea.training.distributed import writers_group

    """Saves a checkpoint, and beside it the state as DeepSpeed gathers it; collective."""
    gathered = gather_state(engine)
    if torch.distributed.get_rank() == 0:
        (run_dir / "gathered").mkdir(parents=True, exist_ok=True)
        torch.save(gathered, run_dir / "gathered" / folder_name(step))

    tokenizer = run_dir / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    saver = Saver(
        run_dir=run_dir,
        settings=Checkpoint(keep=100),
        tokenizer=tokenizer,
        group=writers_group(),
        lease=None,
        log=lambda line: None,
    )
    metadata = CheckpointMetadata(
        step=step, samples=0, tokens=0, config={}, data=[], layout={}, versions={}, validation_loss=None
    )
    saver.save(metadata, engine.state.fragments(owned=True))
    saver.wait()


def load(engine, run_dir: Path) -> int:
    """Loads the newest checkpoint of a run, if there is one; returns its step, or 0. Collective."""
    checkpoints = complete_checkpoints(run_dir)
    if not checkpoints:
        return 0

    step, folder = checkpoints[-1]
    assert find_corruption(folder) is None
    read_fragments(folder, engine.state.fragments())
    engine.state.sync_after_load(step)

    expected = torch.load(run_dir / "gathered" / folder.name)
    actual = gather_state(engine)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())
    torch.distributed.barrier()
    return step


def gather_state(engine) -> dict[str, torch.Tensor]:
    """The state of all stages, on all ranks; collective."""
    stages: list[dict[str, torch.Tensor]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(stages, state(engine))
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def check(curves: list[list[tuple[float, float]]], model: dict, *, first: int = 0, rtol: float = 1e-5) -> None:
    """Compares consecutive curves with an uninterrupted run of one process in float64, from step `first` + 1."""
    actual = list(itertools.chain(*curves))
    expected = plain_training(settings({}, model))[0][first : first + len(actual)]
    np.testing.assert_allclose(actual, expected, rtol=rtol)


def test_a_relay_of_all_layouts(tmp_path):
    """From one layout to the next, over four, two, one and again four processes."""
    fours = list(FOURS.values())
    launches = [(4, fours[:6]), (2, list(PAIRS.values())), (1, [layout(zero=2)]), (4, fours[6:])]
    curves = []
    for world_size, layouts in launches:
        runs = [("relay", settings(parallel, UNEVEN)) for parallel in layouts]
        curves_by_rank = run_distributed(relay, world_size, tmp_path, runs, timeout=900)
        assert all(rank_curves == curves_by_rank[0] for rank_curves in curves_by_rank)
        curves += curves_by_rank[0]

    assert len(complete_checkpoints(tmp_path / "relay")) == len(FOURS) + len(PAIRS) + 1
    check(curves, UNEVEN)


def test_relays_with_tied_embeddings_with_experts_and_in_bfloat16(tmp_path):
    tied = [FOURS[name] for name in ("tp 2 x pp 2", "dp 4, ZeRO 3", "pp 2 x dp 2", "dp 4, ZeRO 1")]
    bf16 = [FOURS[name] for name in ("tp 2 x pp 2", "cp 2 x dp 2, ZeRO 3", "dp 4, ZeRO 2", "cp 2 x tp 2")]
    experts = [FOURS[name] for name in ("tp 2 x dp 2, ZeRO 3", "cp 2 x tp 2", "dp 4, ZeRO 3")]
    runs = [("tied", settings(parallel, TIED)) for parallel in tied]
    runs += [("bf16", settings(parallel=parallel, model=UNEVEN, precision="bf16")) for parallel in bf16]
    runs += [("experts", settings(parallel, EXPERTS)) for parallel in experts]
    runs += [("experts-bf16", settings(parallel=parallel, model=EXPERTS, precision="bf16")) for parallel in experts[:2]]
    curves = run_distributed(relay, 4, tmp_path, runs, timeout=900)[0]
    check(curves[:4], TIED)
    check(curves=curves[4:8], model=UNEVEN, rtol=0.05)
    check(curves[8:11], EXPERTS)
    # A router whose input is rounded otherwise may choose other experts.
    check(curves=curves[11:], model=EXPERTS, rtol=0.05)


def begin(root: Path, runs: list[tuple[str, Config]]) -> None:
    """Trains a few steps from the start under each layout, and saves."""
    start()
    for name, run_config in runs:
        engine = new_engine(run_config)
        train(engine=engine, first=1, last=LEG)
        save(engine=engine, run_dir=root / name, step=LEG)

    stop()


def resume(root: Path, names: list[str], configs: list[Config]) -> list[list[list[tuple[float, float]]]]:
    """Curves of ten steps from every checkpoint under every layout: by layout, then by checkpoint."""
    start()
    curves = []
    for run_config in configs:
        engine = new_engine(run_config, initialized=False)
        curves.append([train(engine=engine, first=load(engine, root / name) + 1, last=LEG + 10) for name in names])

    stop()
    return curves


@pytest.mark.full
@pytest.mark.parametrize("model", [UNEVEN, TIED], ids=["uneven", "tied"])
def test_every_layout_into_every_other(tmp_path, model):
    names = list(FOURS)
    for launch in (names[:6], names[6:]):
        run_distributed(begin, 4, tmp_path, [(name, settings(FOURS[name], model)) for name in launch])

    for launch in (names[:6], names[6:]):
        targets = [settings(FOURS[name], model) for name in launch]
        for curves in run_distributed(resume, 4, tmp_path, names, targets, timeout=1200)[0]:
            for curve in curves:
                check(curves=[curve], model=model, first=LEG)
