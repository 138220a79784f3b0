"""A reward function is asked about completions made from its own rows, whose worth is known."""

from __future__ import annotations

import random
import sys
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from omni_grpo_core.recorder.plain import Plain
from omni_grpo_core.recorder.probe import may_probe, probe
from omni_grpo_core.recorder.probe_cases import FORMS, Asked, answer_in, first_cases, later_cases
from omni_grpo_core.recorder.step_buffer import Bounds, StepBuffer
from omni_grpo_core.recorder.watch_rewards import RewardWatch
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.judge import Endpoint, Judge, JudgeReward
from omni_grpo_core.rewards.parse import render
from omni_grpo_core.trace.calls import RewardCall

NOWHERE = "http://127.0.0.1:9/"  # the discard port, where nothing listens
WHOLE = {
    "problem_type": ["multiple choice", "numerical"],
    "options": [["A. Calm", "B. Angry", "C. Sad"], []],
    "solution": [render("c", "t", "B"), render("c", "t", "1200")],
}


def asked(function: Any, columns: Mapping[str, Any] = WHOLE, rows: int = 2) -> dict[str, Any]:
    given = {"prompts": ["why?"] * rows, "completions": ["said"] * rows, **columns}
    return probe(function, given, Plain())


def paid(found: Mapping[str, Any], role: str, form: str) -> list[float]:
    return [c["alone"] for c in found.values() if (c["role"], c["form"]) == (role, form)]


def test_names_are_unique_and_answers_have_the_data_s_types() -> None:
    rows = Asked.of(WHOLE, 2)
    cases = [*first_cases(rows), *later_cases(rows, "answer")]
    assert len({case.name for case in cases}) == len(cases)
    assert {case.problem_type for case in cases} == {"multiple choice", "numerical"}
    bare = Asked.of({"answer": ["7"]}, 1)
    assert {case.problem_type for case in first_cases(bare)} == {""}


@pytest.mark.parametrize(
    ("gold", "answer"),
    [(render("c", "t", "B"), "B"), ("B", "B"), (" 12 ", "12"), (r"so \boxed{12}", "12")],
)
def test_an_answer_is_found_in_golds_of_any_shape(gold: str, answer: str) -> None:
    assert answer_in(gold) == answer


def test_the_project_s_own_rewards_earn_what_is_known() -> None:
    found = asked(Accuracy())
    form = "context-think-answer"
    assert paid(found, "right", form) == paid(found, "right", "verbatim") == [1.0, 1.0]
    assert paid(found, "wrong", form) == paid(found, "foreign", form) == [0.0, 0.0]
    assert {c["alone"] for c in found.values() if c["role"] == "notation"} == {1.0}
    assert {c["alone"] for c in found.values() if c["role"] in ("garbage", "evasion")} == {0.0}
    shaped = asked(Format())
    assert paid(shaped, "wrong", form) == [1.0, 1.0]
    assert paid(shaped, "right", "answer") == [0.0, 0.0]


@pytest.mark.parametrize("form", FORMS)
def test_a_reward_of_any_form_is_paid_in_its_own(form: str) -> None:
    def exact(prompts: Any, completions: Any, answer: Any) -> list[float]:
        """Signed, one column of bare golds, no others taken."""
        return [
            1.0 if c == FORMS[form](a) else -1.0 for c, a in zip(completions, answer, strict=True)
        ]

    found = asked(exact, {"answer": ["B", "C"]})
    assert paid(found, "right", form) == [1.0]
    assert paid(found, "wrong", form) == paid(found, "foreign", form) == [-1.0]


def test_a_batch_that_differs_from_its_rows_shows() -> None:
    def first_type_rules(
        prompts: list[str], completions: list[str], problem_type: list[str], **columns: Any
    ) -> list[float]:
        return [float(problem_type[0] == "numerical")] * len(completions)

    found = asked(first_type_rules)["numerical: right answer, bare"]
    assert (found["value"], found["alone"]) == (0.0, 1.0)


def test_an_error_is_kept_as_text_and_does_not_affect_the_others() -> None:
    def fragile(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if "" in completions:
            raise ValueError("nothing to score")
        return [1.0] * len(completions)

    found = asked(fragile)
    assert found["empty"]["value"] == found["empty"]["alone"] == "ValueError: nothing to score"
    assert found["token salad"]["value"] == 1.0


@pytest.mark.skipif(sys.gettrace() is not None, reason="coverage traces already")
def test_an_exception_that_a_function_swallows_is_noted() -> None:
    def swallowing(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        try:
            return [score_choice(c) for c in completions]  # type: ignore[name-defined]  # noqa: F821
        except Exception:
            return [0.0 for _ in completions]

    found = asked(swallowing)["empty"]
    assert (found["alone"], found["swallowed"]) == (
        0.0, "NameError: name 'score_choice' is not defined",
    )  # fmt: skip


@pytest.mark.skipif(sys.gettrace() is not None, reason="coverage traces already")
def test_what_a_silent_judge_catches_is_recorded_once() -> None:
    """A judge's failure was seen by nobody: no log, no raise. What reaches its own file counts,
    and only the first call is traced; a model in this process never is."""

    def ask(text: str) -> float:
        return float(urllib.request.urlopen(NOWHERE, data=text.encode()).read())

    def judged(completions: Any, **_: Any) -> list[float]:
        def score(text: str) -> float:
            try:
                return ask(text)
            except Exception:
                return 0.0

        return [score(text) for text in completions]

    def by_model(completions: Any, **_: Any) -> list[float]:
        try:
            raise ValueError(urllib.request, torch)
        except ValueError:
            return [0.0 for _ in completions]

    buffer = StepBuffer(Bounds(), Plain())
    watch = RewardWatch([judged, by_model], buffer, probing=True)
    for function in (*watch.functions, watch.functions[0]):
        assert function(completions=["one", "two"]) == [0.0, 0.0]
    calls = [record.value for record in buffer.take()[0]]
    assert isinstance(calls[0], RewardCall)
    [(text, times)] = calls[0].caught.items()
    assert (text.partition(":")[0], times) == ("URLError", 2)
    assert [call.caught for call in calls[1:] if isinstance(call, RewardCall)] == [{}, {}]
    assert sys.gettrace() is None


def test_completions_have_the_trainer_s_own_form() -> None:
    def of_messages(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [float(len(completion[0]["content"]) > 0) for completion in completions]

    messages = [[{"role": "assistant", "content": "said"}]]
    found = probe(of_messages, {"prompts": ["why?"], "completions": messages}, Plain())
    assert (found["empty"]["value"], found["token salad"]["value"]) == (0.0, 1.0)


def test_random_state_is_restored() -> None:
    def dice(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        # three generators, each of which a reward may draw from
        return [random.random() + np.random.rand() + float(len(prompts))] * len(completions)

    def state() -> tuple[Any, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = state()
    assert asked(dice)
    assert state() == before


def counts(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    global CALLS
    CALLS += 1
    return [float(CALLS)] * len(completions)


CALLS = 0


def of_ids(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def asks_an_api(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    import httpx

    return [float(httpx.get("http://localhost").text) for _ in completions]


def calls_one_that_asks(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return asks_an_api(prompts, completions)


async def later(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return []


class Scorer:
    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [0.0 for _ in completions]


class PureScorer(Scorer):
    pure = True


def judge() -> Judge:
    return Judge(Endpoint("http://localhost:1/v1", "judge"))


@pytest.mark.parametrize(
    ("function", "may"),
    [
        (asks_an_api, False),
        (calls_one_that_asks, False),
        (later, False),
        (counts, False),
        (of_ids, False),
        (Scorer(), False),
        (PureScorer(), True),
        (torch.nn.Linear(1, 1), False),
        (Format(), True),
        (Accuracy(), True),
        (JudgeReward("context", judge()), False),
        (Accuracy(judge=JudgeReward("answer", judge())), False),
    ],
    # an address in a test id would differ between pytest-xdist workers
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_only_functions_that_are_safe_to_call_are_probed(function: Any, may: bool) -> None:
    assert may_probe(function) is may
    assert bool(asked(function)) is may
