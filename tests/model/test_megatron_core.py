"""megatron-core's GPTModel with our weights, on CPU: the same logits, loss and gradients as the `plain` variant.

Compared with Megatron's attention, feed-forward, vocabulary-parallel loss and collectives, on one rank and on two. It
has no head combination, so this does not test MEA itself; comparisons with tests/support/reference.py do.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.distributed import run_distributed
from support.models import decoder_and_tensors, small_model

from megatron_mea.config.schema import Model
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.grid import TensorGroup
from megatron_mea.parallel.layers import IGNORE_INDEX
from megatron_mea.parallel.parameter import parameters_by_name

pytestmark = pytest.mark.slow

pytest.importorskip("megatron.core", reason="megatron-core is not installed: pip install -e '.[test,megatron]'")

SEQ = 24
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

# Megatron needs a vocabulary that the ranks divide. eps and RoPE base differ from its defaults, so that a setting which
# does not reach it is noticed.
COMMON: dict[str, Any] = {"attention_variant": "plain", "vocab_size": 38, "rms_norm_eps": 1e-3, "rope_theta": 3000.0}
# Megatron's code fixes all of these but the factor.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": 8, "qk_norm": True},
    {"num_key_value_heads": 2, "attention_bias": True, "qk_norm": True, "tie_word_embeddings": True},
    # Of the three frequencies of this base, Llama 3's scaling leaves one, blends one and divides one.
    {"rope_theta": 1e8, "rope_scaling": LLAMA3},
]
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "mlp_only_layers": [1]}
EXPERT_CASES = [EXPERTS | {"qk_norm": True}, EXPERTS | {"norm_topk_prob": False, "num_experts_per_tok": 3}]
"""On one rank: with a tensor group Megatron wants sequence parallelism, and so Apex's norms."""


@contextlib.contextmanager
def float64_megatron() -> Iterator[None]:
    """Turns float32, which Megatron fixes for RoPE's angles and for the loss, into float64."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def gpt_model(model: Model, size: int) -> torch.nn.Module:
    """Megatron's GPTModel of our configuration, for a tensor group of this size."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.rms_norm_eps,
        normalization="RMSNorm",
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.attention_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=size,
        use_cpu_initialization=True,
        # The fused kernels are CUDA's.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **expert_settings(model),
    )
    return GPTModel(
        config,
        layer_specs(config),
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        rope_scaling=model.rope_scaling is not None,
        rope_scaling_factor=model.rope_scaling.factor if model.rope_scaling else 1.0,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
    )


def expert_settings(model: Model) -> dict[str, Any]:
    """Megatron's settings of experts; without those of its balance losses."""
    if not model.num_experts:
        return {}

    from megatron.core.transformer.moe import moe_utils

    # Where Transformer Engine is missing, it is not defined, and asked for.
    moe_utils.te_general_gemm = None
    return {
        "num_moe_experts": model.num_experts,
        "moe_router_topk": model.num_experts_per_tok,
        "moe_ffn_hidden_size": model.moe_intermediate_size,
        "moe_layer_freq": [int(model.is_routed(layer)) for layer in range(model.num_hidden_layers)],
        # Softmax over the chosen ones is that over all, divided by the sum of the chosen ones.
        "moe_router_pre_softmax": not model.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": False,
    }


def layer_specs(config: Any) -> Any:
    """Megatron's layers; where some are routed and some dense, one spec each."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec

    if config.num_moe_experts:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    return get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)


def to_megatron(*, tensors: dict[str, torch.Tensor], model: Model, size: int, rank: int) -> dict[str, torch.Tensor]:
    """Converts full tensors (weights or gradients) to those of a Megatron rank, by its names."""

    def shard(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.chunk(size, dim)[rank]

    def linear_qkv(template: str) -> torch.Tensor:
        """This rank's rows, ordered by query group, and in a group as queries, key, value."""
        parts = [tensors[template.format(name)].unflatten(0, (model.num_key_value_heads, -1)) for name in "qkv"]
        return shard(torch.cat(parts, 1).flatten(0, 1), 0)

    converted = {
        "embedding.word_embeddings.weight": shard(tensors["model.embed_tokens.weight"], 0),
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
    }
    if not model.tie_word_embeddings:
        converted["output_layer.weight"] = shard(tensors["lm_head.weight"], 0)

    for layer in range(model.num_hidden_layers):
        block, megatron_block = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        attention, mlp = f"{megatron_block}self_attention.", f"{megatron_block}mlp."
        converted |= {
            f"{megatron_block}input_layernorm.weight": tensors[f"{block}input_layernorm.weight"],
            f"{megatron_block}pre_mlp_layernorm.weight": tensors[f"{block}post_attention_layernorm.weight"],
            f"{attention}linear_qkv.weight": linear_qkv(block + "self_attn.{}_proj.weight"),
            f"{attention}linear_proj.weight": shard(tensors[f"{block}self_attn.o_proj.weight"], 1),
        }
        if model.is_routed(layer):
            converted[f"{mlp}router.weight"] = tensors[f"{block}mlp.gate.weight"]
            for number, name in enumerate(("gate_up_proj", "down_proj"), start=1):
                for expert, matrix in enumerate(tensors[f"{block}mlp.experts.{name}"]):
                    converted[f"{mlp}experts.local_experts.{expert}.linear_fc{number}.weight"] = matrix
        else:
            gate, up, down = (tensors[f"{block}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            converted[f"{mlp}linear_fc1.weight"] = torch.cat((shard(gate, 0), shard(up, 0)))
            converted[f"{mlp}linear_fc2.weight"] = shard(down, 1)

        if model.attention_bias:
            converted[f"{attention}linear_qkv.bias"] = linear_qkv(block + "self_attn.{}_proj.bias")

        if model.qk_norm:
            for name in "qk":
                converted[f"{attention}{name}_layernorm.weight"] = tensors[f"{block}self_attn.{name}_norm.weight"]

    return converted


Outcome = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def run_megatron(*, model: Model, tp: TensorGroup, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Outcome:
    """This rank's logits, the loss, and this rank's gradients by Megatron's names."""
    ids, positions, targets = batch(model)

    with float64_megatron() if dtype is torch.float64 else contextlib.nullcontext():
        gpt = gpt_model(model, tp.size).to(dtype)
        parameters = dict(gpt.named_parameters())
        values = to_megatron(tensors=tensors, model=model, size=tp.size, rank=tp.rank)
        assert parameters.keys() == values.keys()

        for name, parameter in parameters.items():
            assert parameter.shape == values[name].shape, name
            parameter.data.copy_(values[name])

        mask = torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1)[None, None]
        logits = gpt(ids, positions, mask).detach()
        loss = (gpt(ids, positions, mask, labels=targets) * (targets != IGNORE_INDEX)).sum()
        loss.backward()

    for name, parameter in parameters.items():
        # A rank's gradient is that of its heads; Megatron sums them over ranks in finalize_model_grads.
        if tp.size > 1 and name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
            dist.all_reduce(parameter.grad)

    return logits, loss.detach(), {name: parameter.grad for name, parameter in parameters.items()}


def run_ours(*, model: Model, tp: TensorGroup, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Outcome:
    """The same of our decoder, with gradients by Megatron's names."""
    ids, positions, targets = batch(model)
    decoder = Decoder(model, tp=tp).to(dtype)
    parameters = parameters_by_name(decoder)
    for name, parameter in parameters.items():
        parameter.data.copy_(parameter.spec.local_shard(tensors[name]))

    logits = decoder.logits(decoder.forward_hidden(ids, positions)).detach()
    loss = decoder(ids, positions, targets)
    loss.backward()
    gradients = {name: parameter.spec.full_tensor(parameter.grad) for name, parameter in parameters.items()}
    return logits, loss.detach(), to_megatron(tensors=gradients, model=model, size=tp.size, rank=tp.rank)


def batch(model: Model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, position ids and targets, each (2, SEQ)."""
    ids = torch.randint(0, model.vocab_size, (2, SEQ), generator=torch.Generator().manual_seed(7))
    targets = ids.roll(-1, 1)
    targets[0, 3] = IGNORE_INDEX
    return ids, torch.arange(SEQ).expand_as(ids), targets


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    # No token chose an expert whose gradient is zero.
    return float((actual - expected).norm() / (expected.norm() or 1.0))


def check_all(size: int) -> dict[str, dict[str, float]]:
    """Checks every case on `size` ranks; returns the largest relative differences by dtype and kind of result."""
    torch.set_num_threads(1)
    # Megatron always asks for the current CUDA device, and for its generator of dropout.
    torch.cuda.current_device = lambda: torch.device("cpu")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    worst: dict[str, dict[str, float]] = {}
    for case in CASES + (EXPERT_CASES if size == 1 else []):
        model = small_model(**COMMON | case)
        tensors = {name: tensor.detach() for name, tensor in decoder_and_tensors(model)[1].items()}
        for dtype, tolerance in TOLERANCE.items():
            group = TensorGroup(size=size, rank=dist.get_rank(), group=dist.group.WORLD)
            logits, loss, gradients = run_megatron(model=model, tp=group, tensors=tensors, dtype=dtype)
            assert logits.dtype == loss.dtype == dtype

            # Without Apex, Megatron has no norm for sequence parallelism, so only ours runs with it.
            for sequence_parallel in (False, True) if size > 1 else (False,):
                tp = dataclasses.replace(group, sequence_parallel=sequence_parallel)
                our_logits, our_loss, our_gradients = run_ours(model=model, tp=tp, tensors=tensors, dtype=dtype)
                differences = {
                    "logits": relative_difference(our_logits, logits),
                    "loss": relative_difference(our_loss, loss),
                    **{name: relative_difference(our_gradients[name], gradients[name]) for name in gradients},
                }
                too_large = {name: value for name, value in differences.items() if not value <= tolerance}
                assert not too_large, (case, dtype, sequence_parallel, too_large)

                largest = worst.setdefault(str(dtype), {})
                for name, value in differences.items():
                    kind = name if name in ("logits", "loss") else "gradients"
                    largest[kind] = max(value, largest.get(kind, 0.0))

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return worst


@pytest.mark.parametrize("size", [1, 2])
def test_megatron_core_gives_the_same_logits_loss_and_gradients(size: int) -> None:
    for rank, worst in enumerate(run_distributed(check_all, size, size)):
        assert worst.keys() == {str(dtype) for dtype in TOLERANCE}
        print(f"{size} ranks, rank {rank}: {worst}")
