"""Statistics of attention heads at validations: the size of their outputs, and the matrices that combine them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_mea.attention.mea import MultiheadExplicitAttention
from megatron_mea.parallel.collectives import all_gather, all_reduce
from megatron_mea.parallel.grid import NO_CP, NO_TP, ContextGroup, TensorGroup
from megatron_mea.parallel.parameter import parameters_by_name
from megatron_mea.training.callbacks import Callback, Record
from megatron_mea.training.engine import Engine

_MATRIX_PREFIX, _OUTPUT_PREFIX = "hlc/", "head_rms/"
_MAX_ELEMENTS = 1 << 18
"""Elements of matrices in a row of heads.jsonl, each 14 characters at most: longer lines are not read back."""


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

    def rms(self, tp: TensorGroup = NO_TP, cp: ContextGroup = NO_CP) -> dict[str, torch.Tensor]:
        """(heads,) for every layer of this stage, by the name of its attention; collective over both groups."""
        rms_by_layer = {}
        for name, mean_square in self._mean_squares.items():
            # Context ranks have equally many tokens.
            local_rms = (all_reduce(mean_square, over=cp) / (cp.size * self._num_passes[name])).sqrt()
            layer_rms = all_gather(local_rms, dim=0, tp=tp) if tp.size > 1 else local_rms
            rms_by_layer[name] = layer_rms.float().cpu()

        return rms_by_layer


def sizes_by_head(combination: torch.Tensor, *, num_composites: int) -> torch.Tensor:
    """The size of each latent number's, or pair's, part in each composite head, (n, h): moduli, norms over features.

    Args:
        combination: (pairs, h, 2) of keys, or (n, h d) of values.
    """
    return combination.reshape(len(combination), num_composites, -1).norm(dim=-1)


def head_tensors(combinations: dict[str, torch.Tensor], rms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names that trackers and heads.jsonl give them.

    `hlc/...` are the head combinations (h', h) or `sizes_by_head`, `head_rms/...` the RMS (heads,) of heads' outputs.
    """
    matrices = {f"{_MATRIX_PREFIX}{_short_name(name)}": matrix for name, matrix in combinations.items()}
    return matrices | {f"{_OUTPUT_PREFIX}{_short_name(name)}": values for name, values in rms.items()}


def hlc_statistics(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Root mean square and condition number of every head combination among `head_tensors`.

    What has more rows than heads holds sizes, which have no condition number.
    """
    statistics = {}
    for name, matrix in _matrices(tensors).items():
        if not matrix.isfinite().all():
            # A learning rate that diverges; svdvals would raise.
            continue

        short_name = name.removeprefix(_MATRIX_PREFIX)
        statistics[f"hlc_rms/{short_name}"] = matrix.pow(2).mean().sqrt().item()
        if len(matrix) <= matrix.shape[1]:
            singular_values = torch.linalg.svdvals(matrix)
            condition = singular_values[0] / singular_values[-1].clamp_min(1e-12)
            statistics[f"hlc_condition/{short_name}"] = condition.item()

    return statistics


def head_row(tensors: Mapping[str, torch.Tensor]) -> dict[str, list]:
    """`head_tensors` as lists, of six significant digits; without the matrices of a model that has very large ones."""
    matrices = _matrices(tensors)
    left_out = matrices if sum(matrix.numel() for matrix in matrices.values()) > _MAX_ELEMENTS else {}
    return {name: _rounded(tensor.tolist()) for name, tensor in tensors.items() if name not in left_out}


def _matrices(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(_MATRIX_PREFIX)}


def _rounded(value: Any) -> Any:
    return [_rounded(item) for item in value] if isinstance(value, list) else float(f"{value:.6g}")


def _short_name(name: str) -> str:
    return name.removesuffix(".weight").removeprefix("model.")


class HeadStatistics(Callback):
    """Puts the statistics of all heads into the record of every validation; collective."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._outputs = engine, HeadOutputs(engine.model)

    @contextmanager
    def validation(self, record: Record) -> Iterator[None]:
        with self._outputs.recording():
            yield

        named = parameters_by_name(self._engine.model).items()
        names = [name for name, parameter in named if parameter.spec.component == "hlc"]
        combinations = self._gather_stages({name: self._combination(name) for name in names})
        rms = self._gather_stages(self._outputs.rms(tp=self._engine.grid.tp, cp=self._engine.grid.cp))
        record.head_tensors.update(head_tensors(combinations, rms))

    def _combination(self, name: str) -> torch.Tensor:
        """A combination as it is recorded; collective."""
        weight, model = self._engine.state.full_weight(name).cpu(), self._engine.config.model
        return sizes_by_head(weight, num_composites=model.num_key_value_heads) if model.hlc_form == "latent" else weight

    def _gather_stages(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of all pipeline stages, by name; collective over the pipeline group."""
        grid = self._engine.grid
        if grid.dims.pp == 1:
            return tensors

        stages: list[dict[str, torch.Tensor]] = [{}] * grid.dims.pp
        dist.all_gather_object(stages, tensors, group=grid.mpu.get_pipe_parallel_group())
        return {name: value for stage in stages for name, value in stage.items()}
