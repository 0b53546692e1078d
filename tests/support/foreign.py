"""Hypothesis strategies for files that somebody else wrote."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

NUMBERS = st.integers() | st.floats() | st.sampled_from([1 << 31, 1 << 63, 10**400, -(10**400)])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=9) | st.just("\ud800") | st.just("\x1b[2J"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
"""Any value of JSON, with numbers that no computer has and text that is no Unicode."""
DEEP = b"[" * 100_000


def examples(count: int) -> settings:
    """Settings of a test with so many examples, or with those of the profile where these are more (`--full`)."""
    return settings(max_examples=max(count, settings.default.max_examples), deadline=None)


@st.composite
def edited_json(draw: st.DrawFn, contents: dict[str, Any]) -> bytes:
    """A JSON object in which a value, anywhere, was replaced, or some bytes were."""
    contents = json.loads(json.dumps(contents))
    section = contents
    while True:
        key = draw(st.sampled_from([*section, "new"]))
        if not (isinstance(section.get(key), dict) and section[key] and draw(st.booleans())):
            break
        section = section[key]

    section[key] = draw(VALUES)
    raw = json.dumps(contents).encode()
    place = draw(st.integers(0, len(raw)))
    cut = place + draw(st.sampled_from([0, 0, 0, 1, 9, len(raw)]))
    return raw[:place] + draw(st.sampled_from([b"", b"", b"", b"\xff", b"9" * 5000, DEEP])) + raw[cut:]
