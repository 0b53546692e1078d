"""Where a text may be cut so that a tokenizer gives its parts the ids that it gives the whole.

A text goes through four steps: added tokens are cut out, normalizers rewrite what is between them, pre-tokenizers cut
that into words, and the model encodes each word for itself. A border is safe where no step sees across it. Two kinds
can be proven from a tokenizer's JSON; of what is not listed here nothing is known, and texts are encoded whole.

1. **Between words**: a separator between two letters, `word| word`, in front of which some pre-tokenizer always cuts.
2. **Between characters**, for a BPE whose words are whole texts, as sentencepiece's are: where no token has the two
   characters side by side, no merge joins them, whatever their neighbours have become.

What is done to the beginning of a text alone (a prefix, stripping) is left out in the parts that follow the first one,
which is the same where only one stretch of text exists: where no added token can be cut out of it.
"""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from megatron_mea.data.word_patterns import ALTERNATIVES, covers_letters, split_alternatives

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_META = "\u2581"
"""What sentencepiece writes for a space."""

_SEPARATORS = " \n\u3002\u3001"
"""Characters in front of which texts are cut between words, the full stop and the comma of Chinese and Japanese too.

Each is a character of its own in every normal form, and neither letter, mark, digit nor apostrophe.
"""

_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents")
_WHITESPACE_SPLITS = ("WhitespaceSplit", "Whitespace", "BertPreTokenizer")


@dataclass(frozen=True, kw_only=True)
class Borders:
    """Safe borders of a tokenizer.

    Attributes:
        find: (text, position) -> the first safe border from `position` on, or the end of the text.
        continuation: JSON of the tokenizer for the parts that follow the first one, as an object.
    """

    find: Callable[[str, int], int]
    continuation: dict[str, Any]


class _Unproven(Exception):
    """Nothing is known of a component."""


def find_borders(config: dict[str, Any], backend: Tokenizer) -> Borders | None:
    """The borders that are safe for a tokenizer, or None where none can be proven.

    Args:
        config: the tokenizer's JSON.
        backend: the tokenizer; special tokens in a text are no special tokens for it.
    """
    for rule in (_between_words, _between_characters):
        try:
            _check_ends(config)
            return rule(copy.deepcopy(config), backend)
        except _Unproven:
            continue

    return None


def _check_ends(config: dict[str, Any]) -> None:
    """Refuses models that draw lots, and post-processors that do more than add special tokens."""
    if config["model"].get("dropout"):
        raise _Unproven

    for processor in _components(config["post_processor"], "processors"):
        if processor["type"] == "TemplateProcessing":
            if [list(piece) for piece in processor["single"]].count(["Sequence"]) != 1:
                raise _Unproven
        elif processor["type"] not in ("ByteLevel", "RobertaProcessing", "BertProcessing"):
            raise _Unproven


def _components(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The normalizers, pre-tokenizers or processors in order, those of sequences one by one."""
    if node is None:
        return []
    if node["type"] == "Sequence":
        return [component for child in node[key] for component in _components(child, key)]
    return [node]


def _is_one_stretch(config: dict[str, Any]) -> bool:
    """Whether a text stays in one piece: all added tokens are special, and those are encoded as ordinary text."""
    return all(token["special"] for token in config["added_tokens"])


def _remove(component: dict[str, Any]) -> None:
    component.clear()
    component.update(type="Sequence", normalizers=[])


# Between words.


@dataclass
class _Words:
    """What is known of `letter| separator letter` as a text goes through the steps.

    Attributes:
        forms: what each separator has become; those at which nothing is safe are taken out.
        cut: separators in front of which a word ends already.
        is_ascii: whether the letters must be those of ASCII, with one more on both sides.
    """

    forms: dict[str, str]
    cut: set[str]
    one_stretch: bool
    is_ascii: bool = False

    def keep(self, condition: Callable[[str], bool]) -> None:
        """Takes out the separators that are not cut yet and whose form does not meet the condition."""
        self.forms = {name: form for name, form in self.forms.items() if name in self.cut or condition(form)}


def _between_words(config: dict[str, Any], backend: Tokenizer) -> Borders:
    words = _Words({name: name for name in _SEPARATORS}, set(), _is_one_stretch(config))
    _check_added_tokens(config, backend)
    pre_tokenizers = _components(config["pre_tokenizer"], "pretokenizers")

    normalizers = _components(config["normalizer"], "normalizers")
    for component in normalizers:
        _normalize(component, words)
    # It writes spaces around Chinese characters, which nobody else may look at.
    if any(component["type"] == "BertNormalizer" for component in normalizers[:-1]) or (
        normalizers
        and normalizers[-1]["type"] == "BertNormalizer"
        and (not pre_tokenizers or pre_tokenizers[0]["type"] not in _WHITESPACE_SPLITS)
    ):
        raise _Unproven

    for index, component in enumerate(pre_tokenizers):
        _pre_tokenize(component, words=words, is_first=index == 0)

    separators = "".join(name for name in words.forms if name in words.cut)
    if not separators:
        raise _Unproven
    if words.is_ascii:
        _check_ascii(config)
        return Borders(find=_finder(r"(?<=[A-Za-z]{2})(?= [A-Za-z][A-Za-z ])"), continuation=config)

    letters = _letters()
    return Borders(find=_finder(f"(?<=[{letters}])(?=[{separators}][{letters}])"), continuation=config)


def _finder(pattern: str) -> Callable[[str, int], int]:
    search = re.compile(pattern).search

    def find(text: str, position: int) -> int:
        match = search(text, position)
        return match.start() if match else len(text)

    return find


def _check_added_tokens(config: dict[str, Any], backend: Tokenizer) -> None:
    """Refuses added tokens that could reach over a border, or that look across one."""
    if _is_one_stretch(config):
        return

    for token in config["added_tokens"]:
        normalized = backend.normalizer.normalize_str(token["content"]) if backend.normalizer else token["content"]
        for content in (token["content"], normalized):
            separators = _SEPARATORS + _META
            if any(left.isalpha() and right in separators for left, right in pairwise(content)):
                raise _Unproven
            if token["single_word"] and content[:1] in separators:
                raise _Unproven
            if token["rstrip"] and content[-1:].isalpha():
                raise _Unproven


def _normalize(component: dict[str, Any], words: _Words) -> None:
    """Follows the borders through a normalizer; leaves out of it what it does to the beginning of a text."""
    kind = component["type"]
    if kind in _NORMAL_FORMS:
        return

    if kind == "BertNormalizer":
        words.keep(str.isspace)
    elif kind == "Precompiled":
        # It works on graphemes; letters and spaces of ASCII among such are graphemes of their own.
        words.is_ascii = True
        words.keep(lambda form: form == " ")
    elif kind == "Replace":
        _replace(component, words)
    elif kind == "Strip" and words.one_stretch:
        # The end of a part is a letter.
        component["strip_left"] = False
    elif kind == "Strip" and not component["strip_left"]:
        return
    elif kind == "Prepend" and words.one_stretch:
        _remove(component)
    else:
        raise _Unproven


def _replace(component: dict[str, Any], words: _Words) -> None:
    pattern, content = component["pattern"], component["content"]
    if pattern == {"String": " "} and content in (" ", _META):
        words.forms = {name: content if form == " " else form for name, form in words.forms.items()}
    elif pattern == {"Regex": " {2,}"}:
        # A separator stands between letters.
        return
    elif not pattern.get("String") or any(
        char.isalnum() or char == _META or char in _SEPARATORS for char in pattern["String"]
    ):
        raise _Unproven


def _pre_tokenize(component: dict[str, Any], *, words: _Words, is_first: bool) -> None:
    """Follows the borders through a pre-tokenizer; leaves out of it what it does to the beginning of a text."""
    kind = component["type"]
    if kind == "Metaspace":
        if component["prepend_scheme"] == "first":
            component["prepend_scheme"] = "never"
        if component["prepend_scheme"] == "always":
            _prefix(component, words=words, is_first=is_first, off={"prepend_scheme": "never"})
        if component["replacement"] != _META:
            words.keep(lambda form: False)
        words.forms = {name: _META if form == " " else form for name, form in words.forms.items()}
        if component["split"]:
            words.cut |= {name for name, form in words.forms.items() if form == _META}
    elif kind == "ByteLevel":
        if component["add_prefix_space"]:
            _prefix(component, words=words, is_first=is_first, off={"add_prefix_space": False})
        if component["use_regex"]:
            words.cut |= set(words.forms)
        # It rewrites letters and separators.
        words.keep(lambda form: False)
    elif kind in _WHITESPACE_SPLITS:
        words.cut |= {name for name, form in words.forms.items() if form.isspace()}
        words.keep(lambda form: False)
    elif kind == "Punctuation":
        words.keep(lambda form: form.isspace() or form == _META)
    elif kind == "Split":
        _split(component, words)
    elif kind != "Digits":
        # After a cut it sees the words one by one.
        words.keep(lambda form: False)


def _prefix(component: dict[str, Any], *, words: _Words, is_first: bool, off: dict[str, Any]) -> None:
    """A prefix for each stretch or word that does not begin with a space."""
    if is_first and words.one_stretch:
        component.update(off)
    else:
        # Words have one in the whole text, too, and a part begins with a space, unless that was cut away with them.
        words.keep(lambda form: form in (" ", _META))


def _split(component: dict[str, Any], words: _Words) -> None:
    pattern, behavior, invert = component["pattern"], component["behavior"], component["invert"]
    if "String" in pattern:
        literal = pattern["String"]
        if literal == " " and not invert and behavior in ("Isolated", "Removed", "MergedWithNext"):
            words.cut |= {name for name, form in words.forms.items() if form == " "}
        elif literal == " ":
            words.keep(lambda form: form != " ")
        else:
            words.keep(lambda form: False)
        return

    alternatives = split_alternatives(pattern["Regex"])
    if not alternatives <= ALTERNATIVES or (behavior, invert) not in (("Isolated", False), ("Removed", True)):
        words.keep(lambda form: False)
    elif covers_letters(alternatives):
        words.keep(lambda form: form in _SEPARATORS)
        words.cut |= set(words.forms)
    elif invert:
        words.keep(lambda form: False)


def _check_ascii(config: dict[str, Any]) -> None:
    """Refuses normalizers that make anything but a letter of a letter of ASCII, or anything but a space of a space."""
    from tokenizers import Tokenizer

    empty = {"type": "BPE", "vocab": {}, "merges": []}
    backend = Tokenizer.from_str(json.dumps(config | {"model": empty, "added_tokens": [], "post_processor": None}))
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz":
        if not re.fullmatch(f"[A-Za-z][ {_META}][A-Za-z]", backend.normalizer.normalize_str(f"{letter} {letter}")):
            raise _Unproven


@cache
def _letters() -> str:
    """Ranges, for a class of `re`, of the letters that all normal forms and lower case make letters of.

    They were letters in Unicode 3.2 already, so that every library and version sees them as such.
    """

    def is_letters(text: str) -> bool:
        return all(unicodedata.category(char)[0] == unicodedata.ucd_3_2_0.category(char)[0] == "L" for char in text)

    ranges: list[list[int]] = []
    for code in range(0x10000):
        char = chr(code)
        if not is_letters(char) or not is_letters(char.lower()) or not is_letters(unicodedata.normalize("NFKD", char)):
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])

    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


# Between characters.


def _between_characters(config: dict[str, Any], backend: Tokenizer) -> Borders:
    model = config["model"]
    if model["type"] != "BPE" or any(
        model[key] for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    ):
        raise _Unproven
    if not _is_one_stretch(config):
        raise _Unproven

    writes_meta = False
    for component in _components(config["normalizer"], "normalizers"):
        if component["type"] == "Prepend":
            _remove(component)
        elif (component["type"], component.get("pattern"), component.get("content")) == (
            "Replace",
            {"String": " "},
            _META,
        ):
            writes_meta = True
        else:
            raise _Unproven

    for component in _components(config["pre_tokenizer"], "pretokenizers"):
        if component["type"] == "Metaspace" and not component["split"] and component["replacement"] == _META:
            component["prepend_scheme"] = "never"
            writes_meta = True
        elif not (component["type"] == "Split" and component["pattern"] == {"String": " "} and writes_meta):
            # Where no space is left, nothing is cut at spaces.
            raise _Unproven

    vocabulary = model["vocab"]
    joined = {token[index : index + 2] for token in vocabulary for index in range(len(token) - 1)}

    def find(text: str, position: int) -> int:
        for border in range(max(position, 1), len(text)):
            pair = text[border - 1 : border + 1]
            if writes_meta:
                pair = pair.replace(" ", _META)
            # Unknown characters may become several symbols, or one with their neighbours.
            if pair not in joined and pair[0] in vocabulary and pair[1] in vocabulary:
                return border

        return len(text)

    return Borders(find=find, continuation=config)
