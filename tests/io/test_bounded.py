"""Untrusted text: what is hostile, truncated or made by accident is named."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.bounded import (
    MAX_DEPTH,
    MAX_DIGITS,
    Unreadable,
    depth_of,
    json_value,
    read_bytes,
    read_text,
)
from omni_grpo_core.io.bounded_yaml import yaml_value
from omni_grpo_core.io.console import require_outputs

HOSTILE = {
    "200,000 brackets": ("[" * 200_000, "nested more than 64 deep"),
    "deep after a long string": (
        '["' + "[" * 99 + '",' + "[" * 99,
        "brackets nested more than 64 deep",
    ),
    "5,000 digits": ("1" * 5000, "5000 digits"),
    "a float beyond floats": ('{"lr": 1e999}', "1e999"),
    "NaN": ("[NaN]", "NaN for a number"),
    "minus infinity": ("[-Infinity]", "-Infinity for a number"),
    "a key twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "duplicate key 'c'"),
    "a lone surrogate": (r'{"id": "\ud800"}', "a lone surrogate"),
    "a lone surrogate as a key": (r'{"\udc00": 1}', "a lone surrogate"),
    "cut": ('{"a": [1, 2', "not JSON"),
    "nothing": ("", "not JSON"),
    # the next two took quadratic time: minutes
    "a string of quotes that never ends": ("[" * 65 + '"' + '\\"' * 500_000, "64 deep"),
    "the last of many keys twice": (
        "{" + ",".join(f'"{i}": 1' for i in [*range(300_000), 299_999]) + "}",
        "duplicate key '299999'",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_named(name: str) -> None:
    text, got = HOSTILE[name]
    with pytest.raises(Unreadable) as caught:
        json_value(text)
    assert got in caught.value.got


def test_values_at_the_bounds_are_read() -> None:
    assert depth_of("[" * MAX_DEPTH + "]" * MAX_DEPTH) == MAX_DEPTH
    assert json_value("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert json_value("9" * MAX_DIGITS) == 10**MAX_DIGITS - 1
    assert json_value('"' + "[" * 1000 + '"') == "[" * 1000
    assert json_value(r'"\ud83d\ude00"') == "\U0001f600"


def test_the_line_of_a_fault_is_reported() -> None:
    with pytest.raises(Unreadable) as caught:
        json_value('{\n"a": 1,\n"b" 2}')
    assert caught.value.place("run.json") == "run.json:3"


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine lines of YAML that expand to 9 to the power of 9 words."""

MERGES = "a0: &a0 {k: 1, l: 1, m: 1}\n" + "\n".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
)

HOSTILE_YAML = {
    "3,000 brackets": ("[" * 3000, "64 deep"),
    "a billion laughs": (LAUGHS, "more than 100000 values"),
    "a list within itself": ("a: &x [*x]", "64 deep"),
    "a key twice": ("a: 1\nb: 2\na: 3", "duplicate key 'a'"),
    "5,000 digits": (f"a: {'1' * 5000}", "as int"),
    "50 digits": (f"a: {'1' * 50}", "40 digits"),
    "a Python object": ("a: !!python/object/apply:os.system [true]", "not YAML"),
    "an impossible date": ("a: 2001-99-99", "as timestamp"),
    "a key that cannot be one": ("? [1]\n: 2", "not YAML"),
    "a control character": ("a: \x00", "not YAML"),
    "a lone surrogate": ('a: "\\ud800"', "a lone surrogate"),
    # PyYAML copies merged mappings before they can be counted
    "a billion merges": (MERGES, "more than 100000 values"),
    "the last of many keys twice": (
        "{" + ",".join(f"k{i}" for i in [*range(10_000), 9_999]) + "}",
        "duplicate key 'k9999'",
    ),
    "a word for a time": ("a: !!timestamp foo", "'foo' as timestamp"),
    "nothing for a number": ("\na: !!int ''", "'' as int"),
    "a word for a boolean": ("a: !!bool foo", "'foo' as bool"),
    "a word for a mapping": ("a: !!map foo", "expected a mapping node"),
    "eight or ten": ("steps: 010", "'010', which is 8 or 10"),
    "64 or a time": ("n: 1:04", "'1:04', which is 64 or a time"),
    "64.5 or a time": ("n: 1:04.5", "'1:04.5', which is 64.5 or a time"),
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_yaml_is_named(name: str) -> None:
    text, got = HOSTILE_YAML[name]
    with pytest.raises(Unreadable) as caught:
        yaml_value(text)
    assert got in caught.value.got


def test_keys_merged_by_yaml_may_be_overridden() -> None:
    merged = yaml_value("base: &b {a: 1, b: 2}\nrun: {<<: *b, b: 3}")
    assert merged["run"] == {"a": 1, "b": 3}


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """``--data`` on a pipe without a writer blocked its reader for ever."""
    os.mkfifo(tmp_path / "rows.json")
    (tmp_path / "large").write_bytes(b"x" * 11)
    (tmp_path / "latin").write_bytes(b"one\ncaf\xe9")
    for name, got in (
        ("rows.json", "a pipe"),
        (".", "a folder"),
        ("gone", "no such file"),
        ("large", "11 bytes"),
        ("a\0b", "embedded null"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(Unreadable) as caught:
            read_bytes(tmp_path / name, most=10)
        assert got in caught.value.got
    with pytest.raises(Unreadable) as caught:
        read_text(tmp_path / "latin")
    assert (caught.value.line, "0xe9" in caught.value.got) == (2, True)
    with pytest.raises(Unreadable, match="a device"):
        read_bytes(Path("/dev/zero"))


_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(_PLAIN)
def test_plain_data_round_trips(data: object) -> None:
    assert json_value(json.dumps(data)) == data


@given(st.text(alphabet='{}[]",:0123456789eE+-.truefalsn\\ud\n &*!|>#x', max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (json_value, yaml_value):
        with suppress(Unreadable):
            read(text)


def test_a_folder_in_place_of_an_output_file_is_called_one(tmp_path: Path) -> None:
    """It was "a device"."""
    with pytest.raises(ConfigError, match="found a folder, wanted a free name"):
        require_outputs(files=[tmp_path])
