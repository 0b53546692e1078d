"""Mixture of experts against the float64 reference, and against transformers' Qwen3-MoE."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.models import decoder_and_tensors, expert_cases, name_of, positions_of, small_model, tokens
from support.reference import reference_logits, reference_loss

from megatron_mea.model.decoder import Decoder
from megatron_mea.model.moe import MoE, RouterLosses
from megatron_mea.parallel.grid import TensorGroup
from megatron_mea.parallel.grouped import gather_tokens, grouped_linear, sum_choices
from megatron_mea.parallel.parameter import init_parameters, parameters_by_name


def routers(decoder: Decoder):
    return [block.mlp.gate for block in decoder.blocks if isinstance(block.mlp, MoE)]


@pytest.mark.parametrize("case", expert_cases(), ids=name_of)
def test_loss_and_gradients_equal_the_reference(case):
    model = small_model(**case)
    decoder, tensors = decoder_and_tensors(model)
    ids = tokens(model.vocab_size, 2, 14)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    loss = decoder(inputs, positions_of(inputs), targets)
    loss.backward()
    config = model.model_dump()
    expected = reference_loss(tensors=tensors, config=config, input_ids=inputs, targets=targets) * targets.numel()
    expected.backward()

    assert len(routers(decoder)) == sum(reference.is_routed(config, layer) for layer in range(3)) > 0
    assert abs(loss.item() - expected.item()) <= 1e-12 * abs(expected.item())

    total_norm = torch.stack([tensor.grad.norm() for tensor in tensors.values() if tensor.grad is not None]).norm()
    for name, parameter in parameters_by_name(decoder).items():
        expected_grad = torch.zeros_like(parameter) if tensors[name].grad is None else tensors[name].grad
        assert (parameter.grad - expected_grad).norm() <= 1e-12 * total_norm, name


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("balance", ["sequence", "batch", "none"])
def test_auxiliary_losses_add_their_gradients_and_count_each_choice_once(balance, checkpointing, monkeypatch):
    """Against autograd on the reference's formulas; a validation in between and recomputation count nothing."""
    model = small_model(**expert_cases()[1])
    _, tensors = decoder_and_tensors(model)
    losses = RouterLosses(balance=balance, balance_coef=0.3 * (balance != "none"), z_coef=0.05, gradient_scale=0.25)
    decoder = Decoder(model, router_losses=losses, activation_checkpointing=checkpointing).double()
    for name, parameter in parameters_by_name(decoder).items():
        parameter.data.copy_(tensors[name].detach())

    previous = torch.tensor([3, 0, 5, 1, 1, 2, 8, 4])
    for router in routers(decoder):
        router.stats.previous_counts = previous

    ids = tokens(model.vocab_size, 2, 11)
    with torch.no_grad():
        decoder(ids, positions_of(ids), ids)
    decoder(ids, positions_of(ids), ids).backward()

    routed = []
    original = reference.mixture_of_experts

    def recorded(*args, **kwargs):
        result = original(*args, **kwargs)
        routed.append(result[1:])
        return result

    monkeypatch.setattr(reference, "mixture_of_experts", recorded)
    objective = ids.numel() * reference_loss(tensors=tensors, config=model.model_dump(), input_ids=ids, targets=ids)
    reported = []
    for logits, chosen in routed:
        by_sequence, z = reference.router_losses(logits, chosen)
        if balance == "batch":
            probabilities = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
            by_sequence = (probabilities.mean(1) * previous / previous.sum() * 8).sum(-1)

        objective = objective + 0.25 * (losses.balance_coef * by_sequence + losses.z_coef * z).sum()
        reported.append(by_sequence.sum())

    objective.backward()
    total_norm = torch.stack([tensor.grad.norm() for tensor in tensors.values()]).norm()
    for name, parameter in parameters_by_name(decoder).items():
        assert (parameter.grad - tensors[name].grad).norm() <= 1e-12 * total_norm, name

    for router, (_, chosen), balance_loss in zip(routers(decoder), routed, reported, strict=True):
        assert torch.equal(router.stats.counts, torch.bincount(chosen.flatten(), minlength=8))
        torch.testing.assert_close(router.stats.balance_loss, balance_loss.detach())


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    features=st.tuples(st.sampled_from([4, 6, 8, 16]), st.sampled_from([4, 5, 8, 16])),
    seed=st.integers(0, 2**31),
)
def test_grouped_products_equal_a_loop(dtype, counts, features, seed):
    """Aligned or not, with experts that have no row, and without any row."""
    generator = torch.Generator().manual_seed(seed)
    inner, outer = features
    x = torch.randn(sum(counts), inner, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), outer, inner, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(sum(counts), outer, generator=generator).to(dtype)
    grouped_linear(x, weight, torch.tensor(counts)).backward(upstream)

    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    expected_weight_grad = torch.zeros_like(weight, dtype=torch.float64)
    expected_x_grad = torch.zeros_like(x, dtype=torch.float64)
    for row, expert in enumerate(experts):
        expected_weight_grad[expert] += torch.outer(upstream[row].double(), x[row].double()).detach()
        expected_x_grad[row] = (upstream[row].double() @ weight[expert].double()).detach()

    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(weight.grad.double(), expected_weight_grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), expected_x_grad, rtol=tolerance, atol=tolerance)


def test_gathering_and_summing_are_each_other_s_transposes():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([9, 0, 3, 4, 7])
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, order, 2), x)
    assert torch.autograd.gradcheck(lambda rows: sum_choices(rows, order, num_tokens=5, top_k=2), rows)
    inner = (gather_tokens(x, order, 2) * rows).sum()
    torch.testing.assert_close(inner, (x * sum_choices(rows, order, num_tokens=5, top_k=2)).sum())


def test_experts_start_alike_on_every_layout_and_unlike_each_other():
    model = small_model(**expert_cases()[0])
    whole = Decoder(model)
    init_parameters(whole, 5)
    parameters = parameters_by_name(whole)
    shards: dict[str, list[torch.Tensor]] = {}
    for rank in range(4):
        decoder = Decoder(model, tp=TensorGroup(size=4, rank=rank))
        init_parameters(decoder, 5)
        for name, parameter in parameters_by_name(decoder).items():
            shards.setdefault(name, []).append(parameter.detach())

    for name in (name for name in parameters if ".experts." in name):
        assert torch.equal(torch.cat(shards[name]), parameters[name]), name
        # No expert is a copy of another.
        assert len({tuple(expert.flatten().tolist()) for expert in parameters[name]}) == 8

    down = torch.cat([p.detach().flatten() for name, p in parameters.items() if name.endswith("experts.down_proj")])
    assert abs(down.std() / (0.3 / 6**0.5) - 1) < 0.05


def test_logits_loss_and_gradients_equal_transformers():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    model = small_model(**expert_cases()[0] | {"mlp_only_layers": [1]})
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared += ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "num_experts")
    shared += ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers")
    config = Qwen3MoeConfig(
        **{key: getattr(model, key) for key in shared},
        rope_parameters=model.rope_parameters,
        tie_word_embeddings=False,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    decoder, _ = decoder_and_tensors(model)
    parameters = parameters_by_name(decoder)
    stock = Qwen3MoeForCausalLM(config).double().train()
    stock.load_state_dict({name: parameter.detach() for name, parameter in parameters.items()}, strict=True)

    ids = tokens(model.vocab_size, 2, 20)
    logits = decoder.logits(decoder.forward_hidden(ids, positions_of(ids)))
    output = stock(input_ids=ids, labels=ids)
    # Its softmax over experts is float32 in a float64 model.
    torch.testing.assert_close(logits, output.logits, rtol=1e-5, atol=1e-5)

    loss = decoder(ids[:, :-1], positions_of(ids[:, :-1]), ids[:, 1:]) / ids[:, 1:].numel()
    assert abs(loss.item() - output.loss.item()) <= 1e-6

    loss.backward()
    output.loss.backward()
    total_norm = torch.stack([parameter.grad.norm() for parameter in parameters.values()]).norm()
    for name, parameter in stock.named_parameters():
        assert (parameter.grad - parameters[name].grad).norm() <= 1e-5 * total_norm, name


def test_logits_of_the_reference_equal_those_of_the_decoder():
    model = small_model(**expert_cases()[2])
    decoder, tensors = decoder_and_tensors(model)
    ids = tokens(model.vocab_size, 1, 9)
    actual = decoder.logits(decoder.forward_hidden(ids, positions_of(ids)))
    expected = reference_logits(tensors=tensors, config=model.model_dump(), input_ids=ids)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("balance", ["sequence", "batch"])
def test_balance_losses_balance(balance):
    """A router that prefers three experts spreads its tokens when it descends on the balance loss alone."""
    losses = RouterLosses(balance=balance, balance_coef=1.0, gradient_scale=0.25)
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(4, 64, 24, generator=generator) + 1
    moe = MoE(small_model(**expert_cases()[0]), 0, losses=losses)
    init_parameters(moe, 1)
    moe.gate.weight.data[:3] += 0.1

    optimizer, loads = torch.optim.Adam([moe.gate.weight], lr=0.01), []
    for _ in range(60):
        weights, _ = moe.gate(hidden_states)
        (weights.sum() * 0).backward()
        stats = moe.gate.stats
        loads.append((stats.counts.max() / stats.counts.double().mean()).item())
        stats.previous_counts, stats.counts, stats.balance_loss = stats.counts, None, None
        optimizer.step()
        optimizer.zero_grad()

    assert loads[0] > 2.5
    assert loads[-1] < 1.5, loads
