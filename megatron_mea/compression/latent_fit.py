"""The fit of a layer's latent keys and values: moments, closed forms, least squares, and a reconstruction by steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mea.attention.document_mask import AttentionFn, attention_function
from megatron_mea.attention.mea import MultiheadExplicitAttention
from megatron_mea.compression.latent_keys import LatentKeys, factorise_keys, frequency_moments, select_keys
from megatron_mea.compression.latent_model import LatentDims, latent_settings
from megatron_mea.compression.latent_values import LatentValues, factorise_values, output_weight
from megatron_mea.compression.source_model import SourceModel
from megatron_mea.config.schema import Model
from megatron_mea.data.windows import Windows
from megatron_mea.exported.rotary_mea import apply_rotary, rotary_cos_sin
from megatron_mea.model.decoder import Decoder, StageLayers
from megatron_mea.model.layerwise import load_layer

_RIDGE = 1e-3
"""Of the mean square of a feature: how much `o_proj` stays what it was, since calibration tokens are few."""
_LEARNING_RATE = 6e-3
"""Of a reconstruction: the part of a tensor's root mean square by which a step of Adam changes its elements."""


@dataclass(frozen=True, kw_only=True)
class LatentLayer:
    """What a layer becomes.

    Attributes:
        counts: pairs of each frequency.
        tensors: the changed parameters, by name.
        error: the part of the mean square of attention's outputs that is lost on the calibration tokens.
    """

    counts: list[int]
    tensors: dict[str, torch.Tensor]
    error: float


class LayerFit:
    """Fits one layer on a stream of hidden states, to give what the source model's layer gives on a stream of its own.

    Args:
        layer: counted from 0.
        windows: the calibration tokens; a stream has the hidden states (batch, seq, hidden) of each batch.

    Attributes:
        source: the source model's layer.
    """

    def __init__(self, *, source_model: SourceModel, layer: int, windows: Windows, device: torch.device) -> None:
        self.source_model, self.layer, self.windows, self.device = source_model, layer, windows, device
        self.name = f"model.layers.{layer}.self_attn"
        self.source = self._load(source_model.model, source_model.read)

    def build(self, latent: LatentLayer) -> Decoder:
        """The compressed layer."""
        model = self.source_model.model
        widths = [len(latent.tensors[f"{self.name}.{side}_proj.weight"]) for side in "kv"]
        settings = latent_settings(
            model,
            dims=[(widths[0], widths[1])] * model.num_hidden_layers,
            counts=[latent.counts] * model.num_hidden_layers,
        )
        return self._load(
            settings,
            lambda name: latent.tensors[name].clone() if name in latent.tensors else self.source_model.read(name),
        )

    def _load(self, model: Model, read: Callable[[str], torch.Tensor]) -> Decoder:
        return load_layer(
            config=model,
            layer=StageLayers(blocks=range(self.layer, self.layer + 1)),
            read=read,
            document_mask=self.windows.document_mask,
        ).to(self.device)

    def move(self, decoder: Decoder, stream: list[torch.Tensor]) -> list[torch.Tensor]:
        """Moves a stream behind the layer; returns the outputs (batch, seq, hidden) of its attention."""
        outputs: list[torch.Tensor] = []
        handle = decoder.blocks[0].self_attn.register_forward_hook(lambda *call: outputs.append(call[-1].cpu()))
        for index, batch in enumerate(self.windows):
            positions = torch.from_numpy(batch.position_ids).to(self.device)
            stream[index] = decoder.forward_hidden(stream[index].to(self.device), positions).cpu()

        handle.remove()
        return outputs

    def moments(self, states: list[torch.Tensor]) -> Moments:
        """The second moments on a stream, of which the closed forms are made."""
        moments = Moments(self.source_model.model, self.device)
        for hidden_states, arguments in self._attention_inputs(states):
            moments.add(self.source.blocks[0].self_attn, hidden_states, **arguments)

        return moments

    def fit(
        self, dims: LatentDims, *, moments: Moments, states: list[torch.Tensor], targets: list[torch.Tensor]
    ) -> LatentLayer:
        """Keys and values in closed form, and `o_proj` by least squares.

        Args:
            moments: on `states`.
            states: the stream before the layer.
            targets: what attention should put out for each of its batches.
        """
        keys, values = self._factorise(moments, dims)
        counts = torch.bincount(keys.frequency, minlength=self.source_model.model.head_dim // 2).tolist()
        tensors = self._projections(keys, values)
        latent = LatentLayer(counts=counts, tensors=tensors, error=1.0)
        return self._refit(latent, self.build(latent).blocks[0].self_attn, states=states, targets=targets)

    def reconstruct(
        self, latent: LatentLayer, *, steps: int, states: list[torch.Tensor], targets: list[torch.Tensor]
    ) -> LatentLayer:
        """Steps of Adam on all matrices of attention, a batch a step, and `o_proj` by least squares again.

        Returns:
            What it was given where that has the smaller error.
        """
        attention = self.build(latent).blocks[0].self_attn
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
        inputs = list(self._attention_inputs(states))
        scale = sum(target.double().square().sum().item() for target in targets) / len(targets)
        with torch.enable_grad():
            attention.requires_grad_()
            for step in range(steps):
                hidden_states, arguments = inputs[step % len(inputs)]
                error = attention(hidden_states, **arguments) - targets[step % len(inputs)].to(self.device)
                optimizer.zero_grad()
                (error.square().sum() / scale).backward()
                optimizer.step()
                schedule.step()

        attention.requires_grad_(requires_grad=False)
        tensors = latent.tensors | {name: parameter.detach().cpu() for name, parameter in parameters.items()}
        steps_taken = LatentLayer(counts=latent.counts, tensors=tensors, error=1.0)
        found = self._refit(steps_taken, attention, states=states, targets=targets)
        return found if found.error < latent.error else latent

    def _attention_inputs(self, states: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Yields the normalised hidden states of every batch, and the other arguments of an attention layer."""
        block = self.source.blocks[0]
        for hidden_states, batch in zip(states, self.windows, strict=True):
            positions = torch.from_numpy(batch.position_ids).to(self.device)
            cos, sin = rotary_cos_sin(config=self.source_model.model, position_ids=positions, dtype=torch.float32)
            attend = attention_function(positions, document_mask=self.windows.document_mask)
            arguments = {"cos": cos.unsqueeze(1), "sin": sin.unsqueeze(1), "attend": attend}
            yield block.input_layernorm(hidden_states.to(self.device)), arguments

    def _factorise(self, moments: Moments, dims: LatentDims) -> tuple[LatentKeys, LatentValues]:
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

    def _projections(self, keys: LatentKeys, values: LatentValues) -> dict[str, torch.Tensor]:
        """Parameters of the latent keys and values, biases included."""
        model = self.source_model.model
        key_rows = self.source_model.composite_projection(self.layer, "k")
        if model.qk_norm:
            gains = self.source_model.read(f"{self.name}.k_norm.weight").double()
            key_rows = key_rows * gains.repeat(model.num_key_value_heads).unsqueeze(1)

        rows = {
            "k": select_keys(key_rows, keys),
            "v": values.selection @ self.source_model.composite_projection(self.layer, "v"),
        }
        tensors = {
            f"{self.name}.hlc_k.weight": torch.view_as_real(keys.combination.resolve_conj()).float(),
            f"{self.name}.hlc_v.weight": values.combination.float(),
        }
        for side, projection in rows.items():
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
        """`o_proj` (hidden, H d) by least squares from what its heads put out, with a ridge towards what it is."""
        o_proj = attention.o_proj.weight.double()
        hidden_size, width = o_proj.shape
        gram = torch.zeros(width, width, dtype=torch.float64, device=self.device)
        product = torch.zeros(width, hidden_size, dtype=torch.float64, device=self.device)
        energy = 0.0
        heads: list[torch.Tensor] = []
        handle = attention.o_proj.register_forward_pre_hook(lambda _, call: heads.append(call[0]))
        for target, (hidden_states, arguments) in zip(targets, self._attention_inputs(states), strict=True):
            attention(hidden_states, **arguments)
            # shape: (batch, seq, ..) -> (tokens, ..). Sums over one batch in float32, over batches in float64.
            outputs, wanted = heads.pop().flatten(0, 1), target.to(self.device).flatten(0, 1)
            gram += outputs.mT @ outputs
            product += outputs.mT @ wanted
            energy += wanted.double().square().sum().item()

        handle.remove()
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64, device=self.device)
        found = torch.linalg.solve(gram + ridge, product + ridge @ o_proj.mT)
        # |target - outputs W|^2, summed over the tokens.
        squares = energy - 2 * (found * product).sum() + (found * (gram @ found)).sum()
        tensors = latent.tensors | {f"{self.name}.o_proj.weight": found.mT.float().cpu().contiguous()}
        return LatentLayer(counts=latent.counts, tensors=tensors, error=max(squares.item(), 0.0) / energy)


class Moments:
    """Sums over tokens, in float64: keys E[y y^T], queries' energy by head and frequency, and attended values."""

    def __init__(self, model: Model, device: torch.device) -> None:
        heads, width = model.num_key_value_heads, model.num_key_value_heads * model.head_dim
        self.model = model
        self.keys = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.values = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.query_energy = torch.zeros(heads, model.head_dim // 2, dtype=torch.float64, device=device)

    def add(
        self,
        attention: MultiheadExplicitAttention,
        hidden_states: torch.Tensor,
        *,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: AttentionFn,
    ) -> None:
        """Adds the tokens of normalised hidden states (batch, seq, hidden)."""
        model, (batch, seq, _) = self.model, hidden_states.shape
        query = attention.q_proj(hidden_states).view(batch, seq, -1, model.head_dim).transpose(1, 2)
        key, value = attention.key_projection(hidden_states), attention.value_projection(hidden_states)
        if attention.q_norm is not None and attention.k_norm is not None:
            # Keys count by the size that the norm gives them, the same for all heads of a token, so that a
            # combination of heads can be weighted by it.
            query, normed, with_gain = attention.q_norm(query), attention.k_norm(key), key * attention.k_norm.gain()
            sizes = [heads.square().mean((1, 3), keepdim=True) for heads in (normed, with_gain)]
            latent_key, key = with_gain * (sizes[0] / sizes[1]).sqrt(), normed
        else:
            latent_key = key

        # shape: (batch, h, seq, d) -> (tokens, h d)
        rows = latent_key.transpose(1, 2).flatten(2).flatten(0, 1).double()
        self.keys += rows.mT @ rows
        # shape: (batch, H, seq, d) -> (h, d/2)
        energy = query.double().square().sum((0, 2)).unflatten(0, (model.num_key_value_heads, -1)).sum(1)
        self.query_energy += energy.unflatten(1, (2, -1)).sum(1)

        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        # All value heads as attended by each query head: (batch, H, seq, h d)
        attended = torch.cat([attend(query, key, head.expand_as(value)) for head in value.split(1, 1)], -1)
        if model.has_head_norm:
            attended = attended / self._own_size(attended)
        rows = attended.flatten(0, 2).double()
        self.values += rows.mT @ rows

    def _own_size(self, attended: torch.Tensor) -> torch.Tensor:
        """RMS of each query head's own output, (batch, H, seq, 1), which the head norm takes away."""
        model = self.model
        heads = attended.unflatten(-1, (model.num_key_value_heads, model.head_dim))
        groups = torch.arange(model.num_attention_heads, device=attended.device) // (
            model.num_attention_heads // model.num_key_value_heads
        )
        own = heads[:, torch.arange(len(groups), device=attended.device), :, groups].transpose(0, 1)
        return (own.square().mean(-1, keepdim=True) + model.head_norm_eps).sqrt()
