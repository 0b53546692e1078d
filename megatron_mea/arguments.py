"""The command line's verbs and their arguments, with types, ranges and defaults."""

from __future__ import annotations

import math
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from megatron_mea import __version__
from megatron_mea.compression.budget import METHODS
from megatron_mea.errors import UserError, did_you_mean, shorten
from megatron_mea.parser import Parser, WrongValue, comma_separated, file_ending, float_where, int_range, one_of, utf8
from megatron_mea.slurm.scheduler import RESERVED_OPTIONS, parse_time

_VERB_SYNONYMS = {
    "tokenizer": "train-tokenizer spm sentencepiece bpe vocab",
    "prepare": "tokenize tokenise preprocess preprocess_data preprocess-data encode",
    "train": "pretrain pretraining finetune fit run resume",
    "plan": "estimate memory flops check validate",
    "submit": "sbatch slurm launch schedule",
    "sweep": "grid search tune",
    "report": "plot analyze analyse compare",
    "inspect": "show info verify",
    "export": "convert convert-checkpoint save to-hf upload",
    "import": "convert convert-checkpoint load from-hf",
    "compress": "prune factorize factorise quantize virtual-heads",
    "evaluate": "eval test benchmark lm_eval lm-eval perplexity",
    "generate": "sample chat infer inference predict complete",
}
"""{verb: words of other tools}"""
_OPTION_SYNONYMS = {
    "--input": "-i --source --files --dataset",
    "--out": "-o --output --output-dir --output_dir --output-prefix --output-path",
    "--text-key": "--json-keys --field --column",
    "--bos": "--append-bos --add-bos",
    "--force": "--overwrite",
    "--workers": "-j --jobs --num-proc --num-workers --processes",
    "--world-size": "-n --nprocs --num-processes --processes --num-gpus --gpus",
    "--nodes": "-n --nnodes --num-nodes --num_nodes",
    "--gpus-per-node": "--nproc-per-node --nproc_per_node --ntasks-per-node --gres --gpus",
    "--time": "-t --walltime --time-limit",
    "--learning-rates": "--lr --lrs --learning-rate",
    "--at-once": "-j --jobs --parallel --max-parallel",
    "--dtype": "--precision --torch-dtype --torch_dtype",
    "--max-new-tokens": "-n --max-tokens --max-length --max_new_tokens --num-tokens",
}
"""{option: words of other tools}"""
MODEL_HELP = "a checkpoint folder, a run folder (its newest checkpoint) or a Hugging Face folder"


def parse_arguments(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The verb, and the values of its arguments by name.

    Raises:
        UserError: no or an unknown verb, or arguments that it does not take.
    """
    parser, verbs = build_parser()
    name = words[0] if words else ""
    if name in verbs:
        return name, verbs[name].parse(words[1:])

    with suppress(ArgumentError):
        # --help and --version end here.
        parser.parse_known_args(words[:1])

    got = f"{shorten(name)}, an unknown verb" if words else "nothing"
    hint = did_you_mean(name, verbs, _VERB_SYNONYMS, misspelt=True)
    raise UserError(where="VERB", got=got, expected=", ".join(verbs), hint=hint or f"see {parser.prog} --help")


def complete() -> None:
    """Answers a shell that asks what may stand at its cursor, by argcomplete's protocol, and ends the process."""
    from argcomplete import CompletionFinder

    class Finder(CompletionFinder):
        def collect_completions(self, active_parsers: Any, parsed_args: Any, cword_prefix: str) -> list[str]:
            words = super().collect_completions(active_parsers, parsed_args, cword_prefix)
            # argparse, and so argcomplete, expects no overrides behind an option.
            expects_nothing = not words and not active_parsers[-1].active_actions
            if expects_nothing and hasattr(parsed_args, "overrides"):
                words = [word for word in _complete_override(cword_prefix) if word.startswith(cword_prefix)]

            return words

    parser, _ = build_parser()
    Finder()(parser)


def _complete_override(prefix: str, **_: object) -> list[str]:
    """Keys with `=` behind them, or the values of a key that has a choice."""
    from megatron_mea.config.keys import choices, leaf_keys

    key, equals, _ = prefix.partition("=")
    return [f"{key}={value}" for value in choices(key)] if equals else [f"{leaf}=" for leaf in leaf_keys()]


def _complete_variant(**_: object) -> list[str]:
    from megatron_mea.config.keys import choices

    return choices("model.attention_variant")


def _option_hint(name: str, options: list[str]) -> str:
    return did_you_mean(name, options, _OPTION_SYNONYMS)


def _option_or_key_hint(name: str, options: list[str]) -> str:
    """A hint at an option, or at the key of the configuration that is an option elsewhere, as `--lr`."""
    from megatron_mea.config.keys import meant_keys, namesakes

    words = name.lstrip("-").replace("-", "_").split(".")
    keys = [f"{key}=VALUE" for key in (meant_keys(words) if len(words) > 1 else namesakes(words[0]))]
    return did_you_mean(name, [*options, *keys], _OPTION_SYNONYMS | dict.fromkeys(keys, name.lower()))


def _slurm_time(text: str) -> str | WrongValue:
    expected = "SLURM's M, M:S, H:M:S, D-H, D-H:M or D-H:M:S, above zero"
    return text if parse_time(text) else WrongValue(got=shorten(text), expected=expected)


def _sbatch_option(word: str) -> str | WrongValue:
    name = word.partition("=")[0] if word.startswith("--") else word[:2]
    if name in RESERVED_OPTIONS:
        return WrongValue(got="an option that `submit` sets", expected=RESERVED_OPTIONS[name])

    return word


def build_parser() -> tuple[Parser, Mapping[str, Parser]]:
    """The parser of the whole command line, and those of the verbs by name."""
    parser = Parser(
        prog="megatron-mea",
        description="Distributed pre-training of language models with Multi-head Explicit Attention (MEA).",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    def add_verb(*, name: str, summary: str, example: str) -> Parser:
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  megatron-mea {name} {example}",
        )
        sub.option_hint = _option_hint
        return sub

    def add_config_arguments(sub: Parser) -> None:
        sub.option_hint = _option_or_key_hint
        sub.add_argument("config", metavar="CONFIG", help="a YAML file")
        overrides_help = "dotted keys of the YAML and new values"
        sub.add_argument(
            "overrides", nargs="*", default=[], metavar="KEY=VALUE", help=overrides_help, completer=_complete_override
        )

    def add_job_arguments(sub: Parser, *, required: bool = False, needs: str = "") -> None:
        sub.usage = f"megatron-mea {sub.prog.split()[-1]} CONFIG [KEY=VALUE ...] [options] [-- SBATCH_OPTION ...]"
        count_default, time_default = ("", "") if required else (" (default: 1)", " (default: 24:00:00)")

        sub.add_argument(
            "--nodes",
            type=int_range(1),
            needs=needs,
            required=required,
            metavar="N",
            help=f"nodes of a job{count_default}",
        )
        gpus_help = f"processes a node, one a GPU{count_default}"
        sub.add_argument(
            "--gpus-per-node", type=int_range(1), needs=needs, required=required, metavar="G", help=gpus_help
        )
        time_help = f"limit of a job, H:M:S or D-H:M:S; the run goes on{time_default}"
        sub.add_argument("--time", type=_slurm_time, needs=needs, required=required, metavar="T", help=time_help)
        sub.add_argument("--dry-run", needs=needs, action="store_true", help="print the script instead")
        sub.pass_on("sbatch_options", needs=needs, check=_sbatch_option)

    def add_source_arguments(sub: Parser) -> None:
        sources_help = (
            "text: .txt, .jsonl, .ndjson, .json.gz (.gz or .zst behind each), .parquet, a folder of those or of "
            "`datasets`, or a hub NAME[:CONFIG]"
        )
        sub.add_argument("--input", nargs="+", action="extend", required=True, metavar="SOURCE", help=sources_help)
        sub.add_argument("--text-key", default="text", help="field of a document's text (default: text)")
        split_at_help = "a .txt is one document (file, the default), or is cut into documents at its blank lines"
        sub.add_argument("--split-at", type=one_of("file", "blank-lines"), default="file", help=split_at_help)
        max_document_help = "a longer document is refused, in bytes of UTF-8 (default: 67108864, 64 MiB)"
        sub.add_argument(
            "--max-document",
            type=int_range(1, 1 << 30, "bytes"),
            default=64 << 20,
            metavar="BYTES",
            help=max_document_help,
        )

    sub = add_verb(
        name="tokenizer",
        summary="train a sentencepiece BPE with byte fallback",
        example="--input corpus.jsonl.gz --vocab-size 32000 --out tokenizer",
    )
    add_source_arguments(sub)
    sub.add_argument(
        "--vocab-size", type=int_range(1), required=True, metavar="N", help="counts every id, special ones too"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="the tokenizer folder to write")

    sub = add_verb(
        name="prepare",
        summary="tokenise documents into PREFIX.bin and PREFIX.idx, Megatron's indexed format",
        example="--input corpus.jsonl.gz --tokenizer tokenizer --out data/corpus",
    )
    add_source_arguments(sub)
    sub.add_argument("--tokenizer", required=True, metavar="DIR", help="a Hugging Face tokenizer folder")
    sub.add_argument("--out", required=True, metavar="PREFIX", help="PREFIX.bin and PREFIX.idx are written")
    sub.add_argument("--split", default="train", help="split of a `datasets` source (default: train)")
    sub.add_argument("--workers", type=int_range(1), help="processes (default: the cores of this machine)")
    max_broken_help = "part of the lines and rows that may be broken and left out (default: 0.01)"
    sub.add_argument("--bos", action="store_true", help="put the tokenizer's begin token before every document")
    sub.add_argument(
        "--max-broken",
        type=float_where(lambda part: 0 <= part <= 1, "0 to 1"),
        default=0.01,
        metavar="SHARE",
        help=max_broken_help,
    )
    force_help = "replace other data at PREFIX (default: data of the same input and options is left, other is refused)"
    sub.add_argument("--force", action="store_true", help=force_help)

    sub = add_verb(
        name="train",
        summary="train, alone or as one rank of many; resumes by itself",
        example="configs/quickstart.yaml optimizer.lr=1e-3",
    )
    add_config_arguments(sub)

    sub = add_verb(
        name="plan",
        summary="check a configuration and say what it needs: memory, FLOPs, communication; allocates nothing",
        example="configs/quickstart.yaml parallel.tensor_model_parallel_size=2 --world-size 4",
    )
    add_config_arguments(sub)
    sub.add_argument("--world-size", type=int_range(1), metavar="N", help="processes (default: one copy of the model)")
    sub.add_argument("--json", action="store_true", help="for machines: bytes, counts and FLOPs")

    sub = add_verb(
        name="submit",
        summary="check everything, and submit a SLURM job that trains, requeues and resumes by itself",
        example="my.yaml optimizer.lr=1e-3 --nodes 2 --gpus-per-node 8 --time 24:00:00 -- --qos=high",
    )
    add_config_arguments(sub)
    add_job_arguments(sub, required=True)
    chain_help = "jobs in a row, for clusters that forbid to requeue (default: one job that requeues itself)"
    sub.add_argument("--chain", type=int_range(1), default=1, metavar="JOBS", help=chain_help)

    sub = add_verb(
        name="sweep",
        summary="one run a combination of variant, learning rate and seed, here or as a SLURM array; "
        "skips what is done",
        example="my.yaml --variants plain,mea --learning-rates 1e-3,3e-3 --seeds 1,2 --out runs/sweep",
    )
    add_config_arguments(sub)
    sub.add_argument(
        "--variants",
        type=comma_separated,
        default=[],
        metavar="V,...",
        help="of model.attention_variant, or mea-latent: with model.hlc_form latent (default: the file's)",
    )
    sub.add_argument(
        "--learning-rates",
        type=comma_separated,
        default=[],
        metavar="LR,...",
        help="of optimizer.lr (default: the file's)",
    )
    sub.add_argument(
        "--seeds", type=comma_separated, default=[], metavar="S,...", help="of training.seed (default: the file's)"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="holds a run folder for each")
    sub.add_argument("--submit", action="store_true", help="as a SLURM array; the options below say on what each runs")
    add_job_arguments(sub, needs="--submit")
    sub.add_argument(
        "--at-once",
        type=int_range(1),
        metavar="K",
        help="runs that may run at the same time (default: all of an array, 1 here)",
    )

    sub = add_verb(
        name="report",
        summary="what runs say together: curves, fits, stability, the best rates, as a page that needs no network",
        example="runs/sweep --out report.html --tokens 5e11",
    )
    sub.add_argument("paths", nargs="+", metavar="DIR", help="a run folder, or a sweep's --out")
    out_help = "the page; FILE.csv (a row a run), FILE-curves.csv and a PNG a figure are written beside it"
    sub.add_argument("--out", required=True, type=file_ending(".html"), metavar="FILE.html", help=out_help)
    tokens_help = "tokens at which the fits are extrapolated"
    sub.add_argument(
        "--tokens",
        nargs="+",
        type=float_where(lambda count: 0 < count < math.inf, "above 0"),
        default=[],
        metavar="N",
        help=tokens_help,
    )

    sub = add_verb(
        name="inspect",
        summary="show a checkpoint or prepared data and verify it; runs no code of it, so a stranger's will do",
        example="runs/quickstart/run/checkpoints/step_00000500",
    )
    path_help = "a checkpoint folder, a run folder (its newest checkpoint), or the PREFIX of prepared data"
    sub.add_argument("path", metavar="PATH", help=path_help)

    sub = add_verb(
        name="export",
        summary="write a Hugging Face folder, and check its logits",
        example="runs/quickstart/run exported",
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("out", metavar="OUT_DIR", help="a folder that does not exist or is empty")
    sub.add_argument("--dtype", type=one_of("fp32", "bf16"), default="fp32", help="default fp32: the master weights")
    target_help = "stock: plain Llama or Qwen where that is exact; vllm: its cache holds component heads alone"
    sub.add_argument("--target", type=one_of("transformers", "stock", "vllm"), default="transformers", help=target_help)

    sub = add_verb(
        name="import",
        summary="write a checkpoint that a run can begin from, out of a Llama, Mistral, Qwen2, Qwen3 or an export",
        example="Llama-3.2-1B imported",
    )
    sub.add_argument("source", metavar="HF_DIR", help="a Hugging Face folder with safetensors")
    sub.add_argument("out", metavar="OUT_CHECKPOINT", help="a folder that does not exist or is empty")
    variant_help = "attention variant (default: mea_no_norm, which computes what the source does; an export's own)"
    sub.add_argument("--variant", completer=_complete_variant, metavar="V", help=variant_help)

    sub = add_verb(
        name="compress",
        summary="virtual heads: a smaller key-value cache for a trained model",
        example="Llama-3.2-1B compressed --cache-ratio 0.5 --calibration data/train --method latent",
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("out", metavar="OUT", help="of the same kind as MODEL; does not exist or is empty")
    heads_help = "component heads of the layers: one number, or one for every layer with commas between"
    sub.add_argument("--component-heads", metavar="N", help=heads_help)
    ratio_help = "or the size of the cache to that of all composite heads; how much of it each layer gets is chosen"
    ratio = float_where(lambda ratio: 0 < ratio <= 1, "above 0, and at most 1: all composite heads")
    sub.add_argument("--cache-ratio", type=ratio, excludes="--component-heads", metavar="R", help=ratio_help)
    layers_help = (
        "full, half or deep as in the paper, auto (all, with --cache-ratio), or from 1 on as 5-12,20 or 5-12:2,20:1; "
        "with --method latent auto, or full for equal sizes"
    )
    sub.add_argument("--layers", metavar="LAYERS", help=layers_help)
    calibration_help = "prepared data: lose least of what heads put out there, rather than of the weights"
    sub.add_argument("--calibration", metavar="PREFIX", help=calibration_help)
    method_help = (
        "svd (the paper's, of weights), outputs (with --calibration), aligned (turns heads towards one another first; "
        "q_proj and o_proj change too), or latent (combines heads within each RoPE frequency; with "
        "--cache-ratio and --calibration)"
    )
    sub.add_argument("--method", type=one_of(*METHODS), help=method_help)
    sub.add_argument("--align", action="store_true", excludes="--method", help="the same as --method aligned")
    steps_help = "with --method latent: steps of Adam on each layer's attention, such as 120 (default: none)"
    sub.add_argument("--reconstruction-steps", type=int_range(1), metavar="N", help=steps_help)

    sub = add_verb(
        name="sensitivity",
        summary="compress one layer at a time, and measure the cross-entropy of each",
        example="runs/quickstart/run --component-heads 1 --data runs/quickstart/data/validation --out sensitivity.json",
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument(
        "--component-heads", type=int_range(1), required=True, metavar="N", help="of the layer in question"
    )
    sub.add_argument("--data", required=True, metavar="PREFIX", help="prepared data")
    sub.add_argument(
        "--out",
        required=True,
        type=file_ending(".json"),
        metavar="FILE.json",
        help="the result; a plot is written to FILE.png",
    )
    sub.add_argument("--align", action="store_true", help="as in `compress`")

    sub = add_verb(
        name="evaluate",
        summary="cross-entropy and perplexity of a model on prepared data, and lm-eval's tasks",
        example="runs/quickstart/run --data runs/quickstart/data/validation",
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("--data", metavar="PREFIX", help="prepared data (default: a checkpoint's data.validation)")
    window_help = "tokens of a window of the data (default: those of training; of a folder its context, up to 2,048)"
    sub.add_argument("--window", type=int_range(1), metavar="N", help=window_help)
    tasks_help = "lm-eval tasks, by name or as files; `paper`: the six of the paper"
    sub.add_argument("--tasks", nargs="+", metavar="NAME_OR_YAML", help=tasks_help)
    sub.add_argument("--out", metavar="FILE.json", help="write the result there too")

    sub = add_verb(name="generate", summary="continue a text", example='exported --prompt "In the beginning"')
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("--prompt", type=utf8, required=True, metavar="TEXT")
    sub.add_argument("--max-new-tokens", type=int_range(1), default=64, metavar="N")
    temperature = float_where(
        lambda value: value == 0 or 1e-3 <= value < math.inf, "0 (the likeliest token), or 0.001 and more"
    )
    sub.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T", help="0 (default): the likeliest token"
    )
    return parser, verbs.choices
