"""The command line: one function a verb, and a user's error as one message.

Each verb checks what it can before it imports torch, which takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mea.arguments import parse_arguments
from megatron_mea.console import guard_console, outlive_console
from megatron_mea.errors import UserError, shorten
from megatron_mea.failures import exit_status
from megatron_mea.printing import note, show
from megatron_mea.training.signals import hangup_signals

if TYPE_CHECKING:
    from megatron_mea.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 done, 2 the user's input was wrong."""
    guard_console()
    return exit_status(lambda: _run_verb(sys.argv[1:] if argv is None else list(argv)))


def _run_verb(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    # The other verbs remove unfinished output when they are interrupted; `train` saves a checkpoint instead.
    for number in (signal.SIGINT, signal.SIGTERM, *hangup_signals()):
        signal.signal(number, _exit_on_signal)

    _VERBS[arguments.verb](arguments)


def _exit_on_signal(number: int, frame: object) -> None:
    # Not KeyboardInterrupt: raised inside `exec`, which dataclasses call on import, it makes Python die of SIGINT even
    # where it is caught.
    note("megatron-mea: interrupted")
    sys.exit(128 + number)


def _tokenizer(arguments: argparse.Namespace) -> None:
    from megatron_mea.data.tokenizer import train_tokenizer

    _check_max_document(arguments)
    train_tokenizer(
        sources=arguments.input,
        vocab_size=arguments.vocab_size,
        out=arguments.out,
        text_key=arguments.text_key,
        split_at=arguments.split_at,
        max_document=arguments.max_document,
    )
    show(f"wrote {arguments.out}: {arguments.vocab_size} ids")


def _prepare(arguments: argparse.Namespace) -> None:
    from megatron_mea.data.prepare import prepare
    from megatron_mea.data.text_records import ReadOptions

    workers = arguments.workers
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 1:
        raise UserError(where="--workers", got=workers, expected="at least 1")
    if not 0 <= arguments.max_broken <= 1:
        raise UserError(where="--max-broken", got=arguments.max_broken, expected="0 to 1")
    _check_max_document(arguments)

    done = prepare(
        sources=arguments.input,
        tokenizer_folder=arguments.tokenizer,
        prefix=arguments.out,
        options=ReadOptions(
            text_key=arguments.text_key,
            split=arguments.split,
            split_at=arguments.split_at,
            max_document=arguments.max_document,
        ),
        workers=workers,
        max_broken=arguments.max_broken,
        bos=arguments.bos,
        force=arguments.force,
    )
    files, counts = f"{arguments.out}.bin and .idx", f"{done.documents:,} documents, {done.tokens:,} tokens"
    if done.is_new:
        show(f"wrote {files}: {counts}")
    else:
        show(f"left {files} as they are, made of the same input with the same options: {counts}")


def _check_max_document(arguments: argparse.Namespace) -> None:
    # The index counts the tokens of a document with 32 bits, and a record of a file may be six times as large.
    if not 1 <= arguments.max_document <= 1 << 30:
        raise UserError(where="--max-document", got=arguments.max_document, expected="1 to 1,073,741,824 bytes")


def _train(arguments: argparse.Namespace) -> None:
    from megatron_mea.training.signals import StopSignal

    # Before torch is imported: a signal during that import would kill the process.
    stop = StopSignal()

    from megatron_mea.checkpoint.run_config import load_run_config
    from megatron_mea.training.rank_env import RankEnv

    config, inherited = load_run_config(arguments.config, arguments.overrides)
    outlive_console(Path(config.run.dir))
    _print_inherited(inherited if RankEnv.from_environment().rank == 0 else [])

    from megatron_mea.training.run import train

    train(config, stop)


def _load_run_config(arguments: argparse.Namespace) -> Config:
    """The configuration of a run; prints to stderr what its checkpoint decided."""
    from megatron_mea.checkpoint.run_config import load_run_config

    config, inherited = load_run_config(arguments.config, arguments.overrides)
    _print_inherited(inherited)
    return config


def _print_inherited(lines: Sequence[str]) -> None:
    for line in lines:
        note(line)


def _plan(arguments: argparse.Namespace) -> None:
    if arguments.world_size is not None and arguments.world_size < 1:
        raise UserError(where="--world-size", got=arguments.world_size, expected="at least 1")

    config = _load_run_config(arguments)

    from megatron_mea.config.layout import check_layout

    check_layout(config, arguments.world_size)

    from megatron_mea.plan.plan import as_json, as_text, make_plan

    plan = make_plan(config, world_size=arguments.world_size)
    show(json.dumps(as_json(plan), indent=2) if arguments.json else as_text(plan))


def _submit(arguments: argparse.Namespace) -> None:
    config = _load_run_config(arguments)

    from megatron_mea.slurm.resources import Resources
    from megatron_mea.slurm.submit import submit

    resources = Resources(
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        time=arguments.time,
        chain=arguments.chain,
        options=tuple(arguments.sbatch_options),
    )
    show(submit(config=config, resources=resources, dry_run=arguments.dry_run))


def _sweep(arguments: argparse.Namespace) -> None:
    from megatron_mea.experiments.sweep import combinations, run_here, submit_array

    def comma_separated(option: str | None) -> list[str]:
        return option.split(",") if option else []

    out = Path(arguments.out)
    configs, inherited = combinations(
        path=arguments.config,
        overrides=arguments.overrides,
        variants=comma_separated(arguments.variants),
        learning_rates=comma_separated(arguments.learning_rates),
        seeds=comma_separated(arguments.seeds),
        out=out,
    )
    _print_inherited(inherited)

    defaults = {"nodes": 1, "gpus_per_node": 1, "time": "24:00:00"}
    requested = {name: value for name in defaults if (value := getattr(arguments, name)) is not None}
    if not arguments.submit:
        if requested or arguments.dry_run or arguments.sbatch_options:
            raise UserError(
                where="sweep",
                got="options of a job without --submit",
                expected="--submit, or none of them: it trains here",
            )
        show(run_here(configs, 1 if arguments.at_once is None else arguments.at_once))
        return

    from megatron_mea.slurm.resources import Resources

    resources = Resources(**defaults | requested, options=tuple(arguments.sbatch_options))
    show(
        submit_array(
            configs=configs, out=out, resources=resources, at_once=arguments.at_once, dry_run=arguments.dry_run
        )
    )


def _report(arguments: argparse.Namespace) -> None:
    if not all(0 < count < float("inf") for count in arguments.tokens):
        raise UserError(where="--tokens", got=arguments.tokens, expected="numbers above 0")
    if Path(arguments.out).suffix != ".html":
        raise UserError(where="--out", got=arguments.out, expected="a file that ends in .html")

    from megatron_mea.experiments.runs import find_runs

    runs = find_runs(arguments.paths)

    from megatron_mea.experiments.report import report

    report(runs=runs, out=arguments.out, tokens=arguments.tokens)


def _inspect(arguments: argparse.Namespace) -> None:
    from megatron_mea.checkpoint.folder import checkpoint_folder

    path, prefix = arguments.path, arguments.path.removesuffix(".idx").removesuffix(".bin")
    try:
        checkpoint_folder(path)
    except UserError as error:
        if not any(Path(f"{prefix}.{kind}").exists() for kind in ("idx", "bin")):
            problem = error.problems[0]
            expected = f"{problem.expected}, or the PREFIX of prepared data"
            raise UserError(where=problem.where, got=problem.got, expected=expected) from None

        from megatron_mea.data.inspect import inspect_data

        show(inspect_data(prefix))
        return

    from megatron_mea.checkpoint.inspect import inspect

    show(inspect(path))


def _export(arguments: argparse.Namespace) -> None:
    from megatron_mea.huggingface.locate import check_paths

    check_paths(arguments.model, out=arguments.out)

    from megatron_mea.huggingface.export import export

    show(export(model=arguments.model, out=arguments.out, dtype=arguments.dtype, kind=arguments.target))


def _import(arguments: argparse.Namespace) -> None:
    from megatron_mea.huggingface.locate import check_hf_folder
    from megatron_mea.outputs import check_free_folder

    check_free_folder(Path(arguments.out))
    check_hf_folder(Path(arguments.source))

    from megatron_mea.huggingface.importing import import_model

    show(import_model(source=arguments.source, out=arguments.out, variant=arguments.variant))


def _compress(arguments: argparse.Namespace) -> None:
    from megatron_mea.huggingface.locate import check_paths

    check_paths(model=arguments.model, out=arguments.out, data={"--calibration": arguments.calibration})

    from megatron_mea.compression.compress import compress

    show(
        compress(
            model=arguments.model,
            out=arguments.out,
            heads=arguments.component_heads,
            ratio=arguments.cache_ratio,
            layers=arguments.layers,
            calibration=arguments.calibration,
            aligned=arguments.align,
        )
    )


def _sensitivity(arguments: argparse.Namespace) -> None:
    if Path(arguments.out).suffix != ".json":
        raise UserError(where="--out", got=arguments.out, expected="a name that ends in .json")

    from megatron_mea.huggingface.locate import check_paths

    check_paths(arguments.model, data={"--data": arguments.data})

    from megatron_mea.compression.sensitivity import sensitivity

    sensitivity(
        model=arguments.model,
        heads=arguments.component_heads,
        data=arguments.data,
        out=arguments.out,
        aligned=arguments.align,
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from megatron_mea.huggingface.locate import check_paths

    check_paths(arguments.model, data={"--data": arguments.data})

    from megatron_mea.outputs import print_and_write, reserve_output

    with reserve_output(arguments.out, folder=False) if arguments.out else nullcontext() as file:
        from megatron_mea.huggingface.evaluate import evaluate

        result, table = evaluate(model=arguments.model, data=arguments.data, tasks=arguments.tasks)
        text = json.dumps(result, indent=1)
        try:
            print_and_write(text, {file: f"{text}\n"} if file else {})
        finally:
            if table:
                # stdout stays JSON.
                note(table)


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1:
        raise UserError(where="--max-new-tokens", got=arguments.max_new_tokens, expected="at least 1")
    if arguments.temperature != 0 and not 1e-3 <= arguments.temperature < float("inf"):
        raise UserError(
            where="--temperature", got=arguments.temperature, expected="0 (the likeliest token), or 0.001 and more"
        )

    try:
        arguments.prompt.encode()
    except UnicodeEncodeError:
        # Bytes of the command line that are no UTF-8 arrive as halves of surrogate pairs.
        raise UserError(where="--prompt", got=shorten(arguments.prompt), expected="text in UTF-8") from None

    from megatron_mea.huggingface.locate import check_paths

    check_paths(arguments.model)

    from megatron_mea.huggingface.generate import generate

    text = generate(
        model=arguments.model,
        prompt=arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
    )
    if sys.stdout.isatty():
        show(text)
    else:
        # A program reads the text as it is.
        print(text)


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
