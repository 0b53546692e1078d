"""A tiny round of benches that nothing else calls: they follow the code, names of private methods included."""

from __future__ import annotations

import json
import sys

import pytest
from support.runs import ROOT
from support.source_models import save_source_model

sys.path.insert(0, str(ROOT / "tools/bench"))
import compress as compress_bench
import decode
import experts as experts_bench

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("options", [[], ["--qk-norm", "--dtype", "bfloat16"]])
def test_decode(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "COLD_BYTES", 1e5)
    monkeypatch.setattr(decode, "machine_limits", lambda dtype: (1.0, 1.0))
    out = tmp_path / "out.json"
    sizes = ["--heads", "8", "4", "8", "--lengths", "32", "--budget", "0.01", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["decode.py", *sizes, *options, "--out", str(out)])
    decode.main()
    tables = {row["table"] for row in json.loads(out.read_text())["results"]}
    assert tables == set(decode.PARTS)


def test_compress(tiny, tmp_path, monkeypatch):
    model = save_source_model(kind="mea_no_norm", folder=tmp_path / "model", tokenizer=tiny.tokenizer)
    out = tmp_path / "rows.json"
    options = ["--calibration", str(tiny.train), "--validation", str(tiny.validation), "--tokens", "256"]
    monkeypatch.setattr(sys, "argv", ["compress.py", str(model), "--out", str(out), *options, "--ratios", "0.5"])
    compress_bench.main()
    rows = json.loads(out.read_text())
    assert rows["50% outputs, auto | loss"]["value"] > 0


def test_experts(tmp_path, monkeypatch):
    sizes = {"hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    monkeypatch.setattr(experts_bench, "SIZES", {"cpu": sizes})
    monkeypatch.setattr(experts_bench, "TOKENS", (64,))
    monkeypatch.setattr(experts_bench, "SEQ", 32)
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["experts.py", "--rounds", "1", "--out", str(out)])
    experts_bench.main()
    assert {(row["what"], row["tokens"]) for row in json.loads(out.read_text())["rows"]} == {
        ("layer", 64),
        ("step", 64),
    }
