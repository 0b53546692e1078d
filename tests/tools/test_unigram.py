"""The cross-entropy of a unigram model, which the quickstart prints beside a model's."""

from __future__ import annotations

import math
import runpy
import sys
from collections import Counter

import numpy as np
from support.runs import ROOT

from megatron_mea.data.indexed import IndexedWriter


def test_of_prepared_data(tmp_path, monkeypatch, capsys):
    """Counts by hand, with one added to each; the first token of all is foretold by nothing."""
    train, validation = [0, 1, 1, 2, 5], [3, 1, 2, 6]
    for name, tokens in (("train", train), ("validation", validation)):
        with IndexedWriter(tmp_path / name, np.dtype("u2")) as writer:
            writer.add(np.asarray(tokens), np.asarray([len(tokens)]))
            writer.commit()

    monkeypatch.setattr(sys, "argv", ["unigram.py", str(tmp_path / "train"), str(tmp_path / "validation")])
    runpy.run_path(str(ROOT / "tools/unigram.py"), run_name="__main__")

    counts = Counter([*train, *range(7)])
    losses = [-math.log(counts[token] / counts.total()) for token in validation[1:]]
    assert capsys.readouterr().out == f"unigram model:  {sum(losses) / len(losses):.4f}\n"
