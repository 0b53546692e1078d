"""Compares the logits of an export with the trainer's on real tokens, with one layer of each in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from megatron_mea.config.schema import Model
from megatron_mea.errors import RunError
from megatron_mea.huggingface.expert_tensors import expert_matrices
from megatron_mea.huggingface.targets import ExportTarget
from megatron_mea.model.decoder import single_layers
from megatron_mea.model.layerwise import load_layer

_MEA_TOLERANCE, _STOCK_TOLERANCE = 1e-9, 1e-4
"""Relative to the largest logit: float64 in two orders of summation; stock models have norms and angles in float32."""

_OTHER_CHOICES = 0.05
"""Tokens at most for which a stock model may choose other experts, by the rounding of its router."""


class ExportError(RunError):
    """The exported model does not compute what the trainer computes; nothing was written."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Result of a parity check.

    Args:
        tokens: how many were compared.
        difference: largest absolute difference of two logits.
        scale: largest absolute logit.
    """

    tokens: int
    difference: float
    scale: float


def check_parity(
    *,
    target: ExportTarget,
    folder: Path,
    files: Mapping[str, Path],
    dtype: torch.dtype,
    read_exported: Callable[[str], torch.Tensor],
    model: Model,
    read_master: Callable[[str], torch.Tensor],
    tokens: torch.Tensor,
) -> Parity:
    """Compares the folder's model, read back, with the training model.

    Both compute in float64 with the weights before they were rounded for storage, so that errors show even where they
    hardly change the logits; that the files hold the rounded weights is checked bit for bit.

    Args:
        files: the file of each tensor.
        dtype: what the files hold.
        read_exported: returns an exported tensor by its name, in float32.
        model: the trainer's settings.
        read_master: returns one of the trainer's parameters by its name, in float32.
        tokens: (batch, seq)

    Raises:
        ExportError: names, shapes, values or logits differ.
    """

    def read_verified(name: str) -> torch.Tensor:
        expected = read_exported(name)
        with safe_open(files[name], framework="pt") as tensors:
            if not torch.equal(tensors.get_tensor(name), expected.to(dtype)):
                raise ExportError(f"{name} is not what {files[name].name} holds")

        return expected.double()

    # Grouped products are none of float64.
    config = type(target.config).from_pretrained(folder, experts_implementation="eager")
    with torch.no_grad():
        actual = _run_exported(
            model_class=target.model_class, config=config, files=files, read=read_verified, tokens=tokens
        )
        expected = _run_trained(model=model, read_master=read_master, tokens=tokens)

    # shape: (batch, seq, vocab) -> (tokens,)
    differences, scale = (actual - expected).abs().amax(-1).flatten(), expected.abs().max().item()
    is_stock = not target.modules
    allowed = (_STOCK_TOLERANCE if is_stock else _MEA_TOLERANCE) * scale
    # Stock routers choose in float32: of thousands of choices one may be as close as its rounding.
    num_other_choices = int(_OTHER_CHOICES * tokens.numel()) if is_stock and model.num_experts else 0
    difference = differences.sort().values[-1 - num_other_choices].item()
    if not difference <= allowed:
        raise ExportError(f"logits differ from the trainer's by {difference:.3g} (they reach {scale:.3g})")

    return Parity(tokens=tokens.numel(), difference=difference, scale=scale)


def _run_trained(*, model: Model, read_master: Callable[[str], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Logits (batch, seq, vocab) of the training model, a layer at a time."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden_states, decoder = tokens, None
    for layer in single_layers(model):
        # Freed before the next layer takes its memory.
        del decoder
        decoder = load_layer(config=model, layer=layer, read=read_master, dtype=torch.float64)
        hidden_states = decoder.forward_hidden(hidden_states, positions)

    return decoder.logits(hidden_states)


def _run_exported(
    *,
    model_class: type[PreTrainedModel],
    config: object,
    files: Mapping[str, Path],
    read: Callable[[str], torch.Tensor],
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Logits (batch, seq, vocab) of the exported model, whose modules hold their parameters only while they run."""
    with torch.device("meta"):
        model = model_class(config).double().eval()

    tied = "lm_head.weight" if config.tie_word_embeddings else None
    experts = {name: list(expert_matrices(name, parameter.shape)) for name, parameter in model.named_parameters()}
    expected = {
        stored
        for name in model.state_dict()
        if name != tied
        for stored in [matrix.name for matrix in experts.get(name, ())] or [name]
    }
    if problems := sorted(expected ^ files.keys()):
        raise ExportError(f"missing or unexpected: {', '.join(problems)}")

    base = model.model
    if hasattr(base, "rotary_emb"):
        # Its frequencies are no parameters: they are computed when it is built, here not on the meta device.
        base.rotary_emb = type(base.rotary_emb)(config)

    names = {id(module): name for name, module in model.named_modules()}
    for name, buffer in model.named_buffers():
        # Of those that are stored: small, so they stay in memory.
        if name in files:
            module, _, key = name.rpartition(".")
            setattr(model.get_submodule(module), key, read(name).to(buffer.dtype))

    def parameters_of(part: nn.Module) -> list[tuple[nn.Module, str, str]]:
        return [
            (module, key, f"{names[id(module)]}.{key}")
            for module in part.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]

    def read_parameter(name: str) -> torch.Tensor:
        if not experts[name]:
            return read(name)

        stack = torch.empty(model.get_parameter(name).shape, dtype=torch.float64)
        for matrix in experts[name]:
            expert, first, _ = matrix.offsets
            stack[expert, first : first + matrix.shape[1]] = read(matrix.name)

        return stack

    def fill(part: nn.Module, *_: object) -> None:
        for module, key, name in parameters_of(part):
            tensor = read_parameter("model.embed_tokens.weight" if name == tied else name)
            if tensor.shape != module._parameters[key].shape:
                raise ExportError(f"{name} has the shape {tuple(tensor.shape)}")
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)

    def empty(part: nn.Module, *_: object) -> None:
        for module, key, _ in parameters_of(part):
            module._parameters[key] = nn.Parameter(module._parameters[key].to("meta"), requires_grad=False)

    for part in (base.embed_tokens, *base.layers, base.norm, model.lm_head):
        part.register_forward_pre_hook(fill)
        part.register_forward_hook(empty)

    return model(tokens, use_cache=False).logits
