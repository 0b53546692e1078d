"""`sensitivity`: the cross-entropy of each layer is that of `evaluate` on a model with that layer compressed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from support.foreign import edited_json
from support.source_models import LAYERS, save_source_model

from megatron_mea.cli import main
from megatron_mea.compression import changes, compressed_model, head_choice
from megatron_mea.compression import sensitivity as module
from megatron_mea.compression.compressed_model import Factoriser
from megatron_mea.compression.head_choice import measure_costs
from megatron_mea.compression.sensitivity import _read_progress
from megatron_mea.compression.source_model import open_source_model
from megatron_mea.huggingface.model_folder import ModelFolder

pytestmark = pytest.mark.slow


@pytest.fixture
def original(tiny, tmp_path):
    return save_source_model(kind="mea_no_norm", folder=tmp_path / "in", tokenizer=tiny.tokenizer)


def cross_entropy(*, model, tiny, capsys) -> float:
    capsys.readouterr()
    assert main(["evaluate", str(model), "--data", str(tiny.validation)]) == 0
    return json.loads(capsys.readouterr().out)["cross_entropy"]


def test_every_layer_alone(original, tiny, tmp_path, capsys):
    out = tmp_path / "deep/found.json"
    command = ["sensitivity", str(original), "--component-heads", "2", "--data", str(tiny.validation), "--align"]
    assert main([*command, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    result = json.loads(out.read_text())

    assert result["cross_entropy"] == pytest.approx(cross_entropy(model=original, tiny=tiny, capsys=capsys), abs=1e-5)
    assert [row["layer"] for row in result["layers"]] == [1, 2, 3]

    for row in result["layers"][::2]:
        changed = tmp_path / f"layer{row['layer']}"
        options = ["--component-heads", "2", "--layers", str(row["layer"]), "--align"]
        assert main(["compress", str(original), str(changed), *options]) == 0
        assert row["cross_entropy"] == pytest.approx(cross_entropy(model=changed, tiny=tiny, capsys=capsys), abs=1e-5)
        assert row["difference"] == pytest.approx(row["cross_entropy"] - result["cross_entropy"])
        assert f"{row['cross_entropy']:.4f}" in table

    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.parent.iterdir()) == ["found.json", "found.png"]


def test_it_goes_on_where_it_was_stopped(original, tiny, tmp_path, monkeypatch, capsys):
    command = ["sensitivity", str(original), "--component-heads", "1", "--data", str(tiny.validation)]
    assert main([*command, "--out", str(tmp_path / "whole.json")]) == 0
    forward_changes, calls = module.forward_changes, []

    def counted(**arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward_changes(**arguments)

    monkeypatch.setattr(module, "forward_changes", counted)
    out = tmp_path / "found.json"
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--out", str(out)])

    assert not out.exists()

    passes = json.loads((tmp_path / "whole.json").read_text())["passes"]
    assert main([*command, "--out", str(out)]) == 0
    assert len(calls) == passes + 1
    assert json.loads(out.read_text()) == json.loads((tmp_path / "whole.json").read_text())

    # Progress of another request, or on other data of the same name, is not used.
    calls[:] = [1, 1, 1]
    asked = {key: json.loads(out.read_text())[key] for key in ("model", "component_heads", "weights", "passes")}
    (tmp_path / "found.json.part").write_text(json.dumps({"asked": asked, "done": 1}))
    assert main([*command, "--out", str(out)]) == 0
    assert len(calls) == passes + 3


def test_what_is_kept_depends_on_tokens_weights_and_settings(original, tiny, tmp_path):
    other = tmp_path / "other"
    for kind in ("bin", "idx"):
        other.with_suffix(f".{kind}").write_bytes(tiny.validation.with_suffix(f".{kind}").read_bytes())

    def ask() -> dict:
        out = tmp_path / "found.json"
        command = ["sensitivity", str(original), "--component-heads", "3", "--data", str(other), "--out", str(out)]
        assert main(command) == 0
        return {key: value for key, value in json.loads(out.read_text()).items() if key in ("weights", "tokens_digest")}

    answers = [ask()]
    tokens = other.with_suffix(".bin").read_bytes()
    other.with_suffix(".bin").write_bytes(tokens[2:4] + tokens[2:])
    config_json = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config_json | {"rms_norm_eps": 1e-3}))
    answers.append(ask())

    assert answers[0]["weights"] != answers[1]["weights"]
    assert answers[0]["tokens_digest"] != answers[1]["tokens_digest"]


def test_costs_are_never_negative_and_never_fall_with_fewer_heads(original, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(head_choice, "CHOICE_TOKENS", 128)
    with open_source_model(ModelFolder.locate(original), tmp_path / "x") as source_model:
        options = [list(range(1, before + 1)) for before in source_model.model.component_heads]
        costs = measure_costs(
            source_model=source_model,
            factoriser=Factoriser(source_model=source_model, moments=None, aligned=False),
            options=options,
            calibration=str(tiny.train),
        )
        # The same where memory is for one change at a time, and cache for the virtual heads of one layer and side.
        monkeypatch.setattr(changes, "_MAX_HIDDEN_BYTES", 0)
        monkeypatch.setattr(compressed_model, "_MAX_CACHED_BYTES", 0)
        factoriser = Factoriser(source_model=source_model, moments=None, aligned=False)
        for repeated, layer_costs in zip(
            measure_costs(
                source_model=source_model, factoriser=factoriser, options=options, calibration=str(tiny.train)
            ),
            costs,
            strict=True,
        ):
            assert repeated == pytest.approx(layer_costs, abs=1e-6)

        assert len(factoriser._cache) == 1

    assert [sorted(layer_costs) for layer_costs in costs] == [[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 4]]

    for layer_costs in costs:
        values = [layer_costs[heads] for heads in sorted(layer_costs, reverse=True)]
        assert values[0] == 0
        assert values == sorted(values)

    assert len(costs) == LAYERS


REQUEST = {"model": "m", "window": 64}
PROGRESS = {"asked": REQUEST, "done": 2, "targets": 100, "sums": {"none": 1.5, "0": 2.5}}


@given(raw=edited_json(PROGRESS))
@settings(max_examples=200, deadline=None)
def test_progress_that_is_none_of_this_request_is_absent(tmp_path_factory, raw):
    file = tmp_path_factory.getbasetemp() / "result.json.part"
    file.write_bytes(raw)
    measured = _read_progress(file, request=REQUEST, names={"none", "0"}, passes=3)
    assert measured.keys() == {"done", "targets", "sums"}
    assert type(measured["done"]) is type(measured["targets"]) is int
    assert 0 <= measured["done"] <= 3
    assert all(type(total) is float for total in measured["sums"].values())
    assert measured["sums"].keys() == (PROGRESS["sums"].keys() if measured["done"] else set())


def test_progress_of_this_request_is_taken_up(tmp_path):
    (tmp_path / "part").write_text(json.dumps(PROGRESS))
    measured = {key: value for key, value in PROGRESS.items() if key != "asked"}
    assert _read_progress(tmp_path / "part", request=REQUEST, names={"none", "0"}, passes=3) == measured
    for other in ({"names": {"none", "1"}}, {"passes": 1}, {"request": REQUEST | {"window": 32}}):
        settings = {"request": REQUEST, "names": {"none", "0"}, "passes": 3} | other
        assert _read_progress(tmp_path / "part", **settings)["done"] == 0
