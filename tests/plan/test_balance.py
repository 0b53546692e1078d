"""Work of attention on the ranks of a context group, against dense masks, and its balance for a corpus's documents."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mea.attention.document_mask import visible_pairs, visible_tokens_mask
from megatron_mea.cli import main
from megatron_mea.config import Config
from megatron_mea.config.layout import check_layout
from megatron_mea.config.load import parse_config
from megatron_mea.data.indexed import IndexedWriter
from megatron_mea.parallel.grid import ContextGroup
from megatron_mea.plan.balance import attention_balance

LENGTHS = [5, 11, 3, 40, 1, 1, 19, 64, 7, 2, 30, 90, 4, 4, 4, 66]


def in_documents(borders: set[int], seq: int, *, first: int) -> list[int]:
    """Positions of a window, the first at `first` of its document, the others from 0 at each border."""
    positions = [first]
    for index in range(1, seq):
        positions.append(0 if index in borders else positions[-1] + 1)

    return positions


@given(data=st.data(), cp_size=st.integers(1, 4), document_mask=st.booleans())
def test_pairs_are_those_of_a_dense_mask(data, cp_size, document_mask):
    seq = 2 * cp_size * data.draw(st.integers(1, 6))
    windows = st.builds(in_documents, st.sets(st.integers(1, 48)), st.just(seq), first=st.sampled_from([0, 3]))
    position_ids = torch.tensor(data.draw(st.lists(windows, min_size=1, max_size=3)))

    pairs = visible_pairs(position_ids, document_mask=document_mask, cp_size=cp_size)
    for rank in range(cp_size):
        cp = ContextGroup(size=cp_size, rank=rank)
        mask = visible_tokens_mask(position_ids, document_mask=document_mask, cp=cp)
        assert torch.equal(pairs[rank], mask.expand(len(position_ids), -1, -1, -1).sum((1, 2, 3)))

    if not document_mask:
        assert pairs.unique().numel() == 1


@pytest.fixture
def corpus(tmp_path) -> str:
    """PREFIX of documents of `LENGTHS`."""
    with IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(sum(LENGTHS)) % 30, np.array(LENGTHS))
        writer.commit()

    return str(tmp_path / "corpus")


def config(corpus: str, *, micro_batch_size: int = 1, context: int = 2, document_mask: bool = True) -> Config:
    """Steps of four windows of 16 tokens."""
    return parse_config(
        {
            "model": {
                "vocab_size": 37,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "max_position_embeddings": 64,
            },
            "data": {
                "tokenizer": "none",
                "train": [{"path": corpus}],
                "seq_length": 16,
                "document_mask": document_mask,
            },
            "parallel": {"context_parallel_size": context},
            "schedule": {"warmup_steps": 1},
            "training": {"steps": 20, "global_batch_size": 4, "micro_batch_size": micro_batch_size},
            "run": {"dir": "none"},
        }
    )


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_ranks_wait_for_the_busiest_of_a_micro_batch(corpus, micro_batch_size):
    settings = config(corpus, micro_batch_size=micro_batch_size)
    balance = attention_balance(settings, check_layout(settings))
    assert balance.basis == "the first 64 samples"

    # 64 samples are the 21 windows three times, each time in another order, and one of them again.
    num_windows = (sum(LENGTHS) - 1) // 16
    starts, tokens = np.cumsum([0, *LENGTHS]), np.arange(16 * num_windows)
    document_starts = starts[np.searchsorted(starts, tokens, side="right") - 1]
    visible_keys = tokens - np.maximum(document_starts, tokens // 16 * 16) + 1
    # shape: (windows, chunks)
    chunks = visible_keys.reshape(num_windows, 4, 4).sum(2)
    works = np.stack([chunks[:, 0] + chunks[:, 3], chunks[:, 1] + chunks[:, 2]])
    one_by_one = works.max(0).sum() / works.mean(0).sum()
    if micro_batch_size == 1:
        assert balance.busiest_over_mean == pytest.approx(one_by_one, rel=0.02)
    else:
        assert 1 < balance.busiest_over_mean < one_by_one


def test_without_documents_ranks_do_the_same(corpus, tmp_path):
    settings = config(corpus, document_mask=False)
    balance = attention_balance(settings, check_layout(settings))
    assert (balance.busiest_over_mean, balance.basis) == (1.0, "windows of one document")

    settings = config(str(tmp_path / "missing"))
    balance = attention_balance(settings, check_layout(settings))
    assert balance.busiest_over_mean is None
    assert "missing.idx" in balance.basis


def test_plan_prints_the_balance(corpus, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(config(corpus).model_dump_json())
    assert main(["plan", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # One copy of the model: tensor x pipeline x context processes.
    assert plan["world_size"] == 2
    assert plan["layout"] == {"tensor": 1, "pipeline": 1, "context": 2, "data": 1}
    assert plan["attention_balance"]["basis"] == "the first 64 samples"
    assert {row["group"] for row in plan["communication_per_step"]} == {"context", "data"}

    assert main(["plan", str(path), "--world-size", "4"]) == 0
    text = capsys.readouterr().out
    assert "4 process(es): tensor 1 x pipeline 1 x context 2 x data 2, ZeRO 1" in text
    assert f"balance of attention work: {plan['attention_balance']['busiest_over_mean']:.2f}, the busiest" in text
    assert "data x context  all_reduce" in text

    path.write_text(config(str(tmp_path / "missing")).model_dump_json())
    assert main(["plan", str(path)]) == 0
    assert "balance of attention work: unknown, the busiest context rank over the mean (" in capsys.readouterr().out
