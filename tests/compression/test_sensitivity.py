"""`sensitivity`: what one layer costs is what `evaluate` says of a model with that layer compressed."""

from __future__ import annotations

import json

import pytest
from test_compress import LAYERS, source

from megatron_mea.cli import main
from megatron_mea.compression import compress, virtual
from megatron_mea.compression import sensitivity as module
from megatron_mea.compression.compress import measured_costs
from megatron_mea.compression.origin import open_origin
from megatron_mea.compression.virtual import Factoriser


@pytest.fixture
def original(tiny, tmp_path):
    return source("mea_no_norm", tmp_path / "in", tiny.tokenizer)


def cross_entropy(model, tiny, capsys) -> float:
    capsys.readouterr()
    assert main(["evaluate", str(model), "--data", str(tiny.validation)]) == 0
    return json.loads(capsys.readouterr().out)["cross_entropy"]


def test_every_layer_alone(original, tiny, tmp_path, capsys):
    out = tmp_path / "deep/found.json"
    command = ["sensitivity", str(original), "--component-heads", "2", "--data", str(tiny.validation), "--align"]
    assert main([*command, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["cross_entropy"] == pytest.approx(cross_entropy(original, tiny, capsys), abs=1e-5)
    assert [row["layer"] for row in found["layers"]] == [1, 2, 3]
    for row in found["layers"][::2]:
        changed = tmp_path / f"layer{row['layer']}"
        one = ["--component-heads", "2", "--layers", str(row["layer"]), "--align"]
        assert main(["compress", str(original), str(changed), *one]) == 0
        assert row["cross_entropy"] == pytest.approx(cross_entropy(changed, tiny, capsys), abs=1e-5)
        assert row["difference"] == pytest.approx(row["cross_entropy"] - found["cross_entropy"])
        assert f"{row['cross_entropy']:.4f}" in table
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.parent.iterdir()) == ["found.json", "found.png"]


def test_it_goes_on_where_it_was_stopped(original, tiny, tmp_path, monkeypatch, capsys):
    command = ["sensitivity", str(original), "--component-heads", "1", "--data", str(tiny.validation)]
    assert main([*command, "--out", str(tmp_path / "whole.json")]) == 0
    real, calls = module.losses_of_changes, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "losses_of_changes", counted)
    out = tmp_path / "found.json"
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--out", str(out)])
    assert not out.exists()
    passes = json.loads((tmp_path / "whole.json").read_text())["passes"]
    assert main([*command, "--out", str(out)]) == 0
    assert len(calls) == passes + 1
    assert json.loads(out.read_text()) == json.loads((tmp_path / "whole.json").read_text())
    # Of another question, or of other data of the same name, nothing is kept.
    calls[:] = [1, 1, 1]
    asked = {key: json.loads(out.read_text())[key] for key in ("model", "component_heads", "weights", "passes")}
    (tmp_path / "found.json.part").write_text(json.dumps({"asked": asked, "done": 1}))
    assert main([*command, "--out", str(out)]) == 0
    assert len(calls) == passes + 3


def test_what_is_kept_depends_on_tokens_weights_and_settings(original, tiny, tmp_path):
    other = tmp_path / "other"
    for kind in ("bin", "idx"):
        other.with_suffix(f".{kind}").write_bytes(tiny.validation.with_suffix(f".{kind}").read_bytes())

    def asked() -> dict:
        out = tmp_path / "found.json"
        command = ["sensitivity", str(original), "--component-heads", "3", "--data", str(other), "--out", str(out)]
        assert main(command) == 0
        return {key: value for key, value in json.loads(out.read_text()).items() if key in ("weights", "tokens_digest")}

    found = [asked()]
    tokens = other.with_suffix(".bin").read_bytes()
    other.with_suffix(".bin").write_bytes(tokens[2:4] + tokens[2:])
    description = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(description | {"rms_norm_eps": 1e-3}))
    found.append(asked())
    assert found[0]["weights"] != found[1]["weights"]
    assert found[0]["tokens_digest"] != found[1]["tokens_digest"]


def test_costs_are_never_negative_and_never_fall_with_fewer_heads(original, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "AUTO_TOKENS", 128)
    with open_origin(original, tmp_path / "x") as origin:
        options = [list(range(1, had + 1)) for had in origin.model.component_heads]
        costs = measured_costs(origin, Factoriser(origin, None, False), options, str(tiny.train))
        # The same where memory is for one change at a time, and for the virtual heads of one layer and side.
        monkeypatch.setattr(module, "_BYTES", 0)
        monkeypatch.setattr(virtual, "_KEPT", 0)
        factoriser = Factoriser(origin, None, False)
        for again, one in zip(measured_costs(origin, factoriser, options, str(tiny.train)), costs, strict=True):
            assert again == pytest.approx(one, abs=1e-6)
        assert len(factoriser._made) == 1
    assert [sorted(one) for one in costs] == [[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 4]]
    for one in costs:
        values = [one[heads] for heads in sorted(one, reverse=True)]
        assert values[0] == 0
        assert values == sorted(values)
    assert len(costs) == LAYERS
