"""Documents that share a window: attention, positions and targets stop at their borders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import positions_of, small_model

from megatron_mea.attention.causal import causal_attention
from megatron_mea.attention.document_mask import _flex_attention, attention_function
from megatron_mea.config.schema import TrainCorpus
from megatron_mea.config.variants import VARIANTS
from megatron_mea.data.corpora import IGNORE_INDEX, Corpora
from megatron_mea.data.indexed import IndexedWriter
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.parameter import init_parameters


def positions(borders: list[list[int]], seq: int) -> torch.Tensor:
    """Position ids (batch, seq) that restart at the borders of each row, and at the beginning of the window."""
    rows = []
    for row_borders in borders:
        starts, ends = [0, *row_borders], [*row_borders, seq]
        rows.append(torch.cat([torch.arange(end - start) for start, end in zip(starts, ends, strict=True)]))

    return torch.stack(rows)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, position_ids: torch.Tensor
) -> torch.Tensor:
    """Document attention as a softmax over explicitly masked scores."""
    seq = position_ids.shape[1]
    document = torch.tensor([[int((row[: i + 1] == 0).sum()) for i in range(seq)] for row in position_ids])
    visible = (document[:, :, None] == document[:, None, :]) & torch.ones(seq, seq, dtype=torch.bool).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1) @ value


def random_heads(seq: int, dtype: torch.dtype, *, width: int = 6) -> list[torch.Tensor]:
    """Query (3, 4, seq, width), key and value (3, 2, seq, width)."""
    generator = torch.Generator().manual_seed(seq)
    return [
        torch.randn(3, count, seq, width, generator=generator, dtype=dtype, requires_grad=True) for count in (4, 2, 2)
    ]


BORDERS = [[3, 4, 9], [], [1]]


def test_attention_equals_a_dense_mask_with_gradients():
    position_ids = positions(BORDERS, 13)
    results = []
    for attend in (
        attention_function(position_ids, document_mask=True),
        lambda q, k, v: masked_attention(q, k, v, position_ids=position_ids),
    ):
        inputs = random_heads(13, torch.float64)
        output = attend(*inputs)
        output.pow(3).sum().backward()
        results.append([output, *(x.grad for x in inputs)])

    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_one_document_is_causal_attention():
    inputs = random_heads(7, torch.float64)
    assert torch.equal(
        attention_function(positions([[]] * 3, 7), document_mask=True)(*inputs), causal_attention(*inputs)
    )


def test_a_window_that_begins_inside_a_document():
    """A window whose positions do not begin at 0 starts with the tail of a document."""
    position_ids = positions(BORDERS, 13)
    tail_position_ids = position_ids.clone()
    tail_position_ids[0, :3] += 5
    inputs = random_heads(13, torch.float64)

    assert torch.equal(
        attention_function(tail_position_ids, document_mask=True)(*inputs),
        attention_function(position_ids, document_mask=True)(*inputs),
    )


def test_flex_attention_equals_one_call_per_document():
    """FlexAttention's forward pass runs on a CPU too, uncompiled."""
    position_ids = positions([[30, 31, 100], [], [64]], 160)
    inputs = [x.detach() for x in random_heads(seq=160, dtype=torch.float32, width=16)]
    with torch.no_grad():
        actual = _flex_attention(position_ids, document_mask=True, compiled=False)(*inputs)
        expected = attention_function(position_ids, document_mask=True)(*inputs)

    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_document_does_not_depend_on_its_neighbours(variant):
    """Changing one leaves the logits of the others bit-equal, and they are those of the document alone."""
    model = small_model(attention_variant=variant)
    decoder = Decoder(model, document_mask=True)
    init_parameters(decoder, 5)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 37, (2, 20), generator=generator)
    position_ids = positions([[6, 13], [9]], 20)
    changed = ids.clone()
    changed[0, 6:13] = (changed[0, 6:13] + 1) % 37
    before, after = (decoder.logits(decoder.forward_hidden(batch, position_ids)) for batch in (ids, changed))

    assert torch.equal(before[0, :6], after[0, :6])
    assert torch.equal(before[0, 13:], after[0, 13:])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 6:13], after[0, 6:13])

    # Positions that restart are not enough.
    unmasked = Decoder(model)
    unmasked.load_state_dict(decoder.state_dict())
    assert not torch.equal(
        unmasked.forward_hidden(ids, position_ids)[0, 13:], unmasked.forward_hidden(changed, position_ids)[0, 13:]
    )

    expected = unmasked.logits(unmasked.forward_hidden(ids[:1, 13:], positions_of(ids[:1, 13:])))
    torch.testing.assert_close(before[:1, 13:], expected, rtol=1e-4, atol=1e-5)


def test_recomputed_blocks_have_the_same_gradients():
    gradients = []
    for activation_checkpointing in ("none", "full"):
        decoder = Decoder(config=small_model(), activation_checkpointing=activation_checkpointing, document_mask=True)
        init_parameters(decoder, 5)
        ids = torch.arange(40).view(2, 20) % 37
        decoder(ids, positions([[6, 13], [9]], 20), ids).backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])

    assert all(torch.equal(actual, expected) for expected, actual in zip(*gradients, strict=True))


@pytest.mark.slow
@settings(max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(2, 8))
def test_windows_of_documents(tmp_path_factory, lengths, seq):
    """Positions, targets and their count against a loop over tokens; every token is an input once per epoch."""
    total = sum(lengths)
    if total <= seq:
        return

    prefix = tmp_path_factory.mktemp("corpus") / "corpus"
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.arange(total), np.array(lengths))
        writer.commit()

    corpora = Corpora(
        corpora=[TrainCorpus(path=str(prefix))],
        seq_length=seq,
        vocab_size=total,
        seed=None,
        key="data.train",
        document_mask=True,
    )
    document_starts = set(np.cumsum([0, *lengths])[:-1].tolist())
    windows = (total - 1) // seq
    batch = corpora.batch(np.arange(windows))
    num_targets = 0
    for row in range(windows):
        position = -1
        for column in range(seq):
            token = row * seq + column
            position = 0 if token in document_starts or column == 0 else position + 1
            assert batch.input_ids[row, column] == token
            assert batch.position_ids[row, column] == position

            is_last = token + 1 in document_starts
            assert batch.targets[row, column] == (IGNORE_INDEX if is_last else token + 1)
            num_targets += not is_last

    assert corpora.count_targets(np.arange(windows)) == num_targets

    unmasked = Corpora(
        corpora=[TrainCorpus(path=str(prefix))], seq_length=seq, vocab_size=total, seed=None, key="data.train"
    )
    assert unmasked.count_targets(np.arange(windows)) == windows * seq
    assert (unmasked.batch(np.arange(windows)).position_ids == np.arange(seq)).all()


def test_documents_of_several_sequences(tmp_path):
    """Megatron may write a document as several sequences: only the first begins a document."""
    prefix = tmp_path / "corpus"
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.arange(20), np.array([4, 0, 3, 5, 8]))
        writer.commit()

    index = prefix.with_suffix(".idx")
    raw = bytearray(index.read_bytes())
    # documents: [0, 1, 2, 3, 4, 5] becomes [0, 0, 2, 3, 3, 5]: the fourth sequence belongs to two, an empty one too
    raw[-48:] = np.array([0, 0, 2, 3, 3, 5], np.int64).tobytes()
    index.write_bytes(raw)
    corpora = Corpora(
        corpora=[TrainCorpus(path=str(prefix))],
        seq_length=19,
        vocab_size=20,
        seed=None,
        key="data.train",
        document_mask=True,
    )

    assert corpora.readers[0].index.document_starts(0, 20).tolist() == [0, 4, 7]
    assert corpora.readers[0].index.document_starts(1, 7).tolist() == [4]
