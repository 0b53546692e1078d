"""A MODEL has one door: who else may open one, what it costs, and what a checkpoint of a stranger meets there."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.hf_folders import save_stock_model
from support.runs import ROOT

from megatron_mea.checkpoint.folder import META, seal
from megatron_mea.checkpoint.tensors import read_tensors, weight_shapes, write_tensors
from megatron_mea.cli import main
from megatron_mea.huggingface.model_folder import CheckpointFolder, HFFolder, ModelFolder

PACKAGE = ROOT / "megatron_mea"
DOOR, READER, LOADER = (
    f"huggingface/{name}.py" for name in ("model_folder", "safetensors_reader", "transformers_model")
)
KEYS, HF_CONFIG, PARITY = (f"huggingface/{name}.py" for name in ("config_keys", "hf_config", "parity_check"))
MAY_USE = {
    "read_config_json": (KEYS, DOOR),
    "transformers_config": (HF_CONFIG, LOADER, DOOR),
    "model_section": (HF_CONFIG, DOOR),
    "read_generation_config": (HF_CONFIG, DOOR),
    "scan_safetensors": (READER,),
    "scan_model": (READER, LOADER, DOOR),
    "fill_fragments": (READER, DOOR),
    "load_pretrained": (LOADER, DOOR),
    "build_causal_lm": (LOADER, DOOR),
    # A tokenizer has a gate of its own; the parity check reads the export that was just written.
    "from_pretrained": (LOADER, "data/tokenizer.py", PARITY),
    # What an interrupted `compress` has fitted is read where it was written.
    "safe_open": (READER, PARITY, "compression/partial_fit.py"),
    "load_file": ("compression/partial_fit.py",),
    "config.json": (KEYS, "data/tokenizer.py"),
    # A run's own checkpoints, which it resumes from.
    "find_corruption": (DOOR, "checkpoint/", "training/"),
    "CheckpointMetadata.read": (DOOR, "checkpoint/", "training/"),
    # `rate_jump` looks for an earlier rate.
    "complete_checkpoints": (DOOR, "checkpoint/", "training/rate_jump.py"),
    "read_fragments": (DOOR, "checkpoint/", "training/run_start.py"),
    # `inspect` counts parameters.
    "weight_shapes": (DOOR, "checkpoint/", "huggingface/inspect.py"),
    "tensor_shapes": ("checkpoint/",),
    "read_tensors": (DOOR, "checkpoint/"),
    "CheckpointReader": ("checkpoint/",),
    "torch.load": (),
}
"""What opens a MODEL or a part of one, and the modules that may: the door, and what lies behind it."""


def names_in(file: Path) -> Iterator[str]:
    """Names, attributes (`a.b` and `b`) and strings of a module, and what it imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
            yield f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("file", sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")))
def test_nothing_else_opens_a_model(file):
    used = set(names_in(PACKAGE / file)) & MAY_USE.keys()
    assert [name for name in sorted(used) if not file.startswith(MAY_USE[name])] == [], f"{file}: see ModelFolder"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`hf`, a small Llama; `run`, a run folder with two checkpoints, both its import."""
    root = tmp_path_factory.mktemp("models")
    save_stock_model("llama", root / "hf")
    assert main(["import", str(root / "hf"), str(root / "run/checkpoints/step_00000007")]) == 0
    shutil.copytree(root / "run/checkpoints/step_00000007", root / "run/checkpoints/step_00000008")
    return root


@pytest.mark.slow
def test_the_three_kinds(models):
    newest = models / "run/checkpoints/step_00000008"
    hf, run, checkpoint = (ModelFolder.locate(path, "a.key") for path in (models / "hf", models / "run", newest))
    assert isinstance(hf, HFFolder)
    assert isinstance(run, CheckpointFolder)
    assert (hf.folder, run.folder, checkpoint.folder) == (models / "hf", newest, newest)
    assert (hf.config, run.config.model, run.metadata.step) == (None, run.settings(), 0)
    assert (hf.settings().attention_variant, run.settings().attention_variant) == ("plain", "mea_no_norm")
    assert hf.context_length == run.context_length == 128
    assert hf.tokenizer is run.tokenizer is None

    tokens = torch.arange(9).view(1, -1)
    logits = [folder.as_transformers()(tokens).logits for folder in (hf, run)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    stored = [folder.tensors() for folder in (hf, run)]
    for name in stored[0].shapes:
        assert torch.equal(*(tensors.read_tensor(name) for tensors in stored))
    assert torch.equal(
        stored[1].read_tensor("lm_head.weight", offsets=(2, 3), shape=(4, 5)),
        stored[0].read_tensor("lm_head.weight")[2:6, 3:8],
    )


@pytest.fixture
def checkpoint(models, tmp_path, monkeypatch) -> Path:
    """A checkpoint to change."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(models / "run/checkpoints/step_00000007", Path("checkpoint"))


VERBS = ["generate {} --prompt a", "export {} out", "compress {} out --component-heads 1"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_checkpoint_that_contradicts_itself_is_refused(verb, checkpoint, capsys):
    """Its checksums hold, and its tensors are not those of its configuration."""
    meta = json.loads((checkpoint / META).read_text())
    meta["config"]["model"] |= {"intermediate_size": 48, "num_hidden_layers": 3}
    (checkpoint / META).write_text(json.dumps(meta))
    (checkpoint / "COMPLETE").unlink()
    seal(checkpoint)
    assert main(verb.format(checkpoint).split()) == 2
    error = capsys.readouterr().err
    assert "got:      model.layers.0.mlp.gate_proj.weight of shape (32, 16) in checkpoint" in error
    assert "expected: (48, 16), by checkpoint/meta.json" in error
    assert "checkpoint without model.layers.2.mlp.up_proj.weight" in error
    assert not Path("out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_numbers_of_a_checkpoint_that_are_not_finite(verb, checkpoint, capsys):
    shapes, name = weight_shapes(checkpoint), "model.layers.1.self_attn.k_proj.weight"
    tensors = read_tensors(checkpoint, shapes)
    tensors[name][3, 3] = torch.nan
    for file in (checkpoint / "COMPLETE", *checkpoint.glob("*.distcp"), checkpoint / ".metadata"):
        file.unlink()

    def read(name: str, *, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        return tensors[name]

    write_tensors(folder=checkpoint, shapes=shapes, read=read)
    seal(checkpoint)
    assert main(verb.format(checkpoint).split()) == 2
    assert f"{name} in checkpoint, with numbers that are not finite" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_tokenizer_folder_without_files_is_refused(verb, checkpoint, capsys):
    """A checkpoint without the folder has none; one with a folder has lost it."""
    (checkpoint / "tokenizer").mkdir()
    assert main(verb.format(checkpoint).split()) == 2
    assert "got:      checkpoint/tokenizer, without tokenizer files" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.slow
def test_finding_a_model_costs_no_torch(models):
    """And so does the refusal of one that is not there, by every verb that takes one."""
    script = """if True:
        import sys
        from megatron_mea.cli import main
        from megatron_mea.huggingface.model_folder import ModelFolder
        for name in ("hf", "run", "run/checkpoints/step_00000007"):
            ModelFolder.locate(name, "run.init_from")
        ModelFolder.locate("run").settings()
        verbs = ["inspect none", "export none out", "import none out", "generate none --prompt a", "compress none out"]
        verbs += ["evaluate none --data x", "sensitivity none --component-heads 1 --data x --out a.json"]
        status = [main(verb.split()) for verb in verbs]
        print(status, [name for name in ("torch", "transformers", "safetensors") if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=models, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == f"{[2] * 7} []\n"
    assert done.stderr.count("no such folder") == 7
