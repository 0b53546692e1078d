"""Using a model: cross-entropy on prepared data, and text."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from megatron_mea.config import Config
from megatron_mea.data.corpora import IGNORE
from megatron_mea.data.tokenizer import load_tokenizer
from megatron_mea.data.windows import MAX_WINDOW, open_windows
from megatron_mea.errors import UserError
from megatron_mea.huggingface.source import load_model
from megatron_mea.huggingface.tasks import beside_the_paper, open_tasks, run_tasks
from megatron_mea.outputs import output_place
from megatron_mea.progress import progress_bar

_BATCH = 8


def evaluate(
    model: str | Path, data: str | None, tasks: Sequence[str] | None, out: str | None
) -> tuple[str, str | None]:
    """Cross-entropy and perplexity on data, lm-eval's tasks, or both, as JSON text, in the file `out` too if named.

    Args:
        data: PREFIX; None takes the validation corpora of a checkpoint, unless there are tasks.
        tasks: names and YAML files; `tasks.open_tasks` says which.

    Returns:
        The JSON text, and for people a table of the tasks.
    """
    opened = open_tasks(tasks) if tasks else None
    with contextlib.nullcontext() if out is None else output_place(out, folder=False) as place:
        loaded, folder, config = load_model(model)
        loaded.to("cuda" if torch.cuda.is_available() else "cpu")
        result: dict[str, Any] = {"model": str(model)}
        if data is not None or not opened:
            result |= cross_entropy(loaded, config, data)
        table = None
        if opened:
            result["tasks"] = run_tasks(loaded, folder, opened)
            table = beside_the_paper(result["tasks"])
        text = json.dumps(result, indent=1)
        if place is not None:
            place.write_text(text + "\n")
    return text, table


def cross_entropy(loaded: PreTrainedModel, config: Config | None, data: str | None) -> dict[str, Any]:
    """Cross-entropy (nats a token) and perplexity over all of the data.

    Windows as long as in training, with documents masked as in training (for a Hugging Face folder 2,048 tokens at
    most, and masked); every token is predicted once, but for the first one, and of masked documents the first of each.

    Args:
        config: of a checkpoint.
        data: PREFIX; None takes the validation corpora of a checkpoint.
    """
    if data is None and (config is None or not config.data.validation):
        raise UserError("--data", "nothing", "the PREFIX of prepared data: this model names no validation data")
    paths = [corpus.path for corpus in config.data.validation] if data is None else [data]
    window = config.data.seq_length if config else min(loaded.config.max_position_embeddings, MAX_WINDOW)
    mask = config is None or config.data.document_mask
    windows = open_windows(paths, "--data", window, _BATCH, loaded.config.vocab_size, mask)
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in progress_bar(windows, desc="evaluate", unit="batch"):
            arrays = (batch.input_ids, batch.position_ids, batch.targets)
            input_ids, position_ids, targets = (torch.from_numpy(array).to(loaded.device) for array in arrays)
            # transformers masks documents by itself where positions restart.
            logits = loaded(input_ids, position_ids=position_ids, use_cache=False).logits.float()
            summed = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
            total += summed.item()
            count += int((targets != IGNORE).sum())
    if count == 0:
        raise UserError("--data", f"documents of one token in {', '.join(paths)}", "a token to predict")
    loss = total / count
    perplexity = math.exp(min(loss, 700.0))
    return {"data": paths, "tokens": count, "cross_entropy": loss, "perplexity": perplexity}


def generate(model: str | Path, prompt: str, max_new_tokens: int, temperature: float) -> str:
    """The prompt and its continuation; temperature 0 takes the likeliest token each time."""
    loaded, folder, _ = load_model(model)
    tokenizer = load_tokenizer(folder, str(folder))
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length, limit = inputs["input_ids"].shape[1], loaded.config.max_position_embeddings
    if length == 0:
        raise UserError("--prompt", "no token", "at least one token of text")
    if length + max_new_tokens > limit:
        found = f"{max_new_tokens} after a prompt of {length} tokens"
        raise UserError("--max-new-tokens", found, f"at most {max(limit - length, 0)}: the context is {limit}")
    if (highest := int(inputs["input_ids"].max())) >= loaded.config.vocab_size:
        found = f"text whose tokens go up to id {highest}"
        raise UserError("--prompt", found, f"ids below {loaded.config.vocab_size}, which are all that the model has")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = loaded.to(device).generate(
        **inputs.to(device),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)
