"""The published ways of making a cache smaller that the benches compare with ours, on a tiny random layer."""

from __future__ import annotations

import itertools
import json
import sys

import pytest
import torch
from support.runs import ROOT
from support.source_models import SIZES, save_source_model

from megatron_mea.attention.causal import causal_attention
from megatron_mea.attention.mea import MultiheadExplicitAttention
from megatron_mea.compression.calibrate import calibration_windows
from megatron_mea.compression.source_model import open_source_model
from megatron_mea.config.load import parse_model
from megatron_mea.data.corpora import IGNORE_INDEX
from megatron_mea.exported.rotary_mea import apply_rotary, rotary_cos_sin
from megatron_mea.huggingface.model_folder import ModelFolder
from megatron_mea.model.decoder import all_layers
from megatron_mea.model.layerwise import load_layer

sys.path.insert(0, str(ROOT / "tools/bench"))
import latent as latent_bench
from compress import cross_entropy
from peers.care import adjusted_ranks, care_energies, care_layer, damped
from peers.decoding import exported_step, peer_step, uncompressed_step
from peers.layers import PeerAttention
from peers.low_rank import factorise_outputs, output_energies
from peers.palu import palu_layer, proportional_ranks
from peers.study import fisher_information, peer_cross_entropy
from peers.transmla import rotate_keys, transmla_layer

HEADS, DIM, SEQ = 4, 8, 24
FULL = HEADS * DIM


@pytest.fixture(scope="module")
def layer():
    """Attention with biases in float64, its inputs (batch, seq, hidden), arguments, and output."""
    sizes = SIZES | {"head_dim": DIM, "attention_variant": "plain", "num_component_heads": HEADS}
    model = parse_model(sizes | {"attention_bias": True})
    generator = torch.Generator().manual_seed(0)
    attention = MultiheadExplicitAttention(model, 0).double().requires_grad_(requires_grad=False)
    for parameter in attention.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)

    scales = torch.linspace(0.1, 2, model.hidden_size, dtype=torch.float64)
    inputs = torch.randn(3, SEQ, model.hidden_size, generator=generator, dtype=torch.float64) * scales
    cos, sin = rotary_cos_sin(config=model, position_ids=torch.arange(SEQ)[None], dtype=torch.float64)
    arguments = {"cos": cos[:, None], "sin": sin[:, None], "attend": causal_attention}
    return model, attention, inputs, arguments, attention(inputs, **arguments)


def projections(layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Key and value projections with their biases as the last column, and the second moment of the inputs."""
    _, attention, inputs, _, _ = layer
    parameters = {parameter.spec.name.split("self_attn.")[1]: parameter for parameter in attention.parameters()}
    key, value = (
        torch.cat([parameters[f"{side}_proj.weight"], parameters[f"{side}_proj.bias"][:, None]], 1) for side in "kv"
    )
    rows = torch.nn.functional.pad(inputs, (0, 1), value=1.0).flatten(0, 1)
    return key, value, rows.T @ rows / len(rows)


def build(method: str, layer, cached: int):
    """A peer's layer with about so many cached numbers."""
    key, value, moment = projections(layer)
    if method == "transmla":
        return transmla_layer(key, value, moment, head_dim=DIM, cached=cached, rotary_dim=DIM, fold=2)
    if method == "care":
        return care_layer(key, value, moment, key_rank=cached // 2, value_rank=cached // 2)

    groups = HEADS if method == "palu-heads" else 1
    return palu_layer(key, value, moment, key_rank=cached // 2, value_rank=cached // 2, groups=groups)


def error(layer, peer) -> float:
    """Mean square of the difference to the output of the layer."""
    _, attention, inputs, arguments, output = layer
    return (PeerAttention(attention, peer)(inputs, **arguments) - output).square().mean().item()


@pytest.mark.parametrize("method", ["palu", "palu-heads", "care"])
def test_full_rank_reproduces_the_layer(layer, method):
    peer = build(method, layer, cached=2 * FULL)
    assert peer.cached == 2 * FULL
    assert error(layer, peer) < 1e-20


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_transmla_with_every_pair_rotated_reproduces_the_layer_unless_frequencies_are_folded(layer, fold):
    key, value, moment = projections(layer)
    peer = transmla_layer(key, value, moment, head_dim=DIM, cached=2 * FULL, rotary_dim=FULL, fold=fold)
    assert peer.cached == 2 * FULL
    assert (error(layer, peer) < 1e-20) == (fold == 1)


def test_transmla_rotates_keys_as_rope_does(layer):
    """Heads mixed by the rotation have the logits of heads as they are, before RoPE is taken from any of them."""
    key, _, moment = projections(layer)
    rotation, rotary, frequency = rotate_keys(key, moment, head_dim=DIM, rotary_dim=DIM, fold=2)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(FULL, dtype=torch.float64))
    assert sorted(frequency.tolist()) == list(range(DIM // 2))
    assert len(set(rotary.tolist())) == DIM

    # The first components have the most energy of all that can be had by rotating these features.
    energies = (rotation @ key @ moment @ key.T @ rotation.T).diagonal()
    kept, size = energies[rotary].sum().item(), 2 * HEADS * 2
    groups = energies.view(-1, 2, size // 2).sum(1)
    assert kept == pytest.approx(groups.topk(2).values.sum().item(), rel=1e-12)


@pytest.mark.parametrize("method", ["palu", "palu-heads", "care", "transmla"])
def test_fewer_numbers_lose_more(layer, method):
    errors = [error(layer, build(method, layer, cached=cached)) for cached in (64, 48, 32, 24, 16)]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]


def test_no_other_factors_of_the_rank_lose_less(layer):
    """What the closed form leaves out is the sum of the energies, and no step from it gains."""
    key, _, moment = projections(layer)
    generator = torch.Generator().manual_seed(1)

    def lost(weight: torch.Tensor) -> float:
        difference = key - weight
        return (difference @ moment * difference).sum().item()

    for rank in (3, 11, 20):
        (selection,), (expansion,) = factorise_outputs(key, moment, rank=rank)
        least = lost(expansion @ selection)
        assert least == pytest.approx(output_energies(key, moment)[rank:].sum().item(), rel=1e-9)

        # As the papers have it: the SVD of W L, and the inverse of L.
        root = torch.linalg.cholesky(moment)
        left, values, right = torch.linalg.svd(key @ root)
        papers = (left[:, :rank] * values[:rank]) @ right[:rank] @ torch.linalg.inv(root)
        torch.testing.assert_close(expansion @ selection, papers, rtol=1e-8, atol=1e-8)

        for size in (1e-3, 1e-2, 1e-1):
            noise = [torch.randn(part.shape, generator=generator).double() for part in (expansion, selection)]
            assert lost((expansion + size * noise[0]) @ (selection + size * noise[1])) > least


def test_transmla_keeps_the_principal_components_of_balanced_keys_and_values(layer):
    key, value, moment = projections(layer)
    rotation, rotary, _ = rotate_keys(key, moment, head_dim=DIM, rotary_dim=DIM, fold=1)
    others = [row for row in range(FULL) if row not in set(rotary.tolist())]
    rest = (rotation @ key)[others]
    sizes = [(rows @ moment @ rows.T).diagonal().sqrt().mean() for rows in (rest, value)]
    stacked = torch.cat([rest * sizes[1] / sizes[0], value])
    energies = torch.linalg.eigvalsh(stacked @ moment @ stacked.T)

    peer = transmla_layer(key, value, moment, head_dim=DIM, cached=DIM + 20, rotary_dim=DIM, fold=1)
    latent_energy = (peer.selection @ moment * peer.selection).sum()
    torch.testing.assert_close(latent_energy, energies[-20:].sum())


def test_ranks_meet_their_budgets(layer):
    key, value, moment = projections(layer)
    energies = [care_energies(weight, moment) for weight in (key, value, 0.1 * key + value)]
    torch.testing.assert_close(energies[0], output_energies(key, damped(moment)))
    for budget, spread in itertools.product((12, 48, 61), (1.0, 1.5, 2.0)):
        ranks = adjusted_ranks(energies, budget=budget, spread=spread)
        assert sum(ranks) == budget
        assert all(int(budget / 3 / spread) <= rank <= min(FULL, -(-budget * spread // 3)) for rank in ranks)

    # By hand: 4 is two thirds of 4 + 1 + 1, and then 1 a half of what is left there; 3.5 is more than half of 6.5.
    spectra = [torch.tensor([6.0, 4.0, 1.0, 1.0]), torch.tensor([6.0, 3.5, 2.0, 1.0])]
    assert adjusted_ranks(spectra, budget=3, spread=2.0) == [2, 1]
    assert adjusted_ranks(spectra, budget=4, spread=2.0) == [2, 2]

    assert proportional_ranks([1.0, 2.0, 3.0], budget=12, largest=10) == [2, 4, 6]
    assert proportional_ranks([0.0, 1.0, 100.0], budget=16, largest=10) == [1, 5, 10]
    for budget, scores in itertools.product((4, 17, 40), ([1.0, 1.0, 1.0, 1.0], [5.0, 0.1, 3.0, 0.7])):
        assert sum(proportional_ranks(scores, budget=budget, largest=10)) == budget


@pytest.mark.parametrize("method", ["palu", "palu-heads", "transmla"])
def test_a_step_of_decoding_computes_the_attention_that_is_measured(layer, method, monkeypatch):
    """Caches filled by the layer's selections, and queries as attention takes them, give the last token's output."""
    model, attention, inputs, arguments, _ = layer
    peer = build(method, layer, cached=32)
    rows = torch.nn.functional.pad(inputs[:1], (0, 1), value=1.0)
    query = attention.q_proj(inputs[:1]).unflatten(2, (-1, DIM)).transpose(1, 2)
    expected = peer.attend(query, rows, **arguments)[0, :, -1].float()

    last = query[0, :, -1].unflatten(0, (HEADS, -1))
    cos, sin = arguments["cos"][0, 0, -1], arguments["sin"][0, 0, -1]
    if method == "transmla":
        features = peer.frequency.repeat(2)
        turned = torch.einsum("hrd,hgd->hgr", peer.rotary_queries, last)
        angles = [angle[..., features] for angle in (arguments["cos"], arguments["sin"])]
        key = apply_rotary((rows @ peer.rotary_selection.T).unsqueeze(1), *angles)
        cache = torch.cat([rows.unsqueeze(1) @ peer.selection.T, key], -1)
        tensors = [cache, cache[0, 0, -1], last, apply_rotary(turned, cos[features], sin[features])]
    else:
        caches = [rows @ selection.mT for selection in (peer.key_selection, peer.value_selection)]
        pairs = torch.arange(DIM).view(2, -1).T.flatten()
        tensors = [*caches, *(cache[:, -1] for cache in caches), apply_rotary(last, cos, sin)[..., pairs]]

    given = iter(tensors)
    monkeypatch.setattr("peers.decoding.random_numbers", lambda *shape: next(given).float().view(shape).clone())
    output = peer_step(peer, model, length=SEQ)()
    torch.testing.assert_close(output.flatten(0, -2), expected, rtol=1e-4, atol=1e-4)


def test_steps_of_the_uncompressed_model_and_of_exports_run():
    sizes = SIZES | {"head_dim": DIM, "attention_variant": "mea_no_norm"}
    heads = parse_model(sizes | {"num_component_heads": 2})
    latent = parse_model(
        sizes | {"num_component_heads": HEADS, "hlc_form": "latent", "key_latent_dim": 12, "value_latent_dim": 9}
    )
    for step in (
        uncompressed_step(heads, length=8),
        exported_step(heads, layer=1, length=8),
        exported_step(latent, layer=1, length=8),
    ):
        assert step().shape == (1, 1, SIZES["num_attention_heads"], DIM)


@pytest.mark.slow
def test_the_source_model_is_measured_a_layer_at_a_time(tiny, tmp_path):
    """Fisher information is that of the whole model's gradients, and full ranks lose nothing."""
    folder = save_source_model(kind="qwen2", folder=tmp_path / "model", tokenizer=tiny.tokenizer)
    with open_source_model(ModelFolder.locate(folder), tmp_path / "out") as source_model:
        windows = calibration_windows(source_model=source_model, path=str(tiny.train), where="", batch=1, tokens=256)
        decoder = load_layer(
            config=source_model.model, layer=all_layers(source_model.model), read=source_model.read, document_mask=True
        )
        projections = [
            projection.weight.requires_grad_()
            for block in decoder.blocks
            for projection in (block.self_attn.key_projection, block.self_attn.value_projection)
        ]
        squares = torch.zeros(len(projections), *projections[0].shape)
        for batch in windows:
            arguments = [torch.from_numpy(part) for part in (batch.input_ids, batch.position_ids, batch.targets)]
            loss = decoder(*arguments) / (arguments[2] != IGNORE_INDEX).sum()
            squares += torch.stack(torch.autograd.grad(loss, projections)).square()

        expected = (squares / len(windows)).sqrt().mean((1, 2))
        found = fisher_information(source_model=source_model, windows=windows)
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-9)

        study = latent_bench.Study(source_model=source_model, calibration=str(tiny.train), results=None)
        full = latent_bench.cached_numbers(source_model.model, 1.0)
        layers = latent_bench.low_rank(study, full)
        loss = peer_cross_entropy(source_model=source_model, layers=layers, windows=windows)
        assert loss == pytest.approx(cross_entropy(source_model, windows), abs=1e-5)


@pytest.mark.slow
def test_latent_bench(tiny, tmp_path, monkeypatch, capsys):
    """All methods once, a second call that measures nothing, the table and the figure."""
    model = save_source_model(kind="llama", folder=tmp_path / "model", tokenizer=tiny.tokenizer)
    out, figure = tmp_path / "rows.json", tmp_path / "loss.svg"
    monkeypatch.setattr(latent_bench, "LENGTHS", (32,))
    options = ["--calibration", str(tiny.train), "--validation", str(tiny.validation), "--tokens", "256"]
    command = ["latent.py", str(model), "--out", str(out), *options, "--ratios", "0.5"]
    monkeypatch.setattr(sys, "argv", command)
    latent_bench.main()
    rows = json.loads(out.read_text())
    for method in latent_bench.METHODS:
        row = rows[f"0.5 | {method}"]["value"]
        assert row["cross_entropy"] > 0
        assert row["bytes_a_token"] == pytest.approx(rows["uncompressed bytes"]["value"] / 2, rel=0.02)

    latent_bench.main()
    assert json.loads(out.read_text()) == rows
    monkeypatch.setattr(sys, "argv", ["latent.py", "--out", str(out), "--figure", str(figure)])
    latent_bench.main()
    assert figure.read_bytes()
    assert not list(tmp_path.glob("rows.*-*"))
