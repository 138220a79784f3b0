from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.compose import Component, Composition
from omni_grpo_core.rewards.conformance import ConformanceReport, run
from omni_grpo_core.rewards.corpus import corpus
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.load import load_reward
from omni_grpo_core.rewards.people_focus import PeopleFocus


class Ticks:
    """A clock advanced by the function under test: growth without measuring time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def failed(report: ConformanceReport) -> set[str]:
    return {failure.check for failure in report.failures}


def test_our_rewards_pass() -> None:
    both = Composition([Component(Format()), Component(Accuracy())])
    functions: dict[str, Callable[..., Any]] = {
        "format": Format(),
        "accuracy": Accuracy(),
        "people": PeopleFocus(),
        "both": both,
    }
    report = run(functions, clock=Ticks())
    assert report.failures == ()
    assert report.ok
    assert report.cases == len(corpus()) > 100


def test_case_names_are_unique_and_baselines_exist() -> None:
    names = [case.name for case in corpus()]
    assert len(set(names)) == len(names)
    assert {case.baseline for case in corpus() if case.baseline} <= set(names)
    assert corpus() == corpus()


# ------------------------------------------------------------- other people's reward functions


def pays_a_default(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The incident's people-focus reward."""
    return [0.1 + 0.9 * ("smile" in text) for text in completions]


def first_answer_wins(
    prompts: list[str], completions: list[str], solution: list[str], **_: Any
) -> list[float]:
    """A regular expression that takes the first <answer>, wherever it is."""

    def answer(text: str) -> str:
        found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
        return found.group(1).strip() if found else ""

    return [
        float(answer(text) == answer(gold))
        for text, gold in zip(completions, solution, strict=True)
    ]


def first_row_rules(
    prompts: list[str], completions: list[str], problem_type: list[str], **columns: Any
) -> list[float | None]:
    """One problem type for the whole batch."""
    kinds = [problem_type[0]] * len(completions)
    return Accuracy()(prompts, completions, problem_type=kinds, **columns)


def raises(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(len(text.encode()) > 0) * 0.0 for text in completions]


def not_a_number(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float("nan") if not text else 0.0 for text in completions]


def obeys(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A judge that can be talked into a better grade."""
    return [
        1.0
        if text.startswith("<context>A man")
        else 0.5
        if "So be it" in text and "Ignore" in text
        else 0.0
        for text in completions
    ]


def never_scores(prompts: list[str], completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def wants_another_column(
    prompts: list[str], completions: list[str], ground_truth: list[str], **_: Any
) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "checks"),
    [
        (pays_a_default, {"garbage"}),
        (first_answer_wins, {"garbage", "trick"}),
        (first_row_rules, {"exception", "permutation"}),
        (raises, {"exception", "gold"}),
        (not_a_number, {"value", "gold"}),
        (obeys, {"trick"}),
        (never_scores, {"gold"}),
        (wants_another_column, {"callable"}),
    ],
)
def test_faults_of_other_functions_are_found(
    function: Callable[..., Any], checks: set[str]
) -> None:
    report = run({"theirs": function}, clock=Ticks())
    assert failed(report) == checks
    assert not report.functions[0].ok


def test_one_problem_type_for_all_rows_depends_on_row_order() -> None:
    def first_options_rule(
        prompts: list[str], completions: list[str], options: list[list[str]], **columns: Any
    ) -> list[float | None]:
        return [float(len(options[0]) == 3)] * len(completions)

    report = run({"theirs": first_options_rule}, clock=Ticks())
    assert {"batch", "permutation"} <= failed(report)


def test_a_function_that_only_accepts_conversations_gets_them() -> None:
    def conversational(
        prompts: list[Any], completions: list[Any], **columns: Any
    ) -> list[float | None]:
        texts = [completion[0]["content"] for completion in completions]
        return Format()(prompts, texts)

    report = run({"theirs": conversational}, clock=Ticks())
    assert report.ok
    assert report.functions[0].conversational


def test_growth_is_measured_by_the_given_clock() -> None:
    ticks = Ticks()

    def quadratic(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        ticks.now += sum(len(text) ** 2 for text in completions) / 1e9
        return Format()(prompts, completions)

    def linear(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        ticks.now += sum(len(text) for text in completions) / 1e5
        return Format()(prompts, completions)

    report = run({"quadratic": quadratic, "linear": linear}, clock=ticks)
    assert {(failure.function, failure.check) for failure in report.failures} == {
        ("quadratic", "linear")
    }
    assert all("power 2.0" in failure.got for failure in report.failures)
    assert [result.ok for result in report.functions] == [False, True]


def test_floor_and_top_of_other_scales() -> None:
    def minus_one_to_two(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [2.0 if value else -1.0 for value in Format()(prompts, completions)]

    assert failed(run({"theirs": minus_one_to_two}, top=1.0, clock=Ticks())) == {"gold"}
    assert run({"theirs": minus_one_to_two}, floor=-1.0, top=2.0, clock=Ticks()).ok


# ------------------------------------------------------------- other kinds of functions


def answered(completion: str, gold: str) -> bool:
    """R1's layout, and golds without tags."""
    found = re.fullmatch(r"<think>.*?</think>\s*<answer>(.*?)</answer>", completion, re.DOTALL)
    return found is not None and "<" not in found[1] and found[1].strip() == gold


def r1_accuracy(
    prompts: list[str], completions: list[str], solution: list[str], **_: Any
) -> list[float]:
    return [float(answered(*pair)) for pair in zip(completions, solution, strict=True)]


def r1_format(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    layout = re.compile(r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$", re.DOTALL)
    return [float(bool(layout.match(text))) for text in completions]


def letters_only(
    prompts: list[str],
    completions: list[str],
    solution: list[str],
    problem_type: list[str],
    **_: Any,
) -> list[float]:
    """Only knows options: everything else earns nothing."""
    return [
        float(kind == "multiple choice" and answered(text, gold))
        for text, gold, kind in zip(completions, solution, problem_type, strict=True)
    ]


def signed(
    prompts: list[str], completions: list[str], solution: list[str], **_: Any
) -> list[float]:
    """Shorter is better, and a wrong answer costs something."""
    return [
        (1.0 if answered(text, gold) else -1.0) / (1 + len(text) / 1000)
        for text, gold in zip(completions, solution, strict=True)
    ]


def too_long(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
) -> list[float]:
    return [-1.0 if len(ids) > 1000 else 0.0 for ids in completion_ids]


@pytest.mark.parametrize(
    ("function", "kind", "layout", "pays"),
    [
        (r1_accuracy, "content", "think and answer (R1), bare golds", 8),
        (r1_format, "format", "think and answer (R1)", 8),
        (letters_only, "content", "think and answer (R1), bare golds", 1),
        (signed, "signed", "think and answer (R1), bare golds", 8),
        (too_long, "penalty", "context, think and answer", 0),
    ],
)
def test_a_function_is_judged_by_its_own_kind(
    function: Callable[..., Any], kind: str, layout: str, pays: int
) -> None:
    report = run({"theirs": function}, clock=Ticks())
    assert report.failures == ()
    [found] = report.functions
    assert (found.kind, found.layout, len(found.pays)) == (kind, layout, pays)


def test_what_a_kind_must_not_pay_for_is_found_in_its_own_layout() -> None:
    """The first answer wins in R1's layout too, wherever it stands; a signed one pays garbage."""

    def first(
        prompts: list[str], completions: list[str], solution: list[str], **_: Any
    ) -> list[float]:
        pairs = zip(completions, solution, strict=True)
        return [float(f"<answer>{gold}</answer>" in re.sub(r"\s", "", text) or answered(text, gold))
                for text, gold in pairs]  # fmt: skip

    def half(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [
            0.5 if "system" in text else value
            for text, value in zip(completions, signed(prompts, completions, **_), strict=True)
        ]

    assert "trick" in failed(run({"theirs": first}, clock=Ticks()))
    assert failed(run({"theirs": half}, clock=Ticks())) == {"garbage"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rewards_of_trl() -> None:
    """No finding against any of them, as none is at fault."""
    pytest.importorskip("trl")
    made = "get_soft_overlong_punishment(max_completion_len=1000, soft_punish_cache=200)"
    names = (
        *("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", made),
        *("get_cosine_scaled_reward(max_len=1000)", "get_repetition_penalty_reward()"),
    )
    functions = {name: load_reward(f"trl.rewards:{name}") for name in names}
    report = run(functions, clock=Ticks())
    assert report.failures == ()
    kinds = [function.kind for function in report.functions]
    assert kinds == ["content", "content", "format", "penalty", "signed", "penalty"]
    assert [f.pays for f in report.functions if f.kind in ("content", "signed")] == [
        ("numerical", "regression")
    ] * 3


# ------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("fromat", "an unknown name"),
        ("context", "no judge"),
        ("no_such_module_here:f", "ModuleNotFoundError while importing it"),
        ("math:no_such", "nothing named 'no_such' in module 'math'"),
        ("math:pi", "found float"),
        ("math:sqrt(2", "arguments that cannot be read"),
        ("math:sqrt(2)", "arguments that cannot be read"),
        ("math:sqrt(x=open('f'))", "arguments that cannot be read"),
        ("collections:Counter(**{})", "arguments that cannot be read"),
        (":f", "ValueError while importing it"),
        ("math:", "nothing named ''"),
        ("omni_grpo_core.rewards.judge:JudgeReward", "a class that needs arguments"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_named(name: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_reward(name)


def test_judged_rewards_load_with_a_judge() -> None:
    from omni_grpo_core.rewards.judge import Endpoint, Judge

    judge = Judge(Endpoint("http://localhost:1/v1", "m"))
    names = [getattr(load_reward(name, judge), "__name__", "") for name in ("context", "reasoning")]
    assert names == ["context", "reasoning"]
