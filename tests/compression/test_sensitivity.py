"""`sensitivity`: what one layer costs is what `evaluate` says of a model with that layer compressed."""

from __future__ import annotations

import json

import pytest
from test_compress import LAYERS, source

from megatron_mea.cli import main
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
    for row in found["layers"]:
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
    # Of another question nothing is kept.
    calls[:] = [1, 1, 1]
    (tmp_path / "found.json.part").write_text(json.dumps({"asked": {"component_heads": 2}, "done": 1}))
    assert main([*command, "--out", str(out)]) == 0
    assert len(calls) == passes + 3


def test_costs_are_never_negative_and_never_fall_with_fewer_heads(original, tiny, tmp_path):
    with open_origin(original, tmp_path / "x") as origin:
        options = [list(range(1, had + 1)) for had in origin.model.component_heads]
        costs = measured_costs(origin, Factoriser(origin, None, False), options, str(tiny.train))
    assert [sorted(one) for one in costs] == [[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 4]]
    for one in costs:
        values = [one[heads] for heads in sorted(one, reverse=True)]
        assert values[0] == 0
        assert values == sorted(values)
    assert len(costs) == LAYERS
