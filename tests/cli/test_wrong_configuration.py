"""Configurations, environments and command lines that are wrong."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.refusals import (
    GOOD,
    KINDS,
    PREPARE,
    PROGRESS_BAR,
    TOKENIZER,
    TrainingStarted,
    check_problems,
    edit_file,
    refusal_params,
    snapshot,
)
from support.runs import ROOT

from megatron_mea.cli import main
from megatron_mea.config import load_config
from megatron_mea.data.order import PERIOD

VALUES = [  # override, got, expected, hint: the message names the key of the override
    ("model.hiden_size=16", "an unknown key", "keys of the configuration", "did you mean model.hidden_size?"),
    ("data.tokenizer=null", "None", "a valid string..."),
    ("run.dir=3", "3", "a valid string: quote the value"),
    ("model.hidden_size=wide", "'wide'", "a valid integer"),
    ("model.hidden_size=1.5", "1.5", "a valid integer"),
    ("model.hidden_size=true", "True", "a valid integer"),
    ("model.qk_norm=1", "1", "a valid boolean"),
    ("optimizer.lr=[1]", "[1]", "a valid number"),
    ("optimizer.lr=0", "0", "greater than 0"),
    ("optimizer.lr=.nan", "nan", "a finite number"),
    ("optimizer.lr=.inf", "inf", "a finite number"),
    ("training.steps=0", "0", "greater than 0"),
    ("training.seed=-1", "-1", "greater than or equal to 0"),
    ("parallel.zero_stage=4", "4", "less than or equal to 3"),
    ("schedule.min_lr_ratio=2", "2", "less than or equal to 1"),
    ("model.attention_variant=gqa", "'gqa'", "'plain', 'plain_norm', 'mea', 'mea_no_norm'..."),
    ("model.hlc_init=identity", "'identity'", "'block', 'orthogonal' or 'normal'"),
    ("model.num_attention_heads=3", "3", "a multiple of model.num_key_value_heads = 2"),
    ("model.head_dim=7", "7", "an even number: RoPE rotates pairs of features"),
    ("model.num_component_heads=[1]", "a list of 1", "one number, or one a layer: model.num_hidden_layers = 2"),
    ("model.num_component_heads=[1, 1, 1]", "a list of 3", "one number, or one a layer: model.num_hidden_layers = 2"),
    ("model.num_component_heads=3", "3", "at most model.num_key_value_heads = 2"),
    ("model.hlc_mixes=keys", "keys with 1 component heads", "`both` where component heads are fewer than..."),
    ("schedule.warmup_steps=4", "4", "fewer than training.steps = 4"),
    ("schedule.decay_steps=2", "2", "null: `cosine` has no decay phase"),
    ("data.seq_length=65", "65", "at most model.max_position_embeddings = 64"),
    ("parallel.sequence_parallel=true", "True", "false where parallel.tensor_model_parallel_size is 1"),
    ("training.activation_checkpointing=some", "'some'", "'none', 'selective' or 'full'"),
    ("run.resume_from=abc", "'abc'", "newest, or the step of a checkpoint"),
    ("run.resume_from=0", "0", "newest, or the step of a checkpoint"),
    ("run.resume_from=3", "3", "newest, or a step with a checkpoint: none"),
    (
        "logging.profile={start: 2, steps: 4}",
        "start 2, steps 4",
        "steps that end with training.steps = 4 at the latest",
    ),
    ("optimizer.lr", "no `=`", "KEY=VALUE, for example optimizer.lr=1e-3"),
    ("optimizer.lr.peak=3", "'lr' is not a section", "a dotted key of a section"),
    ("data.train.0.path=a", "'train' is not a section", "a dotted key of a section"),
    ("optimizer.lr=[1", "'[1' (while parsing...", "a YAML value"),
    ("run.dir=tiny.yaml", "tiny.yaml, which is a file", "a folder, or a name that is free"),
    ("data.tokenizer=nowhere", "nowhere, which is no folder", "a Hugging Face tokenizer folder"),
    ("optimizer.lr=2024-99-99", "'2024-99-99' (month must...", "a YAML value", "quote it: ..."),
    ("training.steps=0100", "'0100' (line 1: 0100 has a leading zero...", "a YAML value", "quote it: ..."),
    ("training.steps='0100'", "'0100'", "a valid integer"),
    ("training.seed=1:30", "'1:30' (line 1: 1:30 is a number to the base 60...", "a YAML value", "quote it: ..."),
    ('training.seed=!!int ""', "... (string index...", "a YAML value", "quote it: ..."),
    ("training.seed=!!bool x", "'!!bool x' ('x')", "a YAML value", "quote it: ..."),
    ("training.seed=!!timestamp x", "'!!timestamp x' (...", "a YAML value", "quote it: ..."),
    (f"training.seed={'9' * 5000}", "...", "...", "..."),
    ("model.num_hidden_layers=1000000000", "1000000000", "less than or equal to 1000"),
    ("model.hidden_size=1000000000000000000", "1000000000000000000", "less than or equal to 1048576"),
    ("model.num_component_heads=1e30", "'1e30'", "less than or equal to 1048576"),
    ("training.steps=1e308", "'1e308'", "less than or equal to 1000000000000"),
    ("parallel.timeout_minutes=1e300", "'1e300'", "less than or equal to 525600"),
    ("run.dir=''", "...", "..."),
    ("checkpoint.keep_every=3", "3", "a multiple of checkpoint.interval = 2: ..."),
    ("model.num_component_heads=[]", "...", "..."),
]
DISTILLATION = "training.distillation"
OTHER_PLACES = [  # override, where, got, expected
    ("modle.head_dim=8", "modle", "an unknown key", "keys of the configuration", "did you mean model?"),
    ("=3", "=3", "no key", "KEY=VALUE, for example optimizer.lr=1e-3"),
    ("optimizer.betas=[0.9, 1]", "optimizer.betas.1", "1", "less than 1"),
    ("data.train=[{weight: 1}]", "data.train.0.path", "nothing", "a value: the key is required"),
    ("data.train=[{path: nowhere}]", "nowhere.idx", "no such file", "the files that `megatron-mea prepare` wrote"),
    ("model.rope_scaling={rope_type: ntk}", "model.rope_scaling.rope_type", "...", "linear, dynamic, yarn or llama3"),
    ("model.attention_variant=plain", "model.num_component_heads", "1", "model.num_key_value_heads = 2, since..."),
    ("schedule.kind=wsd", "schedule.decay_steps", "nothing", "a number of steps: `wsd` needs it"),
    ("training.tokens=1e6", "training.steps, training.tokens", "both: 4 and 1e+06", "one of the two"),
    ("training.micro_batch_size=3", "training.global_batch_size", "4", "a multiple of training.micro_batch_size = 3"),
    ("data.train=[{path: none}]", "none.bin", "0 tokens", "more than data.seq_length = 32 tokens"),
    ("data.train=[{path: short}]", "short.bin", "32 tokens", "more than data.seq_length = 32 tokens"),
    ("data.train=[{path: beyond}]", "beyond.bin", "token id 384", "ids from 0 up to...model.vocab_size = 384"),
    ("data.train=[{path: negative}]", "negative.bin", "token id -1", "ids from 0 up to...model.vocab_size = 384"),
    ("data.train=[]", "data.train", "a list of 0", "at least 1"),
    ("training.distillation={weight: 1}", f"{DISTILLATION}.teacher", "nothing", "a value: the key is required"),
    ("training.distillation={teacher: a, weight: 0}", f"{DISTILLATION}.weight", "0", "greater than 0"),
    ("training.distillation={teacher: a, weight: 1.5}", f"{DISTILLATION}.weight", "1.5", "less than or equal to 1"),
    ("training.distillation={teacher: a, temperature: 0}", f"{DISTILLATION}.temperature", "0", "greater than 0"),
    ("optimizer.betas=[1, 2, 3]", "optimizer.betas", "a list of 3", "at most 2"),
    ("data.train=[{path: ones}]", "data.train", "documents of one token in the first 4 samples", "a token to..."),
    ("data.validation=[{path: ones}]", "data.validation", "documents of one token in the first 8...", "a token..."),
    ("model.num_component_heads=[1, 0]", "model.num_component_heads.1", "0", "greater than 0"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("override", "expected"), refusal_params(VALUES))
def test_a_wrong_value(run_refused, override, expected):
    check_problems(run_refused("train", "tiny.yaml", override), (override.partition("=")[0], *expected))


def test_what_cannot_be_compiled(run_refused, monkeypatch):
    problems = run_refused("train", "tiny.yaml", "training.compile=true", "parallel.zero_stage=3")
    check_problems(problems, ("training.compile", "True", "false where parallel.zero_stage is 3: ..."))

    monkeypatch.setenv("CXX", "no-such-compiler")
    problems = run_refused("train", "tiny.yaml", "training.compile=true")
    check_problems(
        problems,
        ("training.compile", "no no-such-compiler", "false, or a compiler", "install g++, or let CXX name one"),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("override", "expected"), refusal_params(OTHER_PLACES))
def test_a_wrong_value_told_elsewhere(run_refused, override, expected):
    check_problems(run_refused("train", "tiny.yaml", override), expected)


def test_all_wrong_values_in_one_message(run_refused):
    problems = run_refused("train", "tiny.yaml", "model.head_dim=0", "checkpoint.keep=0", "optimiser.lr=1")
    assert {problem.where for problem in problems} == {"model.head_dim", "checkpoint.keep", "optimiser"}


def test_all_wrong_overrides_in_one_message(run_refused):
    problems = run_refused("train", "tiny.yaml", "surplus", "optimizer.lr.peak=3", "optimizer.lr=1", "optimizer.eps=[1")
    assert [problem.where for problem in problems] == ["surplus", "optimizer.lr.peak", "optimizer.eps"]


@pytest.mark.parametrize("place", ["file", "override"])
@pytest.mark.parametrize(("number", "lr"), [("3e-3", 0.003), ("1e6", 1e6)])
def test_numbers_with_an_exponent(workdir, place, number, lr):
    if place == "file":
        edit_file("tiny.yaml", lambda raw: raw.replace(b"lr: 0.01\n", f"lr: {number}\n".encode()))

    with pytest.raises(TrainingStarted) as accepted:
        main(["train", "tiny.yaml", "training.steps=1e6", *([f"optimizer.lr={number}"] if place == "override" else [])])

    config = accepted.value.args[0]["config"]
    assert (config.optimizer.lr, config.training.steps, type(config.training.steps)) == (lr, 1_000_000, int)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["data.train", "data.validation"])
def test_as_many_corpora_as_a_mixture_has_parts(run_refused, key):
    def corpora(count):
        return f"{key}=[{', '.join(['{path: a}'] * count)}]"

    assert len(getattr(load_config("tiny.yaml", [corpora(10_000)]).data, key[5:])) == PERIOD == 10_000
    check_problems(run_refused("train", "tiny.yaml", corpora(10_001)), (key, "a list of 10001", "at most 10000"))


FILES = [  # contents of wrong.yaml, place in it, got, expected
    (b"model: {head_dim: [16", "", "not YAML: while parsing...", "valid YAML"),
    (b"model: \xff\xfe", "", "not UTF-8 text", "a readable YAML file"),
    (b"- model\n", "", "list at the top", "sections such as `model:`, `data:`"),
    (b"", "", "NoneType at the top", "sections such as `model:`, `data:`"),
    (b"model:\n  head_dim: 8\n  head_dim: 9\n", ", line 3", "the key 'head_dim' twice", "each key once"),
    (b"a: !!python/object:os.system {}\n", "", "not YAML: could not determine a constructor...", "valid YAML"),
    (b"optimizer: {lr: 2024-02-31}\n", "", "not YAML: day is out of range...", "valid YAML"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("contents", "expected"), refusal_params(FILES))
def test_an_unreadable_file(workdir, run_refused, contents, expected):
    Path("wrong.yaml").write_bytes(contents)
    check_problems(run_refused("train", "wrong.yaml"), ("wrong.yaml" + expected[0], *expected[1:]))


TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
RANKS = [  # what differs from the first of two ranks, where, got, expected
    ("", "training.global_batch_size", "6", "a multiple of training.micro_batch_size x data-parallel size = 2 x 2 = 4"),
    ("MASTER_PORT=", "environment", "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR without MASTER_PORT", "all of these..."),
    ("RANK=", "environment", "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT without RANK", "all of these..."),
    ("RANK=2", "environment", "RANK=2 with WORLD_SIZE=2", "0 <= RANK < WORLD_SIZE"),
    ("WORLD_SIZE=two", "environment", "...", "whole numbers in all but MASTER_ADDR"),
    ("RANK=one", "environment", "...", "whole numbers in all but MASTER_ADDR"),
    ("MASTER_PORT=99999", "environment", "MASTER_PORT=99999, LOCAL_RANK=0", "a port from 1 to 65535, a rank >= 0"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "expected"), refusal_params(RANKS))
def test_the_environment_of_a_rank(run_refused, monkeypatch, change, expected):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    name, _, value = change.partition("=")
    for key in TWO:
        monkeypatch.setenv(key, value if key == name else TWO[key])

    batch = "training.global_batch_size=6" if change == "" else "training.global_batch_size=8"
    check_problems(run_refused("train", "tiny.yaml", batch), expected)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_later_rank_gives_the_first_one_time_to_say_it(workdir, monkeypatch, capfd, rank):
    for key, value in (TWO | {"RANK": rank}).items():
        monkeypatch.setenv(key, value)

    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    assert main(["train", "tiny.yaml", "data.tokenizer=nowhere"]) == 2

    name = "megatron-mea: rank 1: " if rank == "1" else "megatron-mea: "
    assert capfd.readouterr().err.startswith(f"{name}error: data.tokenizer\n")
    assert len(waited) == int(rank)


OTHER = "train tiny.yaml model.num_component_heads=null model.attention_variant="
LATENT = f"{OTHER}mea model.hlc_form=latent"
COMMANDS = [  # command, where, got, expected, hint; tiny.yaml is a file, `tokenizer` a folder and `run` a run
    ("train no.yaml", "no.yaml", "No such file or directory", "a readable YAML file"),
    (f"{OTHER}plain optimizer.decay_hlc=true", "optimizer.decay_hlc", "True", "false: `plain` has no matrices that..."),
    (f"{OTHER}mea optimizer.decay_hlc=true optimizer.weight_decay=0", "optimizer.decay_hlc", "True", "false where..."),
    (f"{OTHER}differential optimizer.decay_hlc=true", "optimizer.decay_hlc", "True", "false: `differential` has no..."),
    (f"{OTHER}differential model.hlc_init=normal", "model.hlc_init", "normal", "block: `differential` has no head..."),
    (
        f"{OTHER}talking_heads model.head_norm_eps=1",
        "model.head_norm_eps",
        "1.0",
        "1e-05: `talking_heads` has no head...",
    ),
    (f"{OTHER}plain model.hlc_form=latent", "model.hlc_form", "latent", "head: `plain` has no head combination"),
    (f"{OTHER}mea model.key_latent_dim=8", "model.key_latent_dim", "8", "null where model.hlc_form is `head`"),
    (f"{LATENT} model.key_latent_dim=7", "model.key_latent_dim", "7", "even numbers: RoPE rotates pairs..."),
    (f"{LATENT} model.value_latent_dim=17", "model.value_latent_dim", "17", "at most...x model.head_dim = 16"),
    (f"{LATENT} model.key_latent_dim=[2]", "model.key_latent_dim", "a list of 1", "one number, or one a layer..."),
    (f"{LATENT} model.hlc_init=normal", "model.hlc_init", "normal", "block where model.hlc_form is `latent`"),
    (f"{LATENT} model.hlc_mixes=keys", "model.hlc_mixes", "keys", "both where model.hlc_form is `latent`"),
    (f"{LATENT} model.num_component_heads=1", "model.num_component_heads", "1", "model.num_key_value_heads = 2..."),
    (f"{LATENT} model.key_frequencies=[[2,2,2,2]]", "model.key_frequencies", "a list of 1", "one a layer: ..."),
    (
        f"{LATENT} model.key_frequencies=[[2,2,2,2],[3,1,2,2]]",
        "model.key_frequencies.1",
        "3",
        "at most model.num_key_value_heads = 2",
    ),
    (
        f"{LATENT} model.key_frequencies=[[2,2,2,2],[1,1,2,2]]",
        "model.key_frequencies.1",
        "6 pairs",
        "model.key_latent_dim / 2 = 8 pairs",
    ),
    (f"{OTHER}plain model.gate_width=head", "model.gate_width", "head", "feature: `gated` alone reads it"),
    (f"{OTHER}gated model.gate_width=both", "model.gate_width", "'both'", "'feature' or 'head'"),
    (f"{OTHER}gated optimizer.decay_hlc=true", "optimizer.decay_hlc", "True", "false: `gated` has no..."),
    (f"{OTHER}differential model.num_key_value_heads=1", "model.num_key_value_heads", "1", "a multiple of 2: ..."),
    ("train tiny.yaml training.steps=1 schedule.warmup_steps=0", "training.steps", "1", "at least 2, which the run..."),
    ("train tokenizer", "tokenizer", "Is a directory", "a readable YAML file"),
    (f"{PREPARE} no.jsonl", "no.jsonl", "no such file or folder", f"a {KINDS} file, a folder, or a hub name"),
    (f"{PREPARE} tokenizer", "tokenizer", "no file of a known kind", f"{KINDS} files, or a folder of `datasets`"),
    (f"{PREPARE} train.jsonl --tokenizer no", "--tokenizer", "no, which is no folder", "a Hugging Face tokenizer..."),
    (f"{PREPARE} train.jsonl --workers 0", "--workers", "0", "at least 1"),
    (f"{PREPARE} train.jsonl --out tiny.yaml/new", "tiny.yaml/new.bin", "...", "a place that can be written"),
    (f"{PREPARE} train.jsonl --out=", "--out", "''", "PREFIX, a name..."),
    (f"{PREPARE} train.jsonl --out new/", "--out", "'new/'", "PREFIX, a name..."),
    (f"{PREPARE} train.jsonl --out new/..", "--out", "'new/..'", "PREFIX, a name..."),
    (f"{PREPARE} train.jsonl --out .", "--out", "'.'", "PREFIX, a name..."),
    (f"{PREPARE} train.jsonl --out {'x' * 201}", "--out", "...", "PREFIX, a name of 200 bytes at most..."),
    (f"{PREPARE} no.jsonl --input train.jsonl", "no.jsonl", "no such file or folder", "..."),
    (f"{TOKENIZER} no.jsonl --input train.jsonl", "no.jsonl", "no such file or folder", "..."),
    (f"{TOKENIZER} no.txt", "no.txt", "no such file or folder", f"a {KINDS} file, a folder, or a hub name"),
    (
        f"{TOKENIZER} train.jsonl --vocab-size 260",
        "--vocab-size",
        "260",
        "261 (4 special ids...",
    ),
    (f"{TOKENIZER} train.jsonl --vocab-size 261", "--vocab-size", "261", "...", "...smaller than required..."),
    (f"{TOKENIZER} train.jsonl --vocab-size 99999", "--vocab-size", "99999", "...", "...too high..."),
    (f"{TOKENIZER} train.jsonl --out tiny.yaml/new", "tiny.yaml/new", "...", "a place that can be written"),
    (f"{TOKENIZER} train.jsonl --out tiny.yaml", "tiny.yaml", "a file", "a folder, or a name that is free"),
    ("export run new --target stock", "--target", "stock, for the variant mea", "transformers, or vllm: no stock..."),
    ("export run tokenizer", "tokenizer", "a folder that is not empty", "a folder that is empty or does not exist"),
    ("export run tiny.yaml", "tiny.yaml", "a file", "a folder that is empty or does not exist"),
    ("export run tiny.yaml/new", "tiny.yaml/new", "...", "a place that can be written"),
    ("export dict new", "dict", "dict/config.json, unreadable (no key 'model_type')", "a Hugging Face folder"),
    ("evaluate run --data no", "no.idx", "no such file", "the files that `megatron-mea prepare` wrote"),
    ("evaluate run --data none", "none.bin", "0 tokens", "at least 2"),
    ("evaluate run --data beyond", "beyond.bin", "token id 384", "...the model's vocab_size = 384"),
    ("evaluate run --data short --out tiny.yaml/new", "tiny.yaml/new", "...", "a place that can be written"),
    ("evaluate run --data short --out tokenizer", "tokenizer", "a folder", "a file, or a name that is free"),
    (
        "evaluate dict --data train",
        "dict",
        "dict/config.json, unreadable (no key 'model_type')",
        "a Hugging Face folder",
    ),
    ("generate list --prompt a", "list", "list/config.json, unreadable (a JSON list)", "a Hugging Face folder"),
    ("generate run --prompt a --max-new-tokens 0", "--max-new-tokens", "0", "at least 1"),
    ("generate run --prompt a --max-new-tokens 64", "--max-new-tokens", "64 after a prompt of 1...", "at most 63..."),
    ("generate run --prompt a --temperature -1", "--temperature", "-1.0", "0 (the likeliest token), or 0.001 and more"),
    (f"{TOKENIZER} train.jsonl --vocab-size 1099511627776", "--vocab-size", "1099511627776", "261..."),
    ("generate run --prompt a --temperature nan", "--temperature", "nan", "0 (the likeliest token), or 0.001 and more"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "expected"), refusal_params(COMMANDS))
def test_a_wrong_command(run_folder, run_refused, command, expected):
    for name, contents in (("dict", "{}"), ("list", "[]")):
        Path(name).mkdir()
        Path(name, "config.json").write_text(contents)
    check_problems(run_refused(*command.split()), expected)


PROCESSES = [  # command, where, got, expected
    ("train tiny.yaml model.head_dim=7", "model.head_dim", "7", "an even number: RoPE rotates pairs of features"),
    (f"{PREPARE} a.jsonl --workers 2", "a.jsonl, line 2", "broken JSON: Expecting value", "one JSON object a line"),
    (
        "inspect no",
        "no",
        "no such folder",
        "a checkpoint folder, or a run folder with checkpoints, or the PREFIX of prepared data",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "expected"), refusal_params(PROCESSES))
def test_as_a_process(workdir, command, expected):
    Path("a.jsonl").write_bytes(GOOD + b"oops\n")
    before = snapshot(workdir)
    command = [sys.executable, "-m", "megatron_mea", *command.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    message = "megatron-mea: error: {}\n  got:      {}\n  expected: {}\n".format(*expected)

    assert (done.returncode, done.stdout, PROGRESS_BAR.sub("", done.stderr)) == (2, "", message)
    assert snapshot(workdir) == before


@pytest.mark.slow
def test_a_wrong_configuration_is_refused_before_torch_is_imported(workdir):
    script = """if True:
        import sys
        from megatron_mea.cli import main
        status = main(["train", "tiny.yaml", "model.head_dim=7"])
        print(status, [name for name in ("torch", "deepspeed", "transformers") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)

    assert done.stdout == "2 []\n"


@pytest.mark.slow
@pytest.mark.parametrize("count", ["", "0", "00", "010", "0x1", "-1", "two", "1234567"])
def test_a_wrong_number_of_processes(count):
    command = ["bash", str(ROOT / "launch/local.sh"), count, "no.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"local.sh: error: NPROC\n  got:      '{count}'\n  expected: a number from 1 to 999999"
    )
