"""What several tests need: a tiny prepared corpus with its configuration, and a finished run of it."""

import copy
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Before anything imports transformers: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import yaml
from hypothesis import settings
from runs import train

# This machine may be busy: how long an example takes says nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

TEXT = Path(__file__).parents[1] / "launch/quickstart/validation.jsonl.gz"


class Tiny:
    """A tokenizer of 384 ids, two prepared corpora, and the configuration of a model that trains on them in seconds.

    Attributes:
        root: the folder that holds everything below; a test must not write into it.
        tokenizer: the tokenizer folder.
        train: PREFIX of about 27,000 tokens.
        validation: PREFIX of about 4,000 tokens.
        config: a YAML file; its run.dir is relative, so a test changes into a folder of its own first.
    """

    def __init__(self, root: Path) -> None:
        from megatron_mea.data.prepare import prepare
        from megatron_mea.data.tokenizer import train_tokenizer

        self.root, self.tokenizer = root, root / "tokenizer"
        self.train, self.validation, self.config = root / "train", root / "validation", root / "tiny.yaml"
        with gzip.open(TEXT, "rt", encoding="utf-8") as stream:
            texts = [json.loads(line)["text"] for line in stream]
        for prefix, part in ((self.train, texts[:9]), (self.validation, texts[9:12])):
            source = prefix.with_suffix(".jsonl")
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        train_tokenizer([str(self.train.with_suffix(".jsonl"))], 384, self.tokenizer)
        for prefix in (self.train, self.validation):
            prepare([str(prefix.with_suffix(".jsonl"))], self.tokenizer, prefix)
        self.write_config(self.config)

    def tree(self) -> dict[str, Any]:
        """The configuration as nested dictionaries, free to change."""
        return {
            "model": {
                "vocab_size": 384,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "num_component_heads": 1,
                "head_dim": 8,
                "max_position_embeddings": 64,
            },
            "data": {
                "tokenizer": str(self.tokenizer),
                "train": [{"path": str(self.train)}],
                "validation": [{"path": str(self.validation)}],
                "seq_length": 32,
            },
            "optimizer": {"lr": 0.01},
            "schedule": {"warmup_steps": 1},
            "training": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
            "evaluation": {"interval": 2, "batches": 2},
            "checkpoint": {"interval": 2},
            "logging": {"interval": 1, "tensorboard": False},
            "run": {"dir": "run"},
        }

    def write_config(self, path: Path, **overrides: Any) -> Path:
        """Writes the configuration to `path` and returns it.

        Args:
            overrides: dotted keys, given as `**{"model.head_dim": 7}`; a section's name replaces the whole section.
        """
        tree = copy.deepcopy(self.tree())
        for key, value in overrides.items():
            *sections, name = key.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = value
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two real steps with a checkpoint of each, FINISHED; copy it before changing it."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny.write_config(
        folder / "tiny.yaml", **{"training.steps": 2, "checkpoint.interval": 1, "run.dir": str(folder / "run")}
    )
    command = [sys.executable, "-m", "megatron_mea", "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def config(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration that a module's whole runs share: the tiny one with the module's SETTINGS, in a new folder."""
    return tiny.write_config(tmp_path_factory.mktemp("runs") / "run.yaml", **request.module.SETTINGS)


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """The folder of an uninterrupted run of one process; copy it before changing it."""
    train(config, "whole")
    return config.parent / "whole"
