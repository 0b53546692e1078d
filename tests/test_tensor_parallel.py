"""Tensor and sequence parallelism of the model in float64: losses and gradients of one process, to 1e-12."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from models import decoder_and_tensors, small_model, variants

from megatron_mea.attention.hlc import HeadProjection
from megatron_mea.model import decoder as model_decoder
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.grid import ALONE, TensorGroup
from megatron_mea.parallel.layers import IGNORE
from megatron_mea.parallel.parameter import initialize, named_specs
from megatron_mea.training.heads import HeadOutputs

SEQ = 24


def check_all(cases: list[dict], size: int) -> int:
    """Every case on `size` ranks, in both forms of the combination, with and without sequence parallelism."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    count, tokens_of_all = 0, 2 * SEQ
    for case in cases:
        model = small_model(**case)
        whole, tensors = decoder_and_tensors(model)
        ids = torch.randint(0, model.vocab_size, (2, SEQ), generator=torch.Generator().manual_seed(7))
        positions = torch.arange(SEQ).expand_as(ids)
        targets = ids.roll(-1, 1)
        targets[0, 3] = IGNORE
        outputs = HeadOutputs(whole)
        with outputs.watched():
            expected = whole(ids, positions, targets)
        rms = outputs.rms(ALONE)
        expected.backward()
        gradients = {name: parameter.grad for name, parameter in named_specs(whole).items()}
        scale = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        for sequence_parallel in (False, True):
            for form in ("folded", "combined") if model.has_hlc else (None,):
                tp = TensorGroup(size, dist.get_rank(), dist.group.WORLD, sequence_parallel)
                decoder = Decoder(model, tp=tp).double()
                for module in decoder.modules():
                    if isinstance(module, HeadProjection) and module.hlc is not None:
                        module.form = lambda tokens, form=form: form
                named = named_specs(decoder)
                for name, parameter in named.items():
                    parameter.data.copy_(parameter.spec.local(tensors[name].detach()))
                outputs = HeadOutputs(decoder)
                # Every other time the loss is made in chunks, of which 48 tokens leave a rest.
                model_decoder.chunk_size = lambda tokens, columns, chunk=(tokens_of_all, 7)[count % 2]: chunk
                with outputs.watched():
                    loss = decoder(ids, positions, targets)
                assert all(torch.allclose(each, rms[name]) for name, each in outputs.rms(tp).items())
                loss.backward()
                assert abs(loss - expected) <= 1e-12 * abs(expected), (case, sequence_parallel, form)
                for name, parameter in named.items():
                    assert parameter.tensor_model_parallel == (parameter.spec.shard_dim is not None)
                    error = (parameter.spec.whole(parameter.grad) - gradients[name]).norm()
                    assert error <= 1e-12 * scale, (case, sequence_parallel, form, name, float(error / scale))
                count += 1
    dist.destroy_process_group()
    return count


def cases(size: int) -> list[dict]:
    """Vocabulary 37 and 8 x 6 = 48 component rows: none of 2, 3, 4 and 8 divides the first, some not the second."""
    # Talking heads are not shared, and pairs of 4 key/value heads by two ranks at most.
    most = {"talking_heads": 1, "differential": 2}
    fit = [case for case in variants() if size <= most.get(case["attention_variant"], 8)]
    if size == 3:
        # Three ranks: 6 query heads on 3 composite ones; h' = 2 is 12 rows, h' = 1 with d = 8 is 8 rows, replicated.
        three = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 42}
        return [
            {"attention_variant": "mea", "num_component_heads": 2} | three,
            {"attention_variant": "mea", "num_component_heads": [1, 2, 3], "head_dim": 8, "qk_norm": True} | three,
            {"attention_variant": "mea", "num_component_heads": 1, "head_dim": 8, "attention_bias": True} | three,
            {"attention_variant": "plain", "tie_word_embeddings": True} | three,
        ]
    if size == 4:
        # More ranks than composite heads: two, then one.
        few = [{"num_key_value_heads": 2, "num_component_heads": n} for n in (1, 2)]
        few.append({"num_key_value_heads": 1, "num_component_heads": 1})
        extra = [{"attention_variant": "mea", "qk_norm": True, "attention_bias": True} | heads for heads in few]
        extra += [{"attention_variant": "plain_norm", "num_key_value_heads": n, "attention_bias": True} for n in (1, 2)]
        # 2 x 3 = 6 component rows are not divisible by four: replicated.
        pairs = {"attention_variant": "differential", "num_key_value_heads": 8, "qk_norm": True}
        return [*extra, {"attention_variant": "mea", "num_component_heads": 1}, pairs, *fit[::4]]
    return fit


@pytest.mark.parametrize("size", [2, 3, 4])
def test_losses_and_gradients_equal_one_process(size):
    counts = run_distributed(check_all, size, cases(size), size)
    assert counts[0] > 10


def test_initialization_does_not_depend_on_the_layout():
    model = small_model(attention_variant="mea", num_component_heads=2, hlc_init="orthogonal")
    whole = Decoder(model)
    initialize(whole, 5)
    for size in (2, 4):
        parts: dict[str, list[torch.Tensor]] = {}
        for rank in range(size):
            decoder = Decoder(model, tp=TensorGroup(size, rank))
            initialize(decoder, 5)
            for name, parameter in named_specs(decoder).items():
                parts.setdefault(name, []).append(parameter.detach())
        for name, parameter in named_specs(whole).items():
            cut = named_specs(decoder)[name].spec.shard_dim
            found = parts[name][0]
            if cut is not None:
                # The parts are equal, so that a vocabulary's last one may end in zeros.
                found, rest = torch.cat(parts[name], cut).tensor_split([parameter.shape[cut]], cut)
                assert not rest.any()
            assert torch.equal(found, parameter), name
            assert all(torch.equal(part, parts[name][0]) for part in parts[name]) or cut is not None
