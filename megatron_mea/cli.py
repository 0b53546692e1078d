"""The command line: calls one function a verb, and turns a user's error into one message.

What can be refused without torch is, before it is imported: that takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_mea.arguments import parse
from megatron_mea.errors import UserError
from megatron_mea.failures import exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 done, 2 the user's input was wrong."""
    arguments = parse(sys.argv[1:] if argv is None else list(argv))
    # `train` saves and stops instead. Elsewhere what was begun is taken back.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    return exit_status(lambda: _VERBS[arguments.verb](arguments))


def _leave(number: int, frame: object) -> None:
    # Not KeyboardInterrupt: one that is raised while a string is executed, as dataclasses do on import, makes Python
    # end by that signal, also when it is caught.
    print("megatron-mea: interrupted", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def _tokenizer(arguments: argparse.Namespace) -> None:
    from megatron_mea.data.tokenizer import train_tokenizer

    train_tokenizer(arguments.input, arguments.vocab_size, arguments.out, arguments.text_key)
    print(f"wrote {arguments.out}: {arguments.vocab_size} ids")


def _prepare(arguments: argparse.Namespace) -> None:
    from megatron_mea.data.prepare import prepare

    workers = arguments.workers
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 1:
        raise UserError("--workers", workers, "at least 1")
    if not 0 <= arguments.max_broken <= 1:
        raise UserError("--max-broken", arguments.max_broken, "0 to 1")
    documents, tokens = prepare(
        arguments.input,
        arguments.tokenizer,
        arguments.out,
        arguments.text_key,
        arguments.split,
        workers,
        arguments.max_broken,
    )
    print(f"wrote {arguments.out}.bin and .idx: {documents:,} documents, {tokens:,} tokens")


def _train(arguments: argparse.Namespace) -> None:
    from megatron_mea.training.signals import StopSignal

    stop = StopSignal()
    from megatron_mea.config import load_config

    config = load_config(arguments.config, arguments.overrides)

    from megatron_mea.training.run import train

    train(config, stop)


def _plan(arguments: argparse.Namespace) -> None:
    if arguments.world_size is not None and arguments.world_size < 1:
        raise UserError("--world-size", arguments.world_size, "at least 1")
    from megatron_mea.config import load_config

    config = load_config(arguments.config, arguments.overrides)

    from megatron_mea.config.layout import check_layout

    check_layout(config, arguments.world_size)

    from megatron_mea.cluster.plan import as_json, as_text, make_plan

    plan = make_plan(config, arguments.world_size)
    print(json.dumps(as_json(plan), indent=2) if arguments.json else as_text(plan))


def _submit(arguments: argparse.Namespace) -> None:
    from megatron_mea.config import load_config

    config = load_config(arguments.config, arguments.overrides)

    from megatron_mea.cluster.submit import Resources, submit

    given = arguments.nodes, arguments.gpus_per_node, arguments.time, arguments.chain, tuple(arguments.sbatch_options)
    print(submit(config, Resources(*given), arguments.dry_run))


def _sweep(arguments: argparse.Namespace) -> None:
    from megatron_mea.experiments.sweep import combinations, run_here, submit_array

    lists = (arguments.variants, arguments.learning_rates, arguments.seeds)
    given = [value.split(",") if value else [] for value in lists]
    out = Path(arguments.out)
    configs = combinations(arguments.config, arguments.overrides, *given, out)
    asked = {"nodes": 1, "gpus_per_node": 1, "time": "24:00:00"}
    given = {name: value for name in asked if (value := getattr(arguments, name)) is not None}
    if not arguments.submit:
        if given or arguments.dry_run or arguments.sbatch_options:
            raise UserError("sweep", "options of a job without --submit", "--submit, or none of them: it trains here")
        print(run_here(configs, 1 if arguments.at_once is None else arguments.at_once))
        return
    from megatron_mea.cluster.submit import Resources

    resources = Resources(**asked | given, options=tuple(arguments.sbatch_options))
    print(submit_array(configs, out, resources, arguments.at_once, arguments.dry_run))


def _report(arguments: argparse.Namespace) -> None:
    if not all(0 < count < float("inf") for count in arguments.tokens):
        raise UserError("--tokens", arguments.tokens, "numbers above 0")
    if Path(arguments.out).suffix != ".html":
        raise UserError("--out", arguments.out, "a file that ends in .html")
    from megatron_mea.experiments.runs import find_runs

    runs = find_runs(arguments.paths)

    from megatron_mea.experiments.report import report

    print(report(runs, arguments.out, arguments.tokens))


def _inspect(arguments: argparse.Namespace) -> None:
    from megatron_mea.checkpoint.inspect import inspect

    print(inspect(arguments.checkpoint))


def _export(arguments: argparse.Namespace) -> None:
    from megatron_mea.huggingface.place import check_places

    check_places(arguments.model, arguments.out)

    from megatron_mea.huggingface.export import export

    print(export(arguments.model, arguments.out, arguments.dtype, arguments.target))


def _import(arguments: argparse.Namespace) -> None:
    from megatron_mea.huggingface.place import check_hugging_face
    from megatron_mea.outputs import check_free_folder

    check_free_folder(Path(arguments.out))
    check_hugging_face(Path(arguments.source))

    from megatron_mea.huggingface.importing import import_model

    print(import_model(arguments.source, arguments.out, arguments.variant))


def _compress(arguments: argparse.Namespace) -> None:
    from megatron_mea.huggingface.place import check_places

    check_places(arguments.model, arguments.out, {"--calibration": arguments.calibration})

    from megatron_mea.compression.compress import compress

    size = arguments.component_heads, arguments.cache_ratio
    print(compress(arguments.model, arguments.out, *size, arguments.layers, arguments.calibration, arguments.align))


def _sensitivity(arguments: argparse.Namespace) -> None:
    if Path(arguments.out).suffix != ".json":
        raise UserError("--out", arguments.out, "a name that ends in .json")
    from megatron_mea.huggingface.place import check_places

    check_places(arguments.model, data={"--data": arguments.data})

    from megatron_mea.compression.sensitivity import sensitivity

    given = arguments.model, arguments.component_heads, arguments.data, arguments.out, arguments.align
    print(sensitivity(*given))


def _evaluate(arguments: argparse.Namespace) -> None:
    from megatron_mea.huggingface.place import check_places

    check_places(arguments.model, data={"--data": arguments.data})

    from megatron_mea.huggingface.use import evaluate

    text, table = evaluate(arguments.model, arguments.data, arguments.tasks, arguments.out)
    print(text)
    if table:
        # stdout stays JSON.
        print(table, file=sys.stderr)


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1:
        raise UserError("--max-new-tokens", arguments.max_new_tokens, "at least 1")
    if arguments.temperature != 0 and not 1e-3 <= arguments.temperature < float("inf"):
        raise UserError("--temperature", arguments.temperature, "0 (the likeliest token), or 0.001 and more")
    from megatron_mea.huggingface.place import check_places

    check_places(arguments.model)

    from megatron_mea.huggingface.use import generate

    print(generate(arguments.model, arguments.prompt, arguments.max_new_tokens, arguments.temperature))


_VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "tokenizer": _tokenizer,
    "prepare": _prepare,
    "train": _train,
    "plan": _plan,
    "submit": _submit,
    "sweep": _sweep,
    "report": _report,
    "inspect": _inspect,
    "export": _export,
    "import": _import,
    "compress": _compress,
    "sensitivity": _sensitivity,
    "evaluate": _evaluate,
    "generate": _generate,
}
