"""`compress --method latent`: the general head combination of a trained model, layer after layer in closed form.

Two streams of hidden states of the calibration tokens run through the layers, one layer in memory: the source model's,
and the compressed model's own, on which every layer is fitted. Keys follow from the moments of each frequency
(latent_keys.py), values from those of attended values (latent_values.py); then `o_proj` is refitted by least squares,
so that the compressed layer gives the outputs which the source model's layer gives on its own states.

What a layer becomes is kept in a folder beside OUT with both streams, from which the same command resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_mea.attention.document_mask import AttentionFn, attention_function
from megatron_mea.attention.mea import MultiheadExplicitAttention
from megatron_mea.compression.calibrate import embed_windows
from megatron_mea.compression.latent_keys import LatentKeys, factorise_keys, frequency_moments, select_keys
from megatron_mea.compression.latent_values import LatentValues, factorise_values, output_weight
from megatron_mea.compression.source_model import SourceModel
from megatron_mea.config.load import parse_model
from megatron_mea.config.schema import Model
from megatron_mea.config.variants import combining_variant
from megatron_mea.data.windows import Windows
from megatron_mea.exported.rotary_mea import apply_rotary, rotary_cos_sin
from megatron_mea.inputs import read_json_object
from megatron_mea.model.decoder import Decoder, StageLayers, TransformerBlock
from megatron_mea.model.layerwise import load_layer
from megatron_mea.outputs import write_file
from megatron_mea.progress import progress_bar

KEY_SHARE = 0.6
"""Part of a layer's numbers that its keys get: they were measured to need more than values (docs/compression.md)."""
_RIDGE = 1e-3
"""Of the mean square of a feature: how much `o_proj` stays what it was, since calibration tokens are few."""
_STREAMS, _REQUEST = "streams.safetensors", "request.json"


def latent_sizes(model: Model, ratio: float) -> tuple[int, int]:
    """Numbers of keys and of values that a layer caches at this ratio to all composite heads; at least a pair and one.

    The sum is the ratio to within one number.
    """
    composite = model.num_key_value_heads * model.head_dim
    total = max(round(2 * ratio * composite), 3)
    keys = min(2 * round(KEY_SHARE * total / 2), composite)
    values = min(total - keys, composite)
    # What one side cannot use the other gets.
    return min((total - values) // 2 * 2, composite), values


def latent_settings(model: Model, *, ratio: float, counts: Sequence[Sequence[int]] | None = None) -> Model:
    """The settings of the compressed model; `counts` are the pairs of each frequency, by layer."""
    keys, values = latent_sizes(model, ratio)
    return parse_model(
        model.model_dump(mode="json")
        | {
            "attention_variant": combining_variant(model.attention_variant),
            "num_component_heads": model.num_key_value_heads,
            "hlc_form": "latent",
            "hlc_init": "block",
            "hlc_mixes": "both",
            "key_latent_dim": keys,
            "value_latent_dim": values,
            "key_frequencies": None if counts is None else [list(layer) for layer in counts],
        }
    )


@dataclass(frozen=True, kw_only=True)
class LatentModel:
    """A compressed model, whose changed parameters lie in a folder, a file a layer.

    Attributes:
        model: the settings.
    """

    source_model: SourceModel
    model: Model
    folder: Path

    def read(self, name: str) -> torch.Tensor:
        """A full parameter in float32."""
        changed = self._changed(name)
        return self.source_model.read(name) if changed is None else changed

    def read_piece(self, *, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """A box of a parameter in float32."""
        changed = self._changed(name)
        if changed is None:
            return self.source_model.stored.read_tensor(name, offsets=offsets, shape=shape)

        return changed[tuple(slice(offset, offset + size) for offset, size in zip(offsets, shape, strict=True))]

    def _changed(self, name: str) -> torch.Tensor | None:
        if ".self_attn." not in name:
            return None

        with safe_open(_layer_file(self.folder, int(name.split(".")[2])), framework="pt") as tensors:
            return tensors.get_tensor(name) if name in tensors.keys() else None  # noqa: SIM118 - it is no dictionary

    @property
    def description(self) -> str:
        """How small the cache is."""
        cached = sum(self.model.key_latent_dims) + sum(self.model.value_latent_dims)
        total = 2 * self.model.num_key_value_heads * self.model.head_dim * self.model.num_hidden_layers
        return f"compressed to {cached:,} of {total:,} cached numbers a token"

    def summary(self) -> str:
        """For the user."""
        model = self.model
        keys, values = model.key_latent_dims[0], model.value_latent_dims[0]
        lines = [f"{self.description}; in a layer {keys} of keys and {values} of values"]
        if model.qk_norm:
            lines.append("with qk_norm the cache also holds a number for every composite head and token")
        return "\n".join(lines)


@torch.no_grad()
def compress_to_latent(
    *, source_model: SourceModel, ratio: float, windows: Windows, folder: Path, request: dict[str, object]
) -> LatentModel:
    """Fits all layers; what `folder` has of an interrupted call with the same request is not fitted again."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings, num_layers = latent_settings(source_model.model, ratio=ratio), source_model.model.num_hidden_layers
    done, counts = _resume(folder, request)
    if done:
        streams = load_file(folder / _STREAMS)
        source_states, states = (
            [streams[f"{kind}.{index}"] for index in range(len(windows))] for kind in ("source", "own")
        )
    else:
        embedded = embed_windows(source_model=source_model, windows=windows, device=device)
        source_states = [hidden_states.cpu() for _, hidden_states in embedded]
        states = list(source_states)

    with progress_bar(total=num_layers, desc="latent", unit="layer") as bar:
        bar.update(done)
        for layer in range(done, num_layers):
            fit = _LayerFit(source_model=source_model, settings=settings, layer=layer, windows=windows, device=device)
            tensors = fit.run(source_states, states)
            counts.append(fit.pair_counts)
            save_file(tensors, _layer_file(folder, layer))
            # The layer counts as done once the streams behind it are there.
            named = {f"source.{index}": item for index, item in enumerate(source_states)}
            save_file(named | {f"own.{index}": item for index, item in enumerate(states)}, folder / f"{_STREAMS}.new")
            (folder / f"{_STREAMS}.new").replace(folder / _STREAMS)
            write_file(folder / _REQUEST, json.dumps({"request": request, "done": layer + 1, "counts": counts}))
            bar.update()

    model = latent_settings(source_model.model, ratio=ratio, counts=counts)
    return LatentModel(source_model=source_model, model=model, folder=folder)


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:04d}.safetensors"


def _resume(folder: Path, request: dict[str, object]) -> tuple[int, list[list[int]]]:
    """Layers that an interrupted call with this request has fitted, and their pairs of each frequency."""
    folder.mkdir(exist_ok=True)
    try:
        saved = read_json_object(folder / _REQUEST)
        if saved["request"] != request or not (folder / _STREAMS).is_file():
            return 0, []
        return saved["done"], saved["counts"]
    except (OSError, ValueError, KeyError):
        return 0, []


class _LayerFit:
    """The fit of one layer: moments, closed forms, and the least squares of `o_proj`."""

    def __init__(
        self, *, source_model: SourceModel, settings: Model, layer: int, windows: Windows, device: torch.device
    ) -> None:
        self.source_model, self.settings, self.layer, self.device = source_model, settings, layer, device
        self.name = f"model.layers.{layer}.self_attn"
        self.windows = windows
        self.source = self._load(source_model.model, source_model.read)
        self.pair_counts: list[int] = []

    def run(self, source_states: list[torch.Tensor], states: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Fits the layer on both streams, which it moves behind itself, and returns the changed parameters."""
        keys, values = self._factorise(states)
        tensors = self._projections(keys, values)
        self.pair_counts = torch.bincount(keys.frequency, minlength=self.settings.head_dim // 2).tolist()
        compressed = self._load(
            self._layer_settings(), lambda name: tensors[name] if name in tensors else self.source_model.read(name)
        )

        targets = self._move(self.source, source_states)
        o_proj = compressed.blocks[0].self_attn.o_proj.weight
        o_proj.copy_(self._refit(compressed.blocks[0], states=states, targets=targets))
        tensors[f"{self.name}.o_proj.weight"] = o_proj.cpu()
        self._move(compressed, states)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def _load(self, model: Model, read: Callable[[str], torch.Tensor]) -> Decoder:
        return load_layer(
            config=model,
            layer=StageLayers(blocks=range(self.layer, self.layer + 1)),
            read=read,
            document_mask=self.windows.document_mask,
        ).to(self.device)

    def _layer_settings(self) -> Model:
        """Settings in which this layer has the frequencies that were found."""
        by_layer = [list(counts) for counts in self.settings.pair_counts]
        by_layer[self.layer] = self.pair_counts
        return self.settings.model_copy(update={"key_frequencies": by_layer})

    def _move(self, decoder: Decoder, stream: list[torch.Tensor]) -> list[torch.Tensor]:
        """Moves a stream behind the layer; returns the outputs (batch, seq, hidden) of its attention."""
        outputs: list[torch.Tensor] = []
        attention = decoder.blocks[0].self_attn
        handle = attention.register_forward_hook(lambda *call: outputs.append(call[-1].cpu()))
        for index, batch in enumerate(self.windows):
            positions = torch.from_numpy(batch.position_ids).to(self.device)
            stream[index] = decoder.forward_hidden(stream[index].to(self.device), positions).cpu()

        handle.remove()
        return outputs

    def _attention_inputs(
        self, block: TransformerBlock, states: list[torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Yields the normalised hidden states of every batch, and the other arguments of an attention layer."""
        for hidden_states, batch in zip(states, self.windows, strict=True):
            positions = torch.from_numpy(batch.position_ids).to(self.device)
            cos, sin = rotary_cos_sin(config=self.settings, position_ids=positions, dtype=torch.float32)
            attend = attention_function(positions, document_mask=self.windows.document_mask)
            arguments = {"cos": cos.unsqueeze(1), "sin": sin.unsqueeze(1), "attend": attend}
            yield block.input_layernorm(hidden_states.to(self.device)), arguments

    def _factorise(self, states: list[torch.Tensor]) -> tuple[LatentKeys, LatentValues]:
        model, block = self.source_model.model, self.source.blocks[0]
        moments = _Moments(model, self.device)
        for hidden_states, arguments in self._attention_inputs(block, states):
            moments.add(block.self_attn, hidden_states, **arguments)

        keys = factorise_keys(
            frequency_moments(moments.keys.cpu(), num_heads=model.num_key_value_heads),
            weights=moments.query_energy.cpu().T,
            num_pairs=self.settings.key_latent_dims[self.layer] // 2,
        )
        o_proj = self.source_model.read(f"{self.name}.o_proj.weight").double()
        if model.has_head_norm and model.head_norm_affine:
            gains = self.source_model.read(f"{self.name}.head_norm.weight").double()
            o_proj = o_proj * gains.repeat(model.num_attention_heads)
        values = factorise_values(
            moments.values.cpu(),
            weight=output_weight(o_proj, num_heads=model.num_key_value_heads, head_dim=model.head_dim),
            num_latent=self.settings.value_latent_dims[self.layer],
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
        self, block: TransformerBlock, *, states: list[torch.Tensor], targets: list[torch.Tensor]
    ) -> torch.Tensor:
        """`o_proj` (hidden, H d) by least squares from the compressed heads' outputs, with a ridge towards itself."""
        o_proj = block.self_attn.o_proj.weight
        hidden_size, width = o_proj.shape
        gram = torch.zeros(width, width, dtype=torch.float64, device=self.device)
        product = torch.zeros(width, hidden_size, dtype=torch.float64, device=self.device)
        outputs: list[torch.Tensor] = []
        handle = block.self_attn.o_proj.register_forward_pre_hook(lambda _, call: outputs.append(call[0]))
        for target, (hidden_states, arguments) in zip(targets, self._attention_inputs(block, states), strict=True):
            block.self_attn(hidden_states, **arguments)
            heads = outputs.pop().flatten(0, 1).double()
            gram += heads.mT @ heads
            product += heads.mT @ target.to(self.device).flatten(0, 1).double()

        handle.remove()
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64, device=self.device)
        return torch.linalg.solve(gram + ridge, product + ridge @ o_proj.mT.double()).mT.to(o_proj.dtype)


class _Moments:
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
