"""Documents that share a window: attention, positions and targets stop at their borders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import small_model
from test_model import positions_of

from megatron_mea.attention.documents import _blocks, causal, within_documents
from megatron_mea.config.schema import VARIANTS, TrainCorpus
from megatron_mea.data.corpora import IGNORE, Corpora
from megatron_mea.data.indexed import IndexedWriter
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.parameter import initialize


def positions(borders: list[list[int]], seq: int) -> torch.Tensor:
    """(batch, seq), from the borders of each row: restarts there, and at the beginning of the window."""
    rows = []
    for starts in borders:
        ends = [*starts, seq]
        rows.append(torch.cat([torch.arange(b - a) for a, b in zip([0, *starts], ends, strict=True)]))
    return torch.stack(rows)


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Softmax over an explicit mask, written out."""
    seq = position_ids.shape[1]
    document = torch.tensor([[int((row[: i + 1] == 0).sum()) for i in range(seq)] for row in position_ids])
    seen = (document[:, :, None] == document[:, None, :]) & torch.ones(seq, seq, dtype=torch.bool).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ value


def heads(seq: int, dtype: torch.dtype, width: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seq)
    return [
        torch.randn(3, count, seq, width, generator=generator, dtype=dtype, requires_grad=True) for count in (4, 2, 2)
    ]


BORDERS = [[3, 4, 9], [], [1]]


def test_attention_equals_a_dense_mask_with_gradients():
    position_ids = positions(BORDERS, 13)
    results = []
    for attend in (within_documents(position_ids), lambda q, k, v: dense(q, k, v, position_ids)):
        inputs = heads(13, torch.float64)
        output = attend(*inputs)
        output.pow(3).sum().backward()
        results.append([output, *(x.grad for x in inputs)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_one_document_is_causal_attention():
    inputs = heads(7, torch.float64)
    assert torch.equal(within_documents(positions([[]] * 3, 7))(*inputs), causal(*inputs))


def test_a_window_that_begins_inside_a_document():
    """Positions that do not begin at 0 are those of a document's tail."""
    position_ids = positions(BORDERS, 13)
    later = position_ids.clone()
    later[0, :3] += 5
    inputs = heads(13, torch.float64)
    assert torch.equal(within_documents(later)(*inputs), within_documents(position_ids)(*inputs))


def test_blocks_on_a_gpu_mask_what_the_loop_masks():
    """FlexAttention's forward pass runs on a CPU too, not compiled."""
    position_ids = positions([[30, 31, 100], [], [64]], 160)
    inputs = [x.detach() for x in heads(160, torch.float32, 16)]
    with torch.no_grad():
        found, expected = _blocks(position_ids, compiled=False)(*inputs), within_documents(position_ids)(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_document_does_not_know_its_neighbours(variant):
    """Changing one leaves the logits of the others bit-equal, and they are those of the document alone."""
    model = small_model(attention_variant=variant)
    decoder = Decoder(model, document_mask=True)
    initialize(decoder, 5)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 37, (2, 20), generator=generator)
    position_ids = positions([[6, 13], [9]], 20)
    changed = ids.clone()
    changed[0, 6:13] = (changed[0, 6:13] + 1) % 37
    before, after = (decoder.logits(decoder.run(each, position_ids)) for each in (ids, changed))
    assert torch.equal(before[0, :6], after[0, :6])
    assert torch.equal(before[0, 13:], after[0, 13:])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 6:13], after[0, 6:13])
    # Positions that restart are not enough.
    whole = Decoder(model)
    whole.load_state_dict(decoder.state_dict())
    assert not torch.equal(whole.run(ids, position_ids)[0, 13:], whole.run(changed, position_ids)[0, 13:])
    alone = whole.logits(whole.run(ids[:1, 13:], positions_of(ids[:1, 13:])))
    torch.testing.assert_close(before[:1, 13:], alone, rtol=1e-4, atol=1e-5)


def test_recomputed_blocks_have_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        decoder = Decoder(small_model(), recompute, document_mask=True)
        initialize(decoder, 5)
        ids = torch.arange(40).view(2, 20) % 37
        decoder(ids, positions([[6, 13], [9]], 20), ids).backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@settings(max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(2, 8))
def test_windows_of_documents(tmp_path_factory, lengths, seq):
    """Positions, targets and their number, against a walk over the tokens; every token is an input once an epoch."""
    total = sum(lengths)
    if total <= seq:
        return
    prefix = tmp_path_factory.mktemp("corpus") / "corpus"
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.arange(total), np.array(lengths))
        writer.commit()
    corpora = Corpora([TrainCorpus(path=str(prefix))], seq, total, None, "data.train", document_mask=True)
    begins = set(np.cumsum([0, *lengths])[:-1].tolist())
    windows = (total - 1) // seq
    batch = corpora.batch(np.arange(windows))
    seen = 0
    for row in range(windows):
        position = -1
        for column in range(seq):
            token = row * seq + column
            position = 0 if token in begins or column == 0 else position + 1
            assert batch.input_ids[row, column] == token
            assert batch.position_ids[row, column] == position
            crosses = token + 1 in begins
            assert batch.targets[row, column] == (IGNORE if crosses else token + 1)
            seen += not crosses
    assert corpora.targets(np.arange(windows)) == seen
    plain = Corpora([TrainCorpus(path=str(prefix))], seq, total, None, "data.train")
    assert plain.targets(np.arange(windows)) == windows * seq
    assert (plain.batch(np.arange(windows)).position_ids == np.arange(seq)).all()


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
    corpora = Corpora([TrainCorpus(path=str(prefix))], 19, 20, None, "data.train", document_mask=True)
    assert corpora.readers[0].document_starts(0, 20).tolist() == [0, 4, 7]
    assert corpora.readers[0].document_starts(1, 7).tolist() == [4]
