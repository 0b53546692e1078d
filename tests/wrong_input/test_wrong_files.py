"""Data, tokenizers, models and checkpoints that cannot be used."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from refusals import GOOD, KINDS, PREPARE, TOKENIZER, Accepted, check, edit

from megatron_mea.cli import main
from megatron_mea.data.indexed import IndexedWriter


def without_eos(raw):
    return json.dumps({key: value for key, value in json.loads(raw).items() if key != "eos_token"}).encode()


TOKENIZERS = [  # change of each file, found, allowed
    (dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "tokenizer.model")), "without tokenizer files", "..."),
    ({"tokenizer_config.json": without_eos}, "without an eos token", "a tokenizer with an end-of-document token"),
    ({"tokenizer.json": lambda raw: raw[:-9]}, "which does not load...", "a Hugging Face tokenizer folder"),
]


@pytest.mark.parametrize(("changes", "found", "allowed"), TOKENIZERS)
def test_an_unusable_tokenizer(work, refused, changes, found, allowed):
    for name, change in changes.items():
        edit(f"tokenizer/{name}", change)
    check(refused("train", "tiny.yaml"), ("data.tokenizer", f"tokenizer, {found}", allowed))
    problems = refused("prepare", "--input", "train.jsonl", "--tokenizer", "tokenizer", "--out", "new")
    check(problems, ("--tokenizer", f"tokenizer, {found}", allowed))


def test_a_tokenizer_larger_than_the_vocabulary(work, refused):
    for name in ("train.bin", "validation.bin"):
        edit(name, lambda raw: bytes(len(raw)))
    problems = refused("train", "tiny.yaml", "model.vocab_size=383")
    check(problems, ("model.vocab_size", "383", "at least the 384 ids of data.tokenizer = tokenizer"))


FOREIGN = "an .idx of `megatron-mea prepare` or Megatron"
CORPORA = [  # which file, its change, found, allowed; {size} is its size before, {left} the one after
    ("bin", lambda raw: raw[:-2], "{left} bytes", "the {size} that its .idx announces"),
    ("bin", None, "no such file", "the files that `megatron-mea prepare` wrote"),
    ("idx", None, "no such file", "the files that `megatron-mea prepare` wrote"),
    ("idx", lambda raw: bytes(range(100)), "not a Megatron index", FOREIGN),
    ("idx", lambda raw: b"", "not a Megatron index", FOREIGN),
    ("idx", lambda raw: b"TNTIDX\0\0\0" + raw[9:], "not a Megatron index", FOREIGN),
    ("idx", lambda raw: raw[:20], "not a Megatron index", FOREIGN),
    ("idx", lambda raw: raw[:-1], "{left} bytes", "the {size} that its header announces"),
    ("idx", lambda raw: raw[:9] + b"\2" + raw[10:], "version 2, type code 8", "version 1 with integer tokens..."),
    ("idx", lambda raw: raw[:17] + b"\6" + raw[18:], "version 1, type code 6", "version 1 with integer tokens..."),
]


@pytest.mark.parametrize(("kind", "change", "found", "allowed"), CORPORA)
@pytest.mark.parametrize("corpus", ["train", "validation"])
def test_a_damaged_corpus(work, refused, corpus, kind, change, found, allowed):
    file = Path(f"{corpus}.{kind}")
    size = file.stat().st_size
    edit(file, change)
    sizes = {"size": size, "left": file.stat().st_size if change else 0}
    check(refused("train", "tiny.yaml"), (str(file), found.format(**sizes), allowed.format(**sizes)))


def test_validation_with_too_few_batches(work, refused):
    windows = (Path("validation.bin").stat().st_size // 2 - 1) // 32
    enough = windows // 4
    with pytest.raises(Accepted):
        main(["train", "tiny.yaml", f"evaluation.batches={enough}"])
    problems = refused("train", "tiny.yaml", f"evaluation.batches={enough + 1}")
    found = f"validation has {windows} windows of 32 tokens, enough for {enough} global batches of 4"
    check(problems, ("data.validation", found, f"at least evaluation.batches = {enough + 1} global batches"))


@pytest.mark.parametrize("corpus", ["train", "validation"])
def test_without_the_mask_a_token_foretells_the_next_document(work, corpus):
    with pytest.raises(Accepted):
        main(["train", "tiny.yaml", f"data.{corpus}=[{{path: ones}}]", "data.document_mask=false"])


def parquet(**columns):
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


# Without the time, which would name the tests anew each time: pytest -n wants the same names of all processes.
BROKEN_OFF = gzip.compress(GOOD * 99, mtime=0)[:-9]
NO_DEFLATE = gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 20
SOURCES = [  # name, contents, place in it, found, allowed
    ("a.docx", b"x", "", "a file of kind '.docx'", KINDS),
    ("a.jsonl", GOOD + b"{oops\n", ", line 2", "broken JSON: Expecting property name...", "one JSON object a line"),
    ("a.jsonl", GOOD + b"[1]\n", ", line 2", "a JSON list", "one JSON object a line"),
    ("a.jsonl", GOOD + b'{"body": "a"}\n', ", line 2", "the fields body", "text in the field 'text'"),
    ("a.jsonl", GOOD + b'{"text": 3}\n', ", line 2", "int", "text in the field 'text'"),
    ("a.jsonl", GOOD + b'{"text": "\xe9t\xe9"}\n', ", line 2", "not UTF-8 (invalid continuation byte)", "UTF-8 text"),
    ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', ", line 2", "no Unicode text...", "text that UTF-8 can write"),
    ("a.txt", b"caf\xe9\n", ", line 1", "not UTF-8 (invalid continuation byte)", "UTF-8 text"),
    ("a.jsonl.gz", BROKEN_OFF, "", "not readable: Compressed file ended...", "a readable, whole..."),
    ("a.jsonl.gz", NO_DEFLATE, "", "not readable...", "a readable, whole file"),
    ("a.jsonl.gz", GOOD, "", "not readable: Not a gzipped file...", "a readable, whole file"),
    ("a.jsonl.gz", b"", "", "not readable: 0 bytes: a truncated archive", "a readable, whole file"),
    ("a.JSONL.ZST", b"", "", "not readable: 0 bytes: a truncated archive", "a readable, whole file"),
    ("a.jsonl.zst", GOOD, "", "not readable: ZSTD decompress failed...", "a readable, whole file"),
    ("a.parquet", b"PAR1 and no more", "", "not readable as parquet: Parquet magic bytes...", "a parquet file"),
    ("a.parquet", parquet(body=["a"]), "", "the columns body", "a column 'text'"),
    ("a.parquet", parquet(text=["a", None]), ", row 1", "NoneType", "text in the field 'text'"),
]


@pytest.mark.parametrize("command", [TOKENIZER, PREPARE], ids=["tokenizer", "prepare"])
@pytest.mark.parametrize(("name", "contents", "place", "found", "allowed"), SOURCES)
def test_an_unreadable_source(work, refused, command, name, contents, place, found, allowed):
    Path(name).write_bytes(contents)
    check(refused(*command.split(), name), (name + place, found, allowed))


@pytest.mark.parametrize(
    ("name", "contents"), [("a.txt", b""), ("a.txt", b" \n"), ("a.jsonl", b'{"text": " "}\n'), ("a.jsonl", b"")]
)
def test_no_text(work, refused, name, contents):
    Path(name).write_bytes(contents)
    check(refused(*PREPARE.split(), name), ("--input", f"{name}: no text", "at least one document with text"))
    check(refused(*TOKENIZER.split(), name), ("--input", f"{name}: no text", "sources with text"))


def test_data_without_a_token_to_predict(work, run, refused):
    check(
        refused("evaluate", "run", "--data", "ones"), ("--data", "documents of one token in ones", "a token to predict")
    )


def test_evaluate_finds_an_id_that_no_sample_shows(work, run, refused):
    tokens = np.zeros(600_000, np.int64)
    tokens[300_000] = 384
    with IndexedWriter("rare", np.dtype(np.uint16)) as writer:
        writer.add(tokens, np.array([tokens.size]))
        writer.commit()
    check(refused("evaluate", "run", "--data", "rare"), ("rare.bin", "token id 384", "...the model's vocab_size = 384"))


MODEL_COMMANDS = ["inspect {}", "export {} made/new", "evaluate {}", "generate {} --prompt a"]


@pytest.mark.parametrize("command", MODEL_COMMANDS)
@pytest.mark.parametrize(("folder", "found"), [("nowhere", "no such folder"), ("tokenizer", "no checkpoint")])
def test_no_model(refused, command, folder, found):
    problems = refused(*command.format(folder).split())
    check(problems, (folder, found, "a checkpoint folder, or a run folder with checkpoints"))


@pytest.mark.parametrize("command", MODEL_COMMANDS)
@pytest.mark.parametrize("file", ["meta.json", "__0_0.distcp", "tokenizer/tokenizer.json", ".metadata"])
def test_a_flipped_byte(run, refused, command, file):
    folder = "run/checkpoints/step_00000002"
    edit(f"{folder}/{file}", lambda raw: raw[:60] + bytes([raw[60] ^ 1]) + raw[61:])
    for model in ("run", folder):
        expected = (folder, f"{file} does not match its checksum", "a whole checkpoint", "use an older one of the run")
        check(refused(*command.format(model).split()), expected)


RESUMES = [  # key, old value, new value
    ("model.hidden_size", 16, 32),
    ("model.num_component_heads", 1, 2),
    ("model.attention_variant", "mea", "mea_no_norm"),
    ("training.seed", 1234, 5),
    ("data.seq_length", 32, 16),
    ("training.global_batch_size", 4, 8),
    ("training.precision", "fp32", "bf16"),
]


@pytest.mark.parametrize("changes", [*([row] for row in RESUMES), RESUMES[:4]], ids=lambda rows: rows[-1][0])
def test_resume_with_other_values(run, refused, changes):
    problems = refused("train", "tiny.yaml", "optimizer.lr=1", *(f"{key}={new}" for key, _, new in changes))
    mend = "restore the old value, or start a new run with another run.dir"
    expected = [(key, str(new), f"{old}, as in the checkpoint of step 2", mend) for key, old, new in changes]
    check(problems, *sorted(expected))


def test_a_finished_run_with_another_model(run, refused):
    problems = refused("train", "tiny.yaml", "training.steps=2", "model.hidden_size=32")
    assert [problem.where for problem in problems] == ["model.hidden_size"]


@pytest.mark.parametrize(
    ("corpora", "where", "found", "old"),
    [
        ("[{path: validation}]", "data.train.0", "tokens {validation}", "tokens {train}"),
        ("[{path: zeros}]", "data.train.0", "digest ...", "digest "),
        ("[{path: train}, {path: validation}]", "data.train", "2 corpora", "1 corpora"),
    ],
)
def test_resume_with_another_corpus(run, refused, corpora, where, found, old):
    sizes = {name: Path(f"{name}.bin").stat().st_size // 2 for name in ("train", "validation")}
    shutil.copy("train.idx", "zeros.idx")
    Path("zeros.bin").write_bytes(bytes(2 * sizes["train"]))
    problems = refused("train", "tiny.yaml", f"data.train={corpora}")
    check(problems, (where, found.format(**sizes), "the corpora of the checkpoint of step 2, in the same order: ..."))
    assert f"order: {old.format(**sizes)}" in problems[0].allowed


def test_what_a_resume_accepts(run):
    """Else the refusals above would prove little; a damaged newest checkpoint is passed over."""
    with pytest.raises(Accepted):
        main(["train", "tiny.yaml", "optimizer.lr=1"])
    edit("run/checkpoints/step_00000002/meta.json", lambda raw: raw[:-9])
    with pytest.raises(Accepted):
        main(["train", "tiny.yaml", "optimizer.lr=1"])


MODEL = "a checkpoint folder, or a run folder with checkpoints, or a Hugging Face folder"
TEACHERS = [  # teacher, other overrides, found, allowed
    ("nowhere", "", "nowhere: no such folder", MODEL),
    ("tiny.yaml", "", "tiny.yaml: a file", MODEL),
    ("tokenizer", "", "tokenizer: no checkpoint", MODEL),
    (
        "damaged",
        "",
        "damaged/...: __0_0.distcp does not match its checksum",
        "a whole checkpoint",
        "use an older one...",
    ),
    ("gpt2", "", "gpt2/config.json: model_type = gpt2", "mea, mea_vllm, llama, mistral, qwen2, qwen3"),
    (
        "run",
        "model.vocab_size=385",
        "run, with vocab_size = 384",
        "model.vocab_size = 385: probabilities of the same ids",
    ),
    (
        "run",
        "data.seq_length=65 model.max_position_embeddings=65",
        "run, with max_position_embeddings = 64",
        "at least data.seq_length = 65",
    ),
]


@pytest.mark.parametrize(("teacher", "others", "expected"), [(*row[:2], row[2:]) for row in TEACHERS])
def test_a_model_that_cannot_teach(run, refused, teacher, others, expected):
    shutil.copytree(run, "damaged")
    edit(next(Path("damaged").rglob("step_00000002/*.distcp")), lambda raw: raw[:-1] + b"?")
    Path("gpt2").mkdir()
    Path("gpt2/config.json").write_text('{"model_type": "gpt2"}')
    key = "training.distillation.teacher"
    found = refused("train", "tiny.yaml", "run.dir=new", f"{key}={teacher}", *others.split())
    check(found, (key, *expected))
