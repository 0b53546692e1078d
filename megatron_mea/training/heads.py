"""What heads do while a model trains: how much each puts out, and the matrices that combine them; for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from megatron_mea.attention.attention import Attention
from megatron_mea.parallel.collectives import all_gather
from megatron_mea.parallel.grid import TensorGroup


class HeadOutputs:
    """Root mean square of what each head puts out, before the head norm, over all that is computed inside `watched`.

    Args:
        model: this rank's part of a decoder, whose parameters know their names.
    """

    def __init__(self, model: nn.Module) -> None:
        attentions = [module for module in model.modules() if isinstance(module, Attention)]
        self._layers = {each.o_proj.weight.spec.name.removesuffix(".o_proj.weight"): each for each in attentions}
        self._squares: dict[str, torch.Tensor] = {}
        self._count: dict[str, int] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._squares, self._count = {}, {}
        handles = []
        for name, each in self._layers.items():
            behind = each.o_proj if each.head_norm is None else each.head_norm
            handles.append(behind.register_forward_pre_hook(partial(self._see, name, each)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str, layer: Attention, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        (output,) = inputs
        if layer.head_norm is None:
            # shape: (batch, seq, H d) -> (batch, H, seq, d)
            output = output.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        squares = output.detach().double().square().mean((0, 2, 3))
        self._squares[name] = self._squares.get(name, 0) + squares
        self._count[name] = self._count.get(name, 0) + 1

    def rms(self, tp: TensorGroup) -> dict[str, torch.Tensor]:
        """(heads,) of every layer of this stage, by the name of its attention; collective over the tensor group."""
        found = {}
        for name, squares in self._squares.items():
            mine = (squares / self._count[name]).sqrt()
            found[name] = (all_gather(mine, 0, tp) if tp.size > 1 else mine).float().cpu()
        return found


def hlc_statistics(combinations: dict[str, torch.Tensor]) -> dict[str, float]:
    """Root mean square and condition number of every head combination (h', h), by its exported name."""
    statistics = {}
    for name, matrix in combinations.items():
        values = torch.linalg.svdvals(matrix)
        short = _short(name)
        statistics[f"hlc_rms/{short}"] = matrix.pow(2).mean().sqrt().item()
        statistics[f"hlc_condition/{short}"] = (values[0] / values[-1].clamp_min(1e-12)).item()
    return statistics


def head_tensors(combinations: dict[str, torch.Tensor], rms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that TensorBoard keeps: `hlc/...` the matrices, `head_rms/...` what heads put out."""
    matrices = {f"hlc/{_short(name)}": matrix for name, matrix in combinations.items()}
    return matrices | {f"head_rms/{_short(name)}": values for name, values in rms.items()}


def _short(name: str) -> str:
    return name.removesuffix(".weight").removeprefix("model.")
