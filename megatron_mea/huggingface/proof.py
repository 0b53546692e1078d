"""The export's own check: its logits against the trainer's on real tokens, with one layer of each in memory."""

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
from megatron_mea.huggingface.targets import Target
from megatron_mea.model.layerwise import one_layer

_EXACT, _STOCK = 1e-9, 1e-4
"""Of the largest logit. Two orders of summation in float64; transformers' own norms and angles are float32."""


class ExportError(RunError):
    """The exported model does not compute what the trainer computes; nothing was written."""


@dataclass(frozen=True)
class Agreement:
    """How far the logits are apart at most, and how large they get."""

    tokens: int
    difference: float
    scale: float


def compare(
    target: Target,
    folder: Path,
    files: Mapping[str, Path],
    dtype: torch.dtype,
    made: Callable[[str], torch.Tensor],
    model: Model,
    masters: Callable[[str], torch.Tensor],
    tokens: torch.Tensor,
) -> Agreement:
    """Compares the folder's model, read back, with the training model.

    Both compute in float64 with the numbers before they were rounded for storage, so that even what matters little to a
    model of few steps is seen; that the files hold the rounded ones is checked bit for bit.

    Args:
        files: the file of each tensor.
        dtype: what the files hold.
        made: an exported tensor by its name, in float32.
        model, masters: the trainer's settings, and its parameters by name.
        tokens: (batch, seq)

    Raises:
        ExportError: names, shapes, numbers or logits differ.
    """

    def stored(name: str) -> torch.Tensor:
        expected = made(name)
        with safe_open(files[name], framework="pt") as tensors:
            if not torch.equal(tensors.get_tensor(name), expected.to(dtype)):
                raise ExportError(f"{name} is not what {files[name].name} holds")
        return expected.double()

    config = type(target.config).from_pretrained(folder)
    with torch.no_grad():
        found = _run_exported(target.model_class, config, files, stored, tokens)
        expected = _run_trained(model, masters, tokens)
    difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= (_EXACT if target.modules else _STOCK) * scale:
        raise ExportError(f"logits differ from the trainer's by {difference:.3g} (they reach {scale:.3g})")
    return Agreement(tokens.numel(), difference, scale)


def _run_trained(model: Model, masters: Callable[[str], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Logits (batch, seq, vocab) of the training model, a layer at a time."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    x = tokens
    for index in range(model.num_hidden_layers + 2):
        layer = one_layer(model, index, masters, torch.float64)
        x = layer.run(x, positions)
    return layer.logits(x)


def _run_exported(
    model_class: type[PreTrainedModel],
    config: object,
    files: Mapping[str, Path],
    read: Callable[[str], torch.Tensor],
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Logits of the exported model, whose parts get their parameters when they are called and lose them afterwards."""
    with torch.device("meta"):
        model = model_class(config).double().eval()
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    expected = {name: tuple(one.shape) for name, one in model.state_dict().items() if name != tied}
    if problems := sorted(expected.keys() ^ files.keys()):
        raise ExportError(f"missing or unexpected: {', '.join(problems)}")
    base = model.model
    if hasattr(base, "rotary_emb"):
        # Its frequencies are no parameters: they are computed when it is made.
        base.rotary_emb = type(base.rotary_emb)(config)
    names = {id(module): name for name, module in model.named_modules()}

    def parameters_of(part: nn.Module) -> list[tuple[nn.Module, str, str]]:
        return [
            (module, key, f"{names[id(module)]}.{key}")
            for module in part.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]

    def fill(part: nn.Module, *_: object) -> None:
        for module, key, name in parameters_of(part):
            tensor = read("model.embed_tokens.weight" if name == tied else name)
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
