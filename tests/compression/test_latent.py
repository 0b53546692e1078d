"""`compress --method latent`: closed forms against brute force, and the models that it writes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.models import small_model
from support.source_models import save_source_model
from support.tiny import Tiny
from test_compress import logits
from transformers import AutoModelForCausalLM

from megatron_mea.attention.latent import expand_pairs
from megatron_mea.compression.calibrate import calibration_windows
from megatron_mea.compression.changes import forward_changes
from megatron_mea.compression.compress import compress
from megatron_mea.compression.compressed_model import Factoriser, with_one_layer_changed
from megatron_mea.compression.key_factors import factorise_keys, frequency_moments, select_keys
from megatron_mea.compression.latent_fit import LayerFit
from megatron_mea.compression.latent_sizes import _cost_curve, allocate, even_sizes, split_dims
from megatron_mea.compression.source_model import open_source_model
from megatron_mea.compression.value_factors import factorise_values, output_weight
from megatron_mea.config.schema import Model
from megatron_mea.data.corpora import IGNORE_INDEX
from megatron_mea.errors import UserError
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.exported.rotary_mea import apply_rotary
from megatron_mea.huggingface.hf_config import to_hf_config
from megatron_mea.huggingface.importing import import_model
from megatron_mea.huggingface.model_folder import ModelFolder
from megatron_mea.model.decoder import Decoder

HEADS, DIM, TOKENS = 3, 8, 500


def random_heads(seed: int = 0) -> torch.Tensor:
    """(tokens, h d), correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(HEADS * DIM, HEADS * DIM, generator=generator, dtype=torch.float64)
    scales = torch.linspace(0.1, 2, HEADS * DIM, dtype=torch.float64)
    return torch.randn(TOKENS, HEADS * DIM, generator=generator, dtype=torch.float64) * scales @ mix


def as_complex(heads: torch.Tensor) -> torch.Tensor:
    """(tokens, h d) -> (tokens, h, d/2)"""
    first, second = heads.unflatten(1, (HEADS, 2, -1)).unbind(2)
    return torch.complex(first, second)


def weighted_loss(heads: torch.Tensor, approximation: torch.Tensor, weights: torch.Tensor) -> float:
    errors = (as_complex(heads) - as_complex(approximation)).abs().square().mean(0)
    return (errors * weights.T).sum().item()


def approximate(heads: torch.Tensor, keys) -> torch.Tensor:
    matrix = expand_pairs(torch.view_as_real(keys.combination.resolve_conj()), keys.frequency, head_dim=DIM)
    return heads @ select_keys(torch.eye(HEADS * DIM, dtype=torch.float64), keys).T @ matrix


def test_keys_lose_what_is_predicted_and_no_other_pairs_lose_less():
    heads = random_heads()
    weights = torch.rand(DIM // 2, HEADS, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    moments = frequency_moments(heads.T @ heads / TOKENS, num_heads=HEADS)
    z = as_complex(heads)
    torch.testing.assert_close(moments, torch.einsum("taf,tbf->fab", z, z.conj()) / TOKENS)

    for num_pairs in (1, 5, 9, HEADS * DIM // 2):
        keys = factorise_keys(moments, weights=weights, num_pairs=num_pairs)
        loss = weighted_loss(heads, approximate(heads, keys), weights)
        assert len(keys.frequency) == num_pairs
        assert keys.frequency.tolist() == sorted(keys.frequency.tolist())
        assert loss == pytest.approx(keys.lost, abs=1e-9 * moments.abs().sum().item())

        # Steps along random directions, of selection and combination, never gain.
        generator = torch.Generator().manual_seed(2)
        for _ in range(20):
            noise = torch.view_as_complex(torch.randn(2, num_pairs, HEADS, 2, generator=generator).double())
            step = 10 ** float(-3 * torch.rand(1, generator=generator))
            other = type(keys)(
                frequency=keys.frequency,
                selection=keys.selection + step * noise[0],
                combination=keys.combination + step * noise[1],
                lost=0.0,
            )
            assert weighted_loss(heads, approximate(heads, other), weights) >= loss - 1e-9

    torch.testing.assert_close(approximate(heads, keys), heads, rtol=1e-11, atol=1e-11)


def test_no_other_numbers_of_pairs_by_frequency_lose_less():
    """All ways of sharing out five pairs over four frequencies, the best combination of each."""
    heads = random_heads(3)
    moments = frequency_moments(heads.T @ heads / TOKENS, num_heads=HEADS)
    weights = torch.ones(DIM // 2, HEADS, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(moments)
    left_out = [[eigenvalues[f, : HEADS - count].sum().item() for count in range(HEADS + 1)] for f in range(DIM // 2)]
    shares = torch.cartesian_prod(*[torch.arange(HEADS + 1)] * (DIM // 2)).tolist()
    best = min(sum(left_out[f][n] for f, n in enumerate(share)) for share in shares if sum(share) == 5)

    assert factorise_keys(moments, weights=weights, num_pairs=5).lost == pytest.approx(best, rel=1e-12)


def test_rotated_pairs_combine_to_rotated_keys():
    keys = factorise_keys(
        frequency_moments(random_heads().T @ random_heads(), num_heads=HEADS),
        weights=torch.ones(DIM // 2, HEADS),
        num_pairs=7,
    )
    generator = torch.Generator().manual_seed(4)
    pairs = torch.randn(10, 14, generator=generator, dtype=torch.float64)
    angles = torch.randn(10, DIM // 2, generator=generator, dtype=torch.float64).repeat(1, 2)
    matrix = expand_pairs(torch.view_as_real(keys.combination.resolve_conj()), keys.frequency, head_dim=DIM)
    frequency = keys.frequency.repeat(2)
    rotated_first = apply_rotary(pairs, angles[:, frequency].cos(), angles[:, frequency].sin()) @ matrix
    heads = (pairs @ matrix).unflatten(1, (HEADS, DIM))
    rotated_last = apply_rotary(heads, angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)).flatten(1)

    torch.testing.assert_close(rotated_first, rotated_last, rtol=1e-12, atol=1e-12)


def test_values_lose_what_is_predicted_and_no_other_numbers_lose_less():
    attended, generator = random_heads(5), torch.Generator().manual_seed(6)
    o_proj = torch.randn(11, 2 * HEADS * DIM, generator=generator, dtype=torch.float64)
    weight = output_weight(o_proj, num_heads=HEADS, head_dim=DIM)
    first = o_proj.unflatten(1, (HEADS, 2, DIM))[:, 1]
    torch.testing.assert_close(
        weight[DIM : 2 * DIM, DIM : 2 * DIM], torch.einsum("oga,ogb->ab", first, first), rtol=1e-12, atol=1e-12
    )
    assert not weight[:DIM, DIM:].any()

    weight = weight + torch.eye(HEADS * DIM)
    moment = attended.T @ attended / TOKENS

    def loss(selection: torch.Tensor, combination: torch.Tensor) -> float:
        errors = attended - attended @ selection.T @ combination
        return ((errors @ weight) * errors).sum().item() / TOKENS

    for num_latent in (1, 7, HEADS * DIM):
        values = factorise_values(moment, weight=weight, num_latent=num_latent)
        least = loss(values.selection, values.combination)
        assert least == pytest.approx(values.lost, abs=1e-9 * (weight * moment).sum().item())
        for _ in range(20):
            noise = torch.randn(2, num_latent, HEADS * DIM, generator=generator, dtype=torch.float64)
            step = 10 ** float(-3 * torch.rand(1, generator=generator))
            assert loss(values.selection + step * noise[0], values.combination + step * noise[1]) >= least - 1e-9


@pytest.mark.parametrize("ratio", [0.01, 0.25, 1 / 3, 0.5, 0.7, 0.9, 1.0])
def test_the_ratio_is_met_to_within_one_number(ratio):
    model = Model(num_key_value_heads=3, head_dim=64, num_attention_heads=9)
    keys, values = split_dims(model, even_sizes(model, ratio)[0])
    assert keys % 2 == 0
    assert 2 <= keys <= 192
    assert 1 <= values <= 192
    assert abs(keys + values - 2 * 192 * ratio) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "qwen3_moe", "plain_norm"])
def test_the_full_cache_computes_the_original(kind, tiny: Tiny, tmp_path):
    """With all numbers kept; the refit changes nothing where nothing is lost."""
    original, out = save_source_model(kind, tmp_path / "in"), tmp_path / "out"
    compress(ModelFolder.locate(original), out, ratio=1.0, calibration=str(tiny.validation), method="latent")
    torch.testing.assert_close(logits(out), logits(original), atol=2e-4, rtol=1e-4)
    assert not (tmp_path / "out.part").exists()


@given(data=st.data())
def test_no_other_sizes_cost_less(data):
    """Against all ways of sharing out, where every unit gains less than the one before."""
    gains = data.draw(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=4))
    costs = [np.array([sum(row), *np.subtract(sum(row), np.cumsum(sorted(row, reverse=True)))]) for row in gains]
    budget = data.draw(st.integers(0, 3 * len(costs)))
    chosen = allocate(costs, budget)
    ways = [way for way in itertools.product(range(4), repeat=len(costs)) if sum(way) == budget]

    def cost(way) -> float:
        return sum(curve[units] for curve, units in zip(costs, way, strict=True))

    assert sum(chosen) == budget
    assert cost(chosen) == pytest.approx(min(map(cost, ways)))


def test_a_cache_that_would_grow_is_refused(tiny: Tiny, tmp_path):
    original = save_source_model("mea", tmp_path / "in")
    with pytest.raises(UserError, match=r"at most 0\.9166: that is the cache of"):
        compressed_model(original, tmp_path / "out", tiny, ratio=0.95)


def test_a_curve_that_falls_late_is_worth_its_whole_way():
    """By single steps the second layer would get nothing."""
    assert allocate([np.array([3.0, 2.0, 1.0, 0.0]), np.array([9.0, 9.0, 9.0, 0.0])], 3) == [0, 3]


@pytest.mark.slow
def test_an_interrupted_call_is_resumed(tiny: Tiny, tmp_path, monkeypatch):
    """What was fitted is not fitted again, and the result is the same; of another request nothing is taken."""
    original, fitted = save_source_model("llama", tmp_path / "in"), []
    begin = LayerFit.__init__

    def counting_begin(fit, **arguments):
        fitted.append(arguments["layer"])
        if len(fitted) == stop_at:
            raise KeyboardInterrupt
        begin(fit, **arguments)

    def compressed(out: str, ratio: float = 0.5) -> torch.Tensor:
        options = {"ratio": ratio, "calibration": str(tiny.validation), "method": "latent"}
        fitted.clear()
        compress(ModelFolder.locate(original), tmp_path / out, **options)
        return logits(tmp_path / out)

    monkeypatch.setattr(LayerFit, "__init__", counting_begin)
    stop_at = None
    expected = compressed("whole")
    # Three layers are fitted to choose their sizes, and then again.
    assert fitted == [0, 1, 2, 0, 1, 2]

    for stop_at, left in ((2, [1, 2, 0, 1, 2]), (5, [1, 2])):
        out = f"out{stop_at}"
        with pytest.raises(KeyboardInterrupt):
            compressed(out)
        assert not (tmp_path / out).exists()

        stop_at = None
        assert torch.equal(compressed(out), expected)
        assert fitted == left

    stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        compressed("other")
    stop_at = None
    compressed("other", ratio=0.4)
    assert fitted == [0, 1, 2, 0, 1, 2]


def compressed_model(original: Path, out: Path, tiny: Tiny, **options) -> tuple[str, Model]:
    """The summary and the settings of a compressed folder."""
    arguments = {"ratio": 0.5, "calibration": str(tiny.train), "method": "latent"} | options
    summary = compress(ModelFolder.locate(original), out, **arguments)
    return summary, ModelFolder.locate(out).settings()


def lost_by_model(original: Path, out: Path, tiny: Tiny) -> float:
    """KL(original || compressed) of the predictions on validation text, nats a token, from torch's own functions."""
    ids = torch.from_numpy(np.fromfile(tiny.validation.with_suffix(".bin"), dtype=np.uint16)[:1024].astype(np.int64))
    both = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for folder in (original, out)]
    with torch.no_grad():
        before, after = (model(ids.view(-1, 32)).logits.log_softmax(-1) for model in both)
    return torch.nn.functional.kl_div(after, before, log_target=True, reduction="sum").item() / ids.numel()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """A model whose second layer has heads that are all alike, so that it needs a quarter of its cache."""
    folder = save_source_model("llama", tmp_path_factory.mktemp("uneven") / "in")
    weights = load_file(folder / "model.safetensors")
    for side in "kv":
        name = f"model.layers.1.self_attn.{side}_proj.weight"
        weights[name] = weights[name][:8].repeat(4, 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_sizes_are_chosen_where_they_cost_least(uneven, tiny: Tiny, tmp_path):
    """A layer that loses nothing gives its numbers to the others; steps of Adam lose less of the outputs still."""
    summary, chosen = compressed_model(uneven, tmp_path / "chosen", tiny)
    even_summary, even = compressed_model(uneven, tmp_path / "even", tiny, layers="full")
    stepped_summary, _ = compressed_model(uneven, tmp_path / "stepped", tiny, reconstruction_steps=30)

    sizes = [sum(dims) for dims in zip(chosen.key_latent_dims, chosen.value_latent_dims, strict=True)]
    # None has less than half of the ratio.
    assert 16 <= sizes[1] == min(sizes) < 20
    assert max(sizes) > 40
    assert abs(sum(sizes) - 3 * 32) <= 3
    assert set(even.key_latent_dims) <= {16, 18, 20, 22}
    assert [sum(dims) for dims in zip(even.key_latent_dims, even.value_latent_dims, strict=True)] == [32, 32, 32]
    assert lost_by_model(uneven, tmp_path / "chosen", tiny) < 0.9 * lost_by_model(uneven, tmp_path / "even", tiny)
    lost, even_lost, stepped_lost = (
        float(re.search(r"calibration tokens: ([\d.]+)%", text)[1]) for text in (summary, even_summary, stepped_summary)
    )
    assert stepped_lost < 0.95 * lost < lost < even_lost


@pytest.mark.slow
def test_divergences_are_those_of_the_whole_models(uneven, tiny: Tiny, tmp_path):
    """Of a batch, a layer at a time, against full logits of both models."""
    with open_source_model(ModelFolder.locate(uneven), tmp_path / "x") as source_model:
        factoriser = Factoriser(source_model=source_model, moments=None, aligned=False)
        windows = calibration_windows(source_model=source_model, path=str(tiny.train), where="x", batch=4, tokens=256)
        change_layer, changes, batch = with_one_layer_changed(factoriser), [(0, 1), (2, 3)], windows[0]
        found = forward_changes(
            source_model=source_model,
            change_layer=change_layer,
            changes=changes,
            batch=batch,
            document_mask=windows.document_mask,
        ).divergences()
        counted = torch.from_numpy(batch.targets) != IGNORE_INDEX

        def log_probabilities(model) -> torch.Tensor:
            decoder = Decoder(config=model.model, document_mask=windows.document_mask)
            decoder.requires_grad_(requires_grad=False)
            for parameter in decoder.parameters():
                parameter.copy_(model.read(parameter.spec.name))
            positions = torch.from_numpy(batch.position_ids)
            hidden = decoder.forward_hidden(torch.from_numpy(batch.input_ids), positions)
            return decoder.logits(hidden).double().log_softmax(-1)

        before = log_probabilities(source_model)
        for change in changes:
            after = log_probabilities(change_layer(change))
            expected = (before.exp() * (before - after)).sum(-1)[counted].sum().item()
            assert found[change] == pytest.approx(expected, rel=1e-4)


def test_costs_go_through_the_fitted_sizes_and_fall_to_nothing():
    curve = _cost_curve(6.0, errors=[0.3, 0.1, 0.05], totals=[4, 6, 10], full=14)
    assert curve.shape == (11,)
    assert curve[[0, 2, 6, 10]].tolist() == pytest.approx([6.0, 2.0, 1.0, 0.0])
    assert (np.diff(curve) < 0).all()
    assert curve[1] == pytest.approx(6.0 * (1 / 3) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["q_proj", "v_proj", "o_proj"])
def test_a_layer_that_puts_out_nothing_is_compressed(module, tiny: Tiny, tmp_path):
    """As blocks that are added to a model are before they are trained."""
    folder = save_source_model("llama", tmp_path / "in")
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.1.self_attn.{module}.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    compressed_model(folder, tmp_path / "out", tiny, ratio=0.75, reconstruction_steps=2)
    assert torch.isfinite(logits(tmp_path / "out")).all()


@pytest.mark.slow
def test_a_checkpoint_gives_a_checkpoint(tiny: Tiny, tmp_path):
    """Whose settings and tensors are those of the folder that the same model gives as a folder."""
    folder = save_source_model("mea", tmp_path / "in", tokenizer=tiny.tokenizer)
    import_model(source=ModelFolder.locate(folder), out=tmp_path / "imported", variant=None)
    options = {"ratio": 0.5, "calibration": str(tiny.train), "method": "latent"}
    compress(ModelFolder.locate(tmp_path / "imported"), tmp_path / "checkpoint", **options)
    compress(ModelFolder.locate(folder), tmp_path / "folder", **options)
    checkpoint, exported = (ModelFolder.locate(tmp_path / name) for name in ("checkpoint", "folder"))
    assert checkpoint.settings() == exported.settings()
    for name, tensor in load_file(tmp_path / "folder/model.safetensors").items():
        if "frequency" not in name:
            assert torch.equal(checkpoint.tensors().read_tensor(name), tensor), name


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({}, "--cache-ratio"),
        ({"heads": "2"}, "--component-heads"),
        ({"ratio": 0.5, "layers": "2"}, "--layers"),
        ({"ratio": 0.5, "calibration": None}, "--calibration"),
        ({"ratio": 0.001}, "at least 0.0469: a layer caches a pair of keys"),
        ({"ratio": 0.5, "method": "aligned", "reconstruction_steps": 3}, "--reconstruction-steps"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, where, tiny: Tiny, tmp_path):
    original = save_source_model("llama", tmp_path / "in")
    with pytest.raises(UserError, match=where):
        compress(
            ModelFolder.locate(original),
            tmp_path / "out",
            **{"calibration": str(tiny.validation), "method": "latent"} | options,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_all_numbers_give_the_logits_to_rounding_in_float64(qk_norm):
    """Whatever moments and weights the factors follow from."""
    settings = {"attention_variant": "mea_no_norm", "num_component_heads": 3, "num_key_value_heads": 3}
    settings |= {"num_attention_heads": 6, "head_dim": 8, "hidden_size": 24, "qk_norm": qk_norm}
    model = small_model(**settings)
    original = MEAForCausalLM(to_hf_config(model)).double()
    latent_model = MEAForCausalLM(to_hf_config(small_model(**settings, hlc_form="latent"))).double()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3 + ("norm" in name)
        for name, tensor in original.state_dict().items()
    }
    for name in weights:
        if "hlc" in name:
            weights[name] = torch.eye(3, dtype=torch.float64)

    latent = {name: tensor for name, tensor in weights.items() if "hlc" not in name}
    for layer in range(model.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn"
        moment = random_heads(layer).T @ random_heads(layer)
        key_rows = weights[f"{prefix}.k_proj.weight"]
        if qk_norm:
            key_rows = key_rows * weights[f"{prefix}.k_norm.weight"].repeat(3).unsqueeze(1)
        keys = factorise_keys(
            frequency_moments(moment, num_heads=3),
            weights=torch.rand(4, 3, generator=generator, dtype=torch.float64) + 0.1,
            num_pairs=12,
        )
        o_proj = weights[f"{prefix}.o_proj.weight"]
        values = factorise_values(moment, weight=output_weight(o_proj, num_heads=3, head_dim=8), num_latent=24)
        latent |= {
            f"{prefix}.k_proj.weight": select_keys(key_rows, keys),
            f"{prefix}.hlc_k.weight": torch.view_as_real(keys.combination.resolve_conj()),
            f"{prefix}.hlc_k.frequency": keys.frequency.double(),
            f"{prefix}.v_proj.weight": values.selection @ weights[f"{prefix}.v_proj.weight"],
            f"{prefix}.hlc_v.weight": values.combination,
        }

    original.load_state_dict(weights)
    latent_model.load_state_dict(latent)
    ids = torch.randint(model.vocab_size, (2, 9), generator=generator)
    torch.testing.assert_close(latent_model(ids).logits, original(ids).logits, rtol=1e-9, atol=1e-9)
