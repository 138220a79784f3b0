from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from omni_grpo_core.recorder.plain import Plain
from omni_grpo_core.recorder.probe import may_probe, probe
from omni_grpo_core.recorder.probe_cases import ProbeCase, probe_cases
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.judge import Endpoint, Judge, JudgeReward


def names(case: ProbeCase) -> str:
    return case.name


def test_names_are_unique() -> None:
    cases = [case.name for case in probe_cases()]
    assert len(cases) == len(set(cases)) >= 30


@pytest.mark.parametrize("case", probe_cases(), ids=names)
def test_the_known_scores_are_those_of_the_projects_own_rewards(case: ProbeCase) -> None:
    [form] = Format()([case.question], [case.completion])
    assert form == case.format
    if case.gold == "A":  # the project's own reward refuses a gold without tags
        return
    columns: dict[str, Any] = {key: [value] for key, value in case.columns.items()}
    [accuracy] = Accuracy()([case.question], [case.completion], **columns)
    assert accuracy == case.accuracy


def test_values_come_with_the_expected_ones() -> None:
    def floor(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [0.1] * len(completions)

    found = probe(floor, Plain())
    assert found.keys() == {case.name for case in probe_cases()}
    assert found["empty"] == {
        "value": 0.1,
        "alone": 0.1,
        "format": 0.0,
        "accuracy": 0.0,
        "completion": "",
        "solution": probe_cases()[0].gold,
        "problem_type": "multiple choice",
    }


def test_a_batch_that_differs_from_its_rows_shows() -> None:
    def first_type_rules(
        prompts: list[str], completions: list[str], problem_type: list[str], **columns: Any
    ) -> list[float]:
        return [float(problem_type[0] == "numerical")] * len(completions)

    found = probe(first_type_rules, Plain())["gold number"]
    assert (found["value"], found["alone"]) == (0.0, 1.0)


def test_an_error_is_kept_as_text_and_does_not_affect_the_others() -> None:
    def fragile(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if "" in completions:
            raise ValueError("nothing to score")
        return [1.0] * len(completions)

    found = probe(fragile, Plain())
    assert found["empty"]["value"] == found["empty"]["alone"] == "ValueError: nothing to score"
    assert found["gold choice"]["value"] == 1.0


def test_messages_are_tried_where_texts_are_not_accepted() -> None:
    def of_messages(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [float(len(completion[0]["content"]) > 0) for completion in completions]

    found = probe(of_messages, Plain())
    assert (found["empty"]["value"], found["gold choice"]["value"]) == (0.0, 1.0)


def test_random_state_is_restored() -> None:
    def dice(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        # three generators, each of which a reward may draw from
        return [random.random() + np.random.rand() + float(len(prompts))] * len(completions)

    def state() -> tuple[Any, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = state()
    assert probe(dice, Plain())
    assert state() == before


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
    assert bool(probe(function, Plain())) is may
