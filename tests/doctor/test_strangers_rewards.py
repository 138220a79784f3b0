"""Sound rewards of every make in a loop that nobody of ours wrote: none of them breaks the run."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from someones_loop import SomeonesLoop, shortness

from omni_grpo_core import record

RunCli = Callable[..., tuple[int, str, str]]


def signed_length(completions: Any, **_: Any) -> list[float]:
    return [1 - abs(len(text) - 60) / 30 for text in completions]


def minus_one_to_one(completions: Any, solution: Any, **_: Any) -> list[float]:
    given = [re.findall(r"<answer>\s*(\w)", text) for text in completions]
    return [
        -1.0 if not g else 1.0 if g[-1] in gold[-20:] else -0.5
        for g, gold in zip(given, solution, strict=True)
    ]


def box(completions: Any, solution: Any, **_: Any) -> list[float]:
    """Overlap of boxes in JSON. Nothing here is one, and every text raises inside."""
    values = []
    for text, gold in zip(completions, solution, strict=True):
        try:
            values.append(float(json.loads(text)["bbox_2d"] == json.loads(gold)["bbox_2d"]))
        except (ValueError, KeyError, TypeError):
            values.append(0.0)
    return values


def think_answer(completions: Any, **_: Any) -> list[float]:
    shape = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
    return [float(shape.fullmatch(text.strip()) is not None) for text in completions]


def boxed(completions: Any, solution: Any, **_: Any) -> list[float]:
    found = [re.findall(r"\\boxed\{([^}]*)\}", text) for text in completions]
    return [float(bool(f) and f[-1] in gold) for f, gold in zip(found, solution, strict=True)]


def some_unscored(completions: Any, **_: Any) -> list[float | None]:
    return [None if len(text) % 3 == 0 else text.count("e") / 10 for text in completions]


def of_tensors(completions: Any, **_: Any) -> torch.Tensor:
    return torch.tensor([float(text.count("a")) for text in completions])


def of_arrays(completions: Any, **_: Any) -> Any:
    return np.asarray([text.count(" ") for text in completions])


class Counted:
    """State of its own: never probed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions: Any, **_: Any) -> list[float]:
        self.calls += 1
        return [len({*text}) / 40 for text in completions]


def of_letters(letter: str, completions: Any, **_: Any) -> list[float]:
    return [float(text.count(letter)) for text in completions]


def always_nothing(completions: Any, **_: Any) -> list[float]:
    return [0.0] * len(completions)


def exact(completions: Any, solution: Any, **_: Any) -> list[float]:
    """Nothing that a small model says earns it."""
    return [float(text == gold + ".") for text, gold in zip(completions, solution, strict=True)]


def of_messages(completions: Any, **_: Any) -> list[float]:
    return [len(turns[-1]["content"]) / 50 for turns in completions]


def format_of_messages(completions: Any, **_: Any) -> list[float]:
    return [float(turns[0]["content"].startswith("<context>")) for turns in completions]


async def awaited(completions: Any, **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return [str(text).count("i") / 9 for text in completions]


class Paying(SomeonesLoop):
    """Takes whatever a reward returns, and hands over texts or messages."""

    def pay(self, prompts: list[str], texts: list[str], rows: list[dict[str, Any]]) -> torch.Tensor:
        given: Any = texts
        if any("messages" in getattr(f, "__name__", "") for f in self.rewards):
            given = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {"solution": [row["solution"] for row in rows]}
        table = [self.one(f, prompts=prompts, completions=given, **columns) for f in self.rewards]
        return torch.stack(table).nansum(0)

    @staticmethod
    def one(function: Any, **given: Any) -> torch.Tensor:
        values = function(**given)
        values = asyncio.run(values) if inspect.iscoroutine(values) else values
        return torch.tensor([float("nan") if v is None else float(v) for v in values])


def diagnosed(run_cli: RunCli, folder: Path, *rewards: Any) -> Mapping[str, Any]:
    loop = Paying()
    loop.rewards = [*rewards]
    with record(folder, model=loop.model, processor=loop.processor, reward_funcs=loop.rewards):
        loop.train()
    code, out, _ = run_cli("doctor", folder, "--json")
    report: Mapping[str, Any] = json.loads(out)
    assert report["exit"] == code
    return report


@pytest.mark.slow
@pytest.mark.parametrize(
    "rewards",
    [
        (signed_length, think_answer),
        (minus_one_to_one,),
        (box, shortness),
        (boxed, signed_length),
        (of_tensors, of_arrays),
        (Counted(), partial(of_letters, "e")),
        (some_unscored, awaited),
        (of_messages, format_of_messages, awaited),
    ],
    ids=lambda rewards: "-".join(getattr(one, "__name__", type(one).__name__) for one in rewards),
)
def test_sound_rewards_break_nothing(
    run_cli: RunCli, tmp_path: Path, rewards: tuple[Any, ...]
) -> None:
    report = diagnosed(run_cli, tmp_path / "run", *rewards)
    broken = [f["evidence"][0] for f in report["findings"] if f["severity"] == "breaks"]
    assert (report["exit"], broken) == (0, [])


@pytest.mark.slow
def test_a_reward_that_never_pays_is_no_healthy_run(run_cli: RunCli, tmp_path: Path) -> None:
    nothing = diagnosed(run_cli, tmp_path / "nothing", always_nothing)
    assert (nothing["exit"], nothing["healthy"], nothing["headline"]["stage"]) == (1, False, None)
    assert "all rewards are 0" in nothing["headline"]["sentence"]
    # a right answer is not even paid where it was probed
    unearned = diagnosed(run_cli, tmp_path / "unearned", exact)
    assert (unearned["exit"], unearned["healthy"]) == (1, False)
    # a box in a form that is not known, or an answer that a small model does not find
    boxes = diagnosed(run_cli, tmp_path / "boxes", boxed)
    assert (boxes["exit"], boxes["healthy"]) == (0, False)
