"""`training.compile`: one graph for all blocks and the loss curve of eager training, in every layout that allows it."""

from __future__ import annotations

import numpy as np
import pytest
from support.distributed import run_distributed
from support.engines import config, layout, new_engine, plain_training, train

pytestmark = pytest.mark.slow

STEPS = 3
MEA = {"attention_variant": "mea", "num_component_heads": 4}
DIFFERENTIAL = {"attention_variant": "differential", "num_component_heads": 4, "num_hidden_layers": 10}
EXPERTS = MEA | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "mlp_only_layers": [1]}
# ranks, parallel layout, model, activation checkpointing, document mask
CASES = {
    "one rank": (1, {}, MEA, "none", False),
    "one rank, documents": (1, {}, MEA, "selective", True),
    "one rank, differential": (1, {}, DIFFERENTIAL, "none", False),
    "one rank, gated": (1, {}, {"attention_variant": "gated", "num_component_heads": 4}, "selective", False),
    "one rank, experts": (1, {}, EXPERTS, "none", False),
    "tp 2, sequence parallel": (2, layout(tensor=2, sequence=True), MEA | {"qk_norm": True}, "selective", False),
    "pp 2": (2, layout(pipeline=2), MEA, "full", False),
    "cp 2": (2, layout(context=2), MEA | {"num_component_heads": 2, "qk_norm": True}, "selective", False),
    "dp 2, ZeRO 2": (2, layout(zero=2), MEA | {"num_component_heads": 2}, "none", False),
}


def curves(names: list[str]) -> list[tuple[list, dict[str, int]]]:
    """This rank's loss and gradient norm of every step, and the numbers of graphs and graph breaks."""
    import torch
    from torch._dynamo.utils import counters

    from megatron_mea.training.distributed import start_distributed, stop_distributed
    from megatron_mea.training.rank_env import RankEnv

    torch.set_num_threads(1)
    start_distributed(RankEnv.from_environment())
    results = []
    for name in names:
        torch._dynamo.reset()
        counters.clear()
        curve = train(engine=new_engine(settings(name, compile=True)), first=1, last=STEPS)
        breaks = sum(counters["graph_break"].values())
        results.append((curve, {"graphs": counters["stats"]["unique_graphs"], "breaks": breaks}))

    stop_distributed()
    return results


def settings(name: str, **training):
    """The configuration of a case, with changes to its training section."""
    _, parallel, model, activation_checkpointing, document_mask = CASES[name]
    training |= {"activation_checkpointing": activation_checkpointing}
    return config(parallel=parallel, model=model, document_mask=document_mask, training=training)


def test_compiled_blocks_train_like_eager_ones():
    for size in (1, 2):
        names = [name for name, case in CASES.items() if case[0] == size]
        for rank_results in run_distributed(curves, size, names, timeout=1500):
            for name, (curve, graphs) in zip(names, rank_results, strict=True):
                expected = plain_training(settings(name))[0][:STEPS]
                np.testing.assert_allclose(curve, expected, rtol=1e-5 if "experts" in name else 2e-4, err_msg=name)
                if "documents" not in name and "experts" not in name:
                    # Layers share a graph, whatever their number.
                    assert graphs == {"graphs": 1, "breaks": 0}, name
                else:
                    assert graphs["breaks"] > 0


def test_layers_that_all_differ_are_all_compiled(monkeypatch):
    """Unless its limit is raised, torch compiles 8 graphs of a function and runs others eagerly."""
    import torch
    from support.models import small_model

    from megatron_mea.model.decoder import Decoder

    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: torch_compile(function, backend=count, **options))
    torch._dynamo.reset()
    heads = {"num_attention_heads": 12, "num_key_value_heads": 12, "num_component_heads": list(range(1, 13))}
    decoder = Decoder(small_model(**heads, attention_variant="mea", num_hidden_layers=12), compile_blocks=True)
    ids = torch.zeros(1, 4, dtype=torch.long)
    decoder(ids, torch.arange(4)[None], ids)

    assert len(graphs) == 12
