"""The fit of a layer's latent keys and values: moments, closed forms, least squares, and a reconstruction by steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_mea.attention.document_mask import attention_function
from megatron_mea.attention.mea import MultiheadExplicitAttention
from megatron_mea.compression.key_factors import KeyFactors, factorise_keys, frequency_moments, select_keys
from megatron_mea.compression.latent_model import LatentDims, latent_settings
from megatron_mea.compression.moments import Moments
from megatron_mea.compression.source_model import SourceModel
from megatron_mea.compression.value_factors import ValueFactors, factorise_values, output_weight
from megatron_mea.data.windows import Windows
from megatron_mea.exported.rotary_mea import rotary_cos_sin
from megatron_mea.model.decoder import StageLayers, TransformerBlock
from megatron_mea.model.layerwise import load_layer, load_parameters

_RIDGE = 1e-3
"""Part of the mean square of a feature by which `o_proj` stays what it was, since calibration tokens are few."""
_MIN_RIDGE = 1e-30
_LEARNING_RATE = 6e-3
"""A step of reconstruction: the part of a tensor's root mean square by which a step of Adam changes its elements."""


@dataclass(frozen=True, kw_only=True)
class LatentLayer:
    """A compressed layer.

    Attributes:
        dims: numbers of keys and of values.
        counts: pairs of each frequency.
        tensors: the changed parameters, by name.
        error: the part of the mean square of attention's outputs that is lost on the calibration tokens.
    """

    dims: LatentDims
    counts: list[int]
    tensors: dict[str, torch.Tensor]
    error: float


class LayerFit:
    """Fits one layer on a stream of hidden states, to give what the source model's layer gives on a stream of its own.

    Args:
        layer: counted from 0.
        windows: the calibration tokens; a stream has the hidden states (batch, seq, hidden) of each batch.

    Attributes:
        source: attention of the source model's layer.
    """

    def __init__(self, *, source_model: SourceModel, layer: int, windows: Windows, device: torch.device) -> None:
        self.source_model, self.layer, self.windows, self.device = source_model, layer, windows, device
        self.name = f"model.layers.{layer}.self_attn"
        self._decoder = load_layer(
            config=source_model.model,
            layer=StageLayers(blocks=range(layer, layer + 1)),
            read=source_model.read,
            document_mask=windows.document_mask,
        ).to(device)
        self.source: MultiheadExplicitAttention = self._block.self_attn

    @property
    def _block(self) -> TransformerBlock:
        return self._decoder.blocks[0]

    def build(self, latent: LatentLayer) -> MultiheadExplicitAttention:
        """Attention of the compressed layer."""
        num_layers = self.source_model.model.num_hidden_layers
        settings = latent_settings(
            self.source_model.model, dims=[latent.dims] * num_layers, counts=[latent.counts] * num_layers
        )
        with torch.device("meta"):
            attention = MultiheadExplicitAttention(settings, self.layer)

        load_parameters(
            attention,
            read=lambda name: latent.tensors[name].clone() if name in latent.tensors else self.source_model.read(name),
        )
        return attention.to(self.device)

    def move(self, attention: MultiheadExplicitAttention, stream: list[torch.Tensor]) -> list[torch.Tensor]:
        """Moves a stream behind the layer with this attention, whose outputs (batch, seq, hidden) it returns."""
        outputs: list[torch.Tensor] = []
        handle = attention.register_forward_hook(lambda *call: outputs.append(call[-1].cpu()))
        self._block.self_attn = attention
        for index, batch in enumerate(self.windows):
            positions = torch.from_numpy(batch.position_ids).to(self.device)
            stream[index] = self._decoder.forward_hidden(stream[index].to(self.device), positions).cpu()

        handle.remove()
        return outputs

    def moments(self, states: list[torch.Tensor]) -> Moments:
        """The second moments on a stream, of which the closed forms are made."""
        moments = Moments(self.source_model.model, self.device)
        for index, before_norm in enumerate(states):
            hidden_states, arguments = self._attention_input(index, before_norm)
            moments.add(self.source, hidden_states, **arguments)

        return moments

    def fit(
        self, dims: LatentDims, *, moments: Moments, states: list[torch.Tensor], targets: list[torch.Tensor]
    ) -> LatentLayer:
        """Keys and values in closed form, and `o_proj` by least squares.

        Args:
            moments: on `states`.
            states: the stream before the layer.
            targets: the outputs (batch, seq, hidden) that attention should have, of each batch.
        """
        keys, values = self.factorise(moments, dims)
        counts = torch.bincount(keys.frequency, minlength=self.source_model.model.head_dim // 2).tolist()
        tensors = self._projections(keys, values)
        latent = LatentLayer(dims=dims, counts=counts, tensors=tensors, error=1.0)
        return self._refit(latent, self.build(latent), states=states, targets=targets)

    def reconstruct(
        self, latent: LatentLayer, *, steps: int, states: list[torch.Tensor], targets: list[torch.Tensor]
    ) -> LatentLayer:
        """Steps of Adam on all matrices of attention, a batch a step, and `o_proj` by least squares again.

        Returns:
            What it was given where that has the smaller error.
        """
        if latent.error == 0:
            return latent

        attention = self.build(latent)
        parameters = {
            parameter.spec.name: parameter
            for parameter in attention.parameters()
            if parameter.spec.component in ("attention", "hlc")
        }
        groups = [
            {"params": [parameter], "lr": _LEARNING_RATE * parameter.square().mean().sqrt().item()}
            for parameter in parameters.values()
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], total_steps=steps, pct_start=0.15, cycle_momentum=False
        )
        scale = sum(target.double().square().sum().item() for target in targets) / len(targets)
        with torch.enable_grad():
            attention.requires_grad_()
            for step in range(steps):
                index = step % len(states)
                hidden_states, arguments = self._attention_input(index, states[index])
                error = attention(hidden_states, **arguments) - targets[index].to(self.device)
                optimizer.zero_grad()
                (error.square().sum() / scale).backward()
                optimizer.step()
                schedule.step()

        attention.requires_grad_(requires_grad=False)
        tensors = latent.tensors | {name: parameter.detach().cpu() for name, parameter in parameters.items()}
        steps_taken = replace(latent, tensors=tensors)
        reconstructed = self._refit(steps_taken, attention, states=states, targets=targets)
        return reconstructed if reconstructed.error < latent.error else latent

    def _attention_input(self, index: int, hidden_states: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """The normalised hidden states of a batch, and the other arguments of an attention layer."""
        positions = torch.from_numpy(self.windows[index].position_ids).to(self.device)
        cos, sin = rotary_cos_sin(config=self.source_model.model, position_ids=positions, dtype=torch.float32)
        attend = attention_function(positions, document_mask=self.windows.document_mask)
        arguments = {"cos": cos.unsqueeze(1), "sin": sin.unsqueeze(1), "attend": attend}
        return self._block.input_layernorm(hidden_states.to(self.device)), arguments

    def factorise(self, moments: Moments, dims: LatentDims) -> tuple[KeyFactors, ValueFactors]:
        """The closed forms alone."""
        model = self.source_model.model
        keys = factorise_keys(
            frequency_moments(moments.keys.cpu(), num_heads=model.num_key_value_heads),
            weights=moments.query_energy.cpu().T,
            num_pairs=dims[0] // 2,
        )
        o_proj = self.source_model.read(f"{self.name}.o_proj.weight").double()
        if model.has_head_norm and model.head_norm_affine:
            gains = self.source_model.read(f"{self.name}.head_norm.weight").double()
            o_proj = o_proj * gains.repeat(model.num_attention_heads)
        values = factorise_values(
            moments.values.cpu(),
            weight=output_weight(o_proj, num_heads=model.num_key_value_heads, head_dim=model.head_dim),
            num_latent=dims[1],
        )
        return keys, values

    def _projections(self, keys: KeyFactors, values: ValueFactors) -> dict[str, torch.Tensor]:
        """Parameters of the latent keys and values, biases included."""
        model = self.source_model.model
        key_rows = self.source_model.composite_projection(self.layer, "k")
        if model.qk_norm:
            gains = self.source_model.read(f"{self.name}.k_norm.weight").double()
            key_rows = key_rows * gains.repeat(model.num_key_value_heads).unsqueeze(1)

        value_rows = self.source_model.composite_projection(self.layer, "v")
        pairs, pair_sizes = _balance(select_keys(key_rows, keys).unflatten(0, (2, -1)), like=key_rows)
        latent, latent_sizes = _balance((values.selection @ value_rows).unsqueeze(0), like=value_rows)
        combination = torch.view_as_real(keys.combination.resolve_conj()) * pair_sizes[:, None, None]
        tensors = {
            f"{self.name}.hlc_k.weight": combination.float(),
            f"{self.name}.hlc_v.weight": (values.combination * latent_sizes[:, None]).float(),
        }
        for side, projection in (("k", pairs.flatten(0, 1)), ("v", latent.squeeze(0))):
            tensors[f"{self.name}.{side}_proj.weight"] = projection[:, : model.hidden_size].float()
            if model.attention_bias:
                tensors[f"{self.name}.{side}_proj.bias"] = projection[:, -1].float()

        return tensors

    def _refit(
        self,
        latent: LatentLayer,
        attention: MultiheadExplicitAttention,
        *,
        states: list[torch.Tensor],
        targets: list[torch.Tensor],
    ) -> LatentLayer:
        """`o_proj` (hidden, H d) by least squares from the outputs of its heads, with a ridge towards what it is."""
        o_proj = attention.o_proj.weight.double()
        hidden_size, width = o_proj.shape
        gram = torch.zeros(width, width, dtype=torch.float64, device=self.device)
        product = torch.zeros(width, hidden_size, dtype=torch.float64, device=self.device)
        energy = 0.0
        heads: list[torch.Tensor] = []
        handle = attention.o_proj.register_forward_pre_hook(lambda _, call: heads.append(call[0]))
        for index, target in enumerate(targets):
            hidden_states, arguments = self._attention_input(index, states[index])
            attention(hidden_states, **arguments)
            # shape: (batch, seq, ..) -> (tokens, ..). Sums over one batch in float32, over batches in float64.
            outputs, wanted = heads.pop().flatten(0, 1), target.to(self.device).flatten(0, 1)
            gram += outputs.mT @ outputs
            product += outputs.mT @ wanted
            energy += wanted.double().square().sum().item()

        handle.remove()
        # Above 0 where the heads put out nothing, so that `o_proj` stays.
        size = max(_RIDGE * gram.diagonal().mean().item(), _MIN_RIDGE)
        ridge = size * torch.eye(width, dtype=torch.float64, device=self.device)
        solution = torch.linalg.solve(gram + ridge, product + ridge @ o_proj.mT)
        # |target - outputs W|^2, summed over the tokens.
        squares = energy - 2 * (solution * product).sum() + (solution * (gram @ solution)).sum()
        tensors = latent.tensors | {f"{self.name}.o_proj.weight": solution.mT.float().cpu().contiguous()}
        return replace(latent, tensors=tensors, error=max(squares.item(), 0.0) / energy if energy else 0.0)


def _balance(rows: torch.Tensor, *, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales numbers to the mean square that the source model's rows have, since training goes on from there.

    Factors of a product may have any sizes. Steps of Adam are as large for all elements, so that a small factor of a
    large one would be lost with the first of them.

    Args:
        rows: (rows of a number, numbers, D).
        like: (any, D)

    Returns:
        The rows, and how much larger each number was, (numbers,), for the combination.
    """
    sizes = (rows.square().mean((0, 2)) / like.square().mean()).sqrt()
    sizes = torch.where(sizes > 0, sizes, 1.0)
    return rows / sizes[:, None], sizes
