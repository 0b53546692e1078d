"""Statistics of attention heads for TensorBoard: the size of their outputs, and the matrices that combine them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from megatron_mea.attention.mea import MultiheadExplicitAttention
from megatron_mea.parallel.collectives import all_gather
from megatron_mea.parallel.grid import TensorGroup


class HeadOutputs:
    """Root mean square of each head's output, before the head norm, over the forward passes inside `recording`.

    Args:
        model: this rank's part of a decoder, whose parameters have a `spec`.
    """

    def __init__(self, model: nn.Module) -> None:
        attentions = [module for module in model.modules() if isinstance(module, MultiheadExplicitAttention)]
        self._layers = {layer.o_proj.weight.spec.name.removesuffix(".o_proj.weight"): layer for layer in attentions}
        self._mean_squares: dict[str, torch.Tensor] = {}
        self._num_passes: dict[str, int] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forgets earlier passes, and records those inside of the context."""
        self._mean_squares, self._num_passes = {}, {}
        handles = []
        for name, layer in self._layers.items():
            consumer = layer.o_proj if layer.head_norm is None else layer.head_norm
            handles.append(consumer.register_forward_pre_hook(partial(self._record, name=name, layer=layer)))

        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(
        self, module: nn.Module, inputs: tuple[torch.Tensor], *, name: str, layer: MultiheadExplicitAttention
    ) -> None:
        """Forward pre-hook of the module that takes the heads' outputs."""
        (output,) = inputs
        if layer.head_norm is None:
            # shape: (batch, seq, H d) -> (batch, H, seq, d)
            output = output.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)

        mean_square = output.detach().double().square().mean((0, 2, 3))
        self._mean_squares[name] = self._mean_squares.get(name, 0) + mean_square
        self._num_passes[name] = self._num_passes.get(name, 0) + 1

    def rms(self, tp: TensorGroup) -> dict[str, torch.Tensor]:
        """(heads,) for every layer of this stage, by the name of its attention; collective over the tensor group."""
        rms_by_layer = {}
        for name, mean_square in self._mean_squares.items():
            local_rms = (mean_square / self._num_passes[name]).sqrt()
            layer_rms = all_gather(local_rms, dim=0, tp=tp) if tp.size > 1 else local_rms
            rms_by_layer[name] = layer_rms.float().cpu()

        return rms_by_layer


def hlc_statistics(combinations: dict[str, torch.Tensor]) -> dict[str, float]:
    """Root mean square and condition number of every head combination (h', h), by its exported name."""
    statistics = {}
    for name, matrix in combinations.items():
        singular_values = torch.linalg.svdvals(matrix)
        short_name = _short_name(name)
        statistics[f"hlc_rms/{short_name}"] = matrix.pow(2).mean().sqrt().item()
        statistics[f"hlc_condition/{short_name}"] = (singular_values[0] / singular_values[-1].clamp_min(1e-12)).item()

    return statistics


def head_tensors(combinations: dict[str, torch.Tensor], rms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors written to TensorBoard: `hlc/...` the matrices, `head_rms/...` the size of the heads' outputs."""
    matrices = {f"hlc/{_short_name(name)}": matrix for name, matrix in combinations.items()}
    return matrices | {f"head_rms/{_short_name(name)}": values for name, values in rms.items()}


def _short_name(name: str) -> str:
    return name.removesuffix(".weight").removeprefix("model.")
