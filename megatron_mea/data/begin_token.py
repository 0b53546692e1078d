"""Begin tokens: whether documents have one, and a tokenizer that puts before a text what training saw there.

The data is the truth: a run's tokenizer, which travels with checkpoints and exports, is made to fit it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mea.data.tokenizer import load_tokenizer, update_tokenizer_config
from megatron_mea.inputs import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ADDING = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
"""Post processors of the library `tokenizers` that put tokens around a text."""


def tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text."""
    with_tokens = tokenizer("a")["input_ids"]
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = (start for start in range(len(with_tokens)) if with_tokens[start : start + len(text)] == text)
    start = next(starts, 0)
    return with_tokens[:start], with_tokens[start + len(text) :]


def fits_documents(tokenizer: PreTrainedTokenizerBase, *, begins: bool) -> bool:
    """Whether a tokenizer begins a text as documents begin, with or without a begin token, and puts nothing behind it.

    Documents end with an end-of-document token; the text of a prompt goes on.
    """
    return tokens_around(tokenizer) == ([tokenizer.bos_token_id] if begins else [], [])


def fit_to_documents(folder: Path, *, begins: bool) -> None:
    """Changes a tokenizer's files so that it puts the begin token before a text, or nothing."""
    tokenizer = load_tokenizer(folder, str(folder))
    if fits_documents(tokenizer, begins=begins):
        return

    # Classes of the library follow these settings, or tokenizer.json, or both.
    update_tokenizer_config(folder, add_bos_token=begins, add_eos_token=False)
    file = folder / "tokenizer.json"
    if file.is_file():
        contents = read_json_object(file, max_bytes=1 << 30)
        begin_token = (tokenizer.bos_token, tokenizer.bos_token_id) if begins else None
        contents["post_processor"] = _post_processor(contents.get("post_processor"), begin_token)
        file.write_text(json.dumps(contents, indent=2, ensure_ascii=False), encoding="utf-8")


def _post_processor(post_processor: dict[str, Any] | None, begin_token: tuple[str, int] | None) -> dict | None:
    """The post processor of a tokenizer.json with the begin token (text, id) before a text, or with nothing there."""
    parts = [post_processor] if post_processor else []
    if post_processor and post_processor["type"] == "Sequence":
        parts = post_processor["processors"]

    parts = [part for part in parts if part["type"] not in _ADDING]
    if begin_token is not None:
        token, token_id = begin_token
        first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
        begins = [{"SpecialToken": {"id": token, "type_id": number}} for number in range(2)]
        template = {
            "type": "TemplateProcessing",
            "single": [begins[0], first],
            "pair": [begins[0], first, begins[1], second],
            "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
        }
        parts = [*parts, template]

    return {"type": "Sequence", "processors": parts} if len(parts) > 1 else parts[0] if parts else None
