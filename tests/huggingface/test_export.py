"""The export of a trained model: in a process that has transformers but not this package, and through the commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.reference import reference_logits
from transformers import AutoTokenizer, GenerationConfig

from megatron_mea.checkpoint.folder import complete_checkpoints
from megatron_mea.checkpoint.tensors import read_tensors, weight_shapes
from megatron_mea.cli import main
from megatron_mea.exported import attention_mea
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.huggingface import export as export_module
from megatron_mea.huggingface.export import export
from megatron_mea.huggingface.model_folder import ModelFolder, StoredTensors

pytestmark = pytest.mark.slow

SETTINGS = {
    "model.num_attention_heads": 4,
    # The narrowest heads that vLLM's kernels take.
    "model.head_dim": 32,
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
    folder = complete_checkpoints(whole)[-1][1]
    expected = read_tensors(folder, weight_shapes(folder))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert tensors["model.layers.1.self_attn.hlc_k.weight"].shape == (1, 2)

    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o666 & ~umask}
    assert [path.name for path in exported.parent.iterdir()] == ["model"]


STANDALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'megatron_mea':
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True, padding_side='left')
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
texts = ['In the beginning', 'To be']
def run(texts, **settings):
    inputs = tokenizer(texts, return_tensors='pt', padding=True, return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, **settings)
    return [row[inputs['input_ids'].shape[1]:].tolist() for row in output]
batch = run(texts)
assert batch == run(texts, use_cache=False), batch
assert batch == [run([text])[0] for text in texts], batch
print(transformers.__version__, type(model).__name__, model.config.model_type, batch)
"""
OLDEST = "MEA_OLDEST_TRANSFORMERS"


@pytest.mark.parametrize("release", ["this", "oldest"])
def test_stands_alone(exported, whole, tmp_path, release):
    """Greedy generation with left padding equals row by row; nothing of this package is importable.

    So do the folders for vLLM, in the release that is installed and in the oldest one that is supported.
    """
    python = sys.executable if release == "this" else os.environ.get(OLDEST)
    if python is None:
        pytest.skip(f"{OLDEST} names no Python with transformers 5.16")

    script = tmp_path / "alone.py"
    script.write_text(STANDALONE)
    assert main(["export", str(whole), str(tmp_path / "served"), "--target", "vllm"]) == 0
    answers = []
    for folder in (exported, tmp_path / "served"):
        done = subprocess.run(
            [python, str(script), str(folder)],
            env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

        answers.append(done.stdout.split(maxsplit=3))

    assert [answer[1:3] for answer in answers] == [["MEAForCausalLM", "mea"], ["MEAServedForCausalLM", "mea_vllm"]]
    assert answers[0][3] == answers[1][3]
    assert release == "this" or answers[0][0].startswith("5.16.")


def test_evaluate_generate_and_inspect(exported, whole, tiny, tmp_path, capsys):
    out = tmp_path / "new" / "evaluation.json"
    assert main(["evaluate", str(whole), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    capsys.readouterr()
    assert main(["evaluate", str(exported), "--data", str(tiny.validation)]) == 0
    other = json.loads(capsys.readouterr().out)

    assert result["tokens"] == other["tokens"] == _independent_count(tiny.validation)
    # The checkpoint is evaluated in windows of its seq_length, the export in its whole context.
    assert result["window"] < other["window"]
    assert result["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=0.05)
    window = str(result["window"])
    assert main(["evaluate", str(exported), "--data", str(tiny.validation), "--window", window]) == 0
    assert json.loads(capsys.readouterr().out)["cross_entropy"] == pytest.approx(result["cross_entropy"], rel=1e-6)
    assert main(["evaluate", str(exported), "--tasks", "paper", "--window", window]) == 2
    assert "error: --window" in capsys.readouterr().err
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


def test_shards(exported, whole, tmp_path):
    """Shards within the limit, an index as transformers writes it, and the same tensors as in a single file."""
    out = tmp_path / "out"
    export(ModelFolder.locate(whole), out=out, shard_bytes=30_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2

    tensors = {}
    for number, file in enumerate(files, start=1):
        assert file.name == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        part = load_file(file)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 30_000
        tensors |= part

    expected = load_file(exported / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())

    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {name: name in load_file(out / file) for name, file in index["weight_map"].items()} == dict.fromkeys(
        tensors, True
    )

    model, info = MEAForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])


def test_card_and_generation(exported, whole):
    card = (exported / "README.md").read_text()
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for text in ("`mea`", "20 steps, 5,120 tokens", "train (", f"{rows[-1]['validation_loss']:.4f} nats", "fp32"):
        assert text in card

    assert str(whole.parent) not in card

    generation = GenerationConfig.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(generation, name) == getattr(tokenizer, name)


def test_chat_template(whole, tmp_path):
    """It travels with the tokenizer, and so do others beside it; so does how long a text may be."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    folder = complete_checkpoints(run)[-1][1]
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    (folder / "tokenizer" / "chat_template.jinja").write_text(template)
    (folder / "tokenizer/additional_chat_templates").mkdir()
    (folder / "tokenizer/additional_chat_templates/tool_use.jinja").write_text("tools")
    export(ModelFolder.locate(run), tmp_path / "out")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    message = [{"role": "user", "content": "speak"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "user: speak\n"
    assert tokenizer.apply_chat_template(message, chat_template="tool_use", tokenize=False) == "tools"

    config = json.loads((tmp_path / "out/config.json").read_text())
    assert tokenizer.model_max_length == config["max_position_embeddings"]
    assert {path.stat().st_mode & 0o100 for path in (tmp_path / "out").iterdir() if path.is_dir()} == {0o100}


def test_one_layer_at_a_time(whole, tmp_path, monkeypatch):
    """Nothing reads more than one tensor, and what the check fills a layer with is let go of again."""
    alive, most, double, read_fragments = [], 0, torch.Tensor.double, StoredTensors.read

    def read(stored: StoredTensors, fragments: list) -> list[str]:
        assert len(fragments) == 1
        return read_fragments(stored, fragments)

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        result = double(tensor)
        alive.append(weakref.ref(result))
        most = max(most, sum(reference() is not None for reference in alive))
        return result

    monkeypatch.setattr(StoredTensors, "read", read)
    monkeypatch.setattr(torch.Tensor, "double", counted)
    export(ModelFolder.locate(whole), tmp_path / "out")
    folder = complete_checkpoints(whole)[-1][1]
    layer = [name for name in weight_shapes(folder) if ".layers.1." in name]

    assert len(alive) >= 2 * len(weight_shapes(folder))
    assert most <= len(layer)


def test_a_full_disk_is_refused(whole, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert main(["export", str(whole), str(tmp_path / "deep" / "out")]) == 2
    assert "GB free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_lacks_a_tensor_is_refused(exported, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.hlc_k.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    assert f"without {name}" in capsys.readouterr().err

    save_file(tensors | {name: tensors[name][:, :1].clone()}, folder / "model.safetensors", {"format": "pt"})
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    assert name in capsys.readouterr().err

    (folder / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-9])
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    shutil.copy(exported / "model.safetensors", folder)
    config = json.loads((exported / "config.json").read_text()) | {"attention_variant": "foo"}
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    assert "'foo'" in capsys.readouterr().err


def test_a_wrong_export_is_noticed(whole, tmp_path, monkeypatch, capsys):
    wrong = attention_mea.MEAHeadCombination.forward
    monkeypatch.setattr(attention_mea.MEAHeadCombination, "forward", lambda self, x: 2 * wrong(self, x))
    assert main(["export", str(whole), str(tmp_path / "out")]) == 1
    assert "logits differ from the trainer's" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_what_the_check_finds(whole, tmp_path, monkeypatch, capsys, kind):
    """A number that was written wrongly, a tensor that no model has, a setting that was lost."""
    write = export_module.write_safetensors

    def flipped(folder, shapes, *, read, **settings):
        return write(folder, shapes, read=lambda name: read(name) + 1e-6 * ("hlc_v" in name), **settings)

    monkeypatch.setattr(export_module, "write_safetensors", flipped)
    assert main(["export", str(whole), str(tmp_path / "out"), "--target", kind]) == 1
    assert "hlc_v.weight is not what model.safetensors holds" in capsys.readouterr().err
    monkeypatch.undo()

    make = export_module.make_export_target

    def surplus(*arguments, **fields):
        target = make(*arguments, **fields)
        target.tensors["model.more.weight"] = target.tensors["model.norm.weight"]
        return target

    monkeypatch.setattr(export_module, "make_export_target", surplus)
    assert main(["export", str(whole), str(tmp_path / "out"), "--target", kind]) == 1
    assert "missing or unexpected: model.more.weight" in capsys.readouterr().err

    def another(*arguments, **fields):
        target = make(*arguments, **fields)
        target.config.rope_parameters = target.config.rope_parameters | {"rope_theta": 1e4}
        return target

    monkeypatch.setattr(export_module, "make_export_target", another)
    assert main(["export", str(whole), str(tmp_path / "out"), "--target", kind]) == 1
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
            logits = reference_logits(tensors=tensors, config=config, input_ids=document[None, start:stop])[0]
            total -= logits.log_softmax(-1).gather(-1, document[start + 1 : stop + 1, None]).sum().item()
            start = stop

        place += len(document)

    return total / _independent_count(prefix)
