"""Data, tokenizers, models and checkpoints that cannot be used."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from support.refusals import GOOD, KINDS, PREPARE, TOKENIZER, TrainingStarted, check_problems, edit_file

from megatron_mea.cli import main
from megatron_mea.data.indexed import IndexedWriter


def without_eos(raw):
    return json.dumps({key: value for key, value in json.loads(raw).items() if key != "eos_token"}).encode()


TOKENIZERS = [  # change of each file, got, expected
    (dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "tokenizer.model")), "without tokenizer files", "..."),
    ({"tokenizer_config.json": without_eos}, "without an eos token", "a tokenizer with an end-of-document token"),
    ({"tokenizer.json": lambda raw: raw[:-9]}, "which does not load...", "a Hugging Face tokenizer folder"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "got", "expected"), TOKENIZERS)
def test_an_unusable_tokenizer(workdir, run_refused, changes, got, expected):
    for name, change in changes.items():
        edit_file(f"tokenizer/{name}", change)
    check_problems(run_refused("train", "tiny.yaml"), ("data.tokenizer", f"tokenizer, {got}", expected))
    problems = run_refused("prepare", "--input", "train.jsonl", "--tokenizer", "tokenizer", "--out", "new")
    check_problems(problems, ("--tokenizer", f"tokenizer, {got}", expected))


def test_a_tokenizer_larger_than_the_vocabulary(workdir, run_refused):
    for name in ("train.bin", "validation.bin"):
        edit_file(name, lambda raw: bytes(len(raw)))
    problems = run_refused("train", "tiny.yaml", "model.vocab_size=383")
    check_problems(problems, ("model.vocab_size", "383", "at least the 384 ids of data.tokenizer = tokenizer"))


FOREIGN = "an .idx of `megatron-mea prepare` or Megatron"
CORPORA = [  # which file, its change, got, expected; {size} is its size before, {left} the one after
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


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "change", "got", "expected"), CORPORA)
@pytest.mark.parametrize("corpus", ["train", "validation"])
def test_a_damaged_corpus(workdir, run_refused, corpus, kind, change, got, expected):
    file = Path(f"{corpus}.{kind}")
    size = file.stat().st_size
    edit_file(file, change)
    sizes = {"size": size, "left": file.stat().st_size if change else 0}
    check_problems(run_refused("train", "tiny.yaml"), (str(file), got.format(**sizes), expected.format(**sizes)))


def test_validation_with_too_few_batches(workdir, run_refused):
    windows = (Path("validation.bin").stat().st_size // 2 - 1) // 32
    batches = windows // 4
    with pytest.raises(TrainingStarted):
        main(["train", "tiny.yaml", f"evaluation.batches={batches}"])

    problems = run_refused("train", "tiny.yaml", f"evaluation.batches={batches + 1}")
    got = f"validation has {windows} windows of 32 tokens, enough for {batches} global batches of 4"
    check_problems(problems, ("data.validation", got, f"at least evaluation.batches = {batches + 1} global batches"))


@pytest.mark.parametrize("corpus", ["train", "validation"])
def test_without_the_mask_a_token_foretells_the_next_document(workdir, corpus):
    with pytest.raises(TrainingStarted):
        main(["train", "tiny.yaml", f"data.{corpus}=[{{path: ones}}]", "data.document_mask=false"])


def parquet(**columns):
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


# mtime=0, since contents become test names, which pytest-xdist needs to be equal in all processes.
TRUNCATED_GZIP = gzip.compress(GOOD * 99, mtime=0)[:-9]
INVALID_DEFLATE = gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 20
SOURCES = [  # name, contents, place in it, got, expected
    ("a.docx", b"x", "", "a file of kind '.docx'", KINDS),
    ("a.jsonl", GOOD + b"{oops\n", ", line 2", "broken JSON: Expecting property name...", "one JSON object a line"),
    ("a.jsonl", GOOD + b"[1]\n", ", line 2", "a JSON list", "one JSON object a line"),
    ("a.jsonl", GOOD + b'{"body": "a"}\n', ", line 2", "the fields body", "text in the field 'text'"),
    ("a.jsonl", GOOD + b'{"text": 3}\n', ", line 2", "int", "text in the field 'text'"),
    ("a.jsonl", GOOD + b'{"text": "\xe9t\xe9"}\n', ", line 2", "not UTF-8 (invalid continuation byte)", "UTF-8 text"),
    ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', ", line 2", "no Unicode text...", "text that UTF-8 can write"),
    ("a.txt", b"caf\xe9\n", ", line 1", "not UTF-8 (invalid continuation byte)", "UTF-8 text"),
    ("a.jsonl.gz", TRUNCATED_GZIP, "", "not readable: Compressed file ended...", "a readable, whole..."),
    ("a.jsonl.gz", INVALID_DEFLATE, "", "not readable...", "a readable, whole file"),
    ("a.jsonl.gz", GOOD, "", "not readable: Not a gzipped file...", "a readable, whole file"),
    ("a.jsonl.gz", b"", "", "not readable: 0 bytes: a truncated archive", "a readable, whole file"),
    ("a.JSONL.ZST", b"", "", "not readable: 0 bytes: a truncated archive", "a readable, whole file"),
    ("a.jsonl.zst", GOOD, "", "not readable: ...ecompress...", "a readable, whole file"),
    ("a.parquet", b"PAR1 and no more", "", "not readable as parquet: Parquet magic bytes...", "a parquet file"),
    ("a.parquet", parquet(body=["a"]), "", "the columns body", "a column 'text'"),
    ("a.parquet", parquet(text=["a", None]), ", row 1", "NoneType", "text in the field 'text'"),
]


@pytest.mark.slow
@pytest.mark.parametrize("command", [TOKENIZER, PREPARE], ids=["tokenizer", "prepare"])
@pytest.mark.parametrize(("name", "contents", "place", "got", "expected"), SOURCES)
def test_an_unreadable_source(workdir, run_refused, command, name, contents, place, got, expected):
    Path(name).write_bytes(contents)
    check_problems(run_refused(*command.split(), name), (name + place, got, expected))


@pytest.mark.parametrize(
    ("name", "contents"), [("a.txt", b""), ("a.txt", b" \n"), ("a.jsonl", b'{"text": " "}\n'), ("a.jsonl", b"")]
)
def test_no_text(workdir, run_refused, name, contents):
    Path(name).write_bytes(contents)
    check_problems(
        run_refused(*PREPARE.split(), name), ("--input", f"{name}: no text", "at least one document with text")
    )
    check_problems(run_refused(*TOKENIZER.split(), name), ("--input", f"{name}: no text", "sources with text"))


@pytest.mark.slow
def test_data_without_a_token_to_predict(workdir, run_folder, run_refused):
    check_problems(
        run_refused("evaluate", "run", "--data", "ones"),
        ("--data", "documents of one token in ones", "a token to predict"),
    )


@pytest.mark.slow
def test_evaluate_finds_an_id_that_no_sample_shows(workdir, run_folder, run_refused):
    tokens = np.zeros(600_000, np.int64)
    tokens[300_000] = 384

    with IndexedWriter("rare", np.dtype(np.uint16)) as writer:
        writer.add(tokens, np.array([tokens.size]))
        writer.commit()
    check_problems(
        run_refused("evaluate", "run", "--data", "rare"),
        ("rare.bin", "token id 384", "...the model's vocab_size = 384"),
    )


MODEL_COMMANDS = ["inspect {}", "export {} made/new", "evaluate {}", "generate {} --prompt a"]


@pytest.mark.parametrize("command", MODEL_COMMANDS)
@pytest.mark.parametrize(("folder", "got"), [("nowhere", "no such folder"), ("tokenizer", "no checkpoint")])
def test_no_model(run_refused, command, folder, got):
    problems = run_refused(*command.format(folder).split())
    check_problems(problems, (folder, got, "a checkpoint folder, or a run folder with checkpoints..."))


@pytest.mark.slow
@pytest.mark.parametrize("command", MODEL_COMMANDS)
@pytest.mark.parametrize("file", ["meta.json", "__0_0.distcp", "tokenizer/tokenizer.json", ".metadata"])
def test_a_flipped_byte(run_folder, run_refused, command, file):
    folder = "run/checkpoints/step_00000002"
    edit_file(f"{folder}/{file}", lambda raw: raw[:60] + bytes([raw[60] ^ 1]) + raw[61:])
    for model in ("run", folder):
        expected = (folder, f"{file} does not match its checksum", "a whole checkpoint", "use an older one of the run")
        check_problems(run_refused(*command.format(model).split()), expected)


RESUMES = [  # key, old value, new value
    ("model.hidden_size", 16, 32),
    ("model.num_component_heads", 1, 2),
    ("model.attention_variant", "mea", "mea_no_norm"),
    ("training.seed", 1234, 5),
    ("data.seq_length", 32, 16),
    ("training.global_batch_size", 4, 8),
    ("training.precision", "fp32", "bf16"),
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [*([row] for row in RESUMES), RESUMES[:4]], ids=lambda rows: rows[-1][0])
def test_resume_with_other_values(run_folder, run_refused, changes):
    problems = run_refused("train", "tiny.yaml", "optimizer.lr=1", *(f"{key}={new}" for key, _, new in changes))
    hint = "restore the old value, or start a new run with another run.dir"
    expected = [(key, str(new), f"{old}, as in the checkpoint of step 2", hint) for key, old, new in changes]
    check_problems(problems, *sorted(expected))


@pytest.mark.slow
def test_a_finished_run_with_another_model(run_folder, run_refused):
    problems = run_refused("train", "tiny.yaml", "training.steps=2", "model.hidden_size=32")
    assert [problem.where for problem in problems] == ["model.hidden_size"]


@pytest.mark.slow
def test_fewer_steps_than_a_run_has_done(run_folder, run_refused):
    """Whether it is finished or not."""
    for _ in range(2):
        problems = run_refused("train", "tiny.yaml", "training.steps=1", "schedule.warmup_steps=0")
        hint = "run.resume_from = the step of an earlier checkpoint goes back"
        check_problems(problems, ("training.steps", "1", "at least 2, which the run has reached already", hint))
        (run_folder / "FINISHED").write_text('{"step": 2}\n')

    assert main(["train", "tiny.yaml", "training.steps=2"]) == 0


@pytest.mark.slow
def test_a_run_under_a_second_name_of_its_folder(run_folder, workdir):
    """Containers mount one folder under two names."""
    shutil.copy("tiny.yaml", run_folder / "config.yaml")
    (workdir / "other").mkdir()
    if subprocess.run(["mount", "--bind", "run", "other"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root, and to mount")

    try:
        with pytest.raises(TrainingStarted):
            main(["train", "other/config.yaml", "training.steps=4"])
    finally:
        subprocess.run(["umount", "other"], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["move", "copy", "visit", "submitted"])
def test_a_run_that_its_own_configuration_does_not_name(run_folder, run_refused, monkeypatch, action):
    """It was moved, copied, or is started from another working directory than its relative path is for."""
    shutil.copy("tiny.yaml", run_folder / "config.yaml")
    place, command = run_folder.with_name("second"), "second/config.yaml"
    if action == "visit":
        place, command = run_folder, "config.yaml"
        monkeypatch.chdir(run_folder)
    elif action == "copy":
        shutil.copytree(run_folder, place)
    else:
        run_folder.rename(place)

    if action == "submitted":
        (place / "slurm").mkdir()
        (place / "config.yaml").rename(place / "slurm/config.yaml")
        command = "second/slurm/config.yaml"

    for verb in ("train", "plan"):
        problems = run_refused(verb, command, "training.steps=4")
        check_problems(
            problems,
            (
                "run.dir",
                f"run, in the config.yaml of the run folder {place}",
                "that folder, or run.dir=FOLDER...",
                f"run.dir={place} goes on with the run that lies there",
            ),
        )

    with pytest.raises(TrainingStarted) as started:
        main(["train", command, "training.steps=4", f"run.dir={place}", *absolute_data(run_folder.parent)])
    # It goes on from the checkpoint there.
    assert any(line.startswith("run.dir: ") for line in started.value.args[0]["inputs"].changes)


def absolute_data(folder: Path) -> list[str]:
    """Overrides that name the data of `workdir` from anywhere."""
    corpora = [f"data.{name}=[{{path: {folder / name}}}]" for name in ("train", "validation")]
    return [*corpora, f"data.tokenizer={folder / 'tokenizer'}"]


@pytest.mark.slow
def test_a_run_that_its_own_configuration_names(run_folder):
    """Through a link, too; and a configuration beside checkpoints of others is one like any other."""
    shutil.copy("tiny.yaml", run_folder / "config.yaml")
    Path("link").symlink_to(run_folder)
    for path in ("run/config.yaml", "link/config.yaml", str(run_folder / "config.yaml")):
        with pytest.raises(TrainingStarted):
            main(["train", path, "training.steps=4"])

    Path("checkpoints/step_7").mkdir(parents=True)
    shutil.copy("tiny.yaml", "config.yaml")
    with pytest.raises(TrainingStarted):
        main(["train", "config.yaml"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("corpora", "where", "got", "old"),
    [
        ("[{path: validation}]", "data.train.0", "tokens {validation}", "tokens {train}"),
        ("[{path: zeros}]", "data.train.0", "digest ...", "digest "),
        ("[{path: train}, {path: validation}]", "data.train", "2 corpora", "1 corpora"),
    ],
)
def test_resume_with_another_corpus(run_folder, run_refused, corpora, where, got, old):
    sizes = {name: Path(f"{name}.bin").stat().st_size // 2 for name in ("train", "validation")}
    shutil.copy("train.idx", "zeros.idx")
    Path("zeros.bin").write_bytes(bytes(2 * sizes["train"]))
    problems = run_refused("train", "tiny.yaml", f"data.train={corpora}")
    check_problems(
        problems, (where, got.format(**sizes), "the corpora of the checkpoint of step 2, in the same order: ...")
    )
    assert f"order: {old.format(**sizes)}" in problems[0].expected


@pytest.mark.slow
def test_what_a_resume_accepts(run_folder):
    """Allowed changes and a damaged newest checkpoint do not stop a resume; the refusals above rely on it."""
    with pytest.raises(TrainingStarted):
        main(["train", "tiny.yaml", "optimizer.lr=1"])
    edit_file("run/checkpoints/step_00000002/meta.json", lambda raw: raw[:-9])
    with pytest.raises(TrainingStarted):
        main(["train", "tiny.yaml", "optimizer.lr=1"])


MODEL = "a checkpoint folder, or a run folder with checkpoints, or a Hugging Face folder"
TEACHERS = [  # teacher, other overrides, got, expected
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
    ("gpt2", "", "gpt2/config.json: model_type = gpt2", "mea, mea_vllm, llama, mistral, qwen2, qwen3, qwen3_moe"),
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


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "others", "expected"), [(*row[:2], row[2:]) for row in TEACHERS])
def test_a_model_that_cannot_teach(run_folder, run_refused, teacher, others, expected):
    shutil.copytree(run_folder, "damaged")
    edit_file(next(Path("damaged").rglob("step_00000002/*.distcp")), lambda raw: raw[:-1] + b"?")
    Path("gpt2").mkdir()
    Path("gpt2/config.json").write_text('{"model_type": "gpt2"}')
    key = "training.distillation.teacher"
    problems = run_refused("train", "tiny.yaml", "run.dir=new", f"{key}={teacher}", *others.split())
    check_problems(problems, (key, *expected))
