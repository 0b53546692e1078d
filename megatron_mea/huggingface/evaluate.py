"""Evaluating a model: cross-entropy and perplexity on prepared data, and lm-eval's tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from megatron_mea.config import Config
from megatron_mea.data.corpora import IGNORE_INDEX
from megatron_mea.data.windows import MAX_WINDOW, open_windows
from megatron_mea.errors import UserError
from megatron_mea.huggingface.lm_eval_tasks import accuracy_table, check_lengths, open_tasks, run_tasks
from megatron_mea.huggingface.model_folder import ModelFolder
from megatron_mea.progress import progress_bar

_BATCH = 8


def evaluate(
    *, model: ModelFolder, data: str | None, window: int | None, tasks: Sequence[str] | None
) -> tuple[dict[str, Any], str | None]:
    """Measures cross-entropy and perplexity on data, lm-eval's tasks, or both.

    Args:
        data: PREFIX; None takes the validation corpora of a checkpoint, unless there are tasks.
        window: tokens of a window of the data; None as in `cross_entropy`.
        tasks: names and YAML files, as `lm_eval_tasks.open_tasks` takes them.

    Returns:
        The result, and a table of the tasks for people; None without tasks.
    """
    tasks_by_name = open_tasks(tasks) if tasks else None
    if tasks_by_name:
        check_lengths(tasks_by_name, model.context_length)

    loaded_model = model.as_transformers().to("cuda" if torch.cuda.is_available() else "cpu")

    result: dict[str, Any] = {"model": str(model.path)}
    if data is not None or not tasks_by_name:
        result |= cross_entropy(model=loaded_model, config=model.config, data=data, window=window)
    table = None
    if tasks_by_name:
        result["tasks"] = run_tasks(model=loaded_model, tokenizer=model.load_tokenizer(), tasks=tasks_by_name)
        table = accuracy_table(result["tasks"])

    return result, table


def cross_entropy(
    *, model: PreTrainedModel, config: Config | None, data: str | None, window: int | None = None
) -> dict[str, Any]:
    """Cross-entropy (nats a token) and perplexity over all of the data.

    Windows are as long as in training, with documents masked as in training (for a Hugging Face folder 2,048 tokens at
    most, and masked). Every token is predicted once, except the first one, or the first of each masked document.

    Args:
        config: of a checkpoint.
        data: PREFIX; None takes the validation corpora of a checkpoint.
        window: tokens of a window, in place of training's.
    """
    if data is None and (config is None or not config.data.validation):
        raise UserError(
            where="--data", got="nothing", expected="the PREFIX of prepared data: this model names no validation data"
        )

    paths = [corpus.path for corpus in config.data.validation] if data is None else [data]
    if window is None:
        window = config.data.seq_length if config else min(model.config.max_position_embeddings, MAX_WINDOW)
    document_mask = config is None or config.data.document_mask
    windows = open_windows(
        paths=paths,
        where="--data",
        window=window,
        batch=_BATCH,
        vocab_size=model.config.vocab_size,
        document_mask=document_mask,
    )

    total_loss, num_tokens = 0.0, 0
    with torch.inference_mode():
        for batch in progress_bar(windows, desc="evaluate", unit="batch"):
            arrays = (batch.input_ids, batch.position_ids, batch.targets)
            input_ids, position_ids, targets = (torch.from_numpy(array).to(model.device) for array in arrays)

            # transformers masks documents by itself where positions restart.
            logits = model(input_ids, position_ids=position_ids, use_cache=False).logits.float()
            loss_sum = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
            total_loss += loss_sum.item()
            num_tokens += int((targets != IGNORE_INDEX).sum())

    if num_tokens == 0:
        raise UserError(
            where="--data", got=f"documents of one token in {', '.join(paths)}", expected="a token to predict"
        )

    loss = total_loss / num_tokens
    perplexity = math.exp(min(loss, 700.0))
    return {"data": paths, "window": window, "tokens": num_tokens, "cross_entropy": loss, "perplexity": perplexity}
