"""The fit of a latent layer: its moments and least squares against loops in float64, and what each of them is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from support.models import small_model
from support.source_models import save_source_model
from support.tiny import Tiny

from megatron_mea.attention.document_mask import attention_function
from megatron_mea.attention.mea import MultiheadExplicitAttention
from megatron_mea.compression.calibrate import calibration_windows
from megatron_mea.compression.latent_fit import LayerFit
from megatron_mea.compression.moments import Moments
from megatron_mea.compression.source_model import open_source_model
from megatron_mea.exported.rotary_mea import rotary_cos_sin
from megatron_mea.huggingface.model_folder import ModelFolder

HEADS, QUERIES, DIM, HIDDEN = 3, 6, 8, 24
SETTINGS = {
    "num_attention_heads": QUERIES,
    "num_key_value_heads": HEADS,
    "num_component_heads": HEADS,
    "head_dim": DIM,
    "hidden_size": HIDDEN,
}


def rotate(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """(seq, d) by angles (seq, d/2), as complex numbers."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_variant": "plain"},
        {"attention_variant": "plain", "qk_norm": True},
        {"attention_variant": "plain_norm", "attention_bias": True},
    ],
)
@torch.no_grad()
def test_moments_are_those_of_a_loop(settings):
    config = small_model(**SETTINGS | settings)
    generator = torch.Generator().manual_seed(0)
    attention = MultiheadExplicitAttention(config, 0)
    for parameter in attention.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4 + (parameter.dim() == 1))

    attention.double()
    states = torch.randn(2, 7, HIDDEN, generator=generator, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]])
    cos, sin = (
        part.unsqueeze(1) for part in rotary_cos_sin(config=config, position_ids=positions, dtype=torch.float64)
    )
    moments = Moments(config, torch.device("cpu"))
    attend = attention_function(positions, document_mask=True)
    moments.add(attention, states, cos=cos, sin=sin, attend=attend)

    def heads(projection, batch: int, count: int) -> torch.Tensor:
        return torch.stack(projection(states[batch]).unflatten(-1, (count, DIM)).unbind(1))

    def root(part: torch.Tensor) -> torch.Tensor:
        return (part.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    key_moment = torch.zeros(HEADS * DIM, HEADS * DIM, dtype=torch.float64)
    value_moment, energy = key_moment.clone(), torch.zeros(HEADS, DIM // 2, dtype=torch.float64)
    inv_freq = config.rope_theta ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    for batch in range(2):
        queries = heads(attention.q_proj, batch, QUERIES)
        keys, values = (
            side(states[batch : batch + 1])[0] for side in (attention.key_projection, attention.value_projection)
        )
        stored = keys
        if config.qk_norm:
            gains = attention.k_norm.gain()
            queries = queries / root(queries) * attention.q_norm.gain()
            normed = keys / root(keys) * gains
            size = (normed.square().mean((0, 2)) / (keys * gains).square().mean((0, 2))).sqrt()
            stored, keys = keys * gains * size[:, None], normed

        rows = stored.transpose(0, 1).flatten(1)
        key_moment += sum(torch.outer(row, row) for row in rows)
        for j in range(QUERIES):
            pairs = queries[j].unflatten(-1, (2, -1)).square().sum(1)
            energy[j // 2] += pairs.sum(0)
            angles = positions[batch][:, None] * inv_freq
            logits = rotate(queries[j], angles) @ rotate(keys[j // 2], angles).T / DIM**0.5
            document = (positions[batch] == 0).cumsum(0)
            visible = torch.ones(7, 7).tril().bool() & (document[:, None] == document)
            weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
            attended = torch.cat([weights @ value for value in values], -1)
            if config.has_head_norm:
                own = attended.unflatten(-1, (HEADS, DIM))[:, j // 2]
                attended = attended / (own.square().mean(-1, keepdim=True) + config.head_norm_eps).sqrt()
            value_moment += attended.T @ attended / QUERIES

    for found, expected in (
        (moments.keys, key_moment),
        (moments.values, value_moment),
        (moments.query_energy, energy),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@contextmanager
def layer_fit(folder, tiny: Tiny, kind: str = "llama") -> Iterator[tuple[LayerFit, dict[str, list[torch.Tensor]]]]:
    """A fit of the first layer of a random model, with hidden states of which some directions are much larger."""
    original = save_source_model(kind, folder / "in")
    with open_source_model(ModelFolder.locate(original), folder / "x") as source_model:
        windows = calibration_windows(
            source_model=source_model, path=str(tiny.train), where="--calibration", batch=1, tokens=1024
        )
        fit = LayerFit(source_model=source_model, layer=0, windows=windows, device=torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        hidden_size = source_model.model.hidden_size
        mix = torch.randn(hidden_size, hidden_size, generator=generator) * torch.logspace(0, -2, hidden_size)[:, None]
        states = [torch.randn(*batch.input_ids.shape, hidden_size, generator=generator) @ mix for batch in windows]
        yield fit, {"states": states, "targets": fit.move(fit.source, list(states))}


def lost(fit: LayerFit, latent, streams) -> float:
    """Part of the mean square of attention's outputs."""
    outputs = fit.move(fit.build(latent), list(streams["states"]))
    errors = [(output - target).square().sum() for output, target in zip(outputs, streams["targets"], strict=True)]
    return (sum(errors) / sum(target.square().sum() for target in streams["targets"])).item()


@pytest.mark.slow
@torch.no_grad()
def test_every_moment_and_every_step_of_the_fit_loses_less(tiny: Tiny, tmp_path):
    """Than a fit with a moment that says nothing; and what is said to be lost is."""
    with layer_fit(tmp_path, tiny, "qwen3") as (fit, streams):
        moments, dims = fit.moments(streams["states"]), (16, 10)
        closed = fit.fit(dims, moments=moments, **streams)
        for name, nothing in (
            ("keys", torch.eye(len(moments.keys), dtype=torch.float64)),
            ("values", torch.eye(len(moments.values), dtype=torch.float64)),
            ("query_energy", moments.query_energy.flip(1)),
        ):
            known = getattr(moments, name)
            setattr(moments, name, nothing)
            assert fit.fit(dims, moments=moments, **streams).error > 1.02 * closed.error, name
            setattr(moments, name, known)

        found = fit.reconstruct(closed, steps=60, **streams)
        as_it_was = {name: tensor for name, tensor in closed.tensors.items() if "o_proj" not in name}
        assert lost(fit, replace(closed, tensors=as_it_was), streams) > 1.02 * closed.error > 1.05 * found.error
        for latent in (closed, found):
            assert lost(fit, latent, streams) == pytest.approx(latent.error, rel=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_the_output_projection_is_the_least_squares_solution(tiny: Tiny, tmp_path):
    """Against a solution by orthogonal factors of all tokens' rows, in float64, with the ridge as rows of its own."""
    with layer_fit(tmp_path, tiny) as (fit, streams):
        closed = fit.fit((16, 10), moments=fit.moments(streams["states"]), **streams)
        attention = fit.build(closed)
        heads: list[torch.Tensor] = []
        attention.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0].flatten(0, 1)))
        fit.move(attention, list(streams["states"]))
        rows, targets = torch.cat(heads).double(), torch.cat(streams["targets"]).flatten(0, 1).double()
        original = fit.source.o_proj.weight.T.double()
        ridge = (1e-3 * rows.square().sum(0).mean()).sqrt() * torch.eye(rows.shape[1], dtype=torch.float64)
        expected = torch.linalg.lstsq(torch.cat([rows, ridge]), torch.cat([targets, ridge @ original])).solution
        torch.testing.assert_close(attention.o_proj.weight.T.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_training_goes_on_from_rows_as_large_as_before(tiny: Tiny, tmp_path):
    """However large the weights of the closed forms are; otherwise the first steps of Adam destroy the combination."""
    with layer_fit(tmp_path, tiny) as (fit, streams):
        latent = fit.fit((16, 10), moments=fit.moments(streams["states"]), **streams)
        for side in "kv":
            rows = latent.tensors[f"{fit.name}.{side}_proj.weight"]
            source = fit.source_model.read(f"{fit.name}.{side}_proj.weight").square().mean().item()
            sizes = rows.square().mean(1) if side == "v" else rows.unflatten(0, (2, -1)).square().mean((0, 2))
            assert sizes.tolist() == pytest.approx([source] * len(sizes), rel=1e-5)
            assert 0.01 < latent.tensors[f"{fit.name}.hlc_{side}.weight"].square().mean().sqrt() < 10
