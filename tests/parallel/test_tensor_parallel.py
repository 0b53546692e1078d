"""Tensor and sequence parallelism of the model in float64: losses and gradients equal those of one process to 1e-12."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.distributed import run_distributed
from support.models import decoder_and_tensors, expert_cases, small_model, variants

from megatron_mea.attention.hlc import KeyValueProjection
from megatron_mea.model import decoder as model_decoder
from megatron_mea.model.decoder import Decoder
from megatron_mea.model.moe import MoE, RouterLosses
from megatron_mea.parallel.grid import TensorGroup
from megatron_mea.parallel.layers import IGNORE_INDEX
from megatron_mea.parallel.parameter import init_parameters, parameters_by_name
from megatron_mea.training.head_stats import HeadOutputs

SEQ = 24


def check_all(cases: list[dict], size: int) -> int:
    """Checks every case on `size` ranks, in both forms of the combination, with and without sequence parallelism.

    Returns the number of comparisons.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    count, num_tokens = 0, 2 * SEQ
    for case in cases:
        model = small_model(**case)
        reference, tensors = decoder_and_tensors(model)
        losses = None
        if model.num_experts:
            losses = RouterLosses(balance="sequence", balance_coef=0.3, z_coef=0.05, gradient_scale=0.5)
            reference = Decoder(model, router_losses=losses).double()
            if model.num_experts_per_tok == 1:
                collapse_routers(tensors)
            for name, parameter in parameters_by_name(reference).items():
                parameter.data.copy_(tensors[name].detach())

        ids = torch.randint(0, model.vocab_size, (2, SEQ), generator=torch.Generator().manual_seed(7))
        positions = torch.arange(SEQ).expand_as(ids)
        targets = ids.roll(-1, 1)
        targets[0, 3] = IGNORE_INDEX

        outputs = HeadOutputs(reference)
        with outputs.recording():
            expected_loss = reference(ids, positions, targets)

        expected_rms = outputs.rms()
        expected_loss.backward()
        gradients = {name: parameter.grad for name, parameter in parameters_by_name(reference).items()}
        scale = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()

        for sequence_parallel in (False, True):
            for form in ("folded", "combined") if model.has_hlc else (None,):
                tp = TensorGroup(
                    size=size, rank=dist.get_rank(), group=dist.group.WORLD, sequence_parallel=sequence_parallel
                )
                decoder = Decoder(model, tp=tp, router_losses=losses).double()
                for module in decoder.modules():
                    if isinstance(module, KeyValueProjection) and module.hlc is not None:
                        module.form = lambda tokens, form=form: form

                parameters = parameters_by_name(decoder)
                for name, parameter in parameters.items():
                    parameter.data.copy_(parameter.spec.local_shard(tensors[name].detach()))

                outputs = HeadOutputs(decoder)
                # Every other time the loss is chunked, and 7 does not divide 48 tokens.
                model_decoder.chunk_size = lambda tokens, columns, chunk=(num_tokens, 7)[count % 2]: chunk
                with outputs.recording():
                    loss = decoder(ids, positions, targets)

                assert all(torch.allclose(rms, expected_rms[name]) for name, rms in outputs.rms(tp).items())
                assert abs(loss - expected_loss) <= 1e-12 * abs(expected_loss), (case, sequence_parallel, form)

                loss.backward()
                for name, parameter in parameters.items():
                    assert parameter.tensor_model_parallel == (parameter.spec.shard_dim is not None)
                    error = (parameter.spec.full_tensor(parameter.grad) - gradients[name]).norm()
                    assert error <= 1e-12 * scale, (case, sequence_parallel, form, name, float(error / scale))

                for block, expected in zip(decoder.blocks, reference.blocks, strict=True):
                    if isinstance(block.mlp, MoE):
                        assert torch.equal(block.mlp.gate.stats.counts, expected.mlp.gate.stats.counts)

                count += 1

    dist.destroy_process_group()
    return count


def collapse_routers(tensors: dict[str, torch.Tensor]) -> None:
    """Makes routers choose the first expert or the second, so that all ranks but the first get no token."""
    for name, tensor in tensors.items():
        if name.endswith(".mlp.gate.weight"):
            direction = tensor.detach()[:1] / tensor.detach()[:1].norm()
            factors = torch.tensor([1.0, -1.0, *[0.0] * (len(tensor) - 2)], dtype=tensor.dtype)
            tensor.data.copy_(factors.unsqueeze(1) * direction)


def cases(size: int) -> list[dict]:
    """Model configurations for a tensor group of this size.

    Of the vocabulary, 37, none of the sizes is a divisor, and of 8 x 6 = 48 component rows only some are.
    """
    # Talking heads cannot be sharded, and pairs of 4 key/value heads over two ranks at most.
    largest_sizes = {"talking_heads": 1, "differential": 2}
    shardable = [case for case in variants() if size <= largest_sizes.get(case["attention_variant"], 8)]
    if size == 3:
        # Three ranks: 6 query heads on 3 composite ones; h' = 2 is 12 rows, h' = 1 with d = 8 is 8 rows, replicated.
        three = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 42}
        return [
            {"attention_variant": "mea", "num_component_heads": 2} | three,
            {"attention_variant": "mea", "num_component_heads": [1, 2, 3], "head_dim": 8, "qk_norm": True} | three,
            {"attention_variant": "mea", "num_component_heads": 1, "head_dim": 8, "attention_bias": True} | three,
            {"attention_variant": "plain", "tie_word_embeddings": True} | three,
            {"attention_variant": "mea", "hlc_form": "latent", "key_latent_dim": 10, "value_latent_dim": 12} | three,
            expert_cases()[1] | {"num_experts": 6} | three,
        ]

    if size == 4:
        # More ranks than composite heads: two, then one.
        few = [{"num_key_value_heads": 2, "num_component_heads": n} for n in (1, 2)]
        few.append({"num_key_value_heads": 1, "num_component_heads": 1})
        extra = [{"attention_variant": "mea", "qk_norm": True, "attention_bias": True} | heads for heads in few]
        extra += [{"attention_variant": "plain_norm", "num_key_value_heads": n, "attention_bias": True} for n in (1, 2)]
        # 2 x 3 = 6 component rows are not divisible by four: replicated.
        pairs = {"attention_variant": "differential", "num_key_value_heads": 8, "qk_norm": True}
        one_head = {"attention_variant": "mea", "num_component_heads": 1}
        latent = {"attention_variant": "mea", "hlc_form": "latent", "key_latent_dim": 6, "value_latent_dim": 5}
        extra += [latent | {"num_key_value_heads": n, "qk_norm": n > 1, "attention_bias": True} for n in (1, 2)]
        return [*extra, one_head, pairs, *shardable[::4], *expert_cases()[2:]]

    return [*shardable, *expert_cases()]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_losses_and_gradients_equal_one_process(size):
    counts = run_distributed(check_all, size, cases(size), size)
    assert counts[0] > 10


def test_initialization_does_not_depend_on_the_layout():
    model = small_model(attention_variant="mea", num_component_heads=2, hlc_init="orthogonal")
    reference = Decoder(model)
    init_parameters(reference, 5)

    for size in (2, 4):
        shards: dict[str, list[torch.Tensor]] = {}
        for rank in range(size):
            decoder = Decoder(model, tp=TensorGroup(size=size, rank=rank))
            init_parameters(decoder, 5)
            for name, parameter in parameters_by_name(decoder).items():
                shards.setdefault(name, []).append(parameter.detach())

        for name, parameter in parameters_by_name(reference).items():
            shard_dim = parameters_by_name(decoder)[name].spec.shard_dim
            full = shards[name][0]
            if shard_dim is not None:
                # Shards have equal sizes, so a vocabulary's last one may end in zeros.
                full, padding = torch.cat(shards[name], shard_dim).tensor_split([parameter.shape[shard_dim]], shard_dim)
                assert not padding.any()

            assert torch.equal(full, parameter), name
            assert all(torch.equal(shard, shards[name][0]) for shard in shards[name]) or shard_dim is not None
