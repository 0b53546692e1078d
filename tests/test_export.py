"""The export of a trained model: in a process that has transformers but not this package, and through the commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import reference_logits
from safetensors.torch import load_file, save_file

from megatron_mea.checkpoint.folder import checkpoints_of
from megatron_mea.checkpoint.tensors import read_tensors, weight_shapes
from megatron_mea.cli import main
from megatron_mea.huggingface import modeling_mea

SETTINGS = {
    "model.num_attention_heads": 4,
    "training.steps": 20,
    "training.global_batch_size": 8,
    "evaluation.interval": 20,
    "checkpoint.interval": 10,
}


@pytest.fixture(scope="module")
def exported(whole, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "deep" / "model"
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mea", "export", str(whole), str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "real tokens differ from the trainer's by at most" in done.stdout
    return out


def test_files(exported, whole):
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "mea"
    assert config["architectures"] == ["MEAForCausalLM"]
    assert config["num_component_heads"] == [1, 1]
    assert config["rope_parameters"] == {"rope_theta": 500000.0, "rope_type": "default"}
    assert config["dtype"] == "float32"
    tensors = load_file(exported / "model.safetensors")
    folder = checkpoints_of(whole)[-1][1]
    expected = read_tensors(folder, weight_shapes(folder))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert tensors["model.layers.1.self_attn.hlc_k.weight"].shape == (1, 2)
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o666 & ~umask}
    assert [path.name for path in exported.parent.iterdir()] == ["model"]


def test_stands_alone(exported, tmp_path):
    """Greedy generation with left padding equals row by row; nothing of this package is importable."""
    script = tmp_path / "alone.py"
    script.write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'megatron_mea':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True, padding_side='left')\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "texts = ['In the beginning', 'To be']\n"
        "def run(texts, **settings):\n"
        "    inputs = tokenizer(texts, return_tensors='pt', padding=True, return_token_type_ids=False)\n"
        "    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, **settings)\n"
        "    return [row[inputs['input_ids'].shape[1]:].tolist() for row in output]\n"
        "batch = run(texts)\n"
        "assert batch == run(texts, use_cache=False), batch\n"
        "assert batch == [run([text])[0] for text in texts], batch\n"
        "print(type(model).__name__, model.config.model_type, batch)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(exported)],
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("MEAForCausalLM mea")


def test_evaluate_generate_and_inspect(exported, whole, tiny, tmp_path, capsys):
    out = tmp_path / "new" / "evaluation.json"
    assert main(["evaluate", str(whole), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    capsys.readouterr()
    assert main(["evaluate", str(exported), "--data", str(tiny.validation)]) == 0
    other = json.loads(capsys.readouterr().out)
    assert result["tokens"] == other["tokens"] == _independent_count(tiny.validation)
    # The checkpoint is evaluated in windows of its seq_length, the export in its whole context.
    assert result["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=0.05)
    assert result["cross_entropy"] == pytest.approx(_independent_loss(exported, tiny.validation), rel=1e-5)

    texts = []
    for model in (whole, exported):
        assert main(["generate", str(model), "--prompt", "And the", "--max-new-tokens", "5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("And the")

    assert main(["inspect", str(whole)]) == 0
    shown = capsys.readouterr().out
    for text in ("step             20", "5,120", "model.layers.1.self_attn.hlc_v.weight", "(1, 2)", "whole"):
        assert text in shown


def test_bfloat16(whole, tmp_path, capsys):
    assert main(["export", str(whole / "checkpoints/step_00000010"), str(tmp_path), "--dtype", "bf16"]) == 0
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_that_lacks_a_tensor_is_refused(exported, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.hlc_k.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    assert f"missing keys: {name}" in capsys.readouterr().err
    save_file(tensors | {name: tensors[name][:, :1].clone()}, folder / "model.safetensors", {"format": "pt"})
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    assert name in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-9])
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    config = json.loads((exported / "config.json").read_text()) | {"attention_variant": "foo"}
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    assert "'foo'" in capsys.readouterr().err


def test_a_wrong_export_is_noticed(whole, tmp_path, monkeypatch, capsys):
    wrong = modeling_mea.MEAHeadCombination.forward
    monkeypatch.setattr(modeling_mea.MEAHeadCombination, "forward", lambda self, x: 2 * wrong(self, x))
    assert main(["export", str(whole), str(tmp_path / "out")]) == 1
    assert "logits differ from the trainer's" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def _tokens(prefix: Path) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(f"{prefix}.bin", dtype=np.uint16).astype(np.int64))


def _documents(prefix: Path) -> list[torch.Tensor]:
    """Every document ends with the token that ends the last one."""
    tokens = _tokens(prefix)
    ends = (tokens == tokens[-1]).nonzero().flatten() + 1
    return list(tokens.tensor_split(ends[:-1]))


def _independent_count(prefix: Path) -> int:
    return sum(len(document) - 1 for document in _documents(prefix))


@torch.no_grad()
def _independent_loss(folder: Path, prefix: Path) -> float:
    """Cross-entropy of the documents, cut where windows of 32 tokens end, by the reference."""
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    total, place = 0.0, 0
    for document in _documents(prefix):
        start = 0
        while start < len(document) - 1:
            stop = min(start + 32 - (place + start) % 32, len(document) - 1)
            logits = reference_logits(tensors, config, document[None, start:stop])[0]
            total -= logits.log_softmax(-1).gather(-1, document[start + 1 : stop + 1, None]).sum().item()
            start = stop
        place += len(document)
    return total / _independent_count(prefix)
