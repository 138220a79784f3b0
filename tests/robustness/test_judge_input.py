"""Unusable judges: addresses, keys, numbers and caches in a training config."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from runner import Case, check_case

from omni_grpo_core import tiny

KEY = "sk-0123456789-abcdefghij"
SOUND: Mapping[str, object] = {"base_url": "http://127.0.0.1:1/v1", "model": "judge"}


def judged(
    name: str,
    words: Sequence[str],
    before: Callable[[Path], object] = Path.exists,
    key: str = KEY,
    **judge: object,
) -> Case:
    """A training with this judge. ``before`` prepares its folder."""

    def arguments(folder: Path) -> Sequence[object]:
        before(folder)
        config = {
            "checkpoint": str(tiny.checkpoint_dir()),
            "data": str(tiny.data_file()),
            "out": "run",
            "steps": 1,
            "batch_size": 2,
            "settings": {"group_size": 2, "max_new_tokens": 8},
            "rewards": {"format": {}, "context": {}},
            "judge": {**SOUND, **judge},
        }
        path = folder / "train.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return ["train", path]

    return Case(name, arguments, words=("judge", *words), environment={"OPENAI_API_KEY": key})


def _foreign_table(folder: Path) -> None:
    with sqlite3.connect(folder / "cache") as db:
        db.execute("CREATE TABLE verdict (judge TEXT, sentence TEXT)")
    db.close()


def _text(folder: Path) -> None:
    (folder / "cache").write_text("no database " * 1000, encoding="utf-8")


def _folder(folder: Path) -> None:
    (folder / "cache").mkdir()


ADDRESSES = (
    *("", " ", "localhost:8000", "127.0.0.1/v1", "http://", "https:///v1", "ftp://host/v1"),
    *("http://host:port/v1", "http://host:99999/v1", "http://host:0/v1", "http://[::1/v1"),
    *("http://ho st/v1", "http://host/v1\n", "http://h\u00f6st/v1", "http://host\\v1", "file:///x"),
)
WITH_KEY = (
    *(f"http://user:{KEY}@host/v1", f"http://{KEY}@host/v1", f"http://host/v1?key={KEY}"),
    *(f"http://host/v1#{KEY}", f"ftp://user:{KEY}@host", f"user:{KEY}@host"),
)
NUMBERS: dict[str, tuple[Any, ...]] = {
    "concurrency": (0, -1, "many", 1.5, True, None),
    "timeout": (0, -1, float("nan"), "long", None),
    "attempts": (0, -3, "x"),
    "deadline": (0, -1, float("nan")),
    "backoff": (-1, float("nan")),
    "max_tokens": (0, -1, 2.5),
    "prompt_price": (-1, float("nan")),
    "completion_price": (-0.5, "cheap"),
}
CASES = (
    *(judged(f"address {value!r}", ("base_url",), base_url=value) for value in ADDRESSES),
    *(judged(f"address of type {value!r}", ("base_url",), base_url=value) for value in (5, ["x"])),
    *(
        judged(f"address with a key, {i}", ("base_url", "may hold a key"), base_url=value)
        for i, value in enumerate(WITH_KEY)
    ),
    *(judged(f"model {value!r}", ("model",), model=value) for value in ("", "  ", 5, None)),
    *(
        judged(f"variable {i}", ("api_key_env",), api_key_env=value)
        for i, value in enumerate((KEY, "", "A B", "1A", "A=B", "A\n"))
    ),
    *(
        judged(f"{name} {value!r}", (name,), **{name: value})
        for name, values in NUMBERS.items()
        for value in values
    ),
    judged("an unknown key", ("retries",), retries=3),
    judged("an API key in the configuration", ("api_key",), api_key=KEY),
    *(
        judged(f"a key with {name}", ("judge key in OPENAI_API_KEY",), key=f"{KEY}{odd}{KEY}")
        for name, odd in (("a line break", "\n"), ("a space", " "), ("a letter é", "\u00e9"))
    ),
    judged("cache without a name", ("cache",), cache=""),
    judged("cache with a null byte", ("cache",), cache="a\0b"),
    judged("cache in no folder", ("cache",), cache="missing/cache"),
    judged("cache that is text", ("cache",), _text, cache="cache"),
    judged("cache that is a folder", ("cache",), _folder, cache="cache"),
    judged("cache of another program", ("cache",), _foreign_table, cache="cache"),
    judged("cache that is a pipe", ("cache",), lambda f: os.mkfifo(f / "cache"), cache="cache"),
    judged("cache that is a device", ("cache",), cache="/dev/null"),
    judged("cache on a full device", ("cache",), cache="/dev/full"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ends_as_it_should(
    case: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    outcome = check_case(case, tmp_path, record_property)
    assert KEY not in outcome.stdout + outcome.stderr
