"""Text for the terminal: names that somebody else chose are shown without what a terminal would obey."""

from __future__ import annotations

import sys
import unicodedata

_KEPT = "\n\t"
_ESCAPED_CATEGORIES = ("Cc", "Cs")
"""Control characters (C0, DEL, C1), and halves of surrogate pairs: bytes of a name that are no UTF-8."""
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""These reorder what stands around them (Unicode TR 36, 3.1: bidirectional text spoofing)."""


def printable(text: str) -> str:
    """`text` with a backslash escape for each character that a terminal obeys instead of showing it.

    Line ends and tabs stay.
    """
    return text if text.isprintable() else "".join(map(_escape, text))


def show(text: object) -> None:
    """Prints a result to stdout."""
    print(printable(str(text)), flush=True)


def note(text: object) -> None:
    """Prints a remark, a warning or an error to stderr."""
    print(printable(str(text)), file=sys.stderr, flush=True)


def _escape(character: str) -> str:
    is_obeyed = unicodedata.category(character) in _ESCAPED_CATEGORIES or character in _BIDI_CONTROLS
    return character.encode("unicode_escape").decode() if is_obeyed and character not in _KEPT else character
