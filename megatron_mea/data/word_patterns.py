r"""Alternatives of the regular expressions by which tokenizers cut texts into words, as far as they are known.

Each of them, of every text that has `letter| separator` somewhere (a separator is a space, a line end, or a full stop
or comma of Chinese; the match of a contraction is no letter's alone, but ends with one):

- matches nothing that reaches over that border: none has a separator behind a letter;
- matches to the left of it the same whatever is to its right: none looks further than one character behind white space,
  and before the border there is a letter;
- matches to the right of it the same whatever is to its left: none looks back.

Words are matched from left to right, each from the end of the one before on. If every letter is part of a match, one
ends at the border and the next begins there, with or without what is to the left.
"""

from __future__ import annotations

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LOWER_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_UPPER_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"

_LETTERS = {
    r"\p{L}+",
    r" ?\p{L}+",
    r"\s?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
}
"""Alternatives that match every letter."""

ALTERNATIVES = frozenset(
    {
        *_LETTERS,
        *(_LOWER_WORD, _UPPER_WORD, f"{_LOWER_WORD}{_CONTRACTIONS}?", f"{_UPPER_WORD}{_CONTRACTIONS}?"),
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _CONTRACTIONS),
        *(r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r" ?\p{N}+", r"[0-9][0-9][0-9]"),
        *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        *(r"[\r\n]", r"\s*[\r\n]", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
    }
)


def covers_letters(alternatives: set[str]) -> bool:
    """Whether every letter is part of a match."""
    has_upper = any(alternative.startswith(_UPPER_WORD) for alternative in alternatives)
    has_lower = any(alternative.startswith(_LOWER_WORD) for alternative in alternatives)
    return bool(alternatives & _LETTERS) or (has_upper and has_lower)


def split_alternatives(pattern: str) -> set[str]:
    """The alternatives of a regular expression, of which those in brackets are one."""
    pattern = pattern.replace("\r", r"\r").replace("\n", r"\n")
    alternatives, start, depth, in_class, index = set(), 0, 0, False, 0

    while index < len(pattern):
        char = pattern[index]
        if char == "\\":
            index += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            alternatives.add(pattern[start:index])
            start = index + 1
        index += 1

    return alternatives | {pattern[start:]}
