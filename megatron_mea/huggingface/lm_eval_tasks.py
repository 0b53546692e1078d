"""Tasks of lm-evaluation-harness on a model that is in memory: by name, or local files without a network."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_mea.errors import Problem, UserError

PAPER_TASKS = ("piqa", "openbookqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
"""Table 1 of the paper, in its order, by lm-eval's names."""
_HEADINGS = ("PIQA", "OBQA", "WinoGrande", "HellaSwag", "ARC-e", "ARC-c")
# The mean last, as the paper rounds it.
_TABLE_1 = {
    "Transformer": (71.93, 21.00, 56.04, 40.62, 59.51, 26.19, 45.88),
    "+ GroupNorm": (71.38, 21.00, 56.12, 40.59, 59.13, 25.77, 45.67),
    "+ DFA": (71.76, 22.20, 54.38, 41.29, 60.69, 27.82, 46.36),
    "MEA": (73.18, 19.80, 54.14, 42.02, 61.57, 27.65, 46.39),
}
_BATCH_SIZE = 8


def open_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Loads lm-eval's tasks with their data, by name; `paper` stands for the six of the paper.

    Args:
        names: lm-eval's own, or YAML files of its format; data files in these are relative to the YAML file.

    Raises:
        UserError: lm-eval is not installed, or a task or its data cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        hint = "pip install 'megatron-mea[eval]'"
        raise UserError(
            where="--tasks", got=f"no lm-eval ({error})", expected="an environment with lm_eval 0.4.13", hint=hint
        ) from None

    names = [task for name in names for task in (PAPER_TASKS if name == "paper" else (name,))]
    files = {name: Path(name).resolve() for name in names if Path(name).suffix in (".yaml", ".yml")}
    for name, file in files.items():
        if not file.is_file():
            raise UserError(
                where="--tasks", got=f"{name}, which is no file", expected="a name or a YAML file of lm-eval"
            )

    # The thousands of tasks that come with lm-eval take a while to read.
    manager = TaskManager(include_defaults=len(files) < len(names))
    tasks: dict[str, Any] = {}
    for name in names:
        if name not in files and name not in manager.task_index:
            similar = difflib.get_close_matches(name.lower().replace("-", "_"), manager.all_tasks, n=3)
            expected = (
                f"{', '.join(similar) or ', '.join(PAPER_TASKS)}, another task of lm-eval, a YAML file, or `paper`"
            )
            raise UserError(where="--tasks", got=name, expected=expected)

        folder = files[name].parent if name in files else "."
        try:
            with contextlib.chdir(folder):
                loaded = manager.load([str(files.get(name, name))])["tasks"]
        except Exception as error:
            # Whatever lm-eval, `datasets` and the hub raise.
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(
                where="--tasks",
                got=f"{name}, which does not load ({type(error).__name__}: {reason})",
                expected="a task whose data is at hand: on the hub, in the cache of `datasets`, or local files of a "
                "YAML task",
            ) from None

        if repeated := tasks.keys() & loaded.keys():
            raise UserError(where="--tasks", got=f"{', '.join(sorted(repeated))} twice", expected="every task once")

        tasks |= loaded

    return tasks


def check_lengths(tasks: dict[str, Any], context: int) -> None:
    """Refuses tasks for whose answers a model has no room.

    Args:
        context: tokens that the model takes, `max_position_embeddings`.

    Raises:
        UserError: a task generates as many tokens, or more.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    problems = []
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            continue

        try:
            num_tokens = normalize_gen_kwargs(task.config.generation_kwargs)["max_gen_toks"]
        except (ValueError, TypeError) as error:
            problems.append(Problem(where="--tasks", got=f"{name}: generation_kwargs: {error}", expected="numbers"))
            continue

        if not 0 < num_tokens < context:
            got = f"{name}, which generates {num_tokens} tokens"
            expected = f"1 to {context - 1}: the context of the model is {context}, with a token of the question"
            hint = "a YAML task sets them: generation_kwargs: {max_gen_toks: 32}"
            problems.append(Problem(where="--tasks", got=got, expected=expected, hint=hint))

    if problems:
        raise UserError.from_problems(problems)


def run_tasks(
    *, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Runs tasks; returns each one's metrics, such as `acc` and `acc_stderr` (0 to 1), and its number of `samples`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH_SIZE)
    result = simple_evaluate(model=harness_model, tasks=list(tasks.values()), log_samples=False)
    table = {}
    for name, metrics in result["results"].items():
        values = {key.removesuffix(",none"): value for key, value in metrics.items()}
        table[name] = {key: value for key, value in values.items() if isinstance(value, float)}
        table[name] |= {"samples": result["n-samples"][name]["effective"]}

    return table


def accuracy_table(results: dict[str, dict[str, float]]) -> str:
    """A table of accuracies in percent, for people: the paper's tasks beside its Table 1, then the others."""
    rows = [("accuracy, percent", "this model", "+-", *_TABLE_1)]

    def percent(metrics: dict[str, float], metric: str) -> str:
        return f"{100 * metrics[metric]:.2f}" if metric in metrics else "-"

    for index, (name, heading) in enumerate(zip(PAPER_TASKS, _HEADINGS, strict=True)):
        if name in results:
            paper_cells = [f"{column[index]:.2f}" for column in _TABLE_1.values()]
            rows.append((heading, percent(results[name], "acc"), percent(results[name], "acc_stderr"), *paper_cells))

    if all("acc" in results.get(name, {}) for name in PAPER_TASKS):
        mean = sum(results[name]["acc"] for name in PAPER_TASKS) / len(PAPER_TASKS)
        paper_cells = [f"{column[-1]:.2f}" for column in _TABLE_1.values()]
        rows.append(("mean", f"{100 * mean:.2f}", "", *paper_cells))

    has_paper_rows = len(rows) > 1
    for name in [name for name in results if name not in PAPER_TASKS]:
        metrics = results[name]
        rows.append((name, percent(metrics, "acc"), percent(metrics, "acc_stderr"), *["-"] * len(_TABLE_1)))

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))

    if has_paper_rows:
        lines.append("Right: arXiv 2601.19611, Table 1; 1B parameters, 500 B tokens, one seed.")

    return "\n".join(line.rstrip() for line in lines)
