"""A tiny tokenizer, prepared corpora, and the configuration of a model that trains on them in seconds."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import yaml

from support.runs import ROOT

TEXT = ROOT / "launch/quickstart/validation.jsonl.gz"


class Tiny:
    """A tokenizer of 384 ids, two prepared corpora, and the configuration of a model that trains on them in seconds.

    Attributes:
        root: the folder that holds everything below; a test must not write into it.
        tokenizer: the tokenizer folder.
        train: PREFIX of about 27,000 tokens.
        validation: PREFIX of about 4,000 tokens.
        config: a YAML file; its run.dir is relative, so a test must change into a folder of its own first.
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

        train_tokenizer(sources=[str(self.train.with_suffix(".jsonl"))], vocab_size=384, out=self.tokenizer)
        for prefix in (self.train, self.validation):
            prepare(sources=[str(prefix.with_suffix(".jsonl"))], tokenizer_folder=self.tokenizer, prefix=prefix)

        self.write_config(self.config)

    def tree(self) -> dict[str, Any]:
        """A new copy of the configuration as nested dictionaries."""
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
            overrides: dotted keys, given as `**{"model.head_dim": 7}`; a section's name replaces the full section.
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
