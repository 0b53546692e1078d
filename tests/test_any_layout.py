"""Checkpoints from any layout into any other: parameters and moments bit for bit, the losses go on to rounding."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_distributed
from engines import config, layout, new_engine, plain_training, state, train

from megatron_mea.checkpoint.folder import Meta, checkpoints_of, damage, folder_name
from megatron_mea.checkpoint.tensors import read_fragments
from megatron_mea.config import Config

STEPS, EACH = 50, 3
UNEVEN = {"num_component_heads": [1, 2, 3, 2, 4], "num_hidden_layers": 5}
"""h' that divides by no tensor group, blocks that divide by no pipeline, a vocabulary of 37."""
TIED = {"tie_word_embeddings": True, "num_hidden_layers": 5}

FOURS = {
    "dp 4, ZeRO 0": layout(zero=0),
    "tp 2 x pp 2": layout(2, pipeline=2),
    "dp 4, ZeRO 3": layout(zero=3),
    "tp 4": layout(4),
    "pp 2 x dp 2": layout(pipeline=2),
    "tp 2 x dp 2, ZeRO 3": layout(2, 3),
    "dp 4, ZeRO 2": layout(zero=2),
    "pp 4": layout(pipeline=4, zero=0),
    "tp 2 x dp 2, ZeRO 1, sequence parallel": layout(2, 1, True),
    "dp 4, ZeRO 1": layout(),
    "tp 2 x pp 2, sequence parallel": layout(2, 1, True, 2),
}
PAIRS = {"tp 2": layout(2), "pp 2": layout(pipeline=2), "dp 2, ZeRO 3": layout(zero=3), "dp 2, ZeRO 1": layout()}


def settings(parallel: dict, model: dict, precision: str = "fp32") -> Config:
    return config(parallel, model, STEPS, training={"precision": precision})


def relay(root: Path, runs: list[tuple[str, Config]]) -> list[list[tuple[float, float]]]:
    """Each run goes on from the newest checkpoint of its name, trains a few steps and saves; returns the losses.

    What DeepSpeed gathers before a save is compared with what it gathers after the next load.
    """
    start()
    curves = []
    for name, each in runs:
        run_dir = root / name
        engine = new_engine(each, initialized=not checkpoints_of(run_dir))
        step = load(engine, run_dir)
        curves.append(train(engine, step + 1, step + EACH))
        save(engine, run_dir, step + EACH)
        # The same layout goes on bit for bit.
        expected = train(engine, step + EACH + 1, step + EACH + 2)
        assert load(engine, run_dir) == step + EACH
        assert train(engine, step + EACH + 1, step + EACH + 2) == expected
    stop()
    return curves


def start() -> None:
    from megatron_mea.training.processes import start_distributed
    from megatron_mea.training.ranks import Ranks

    torch.set_num_threads(1)
    start_distributed(Ranks.from_environment())


def stop() -> None:
    from megatron_mea.training.processes import stop_distributed

    stop_distributed()


def save(engine, run_dir: Path, step: int) -> None:
    from megatron_mea.checkpoint.saver import Saver
    from megatron_mea.config.schema import Checkpoint
    from megatron_mea.training.processes import writers_group

    whole = states(engine)
    if torch.distributed.get_rank() == 0:
        (run_dir / "gathered").mkdir(parents=True, exist_ok=True)
        torch.save(whole, run_dir / "gathered" / folder_name(step))
    tokenizer = run_dir / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    saver = Saver(run_dir, Checkpoint(keep=100), tokenizer, writers_group(), None, lambda line: None)
    saver.save(Meta(step, 0, 0, {}, [], {}, {}, None), engine.fragments(owned=True))
    saver.wait()


def load(engine, run_dir: Path) -> int:
    """The newest checkpoint of a run, if there is one; returns its step."""
    existing = checkpoints_of(run_dir)
    if not existing:
        return 0
    step, folder = existing[-1]
    assert damage(folder) is None
    read_fragments(folder, engine.fragments())
    engine.loaded(step)
    expected = torch.load(run_dir / "gathered" / folder.name)
    found = states(engine)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    torch.distributed.barrier()
    return step


def states(engine) -> dict[str, torch.Tensor]:
    """Of all stages, on all ranks."""
    stages: list[dict[str, torch.Tensor]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(stages, state(engine))
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def check(curves: list[list[tuple[float, float]]], model: dict, first: int = 0, rtol: float = 1e-5) -> None:
    """Against an uninterrupted run of one process in float64."""
    found = list(itertools.chain(*curves))
    expected = plain_training(settings({}, model))[0][first : first + len(found)]
    np.testing.assert_allclose(found, expected, rtol=rtol)


def test_a_relay_of_all_layouts(tmp_path):
    """From one layout to the next, over four, two, one and again four processes."""
    fours = list(FOURS.values())
    legs = [(4, fours[:6]), (2, list(PAIRS.values())), (1, [layout(zero=2)]), (4, fours[6:])]
    curves = []
    for world, layouts in legs:
        ranks = run_distributed(relay, world, tmp_path, [("relay", settings(one, UNEVEN)) for one in layouts])
        assert all(rank == ranks[0] for rank in ranks)
        curves += ranks[0]
    assert len(checkpoints_of(tmp_path / "relay")) == len(FOURS) + len(PAIRS) + 1
    check(curves, UNEVEN)


def test_relays_with_tied_embeddings_and_in_bfloat16(tmp_path):
    tied = [FOURS[name] for name in ("tp 2 x pp 2", "dp 4, ZeRO 3", "pp 2 x dp 2", "dp 4, ZeRO 1")]
    rounded = [FOURS[name] for name in ("tp 2 x pp 2", "tp 2 x dp 2, ZeRO 3", "dp 4, ZeRO 2", "pp 2 x dp 2")]
    runs = [("tied", settings(one, TIED)) for one in tied]
    runs += [("bf16", settings(one, UNEVEN, "bf16")) for one in rounded]
    curves = run_distributed(relay, 4, tmp_path, runs)[0]
    check(curves[:4], TIED)
    check(curves[4:], UNEVEN, rtol=0.05)


def begin(root: Path, runs: list[tuple[str, Config]]) -> None:
    """Trains a few steps from the start under each layout, and saves."""
    start()
    for name, each in runs:
        engine = new_engine(each)
        train(engine, 1, EACH)
        save(engine, root / name, EACH)
    stop()


def go_on(root: Path, names: list[str], layouts: list[Config]) -> list[list[list[tuple[float, float]]]]:
    """Ten steps from every checkpoint under every layout."""
    start()
    curves = []
    for each in layouts:
        engine = new_engine(each, initialized=False)
        curves.append([train(engine, load(engine, root / name) + 1, EACH + 10) for name in names])
    stop()
    return curves


@pytest.mark.full
@pytest.mark.parametrize("model", [UNEVEN, TIED], ids=["uneven", "tied"])
def test_every_layout_into_every_other(tmp_path, model):
    names = list(FOURS)
    for part in (names[:6], names[6:]):
        run_distributed(begin, 4, tmp_path, [(name, settings(FOURS[name], model)) for name in part])
    for part in (names[:6], names[6:]):
        targets = [settings(FOURS[name], model) for name in part]
        for curves in run_distributed(go_on, 4, tmp_path, names, targets, timeout=1200)[0]:
            for curve in curves:
                check([curve], model, first=EACH)
