"""The command line: one function a verb, and a user's error as one message.

Each verb checks what it can before it imports torch, which takes seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mea.arguments import complete, parse_arguments
from megatron_mea.console import guard_console, outlive_console
from megatron_mea.errors import UserError
from megatron_mea.failures import end_with_status, exit_status
from megatron_mea.printing import note, show
from megatron_mea.training.signals import hangup_signals

if TYPE_CHECKING:
    from megatron_mea.config import Config
    from megatron_mea.huggingface.model_folder import ModelFolder


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 done, 2 the user's input was wrong.

    Args:
        argv: its words; None: those of this process, which ends with it.
    """
    if "_ARGCOMPLETE" in os.environ:
        # A shell asks what may follow the words of its line; it takes the answer from here.
        complete()

    guard_console()
    if argv is None:
        return end_with_status(lambda: exit_status(lambda: _run_verb(sys.argv[1:])))

    return exit_status(lambda: _run_verb(list(argv)))


def _run_verb(argv: list[str]) -> None:
    verb, values = parse_arguments(argv)
    # The other verbs remove unfinished output when they are interrupted; `train` saves a checkpoint instead.
    for number in (signal.SIGINT, signal.SIGTERM, *hangup_signals()):
        signal.signal(number, _exit_on_signal)

    VERBS[verb](**values)


def _exit_on_signal(number: int, frame: object) -> None:
    # Not KeyboardInterrupt: raised inside `exec`, which dataclasses call on import, it makes Python die of SIGINT even
    # where it is caught.
    note("megatron-mea: interrupted")
    sys.exit(128 + number)


def _tokenizer(*, input: list[str], vocab_size: int, out: str, text_key: str, split_at: str, max_document: int) -> None:
    from megatron_mea.data.tokenizer import train_tokenizer

    train_tokenizer(
        sources=input,
        vocab_size=vocab_size,
        out=out,
        text_key=text_key,
        split_at=split_at,
        max_document=max_document,
    )
    show(f"wrote {out}: {vocab_size} ids")


def _prepare(
    *,
    input: list[str],
    tokenizer: str,
    out: str,
    workers: int | None,
    bos: bool,
    max_broken: float,
    force: bool,
    **read_options: Any,
) -> None:
    from megatron_mea.data.prepare import prepare
    from megatron_mea.data.text_records import ReadOptions

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    done = prepare(
        sources=input,
        tokenizer_folder=tokenizer,
        prefix=out,
        options=ReadOptions(**read_options),
        workers=workers or cores,
        max_broken=max_broken,
        bos=bos,
        force=force,
    )
    files, counts = f"{out}.bin and .idx", f"{done.documents:,} documents, {done.tokens:,} tokens"
    if done.is_new:
        show(f"wrote {files}: {counts}")
    else:
        show(f"left {files} as they are, made of the same input with the same options: {counts}")


def _train(*, config: str, overrides: list[str]) -> None:
    from megatron_mea.training.signals import StopSignal

    # Before torch is imported: a signal during that import would kill the process.
    stop = StopSignal()

    from megatron_mea.checkpoint.run_config import load_run_config
    from megatron_mea.training.rank_env import RankEnv

    run_config, inherited = load_run_config(config, overrides)
    outlive_console(Path(run_config.run.dir))
    _print_inherited(inherited if RankEnv.from_environment().rank == 0 else [])

    from megatron_mea.training.run import train

    train(run_config, stop)


def _load_run_config(path: str, overrides: list[str]) -> Config:
    """The configuration of a run; prints to stderr what its checkpoint decided."""
    from megatron_mea.checkpoint.run_config import load_run_config

    config, inherited = load_run_config(path, overrides)
    _print_inherited(inherited)
    return config


def _print_inherited(lines: Sequence[str]) -> None:
    for line in lines:
        note(line)


def _plan(*, config: str, overrides: list[str], world_size: int | None, json: bool) -> None:
    run_config = _load_run_config(config, overrides)

    from megatron_mea.config.layout import check_layout

    check_layout(run_config, world_size)

    from megatron_mea.plan.balance import attention_balance
    from megatron_mea.plan.plan import as_json, as_text, make_plan

    plan = make_plan(run_config, world_size=world_size)
    balance = attention_balance(run_config, plan.dims) if plan.dims.cp > 1 else None
    show(dumps(as_json(plan, balance), indent=2) if json else as_text(plan, balance))


def _submit(*, config: str, overrides: list[str], dry_run: bool, sbatch_options: list[str], **resources: Any) -> None:
    run_config = _load_run_config(config, overrides)

    from megatron_mea.slurm.resources import Resources
    from megatron_mea.slurm.submit import submit

    requested = Resources(options=tuple(sbatch_options), **resources)
    show(submit(config=run_config, resources=requested, dry_run=dry_run))


def _sweep(
    *,
    config: str,
    out: str,
    submit: bool,
    nodes: int | None,
    gpus_per_node: int | None,
    time: str | None,
    dry_run: bool,
    sbatch_options: list[str],
    at_once: int | None,
    **varied: list[str],
) -> None:
    from megatron_mea.experiments.sweep import combinations, run_here, submit_array

    configs, inherited = combinations(path=config, out=Path(out), **varied)
    _print_inherited(inherited)
    if not submit:
        show(run_here(configs, at_once or 1))
        return

    from megatron_mea.slurm.resources import Resources

    resources = Resources(
        nodes=nodes or 1,
        gpus_per_node=gpus_per_node or 1,
        time="24:00:00" if time is None else time,
        options=tuple(sbatch_options),
    )
    show(submit_array(configs=configs, out=Path(out), resources=resources, at_once=at_once, dry_run=dry_run))


def _report(*, paths: list[str], out: str, tokens: list[float]) -> None:
    from megatron_mea.experiments.runs import find_runs

    runs = find_runs(paths)

    from megatron_mea.experiments.report import report

    report(runs=runs, out=out, tokens=tokens)


def _inspect(*, path: str) -> None:
    from megatron_mea.huggingface.model_folder import CheckpointFolder

    prefix = path.removesuffix(".idx").removesuffix(".bin")
    try:
        checkpoint = CheckpointFolder(path)
    except UserError as error:
        if not any(Path(f"{prefix}.{kind}").exists() for kind in ("idx", "bin")):
            problem = error.problems[0]
            expected = f"{problem.expected}, or the PREFIX of prepared data"
            raise UserError(where=problem.where, got=problem.got, expected=expected) from None

        from megatron_mea.data.inspect import inspect_data

        show(inspect_data(prefix))
        return

    from megatron_mea.huggingface.inspect import inspect

    show(inspect(checkpoint))


def _locate(path: str, *, out: str | None = None, data: Mapping[str, str | None] | None = None) -> ModelFolder:
    """Finds the MODEL of a command, without torch; the folder `out` is to be written, `data` has PREFIX by option."""
    from megatron_mea.data.indexed import open_readers
    from megatron_mea.huggingface.model_folder import ModelFolder
    from megatron_mea.outputs import check_free_folder

    if out is not None:
        check_free_folder(Path(out))
    model = ModelFolder.locate(path)
    for option, prefix in (data or {}).items():
        if prefix is not None:
            open_readers([prefix], option)

    return model


def _export(*, model: str, out: str, dtype: str, target: str) -> None:
    located = _locate(model, out=out)

    from megatron_mea.huggingface.export import export

    show(export(model=located, out=out, dtype=dtype, kind=target))


def _import(*, source: str, out: str, variant: str | None) -> None:
    from megatron_mea.huggingface.model_folder import HF_DIR, HFFolder
    from megatron_mea.outputs import check_free_folder

    check_free_folder(Path(out))
    hf_folder = HFFolder(source, HF_DIR)

    from megatron_mea.huggingface.importing import import_model

    show(import_model(source=hf_folder, out=out, variant=variant))


def _compress(
    *,
    model: str,
    out: str,
    component_heads: str | None,
    cache_ratio: float | None,
    layers: str | None,
    calibration: str | None,
    method: str | None,
    align: bool,
    reconstruction_steps: int | None,
) -> None:
    located = _locate(model, out=out, data={"--calibration": calibration})

    from megatron_mea.compression.compress import compress

    show(
        compress(
            model=located,
            out=out,
            heads=component_heads,
            ratio=cache_ratio,
            layers=layers,
            calibration=calibration,
            method="aligned" if align else method,
            reconstruction_steps=reconstruction_steps,
        )
    )


def _sensitivity(*, model: str, component_heads: int, data: str, out: str, align: bool) -> None:
    located = _locate(model, data={"--data": data})

    from megatron_mea.compression.sensitivity import sensitivity

    sensitivity(model=located, heads=component_heads, data=data, out=out, aligned=align)


def _evaluate(*, model: str, data: str | None, window: int | None, tasks: list[str] | None, out: str | None) -> None:
    if window is not None and data is None and tasks:
        raise UserError(where="--window", got=window, expected="--data beside it: tasks have no windows")

    located = _locate(model, data={"--data": data})

    from megatron_mea.outputs import print_and_write, reserve_output

    with reserve_output(out, folder=False) if out else nullcontext() as file:
        from megatron_mea.huggingface.evaluate import evaluate

        result, table = evaluate(model=located, data=data, window=window, tasks=tasks)
        text = dumps(result, indent=1)
        try:
            print_and_write(text, {file: f"{text}\n"} if file else {})
        finally:
            if table:
                # stdout stays JSON.
                note(table)


def _generate(*, model: str, prompt: str, max_new_tokens: int, temperature: float) -> None:
    located = _locate(model)

    from megatron_mea.huggingface.generate import generate

    text = generate(model=located, prompt=prompt, max_new_tokens=max_new_tokens, temperature=temperature)
    if sys.stdout.isatty():
        show(text)
    else:
        # A program reads the text as it is.
        print(text)


VERBS: dict[str, Callable[..., None]] = {
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
