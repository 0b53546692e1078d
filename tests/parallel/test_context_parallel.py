"""Context parallelism of the model in float64: losses and gradients equal those of one process to 1e-12."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed import run_distributed
from support.models import decoder_and_tensors, expert_cases, small_model, variants
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mea.attention.hlc import KeyValueProjection
from megatron_mea.config.schema import Model
from megatron_mea.model.decoder import Decoder
from megatron_mea.model.moe import MoE, RouterLosses
from megatron_mea.parallel.grid import ContextGroup, TensorGroup
from megatron_mea.parallel.layers import IGNORE_INDEX
from megatron_mea.parallel.parameter import init_parameters, parameters_by_name
from megatron_mea.training.head_stats import HeadOutputs

pytestmark = pytest.mark.slow

SEQ, BATCH = 24, 2
GATHERS = (None, True, False)
"""Whether component heads are gathered; None leaves it to the layer."""
CHECKPOINTING = ("none", "selective", "full")
BORDERS = [
    [[], []],
    [[5, 6, 7, 13], [12]],
    [[1, 23], [3, 4, 6, 8, 9, 16, 18, 20]],
    [[3, 6, 9, 12, 15, 18, 21], [4, 8, 12, 16, 20]],
]
"""Where documents begin: nowhere else, inside chunks, beside their borders, and on those of 2 x 2, 2 x 3 and 2 x 4."""


class TrafficCount(TorchDispatchMode):
    """Calls and payload bytes of the collectives inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("c10d::"):
            name = func.name().removeprefix("c10d::").strip("_")
            largest = max((x for x in tree_leaves(args) if isinstance(x, torch.Tensor)), key=torch.numel)
            self.calls[name] += 1
            self.bytes[name] += largest.numel() * largest.element_size()
        return func(*args, **(kwargs or {}))


def position_ids(borders: list[list[int]]) -> torch.Tensor:
    """(batch, SEQ), from 0 at each border."""
    starts = torch.zeros(len(borders), SEQ, dtype=torch.int64)
    for row, row_borders in zip(starts, borders, strict=True):
        row[row_borders] = torch.tensor(row_borders, dtype=torch.int64)
    return torch.arange(SEQ) - starts.cummax(1).values


def targets_of(ids: torch.Tensor, *, where: int) -> torch.Tensor:
    """The next tokens, some or all but those of a chunk left out, so that other ranks have nothing to predict."""
    targets = ids.roll(-1, 1)
    targets[0, 3] = IGNORE_INDEX
    if where % 3 == 1:
        targets[:, 3:] = IGNORE_INDEX
        targets[0, 1] = 7
    return targets


def groups(size: int, tensor: int) -> tuple[ContextGroup, Any]:
    """The context group of this rank and the process group of its tensor group: tensor ranks are neighbours."""
    rank = dist.get_rank()
    context_groups = [dist.new_group(list(range(first, size * tensor, tensor))) for first in range(tensor)]
    tensor_groups = [dist.new_group(list(range(first, first + tensor))) for first in range(0, size * tensor, tensor)]
    cp = ContextGroup(size=size, rank=rank // tensor, group=context_groups[rank % tensor])
    return cp, tensor_groups[rank // tensor]


def check_all(cases: list[dict], size: int, tensor: int) -> int:
    """Checks every case in turn with documents, ways to gather, recomputation and sequence parallelism.

    Two context ranks try every way to gather.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cp, tensor_group = groups(size, tensor)
    count = 0
    for index, (case, gathers) in enumerate(itertools.product(cases, GATHERS)):
        model = small_model(**case)
        is_turn = (size == 2 and tensor == 1) or index % len(GATHERS) == index // len(GATHERS) % len(GATHERS)
        if not is_turn or (gathers is not None and not model.has_hlc):
            continue

        sequence_parallel = tensor > 1 and count % 2 == 0
        tp = TensorGroup(
            size=tensor, rank=dist.get_rank() % tensor, group=tensor_group, sequence_parallel=sequence_parallel
        )
        check(model, cp=cp, tp=tp, gathers=gathers, number=count)
        count += 1

    dist.destroy_process_group()
    return count


def check(model: Model, *, cp: ContextGroup, tp: TensorGroup, gathers: bool | None, number: int) -> None:
    """Loss, gradients, statistics of heads and of routers of a context group against those of one process."""
    losses = None
    if model.num_experts:
        balance = ("sequence", "batch")[number % 2]
        losses = RouterLosses(balance=balance, balance_coef=0.3, z_coef=0.05, gradient_scale=0.5)
    options = {"document_mask": number % 4 > 0, "router_losses": losses}
    checkpointing = CHECKPOINTING[number % 3]
    _, tensors = decoder_and_tensors(model)
    reference = Decoder(model, **options).double()
    decoder = Decoder(model, tp=tp, cp=cp, activation_checkpointing=checkpointing, **options).double()
    for made in (reference, decoder):
        for name, parameter in parameters_by_name(made).items():
            parameter.data.copy_(parameter.spec.local_shard(tensors[name].detach()))

    if gathers is not None:
        for module in decoder.modules():
            if isinstance(module, KeyValueProjection):
                module.gathers_components = gathers and module.hlc is not None

    ids = torch.randint(0, model.vocab_size, (BATCH, SEQ), generator=torch.Generator().manual_seed(number))
    positions = position_ids(BORDERS[number % 4])
    targets = targets_of(ids, where=number)

    losses_and_rms = []
    for made, group, arguments in (
        (reference, {}, (ids, positions, targets)),
        (decoder, {"tp": tp, "cp": cp}, (cp.shard(ids, dim=1), positions, cp.shard(targets, dim=1))),
    ):
        outputs = HeadOutputs(made)
        with outputs.recording():
            loss = made(*arguments)
        losses_and_rms.append((loss, outputs.rms(**group)))

    (expected_loss, expected_rms), (loss, rms) = losses_and_rms
    total_loss = loss.detach().clone()
    dist.all_reduce(total_loss, group=cp.group)
    about = (cp.size, tp, model.model_dump(exclude_defaults=True), gathers, number)
    assert abs(total_loss - expected_loss) <= 1e-12 * abs(expected_loss), about
    assert all(torch.allclose(rms[name], expected) for name, expected in expected_rms.items()), about

    expected_loss.backward()
    loss.backward()
    expected_gradients = {name: parameter.grad for name, parameter in parameters_by_name(reference).items()}
    scale = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm()
    for name, parameter in parameters_by_name(decoder).items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient, group=cp.group)
        error = (parameter.spec.full_tensor(gradient) - expected_gradients[name]).norm()
        assert error <= 1e-12 * scale, (name, float(error / scale), about)
        assert expected_gradients[name].norm() > 0, (name, about)

    for block, expected in zip(decoder.blocks, reference.blocks, strict=True):
        if isinstance(block.mlp, MoE):
            check_router_statistics(block.mlp, expected.mlp, cp=cp)


def check_router_statistics(moe: MoE, expected: MoE, *, cp: ContextGroup) -> None:
    """Counts and balance losses of the context ranks add up to those of one process."""
    counts, balance_loss = moe.gate.stats.counts, moe.gate.stats.balance_loss
    for total in (counts, balance_loss):
        dist.all_reduce(total, group=cp.group)
    assert torch.equal(counts, expected.gate.stats.counts)
    torch.testing.assert_close(balance_loss, expected.gate.stats.balance_loss, rtol=1e-12, atol=0)


def cases(tensor: int) -> list[dict]:
    """Every variant, scalings of RoPE and mixtures of experts."""
    largest_sizes = {"talking_heads": 1}
    shardable = [case for case in variants() if tensor <= largest_sizes.get(case["attention_variant"], 8)]
    mea = {"attention_variant": "mea", "num_component_heads": 2}
    # Dynamic scaling looks at the largest position, which is beyond the trained length in one rank's chunk alone.
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    scalings = [
        mea | {"rope_scaling": scaling, "qk_norm": qk_norm, "max_position_embeddings": length}
        for scaling, length in ((dynamic, 16), (yarn, 32))
        for qk_norm in (False, True)
    ]
    return [*shardable, *scalings, *expert_cases()]


@pytest.mark.parametrize(
    ("size", "tensor"),
    [(2, 1), (3, 1), (4, 1), (2, 2), *(pytest.param(size, 2, marks=pytest.mark.full) for size in (3, 4))],
)
def test_a_context_group_computes_what_one_process_does(size, tensor):
    counts = run_distributed(check_all, size * tensor, cases(tensor), size, tensor, timeout=600)
    assert min(counts) >= 30


def measure_traffic(models: list[dict]) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Calls and bytes of a forward and backward pass of each model."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cp, _ = groups(dist.get_world_size(), 1)
    results = []
    for changes, checkpointing in itertools.product(models, CHECKPOINTING):
        decoder = Decoder(small_model(**changes), cp=cp, activation_checkpointing=checkpointing)
        init_parameters(decoder, 3)
        ids = torch.zeros(BATCH, SEQ // cp.size, dtype=torch.int64)
        with TrafficCount() as traffic:
            decoder(ids, torch.arange(SEQ).expand(BATCH, SEQ), ids).backward()
        results.append((dict(traffic.calls), dict(traffic.bytes)))

    dist.destroy_process_group()
    return results


def test_half_of_the_heads_are_half_of_the_traffic():
    """Whatever computes attention, keys and values of every layer are gathered: twice where it is recomputed."""
    mea = {"attention_variant": "mea", "head_norm_init": 0.5}
    models = [mea | {"num_component_heads": count, "qk_norm": qk_norm} for qk_norm in (False, True) for count in (4, 2)]
    models.append({"attention_variant": "talking_heads"})
    (results, _) = run_distributed(measure_traffic, 2, models)

    whole = 2 * 3 * BATCH * 4 * SEQ * 6 * 4
    for model, checkpointing, (calls, sizes) in zip(
        [model for model in models for _ in CHECKPOINTING], CHECKPOINTING * len(models), results, strict=True
    ):
        share = model.get("num_component_heads", 4) / 4
        passes = 1 if checkpointing == "none" else 2
        assert calls == {"allgather_base": 6 * passes, "reduce_scatter_base": 6}, (model, checkpointing)
        assert sizes == {"allgather_base": whole * share * passes, "reduce_scatter_base": whole * share}, model
