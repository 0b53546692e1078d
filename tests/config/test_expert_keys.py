"""Keys of mixtures of experts: what contradicts, and which layouts experts can have."""

from __future__ import annotations

import pytest

from megatron_mea.config import Config
from megatron_mea.config.layout import check_layout
from megatron_mea.config.load import parse_config
from megatron_mea.errors import UserError

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_hidden_layers": 4}


def parse(*, model: dict, training: dict | None = None, parallel: dict | None = None) -> Config:
    return parse_config(
        {
            "model": model,
            "data": {"tokenizer": "t", "train": [{"path": "p"}]},
            "training": training or {},
            "parallel": parallel or {},
            "run": {"dir": "r"},
        }
    )


@pytest.mark.parametrize(
    ("model", "training", "parallel", "where", "expected"),
    [
        ({"num_experts_per_tok": 7}, {}, {}, "model.num_experts_per_tok", "at most model.num_experts = 6"),
        ({"mlp_only_layers": [1, 4]}, {}, {}, "model.mlp_only_layers", "layers from 0 to 3"),
        ({"mlp_only_layers": [-1]}, {}, {}, "model.mlp_only_layers.0", "greater than or equal to 0"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, {}, {}, "model.num_experts", "a layer that model.mlp_only_layers"),
        ({"decoder_sparse_step": 5}, {}, {}, "model.num_experts", "0, or a layer"),
        ({"decoder_sparse_step": 0}, {}, {}, "model.decoder_sparse_step", "greater than 0"),
        ({"moe_intermediate_size": None}, {}, {}, "model.moe_intermediate_size", "the width of an expert"),
        ({"num_experts": 0}, {}, {}, "model.num_experts_per_tok", "8 where model.num_experts is 0"),
        ({"num_experts": 0}, {}, {}, "model.moe_intermediate_size", "None where model.num_experts is 0"),
        ({"num_experts": -1}, {}, {}, "model.num_experts", "greater than or equal to 0"),
        ({}, {"router_z_loss_coef": -0.1}, {}, "training.router_z_loss_coef", "greater than or equal to 0"),
        ({"router_aux_loss_coef": 0.5}, {"balance": "none"}, {}, "model.router_aux_loss_coef", "balance is none"),
        ({}, {"balance": "Sequence"}, {}, "training.balance", "sequence"),
        ({}, {}, {"expert_model_parallel_size": 2}, "parallel.expert_model_parallel_size", "1: experts are sharded"),
    ],
)
def test_what_contradicts_is_refused_by_its_key(model, training, parallel, where, expected):
    with pytest.raises(UserError) as caught:
        parse(model=EXPERTS | model, training=training, parallel=parallel)

    problems = {problem.where: problem for problem in caught.value.problems}
    assert where in problems, caught.value
    assert expected in problems[where].expected


def test_losses_of_routers_without_experts_are_refused():
    with pytest.raises(UserError) as caught:
        parse(model={}, training={"balance": "batch", "router_z_loss_coef": 0.1})

    assert {problem.where for problem in caught.value.problems} == {"training.balance", "training.router_z_loss_coef"}


def test_a_tensor_group_divides_the_experts_and_of_dense_layers_the_width():
    model = EXPERTS | {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1409}
    assert check_layout(parse(model=model, parallel={"tensor_model_parallel_size": 2})).tp == 2
    with pytest.raises(UserError, match=r"model.num_experts = 6"):
        check_layout(parse(model=model, parallel={"tensor_model_parallel_size": 4}))
    with pytest.raises(UserError, match=r"model.intermediate_size = 1409"):
        check_layout(parse(model=model | {"mlp_only_layers": [1]}, parallel={"tensor_model_parallel_size": 2}))


def test_layers_are_routed_as_qwen3_moe_counts():
    model = parse(model=EXPERTS | {"num_hidden_layers": 9, "decoder_sparse_step": 2, "mlp_only_layers": [3, 4]}).model
    assert model.routed_layers == [1, 5, 7]
