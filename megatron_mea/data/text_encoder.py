"""Texts to ids with the library `tokenizers`, long ones in parts, so that memory does not grow with them."""

from __future__ import annotations

import json
import os
from array import array
from functools import cached_property
from typing import TYPE_CHECKING

from megatron_mea.data.borders import Borders, find_borders

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PART_CHARACTERS = 1 << 17
"""Characters after which a text is cut at the next safe border; the library takes some 300 bytes for each."""


class TextEncoder:
    """Encodes texts; special tokens that are spelt out in them are ordinary text.

    Args:
        backend: the tokenizer as JSON of the library `tokenizers`.
        part_characters: characters after which a text is cut.
    """

    def __init__(self, backend: str, part_characters: int = PART_CHARACTERS) -> None:
        # One thread a worker: the parallelism is over workers.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._tokenizer = _load(backend)
        self._part_characters = part_characters

    def __call__(self, texts: list[str]) -> list[array]:
        """The ids of each text, without an end-of-document token."""
        short = [text for text in texts if len(text) <= self._part_characters]
        encodings = iter(self._tokenizer.encode_batch_fast(short, add_special_tokens=False))
        return [
            # numpy converts an array.array more than three times as fast as a list.
            array("I", next(encodings).ids) if len(text) <= self._part_characters else self._encode_in_parts(text)
            for text in texts
        ]

    def _encode_in_parts(self, text: str) -> array:
        ids, start, tokenizer = array("I"), 0, self._tokenizer
        while start < len(text):
            end = self.borders.find(text, start + self._part_characters) if self.borders else len(text)
            (encoding,) = tokenizer.encode_batch_fast([text[start:end]], add_special_tokens=False)
            ids.extend(encoding.ids)
            start = end
            if start < len(text):
                tokenizer = self._continuation

        return ids

    @cached_property
    def borders(self) -> Borders | None:
        """Where texts may be cut, or None where they are encoded whole."""
        return find_borders(json.loads(self._tokenizer.to_str()), self._tokenizer)

    @cached_property
    def _continuation(self) -> Tokenizer:
        """The tokenizer for the parts of a text that follow the first one."""
        assert self.borders is not None
        return _load(json.dumps(self.borders.continuation))


def _load(backend: str) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(backend)
    tokenizer.encode_special_tokens = True
    # A tokenizer.json may enable both; transformers disables them, too.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
