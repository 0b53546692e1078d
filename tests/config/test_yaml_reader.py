"""YAML within limits: bombs, depth, tags that do not fit, and numbers in another base than they look."""

from __future__ import annotations

import contextlib
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_mea.config.yaml_reader import InvalidYaml, parse_yaml
from megatron_mea.errors import UserError

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "more than 500,000 values"),
        (f"a: {'[' * 2000}{']' * 2000}", "more than 32 levels"),
        ("a: &a [*a]", "an alias of what it is a part of"),
        ("x" * (5 << 20), "more than 4,194,304"),
        ('a: !!int ""', "index"),
        ("a: !!bool x", "x"),
        ("a: !!timestamp x", "groupdict"),
        ("a: 2024-99-99", "month"),
        ("a:\n  b: 0100", "line 2: 0100 has a leading zero"),
        ("a: -07", "-07 has a leading zero"),
        ("a: 12:30", "12:30 is a number to the base 60"),
        ("a: 1:30.5", "1:30.5 is a number to the base 60"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: 'x", "while scanning"),
    ],
)
def test_what_is_refused(text, reason):
    begin = time.process_time()
    with pytest.raises(InvalidYaml, match=reason):
        parse_yaml(text, "name")
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("-0", 0), ("0.5", 0.5), ("1_000", 1000), ("0x10", 16), ("'010'", "010"), ("a: &b [1]\nc: *b", None)],
)
def test_what_is_read(text, value):
    assert parse_yaml(text, "name") == (yaml.safe_load(text) if value is None else value)


@given(st.text(max_size=40))
def test_any_text_is_a_value_or_is_refused(text):
    with contextlib.suppress(InvalidYaml, UserError):
        parse_yaml(text, "name")
