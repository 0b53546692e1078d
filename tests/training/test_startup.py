"""Mistakes are refused before torch is imported, and training loads no modules that it does not need."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import ROOT

pytestmark = pytest.mark.slow

REFUSED = [  # command, what its message names; `tokenizer` is a folder, `run` a run, `gpt2` a model that we do not take
    ("train tiny.yaml model.hiden_size=16", "model.hiden_size"),
    ("train tiny.yaml parallel.tensor_model_parallel_size=3", "parallel.tensor_model_parallel_size"),
    ("train tiny.yaml training.micro_batch_size=3", "training.global_batch_size"),
    ("train tiny.yaml data.tokenizer=nowhere", "data.tokenizer"),
    ("train tiny.yaml 'data.train=[{path: nowhere}]'", "nowhere.idx"),
    ("train tiny.yaml model.vocab_size=300", "train.bin"),
    ("train tiny.yaml run.dir=tiny.yaml", "run.dir"),
    ("train tiny.yaml run.resume_from=7", "run.resume_from"),
    ("train tiny.yaml training.seed=1", "training.seed"),
    ("train tiny.yaml run.dir=other run.init_from=nowhere", "run.init_from"),
    ("train tiny.yaml 'training.distillation={teacher: tokenizer}'", "training.distillation.teacher"),
    ("plan tiny.yaml --world-size 3", "training.global_batch_size"),
    ("submit tiny.yaml --nodes 1 --gpus-per-node 3 --time 1:00:00", "training.global_batch_size"),
    ("submit tiny.yaml data.tokenizer=nowhere --nodes 1 --gpus-per-node 1 --time 1:00:00", "data.tokenizer"),
    ("sweep tiny.yaml --out out --at-once 0", "--at-once"),
    ("sweep tiny.yaml --out out --seeds 1,1", "sweep"),
    ("sweep tiny.yaml --out out --submit data.tokenizer=nowhere", "data.tokenizer"),
    ("report nowhere --out report.html", "nowhere"),
    ("prepare --input nowhere.jsonl --tokenizer tokenizer --out out", "nowhere.jsonl"),
    ("inspect nowhere", "nowhere"),
    ("export nowhere out", "nowhere"),
    ("export run tokenizer", "tokenizer"),
    ("import tokenizer out", "tokenizer"),
    ("compress tiny.yaml out --component-heads 1", "tiny.yaml"),
    ("compress run out --component-heads 1 --calibration nowhere", "nowhere.idx"),
    ("sensitivity run --component-heads 1 --data nowhere --out out.json", "nowhere.idx"),
    ("evaluate tokenizer", "tokenizer"),
    ("evaluate run --data nowhere", "nowhere.idx"),
    ("generate nowhere --prompt In", "nowhere"),
    ("generate run --prompt caf\udce9", "--prompt"),
    ("generate gpt2 --prompt In", "gpt2"),
    ("import gpt2 out", "HF_DIR"),
    ("train tiny.yaml run.dir=other run.init_from=gpt2", "run.init_from"),
]


@pytest.fixture(scope="module")
def work(tiny, trained, tmp_path_factory) -> Path:
    """A folder with the tiny data and a run, beside `heavy`, whose torch and transformers fail to import."""
    folder = tmp_path_factory.mktemp("start") / "work"
    shutil.copytree(tiny.root, folder)
    shutil.copytree(trained, folder / "run")
    (folder / "gpt2").mkdir()
    (folder / "gpt2/config.json").write_text('{"model_type": "gpt2"}')
    corpora = {f"data.{name}": [{"path": name}] for name in ("train", "validation")}
    tiny.write_config(folder / "tiny.yaml", **{"data.tokenizer": "tokenizer"}, **corpora)

    heavy = folder.with_name("heavy")
    heavy.mkdir()
    for name in ("torch", "transformers", "deepspeed"):
        (heavy / f"{name}.py").write_text(f"raise AssertionError('{name} was imported')\n")
    return folder


@pytest.mark.parametrize(("command", "where"), REFUSED, ids=[command for command, _ in REFUSED])
def test_mistakes_are_refused_before_torch_is_imported(work, command, where):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(work.with_name("heavy")), str(ROOT)])}
    result = subprocess.run(
        [sys.executable, "-m", "megatron_mea", *shlex.split(command)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.startswith(f"megatron-mea: error: {where}\n")


def test_training_loads_no_models_of_transformers_and_no_compiler():
    """torch.compile works all the same when it is called later."""
    script = """if True:
        import os, sys
        import megatron_mea.training.startup, megatron_mea.training.loop
        from megatron_mea.training import distributed, rank_env
        distributed.start_distributed(rank_env.RankEnv.from_environment())
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
        heavy = {"transformers.modeling_utils", "torch._inductor.compile_fx"} & sys.modules.keys()
        assert not heavy, heavy
        assert "TORCHDYNAMO_DISABLE" not in os.environ
        import torch
        compiled = []
        torch.compile(lambda x: x + 1, backend=lambda module, _: compiled.append(module) or module)(torch.ones(2))
        assert compiled
        distributed.stop_distributed()
    """

    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
