"""The command line as the verbs get it: what was accepted once is accepted with the same values for ever."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from support.refusals import check_problems, refusal_params

from megatron_mea import __version__
from megatron_mea.arguments import parse_arguments
from megatron_mea.cli import main
from megatron_mea.errors import UserError
from megatron_mea.failures import FAILURE_FILE_VARIABLE

DEFAULTS = {  # verb: its options where none is given
    "tokenizer": {"input": None, "text_key": "text", "split_at": "file", "max_document": 67108864, "vocab_size": None}
    | {"out": None},
    "prepare": {"input": None, "text_key": "text", "split_at": "file", "max_document": 67108864, "tokenizer": None}
    | {"out": None, "split": "train", "workers": None, "bos": False, "max_broken": 0.01, "force": False},
    "train": {"config": None, "overrides": []},
    "plan": {"config": None, "overrides": [], "world_size": None, "json": False},
    "submit": {"config": None, "overrides": [], "nodes": None, "gpus_per_node": None, "time": None, "dry_run": False}
    | {"chain": 1, "sbatch_options": []},
    "sweep": {"config": None, "overrides": [], "variants": [], "learning_rates": [], "seeds": [], "out": None}
    | {"submit": False, "nodes": None, "gpus_per_node": None, "time": None, "dry_run": False, "at_once": None}
    | {"sbatch_options": []},
    "report": {"paths": None, "out": None, "tokens": []},
    "inspect": {"path": None},
    "export": {"model": None, "out": None, "dtype": "fp32", "target": "transformers"},
    "import": {"source": None, "out": None, "variant": None},
    "compress": {"model": None, "out": None, "component_heads": None, "cache_ratio": None, "layers": None}
    | {"calibration": None, "method": None, "align": False, "reconstruction_steps": None},
    "sensitivity": {"model": None, "component_heads": None, "data": None, "out": None, "align": False},
    "evaluate": {"model": None, "data": None, "window": None, "tasks": None, "out": None},
    "generate": {"model": None, "prompt": None, "max_new_tokens": 64, "temperature": 0.0},
}
SOURCES = {"input": ["A", "B"], "tokenizer": "T", "out": "P"}
JOB = {"config": "c", "nodes": 2, "gpus_per_node": 8, "time": "1:00"}
ACCEPTED = [  # command, what it sets
    # Options with several values, repeated options.
    ("prepare --input A B --tokenizer T --out P", SOURCES),
    ("prepare --input A --tokenizer T --input B --out P", SOURCES),
    ("prepare --input A --input=B --tokenizer T --out P", SOURCES),
    ("prepare --input A B --tokenizer T --out P --input C D", SOURCES | {"input": ["A", "B", "C", "D"]}),
    ("prepare --tokenizer T --out P --input A B --bos", SOURCES | {"bos": True}),
    ("prepare --input '' --tokenizer T --out P", SOURCES | {"input": [""]}),
    ("prepare --input 'A B' --tokenizer T --out=", SOURCES | {"input": ["A B"], "out": ""}),
    ("prepare --input - --tokenizer T --out P", SOURCES | {"input": ["-"]}),
    ("prepare --input A B --tokenizer S --out O --tokenizer T --out P", SOURCES),
    (
        "prepare --input A B --tokenizer T --out P --text-key body --split-at blank-lines --max-document 1000 "
        "--split test --workers 3 --max-broken 0 --force",
        SOURCES
        | {"text_key": "body", "split_at": "blank-lines", "max_document": 1000, "split": "test", "workers": 3}
        | {"max_broken": 0.0, "force": True},
    ),
    ("tokenizer --input A --vocab-size 32_000 --out D", {"input": ["A"], "vocab_size": 32000, "out": "D"}),
    ("report a b --out r.html", {"paths": ["a", "b"], "out": "r.html"}),
    ("report --out r.html a b", {"paths": ["a", "b"], "out": "r.html"}),
    ("report a --out r.html -- b", {"paths": ["a", "b"], "out": "r.html"}),
    ("report a --out r.html b -- c --tokens 1", {"paths": ["a", "b", "c", "--tokens", "1"], "out": "r.html"}),
    ("report --out r.html -- a -- b", {"paths": ["a", "--", "b"], "out": "r.html"}),
    ("report a --tokens 1e9 5e11 --out r.html", {"paths": ["a"], "out": "r.html", "tokens": [1e9, 5e11]}),
    ("report a --out r.html --tokens 1e9 --tokens 2", {"paths": ["a"], "out": "r.html", "tokens": [2.0]}),
    ("evaluate M --tasks a b.yaml", {"model": "M", "tasks": ["a", "b.yaml"]}),
    ("evaluate M --tasks a --tasks paper", {"model": "M", "tasks": ["paper"]}),
    ("evaluate --data P --out f.json M", {"model": "M", "data": "P", "out": "f.json"}),
    ("evaluate M --window 4096", {"model": "M", "window": 4096}),
    # Overrides between, before and behind options.
    ("train c", {"config": "c"}),
    ("train c a.b=1 c.d=", {"config": "c", "overrides": ["a.b=1", "c.d="]}),
    (
        "train c 'a.b=[{path: x, weight: 2}, {path: y}]'",
        {"config": "c", "overrides": ["a.b=[{path: x, weight: 2}, {path: y}]"]},
    ),
    ("train c a.b=-1 =3 a.b", {"config": "c", "overrides": ["a.b=-1", "=3", "a.b"]}),
    ("train -- c a=1", {"config": "c", "overrides": ["a=1"]}),
    ("train c -- a=1", {"config": "c", "overrides": ["a=1"]}),
    ("plan c a=1 --world-size 4 --json", {"config": "c", "overrides": ["a=1"], "world_size": 4, "json": True}),
    ("plan c --world-size 4 a=1", {"config": "c", "overrides": ["a=1"], "world_size": 4}),
    ("plan --world-size 4 c a=1", {"config": "c", "overrides": ["a=1"], "world_size": 4}),
    ("plan c --world-size 4 a=1 -- b=2", {"config": "c", "overrides": ["a=1", "b=2"], "world_size": 4}),
    (
        "plan --json c a=1 --world-size=4 b=2",
        {"config": "c", "overrides": ["a=1", "b=2"], "world_size": 4} | {"json": True},
    ),
    ("plan c surplus --json more", {"config": "c", "overrides": ["surplus", "more"], "json": True}),
    ("submit c --nodes 2 --gpus-per-node 8 --time 1:00", JOB),
    (
        "submit c a=1 --nodes 2 b=2 --gpus-per-node 8 c=3 --time 1:00 d=4",
        JOB | {"overrides": ["a=1", "b=2", "c=3", "d=4"]},
    ),
    ("submit --dry-run --nodes 2 --gpus-per-node 8 --time 1:00 c a=1", JOB | {"overrides": ["a=1"], "dry_run": True}),
    # Options of sbatch.
    (
        "submit c --nodes 2 --gpus-per-node 8 --time 1:00 -- --qos high -A x",
        JOB | {"sbatch_options": ["--qos", "high", "-A", "x"]},
    ),
    ("submit c --nodes 2 --gpus-per-node 8 --time 1:00 a=1 --chain 3 --", JOB | {"overrides": ["a=1"], "chain": 3}),
    (
        "submit c --nodes 2 --gpus-per-node 8 --time 1:00 -- -- --qos=1 --help a=1",
        JOB | {"sbatch_options": ["--", "--qos=1", "--help", "a=1"]},
    ),
    ("sweep c --out o", {"config": "c", "out": "o"}),
    (
        "sweep c a=1 --out o --variants plain,mea --learning-rates 1e-3 --seeds 1,2 b=2 --at-once 2",
        {"config": "c", "out": "o", "overrides": ["a=1", "b=2"], "at_once": 2}
        | {"variants": ["plain", "mea"], "learning_rates": ["1e-3"], "seeds": ["1", "2"]},
    ),
    (
        "sweep c --out o --submit --nodes 2 --gpus-per-node 8 --time 1:00 --dry-run -- -q x",
        JOB | {"out": "o", "submit": True, "dry_run": True, "sbatch_options": ["-q", "x"]},
    ),
    # Other positional arguments, choices, abbreviations, numbers.
    ("inspect P", {"path": "P"}),
    ("export M O --dtype bf16 --target stock", {"model": "M", "out": "O", "dtype": "bf16", "target": "stock"}),
    ("export M --dtype=bf16 O", {"model": "M", "out": "O", "dtype": "bf16"}),
    ("export --target vllm -- M -O", {"model": "M", "out": "-O", "target": "vllm"}),
    ("import S O --variant mea", {"source": "S", "out": "O", "variant": "mea"}),
    ("compress M O --component-heads 1,2,3", {"model": "M", "out": "O", "component_heads": "1,2,3"}),
    ("compress M O --cache 0.5 --align", {"model": "M", "out": "O", "cache_ratio": 0.5, "align": True}),
    ("compress M O --cache 0.5 --met latent", {"model": "M", "out": "O", "cache_ratio": 0.5, "method": "latent"}),
    ("compress M O --cal P --lay 5-12:2", {"model": "M", "out": "O", "calibration": "P", "layers": "5-12:2"}),
    ("sensitivity M --comp 1 --da P --ou f.json", {"model": "M", "component_heads": 1, "data": "P", "out": "f.json"}),
    ("plan c --world=4 --js", {"config": "c", "world_size": 4, "json": True}),
    ("submit c --no 2 --gpus 8 --ti 1:00", JOB),
    ("generate M --prompt x", {"model": "M", "prompt": "x"}),
    ("generate M --prompt=-x --max 3", {"model": "M", "prompt": "-x", "max_new_tokens": 3}),
    ("generate M --prompt '- a b' --temp 1", {"model": "M", "prompt": "- a b", "temperature": 1.0}),
    ("generate M --prompt -3 --temperature 1e-2", {"model": "M", "prompt": "-3", "temperature": 0.01}),
    ("generate M --prompt '' --temperature=.5", {"model": "M", "prompt": "", "temperature": 0.5}),
]


@pytest.mark.parametrize(("command", "values"), ACCEPTED, ids=[row[0] for row in ACCEPTED])
def test_what_is_accepted(command, values):
    verb, *_ = words = shlex.split(command)
    assert parse_arguments(words) == (verb, DEFAULTS[verb] | values)


VERBS = ", ".join(DEFAULTS)
REFUSED = [  # command, (where, got, expected, hint) of each problem
    ("", ("VERB", "nothing", VERBS, "see megatron-mea --help")),
    ("no-verb", ("VERB", "'no-verb', an unknown verb", VERBS, "see megatron-mea --help")),
    ("serve", ("VERB", "'serve', an unknown verb", VERBS, "see megatron-mea --help")),
    ("--bogus train c", ("VERB", "'--bogus', an unknown verb", VERBS, "see megatron-mea --help")),
    ("--help=x", ("VERB", "'--help=x', an unknown verb", VERBS)),
    # What is missing, unknown or too much, all of it.
    ("train", ("CONFIG", "nothing", "CONFIG: a YAML file", "see megatron-mea train --help")),
    ("train c --bogus=1", ("--bogus", "an unknown option", "options of `megatron-mea train`", "see ... train --help")),
    ("train c --version", ("--version", "an unknown option", "options of `megatron-mea train`")),
    ("train c -x", ("-x", "an unknown option", "options of `megatron-mea train`")),
    ("train --bogus c", ("--bogus", "an unknown option", "options of `megatron-mea train`")),
    ("inspect", ("PATH", "nothing", "PATH: a checkpoint folder, ...")),
    ("inspect a b c", ("b", "an argument too many", "megatron-mea inspect PATH"), ("c", "an argument too many", "...")),
    ("export M", ("OUT_DIR", "nothing", "OUT_DIR: a folder that does not exist or is empty")),
    ("inspect a -- b", ("b", "an argument too many", "megatron-mea inspect PATH")),
    ("export M O --dtype bf16 -- P", ("P", "an argument too many", "megatron-mea export MODEL OUT_DIR")),
    ("export M O P", ("P", "an argument too many", "megatron-mea export MODEL OUT_DIR")),
    ("import", ("HF_DIR", "nothing", "..."), ("OUT_CHECKPOINT", "nothing", "...")),
    ("prepare A --input B --tokenizer T --out P", ("A", "an argument too many", "megatron-mea prepare")),
    (
        "prepare --input A --bogus 3 --more",
        ("--bogus", "an unknown option", "..."),
        ("--more", "an unknown option", "..."),
        ("--tokenizer", "nothing", "--tokenizer DIR: a Hugging Face tokenizer folder"),
        ("--out", "nothing", "--out PREFIX: PREFIX.bin and PREFIX.idx are written", "see megatron-mea prepare --help"),
    ),
    (
        "submit c --nodes 2",
        ("--gpus-per-node", "nothing", "--gpus-per-node G: processes a node, one a GPU"),
        ("--time", "nothing", "--time T: limit of a job, ..."),
    ),
    ("sweep c", ("--out", "nothing", "--out DIR: holds a run folder for each")),
    ("report --out r.html", ("DIR", "nothing", "DIR ...: a run folder, or a sweep's --out")),
    ("report a", ("--out", "nothing", "--out FILE.html: the page; ...")),
    ("generate M", ("--prompt", "nothing", "--prompt TEXT")),
    # What argparse cannot read beyond.
    ("plan c --world-size", ("--world-size", "no value", "--world-size N", "see megatron-mea plan --help")),
    ("plan c --json=yes", ("--json", "the value 'yes'", "--json without a value")),
    ("train c --help=3", ("--help", "the value '3'", "--help without a value", "see megatron-mea train --help")),
    ("prepare --input --tokenizer T --out P", ("--input", "no value", "--input SOURCE ...")),
    ("report a --out r.html --tokens", ("--tokens", "no value", "--tokens N ...")),
    ("evaluate M --tasks", ("--tasks", "no value", "--tasks NAME_OR_YAML ...")),
    ("generate M --prompt", ("--prompt", "no value", "--prompt TEXT")),
    ("generate M --prompt -x", ("--prompt", "no value", "--prompt TEXT", "did you mean --prompt=-x? see ...")),
    ("generate M --prompt --temp=1", ("--prompt", "no value", "--prompt TEXT", "see megatron-mea generate --help")),
    (
        "generate M --prompt x --temp -1e-3",
        ("--temperature", "no value", "--temperature T", "did you mean --temp=-1e-3? see megatron-mea generate --help"),
    ),
    (
        "sweep c --out o --learning-rates -1,2",
        ("--learning-rates", "no value", "--learning-rates LR,...", "did you mean --learning-rates=-1,2? see ..."),
    ),
    ("compress M O --c 1", ("megatron-mea compress", "ambiguous option: --c could match ...", "an option in full")),
    (
        "report a --tokens x 2 --out",
        ("--tokens", "'x'", "a number, above 0"),
        ("--out", "no value", "--out FILE.html", "see megatron-mea report --help"),
    ),
    # Types and ranges.
    ("plan c --world-size two", ("--world-size", "'two'", "a whole number, at least 1")),
    ("plan c --world-size 1.5", ("--world-size", "'1.5'", "a whole number, at least 1")),
    ("plan c --world-size -1", ("--world-size", "-1", "at least 1")),
    (
        "prepare --input A --tokenizer T --out P --workers 0 --max-broken 1.1 --max-document 0 --split-at lines",
        ("--split-at", "'lines'", "file or blank-lines", "did you mean blank-lines?"),
        ("--max-document", "0", "1 to 1,073,741,824 bytes"),
        ("--workers", "0", "at least 1"),
        ("--max-broken", "1.1", "0 to 1"),
    ),
    ("prepare --input A --tokenizer T --out P --max-broken many", ("--max-broken", "'many'", "a number, 0 to 1")),
    ("prepare --input A --tokenizer T --out P --max-broken nan", ("--max-broken", "nan", "0 to 1")),
    (
        "prepare --input A --tokenizer T --out P --max-document 1073741825",
        ("--max-document", "1073741825", "1 to 1,073,741,824 bytes"),
    ),
    (
        "submit c --nodes 0 --gpus-per-node 0 --time 1 --chain 0",
        *((name, "0", "at least 1") for name in ("--nodes", "--gpus-per-node", "--chain")),
    ),
    (
        "submit c --nodes 0 --gpus-per-node 8 --time 0 --chain 0 -- --array=1 -q -t1",
        ("--nodes", "0", "at least 1"),
        ("--time", "'0'", "SLURM's M, M:S, ..., above zero"),
        ("--chain", "0", "at least 1"),
        ("-- --array=1", "an option that `submit` sets", "the verb sweep"),
        ("-- -t1", "an option that `submit` sets", "--time"),
    ),
    ("submit c --nodes 1 --gpus-per-node 8 --time=", ("--time", "''", "SLURM's M, M:S, ..., above zero")),
    ("sweep c --out o --submit --time=", ("--time", "''", "SLURM's M, M:S, ..., above zero")),
    (
        "report a --out r.htm --tokens 1e9 x -1 inf",
        ("--out", "r.htm", "a file that ends in .html"),
        ("--tokens", "'x'", "a number, above 0"),
        ("--tokens", "-1.0", "above 0"),
        ("--tokens", "inf", "above 0"),
    ),
    ("export M O --dtype fp16", ("--dtype", "'fp16'", "fp32 or bf16", "did you mean ...?")),
    ("export M O --target llama", ("--target", "'llama'", "transformers or stock or vllm", "")),
    ("export M O --target stok", ("--target", "'stok'", "...", "did you mean stock?")),
    ("compress M O --cache-ratio 0", ("--cache-ratio", "0.0", "above 0, and at most 1: all composite heads")),
    ("compress M O --cache-ratio 1.1", ("--cache-ratio", "1.1", "above 0, and at most 1: all composite heads")),
    (
        "sensitivity M --component-heads x --data P --out f.jsonl",
        ("--component-heads", "'x'", "a whole number, at least 1"),
        ("--out", "f.jsonl", "a file that ends in .json"),
    ),
    (
        "generate M --prompt \udcff --max-new-tokens 0 --temperature 1e-4",
        ("--prompt", r"'\udcff'", "text in UTF-8"),
        ("--max-new-tokens", "0", "at least 1"),
        ("--temperature", "0.0001", "0 (the likeliest token), or 0.001 and more"),
    ),
    # Options that need or exclude one another.
    (
        "compress M O --component-heads 1 --cache-ratio 0.5",
        ("--component-heads, --cache-ratio", "both", "one of them"),
    ),
    ("compress M O --method svd --align", ("--method, --align", "both", "one of them")),
    ("compress M O --method svdd", ("--method", "'svdd'", "svd or outputs or aligned or latent", "did you mean svd?")),
    (
        "sweep c --out o --nodes 2 --dry-run -- -q",
        *((name, "no --submit", "--submit too, or neither") for name in ("--nodes", "--dry-run", "--")),
    ),
    # Near misses, and words of other tools.
    *(
        (word, ("VERB", f"{word!r}, an unknown verb", VERBS, f"did you mean {verb}?"))
        for word, verb in [
            ("trian", "train"),
            ("Train", "train"),
            ("pretrain", "train"),
            ("fintune", "train"),
            ("convrt", "export or import"),
            ("tokenize", "prepare"),
            ("preprocess", "prepare"),
            ("convert", "export or import"),
            ("eval", "evaluate"),
            ("sample", "generate"),
            ("chat", "generate"),
            ("prune", "compress"),
            ("genrate", "generate"),
            ("sensitivty", "sensitivity"),
        ]
    ),
    *(
        (
            f"submit c --nodes 1 --gpus-per-node 1 --time 1 {option} 3",
            (option, "an unknown option", "...", f"did you mean {meant}? see megatron-mea submit --help"),
        )
        for option, meant in [
            ("--nodess", "--nodes"),
            ("--num-nodes", "--nodes"),
            ("--chains", "--chain"),
            ("--nproc_per_node", "--gpus-per-node"),
            ("--dryrun", "--dry-run"),
        ]
    ),
    ("export M O --output=x", ("--output", "an unknown option", "...", "see ...")),
    *(
        (f"train c {option}", (name, "an unknown option", "...", f"did you mean {key}=VALUE? see ..."))
        for option, name, key in [
            ("--lr 3", "--lr", "optimizer.lr"),
            ("--optimizer.lr=3", "--optimizer.lr", "optimizer.lr"),
            ("--optimizer.learning-rat 3", "--optimizer.learning-rat", "optimizer.lr"),
            ("--Micro-Batch-Size=3", "--Micro-Batch-Size", "training.micro_batch_size"),
            ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size", "parallel.tensor_model_parallel_size"),
            ("--tp 2", "--tp", "parallel.tensor_model_parallel_size"),
        ]
    ),
    (
        "sweep c --output o",
        ("--output", "an unknown option", "options of `megatron-mea sweep`", "did you mean --out?"),
        ("--out", "nothing", "..."),
    ),
]


@pytest.mark.parametrize(("command", "problems"), refusal_params(REFUSED))
def test_what_is_refused(command, problems):
    with pytest.raises(UserError) as error:
        parse_arguments(shlex.split(command))
    check_problems(error.value.problems, *problems)


POSITIONAL = {"config": "CONFIG", "overrides": "KEY=VALUE", "paths": "DIR", "path": "PATH", "model": "MODEL"} | {
    "source": "HF_DIR",
    "sbatch_options": "SBATCH_OPTION",
}


@pytest.mark.parametrize("verb", DEFAULTS)
@pytest.mark.parametrize("option", ["--help", "-h", "--he"])
def test_help_of_a_verb(verb, option, capsys):
    with pytest.raises(SystemExit) as error:
        parse_arguments([verb, option, "--bogus"])
    assert not error.value.code

    out = capsys.readouterr().out
    assert out.startswith(f"usage: megatron-mea {verb} ")
    for name in DEFAULTS[verb]:
        option = POSITIONAL.get(name, f"--{name.replace('_', '-')}")
        assert option in out or (name, verb) in {("out", "export"), ("out", "import"), ("out", "compress")}


@pytest.mark.parametrize("option", ["--help", "-h", "--he"])
def test_help(option, capsys):
    with pytest.raises(SystemExit) as error:
        parse_arguments([option, "train"])
    assert not error.value.code

    out = capsys.readouterr().out
    assert out.startswith("usage: megatron-mea [-h] [--version] VERB ...\n")
    assert list(DEFAULTS) == re.findall(r"^    (\w+)", out, re.MULTILINE)


def test_what_is_required_is_so_in_the_usage(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse_arguments(["sensitivity", "--help"])
    assert " --component-heads N --data PREFIX --out FILE.json [--align]" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as error:
        parse_arguments(["--version"])
    assert (error.value.code, capsys.readouterr().out) == (0, f"megatron-mea {__version__}\n")


def test_a_refusal_ends_a_job(tmp_path, monkeypatch, capsys):
    """As every other mistake of the user's: a requeued job would fail again."""
    monkeypatch.setenv(FAILURE_FILE_VARIABLE, str(tmp_path / "failure"))
    assert main(["train", "c", "--nodes", "2"]) == 2
    message = "error: --nodes\n  got:      an unknown option\n  expected: options of `megatron-mea train`\n"
    message += "  hint:     see megatron-mea train --help\n"
    assert capsys.readouterr() == ("", f"megatron-mea: {message}")
    assert (tmp_path / "failure").read_text() == f"2\nUserError: {message}"


@pytest.mark.slow
def test_neither_help_nor_a_refusal_imports_what_takes_seconds():
    script = """if True:
        import sys
        from megatron_mea.cli import VERBS, main
        for words in (["--help"], ["--version"], *([verb, "--help"] for verb in VERBS), [], ["trian"], ["plan"],
                      ["generate", "M", "--prompt", "x", "--temperature", "-1"]):
            try:
                assert main(words) == 2
            except SystemExit as error:
                assert not error.code
        print([name for name in ("torch", "transformers", "numpy", "pydantic", "yaml") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
