"""The verbs of the command line and their options."""

from __future__ import annotations

import argparse

from megatron_mea import __version__

_SUBMITTING = ("submit", "sweep")
"""Verbs that hand what stands behind -- to sbatch."""
MODEL_HELP = "a checkpoint folder, a run folder (its newest checkpoint) or a Hugging Face folder"


def parse(argv: list[str]) -> argparse.Namespace:
    """The verb and its options; ends the process, with the usage, where they are wrong."""
    parser, options = _parser(), []
    if "--" in argv and argv[0] in _SUBMITTING:
        argv, options = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    arguments, more = parser.parse_known_args(argv)
    # argparse takes no overrides behind an option.
    if more and (not hasattr(arguments, "overrides") or any("=" not in one or one[0] == "-" for one in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        arguments.overrides += more
    arguments.sbatch_options = options
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-mea",
        description="Distributed pre-training of language models with Multi-head Explicit Attention (MEA).",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  megatron-mea {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def configuration(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", metavar="CONFIG", help="a YAML file")
        sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted keys of the YAML and new values")

    def resources(sub: argparse.ArgumentParser, required: bool) -> None:
        sub.usage = f"megatron-mea {sub.prog.split()[-1]} CONFIG [KEY=VALUE ...] [options] [-- SBATCH_OPTION ...]"
        default = ("", "", "") if required else (" (default: 1)", " (default: 1)", " (default: 24:00:00)")
        sub.add_argument("--nodes", type=int, required=required, metavar="N", help=f"nodes of a job{default[0]}")
        gpus = f"processes a node, one a GPU{default[1]}"
        sub.add_argument("--gpus-per-node", type=int, required=required, metavar="G", help=gpus)
        limit = f"limit of a job, H:M:S or D-H:M:S; the run goes on{default[2]}"
        sub.add_argument("--time", required=required, metavar="T", help=limit)
        sub.add_argument("--dry-run", action="store_true", help="print the script instead")

    sources = "text: .txt, .jsonl(.gz, .zst), .parquet, a folder of those or of `datasets`, or a hub NAME[:CONFIG]"

    sub = verb(
        "tokenizer",
        "train a sentencepiece BPE with byte fallback",
        "--input corpus.jsonl.gz --vocab-size 32000 --out tokenizer",
    )
    sub.add_argument("--input", nargs="+", action="extend", required=True, metavar="SOURCE", help=sources)
    sub.add_argument("--vocab-size", type=int, required=True, metavar="N", help="counts every id, special ones too")
    sub.add_argument("--out", required=True, metavar="DIR", help="the tokenizer folder to write")
    sub.add_argument("--text-key", default="text", help="field of a document's text (default: text)")

    sub = verb(
        "prepare",
        "tokenise documents into PREFIX.bin and PREFIX.idx, Megatron's indexed format",
        "--input corpus.jsonl.gz --tokenizer tokenizer --out data/corpus",
    )
    sub.add_argument("--input", nargs="+", action="extend", required=True, metavar="SOURCE", help=sources)
    sub.add_argument("--tokenizer", required=True, metavar="DIR", help="a Hugging Face tokenizer folder")
    sub.add_argument("--out", required=True, metavar="PREFIX", help="PREFIX.bin and PREFIX.idx are written")
    sub.add_argument("--text-key", default="text", help="field of a document's text (default: text)")
    sub.add_argument("--split", default="train", help="split of a `datasets` source (default: train)")
    sub.add_argument("--workers", type=int, default=None, help="processes (default: the cores of this machine)")
    broken = "part of the lines and rows that may be broken and left out (default: 0.01)"
    sub.add_argument("--max-broken", type=float, default=0.01, metavar="SHARE", help=broken)

    sub = verb(
        "train",
        "train, alone or as one rank of many; resumes by itself",
        "configs/quickstart.yaml optimizer.lr=1e-3",
    )
    configuration(sub)

    sub = verb(
        "plan",
        "check a configuration and say what it needs: memory, FLOPs, communication; allocates nothing",
        "configs/quickstart.yaml parallel.tensor_model_parallel_size=2 --world-size 4",
    )
    configuration(sub)
    sub.add_argument("--world-size", type=int, metavar="N", help="processes (default: one copy of the model)")
    sub.add_argument("--json", action="store_true", help="for machines: bytes, counts and FLOPs")

    sub = verb(
        "submit",
        "check everything, and submit a SLURM job that trains, requeues and resumes by itself",
        "my.yaml optimizer.lr=1e-3 --nodes 2 --gpus-per-node 8 --time 24:00:00 -- --qos=high",
    )
    configuration(sub)
    resources(sub, required=True)
    chain = "jobs in a row, for clusters that forbid to requeue (default: one job that requeues itself)"
    sub.add_argument("--chain", type=int, default=1, metavar="JOBS", help=chain)

    sub = verb(
        "sweep",
        "one run a combination of variant, learning rate and seed, here or as a SLURM array; skips what is done",
        "my.yaml --variants plain,mea --learning-rates 1e-3,3e-3 --seeds 1,2 --out runs/sweep",
    )
    configuration(sub)
    sub.add_argument("--variants", metavar="V,...", help="of model.attention_variant (default: the file's)")
    sub.add_argument("--learning-rates", metavar="LR,...", help="of optimizer.lr (default: the file's)")
    sub.add_argument("--seeds", metavar="S,...", help="of training.seed (default: the file's)")
    sub.add_argument("--out", required=True, metavar="DIR", help="holds a run folder for each")
    sub.add_argument("--submit", action="store_true", help="as a SLURM array; the options below say on what each runs")
    resources(sub, required=False)
    sub.add_argument(
        "--at-once", type=int, metavar="K", help="runs that may run at the same time (default: all of an array, 1 here)"
    )

    sub = verb(
        "report",
        "what runs say together: curves, fits, stability, the best rates, as a page that needs no network",
        "runs/sweep --out report.html --tokens 5e11",
    )
    sub.add_argument("paths", nargs="+", metavar="DIR", help="a run folder, or a sweep's --out")
    files = "the page; FILE.csv (a row a run), FILE-curves.csv and a PNG a figure are written beside it"
    sub.add_argument("--out", required=True, metavar="FILE.html", help=files)
    counts = "tokens at which the fits are extrapolated"
    sub.add_argument("--tokens", nargs="+", type=float, default=[], metavar="N", help=counts)

    sub = verb("inspect", "show a checkpoint and verify it", "runs/quickstart/run/checkpoints/step_00000500")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint folder, or a run folder (its newest)")

    sub = verb("export", "write a Hugging Face folder, and check its logits", "runs/quickstart/run exported")
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("out", metavar="OUT_DIR", help="a folder that does not exist or is empty")
    sub.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default fp32: the master weights")
    targets = "stock: plain Llama or Qwen where that is exact; vllm: its cache holds component heads alone"
    sub.add_argument("--target", choices=("transformers", "stock", "vllm"), default="transformers", help=targets)

    sub = verb(
        "import",
        "write a checkpoint that a run can begin from, out of a Llama, Mistral, Qwen2, Qwen3 or an export",
        "Llama-3.2-1B imported",
    )
    sub.add_argument("source", metavar="HF_DIR", help="a Hugging Face folder with safetensors")
    sub.add_argument("out", metavar="OUT_CHECKPOINT", help="a folder that does not exist or is empty")
    variant = "attention variant (default: mea_no_norm, which computes what the source does; an export's own)"
    sub.add_argument("--variant", metavar="V", help=variant)

    sub = verb(
        "compress",
        "virtual heads: a smaller key-value cache for a trained model",
        "Llama-3.2-1B compressed --cache-ratio 0.5 --calibration data/train --align",
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("out", metavar="OUT", help="of the same kind as MODEL; does not exist or is empty")
    size = sub.add_mutually_exclusive_group()
    numbers = "component heads of the layers: one number, or one for every layer with commas between"
    size.add_argument("--component-heads", metavar="N", help=numbers)
    ratio = "size of the cache to that of all composite heads; each layer's number of heads is chosen"
    size.add_argument("--cache-ratio", type=float, metavar="R", help=ratio)
    layers = (
        "full, half or deep as in the paper, auto (all, with --cache-ratio), or from 1 on as 5-12,20 or 5-12:2,20:1"
    )
    sub.add_argument("--layers", metavar="LAYERS", help=layers)
    tokens = "prepared data: lose least of what heads put out there, rather than of the weights"
    sub.add_argument("--calibration", metavar="PREFIX", help=tokens)
    align = "turn heads towards one another first, which costs nothing and loses far less; q_proj and o_proj change too"
    sub.add_argument("--align", action="store_true", help=align)

    sub = verb(
        "sensitivity",
        "compress one layer at a time, and measure the cross-entropy of each",
        "runs/quickstart/run --component-heads 1 --data runs/quickstart/data/validation --out sensitivity.json",
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("--component-heads", type=int, required=True, metavar="N", help="of the layer in question")
    sub.add_argument("--data", required=True, metavar="PREFIX", help="prepared data")
    sub.add_argument("--out", required=True, metavar="FILE.json", help="the result; a plot is written to FILE.png")
    sub.add_argument("--align", action="store_true", help="as in `compress`")

    sub = verb(
        "evaluate",
        "cross-entropy and perplexity of a model on prepared data, and lm-eval's tasks",
        "runs/quickstart/run --data runs/quickstart/data/validation",
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("--data", metavar="PREFIX", help="prepared data (default: a checkpoint's data.validation)")
    tasks = "lm-eval tasks, by name or as files; `paper`: the six of the paper"
    sub.add_argument("--tasks", nargs="+", metavar="NAME_OR_YAML", help=tasks)
    sub.add_argument("--out", metavar="FILE.json", help="write the result there too")

    sub = verb("generate", "continue a text", 'exported --prompt "In the beginning"')
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("--prompt", required=True, metavar="TEXT")
    sub.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    return parser
