"""A run with `hlc_form: latent` through the commands: what is recorded of its heads, and its report."""

from __future__ import annotations

import pytest
import torch

from megatron_mea.attention.latent import block_features, block_pairs
from megatron_mea.cli import main
from megatron_mea.experiments.read_head_stats import read_head_stats
from megatron_mea.training.head_stats import head_tensors, sizes_by_head


@pytest.mark.slow
def test_a_run_and_its_report(tiny, tmp_path, one_engine):
    latent = {"num_component_heads": None, "hlc_form": "latent", "key_latent_dim": 12, "value_latent_dim": 10}
    settings = {f"model.{key}": value for key, value in latent.items()}
    run, page = tmp_path / "run", tmp_path / "report/page.html"
    config = tiny.write_config(tmp_path / "run.yaml", **settings, **{"run.dir": str(run), "logging.tensorboard": True})
    assert main(["train", str(config)]) == 0

    history = read_head_stats(run)
    assert history.steps == [0, 2, 4]
    assert {name.removeprefix("layers."): values.shape for name, values in history.matrices.items()} == {
        f"{layer}.self_attn.{matrix}": (3, latents, 2)
        for layer in (0, 1)
        for matrix, latents in (("hlc_k", 6), ("hlc_v", 10))
    }
    # The first combinations are of ones.
    assert history.matrices["layers.1.self_attn.hlc_k"][0].tolist() == block_pairs([1, 1, 2, 2], 2)[..., 0].tolist()
    assert history.outputs.keys() == {"layers.0.self_attn", "layers.1.self_attn"}

    assert main(["report", str(run), "--out", str(page)]) == 0
    figures = {path.name.removeprefix("page-") for path in page.parent.glob("*.png")}
    assert figures >= {"hlc_k-mea-latent.png", "hlc_v-mea-latent.png", "heads-mea-latent.png"}
    assert "no row of head statistics" not in page.read_text()


def test_sizes_of_each_head():
    """Two numbers of a pair, or d features of a value, are one number a head."""
    keys = torch.tensor([[[3.0, 4.0], [0.0, -1.0]]])
    assert sizes_by_head(keys, num_composites=2).tolist() == [[5, 1]]
    assert sizes_by_head(torch.tensor([[1.0, -2, 2, 0, 0, 7]]), num_composites=2).tolist() == [[3, 7]]

    values = sizes_by_head(block_features(7, num_composites=2, head_dim=4), num_composites=2)
    names = head_tensors({"model.layers.0.self_attn.hlc_v.weight": values}, {})
    assert {name: tensor.shape for name, tensor in names.items()} == {"hlc/layers.0.self_attn.hlc_v": (7, 2)}
