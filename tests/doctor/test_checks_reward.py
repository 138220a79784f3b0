"""Wrong rewards, found by their values and by what they pay for completions of known worth."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small_recordings import case, found, rewarded, stepped

from omni_grpo_core.doctor.causes.reward import RULES
from omni_grpo_core.doctor.checks.reward import LOOKS
from omni_grpo_core.doctor.evidence import Case, Explanation, noted_missing
from omni_grpo_core.doctor.probed import learned
from omni_grpo_core.recorder.plain import Plain
from omni_grpo_core.recorder.probe import probe
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.parse import render

WHOLE = {
    "problem_type": ["multiple choice", "numerical"],
    "options": [["A. Calm", "B. Angry", "C. Sad"], []],
    "solution": [render("c", "t", "B"), render("c", "t", "1200")],
}
BARE = {"answer": ["B", "C"]}


def probed(
    function: Any,
    name: str,
    columns: Mapping[str, Any] = WHOLE,
    values: Sequence[float | None] = (0.0,) * 4,
) -> Any:
    given = {"prompts": ["why?"] * 2, "completions": ["said"] * 2, **columns}
    return rewarded(values, name=name, probe=probe(function, given, Plain()))


def causes(recorded: Case) -> list[str]:
    """The causes of all looks' evidence, proved ones first."""
    evidence = [item for look in LOOKS for item in look(recorded)]
    made: list[Explanation] = [e for rule in RULES for e in rule(recorded, evidence)]
    return [e.cause for e in sorted(made, key=lambda e: not e.proved)]


def severities(call: Any) -> dict[str, str]:
    seen = found(LOOKS, case(call))
    return {fact: e.severity for fact, e in seen.items() if e.origin != "inherited"}


# --------------------------------------------------------------------------- sound rewards


def boxed(prompts: Any, completions: Any, answer: Any, **_: Any) -> list[float]:
    """As in maths recipes: exact, in a box, one column."""
    found = [re.findall(r"\\boxed\{([^}]*)\}", text) for text in completions]
    return [float(bool(f) and f[-1] == a) for f, a in zip(found, answer, strict=True)]


def signed(prompts: Any, completions: Any, answer: Any, **_: Any) -> list[float]:
    """As in R1 recipes: -1 for a wrong answer."""
    shape = re.compile(r"<think>.*</think>\s*<answer>(.*)</answer>", re.DOTALL)
    read = [shape.fullmatch(text.strip()) for text in completions]
    return [1.0 if f and f[1].strip() == a else -1.0 for f, a in zip(read, answer, strict=True)]


def brackets(completions: Any, **_: Any) -> list[float]:
    """A format of its own that no probe has."""
    return [float(text.startswith("{") and text.endswith("}")) for text in completions]


def tag_count(completions: Any, **_: Any) -> list[float]:
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    return [sum(0.25 for tag in tags if text.count(tag) == 1) for text in completions]


def brevity(completions: Any, **_: Any) -> list[float]:
    """Shorter is better: the empty completion earns most."""
    return [-len(text) / 100 for text in completions]


def two_lengths(completions: Any, kind: Any, **_: Any) -> list[float]:
    """Its column is no gold. The wrong answer that is tried is longer than the right one, as is the
    other gold: both paid more, and it was "proved" to pay for wrong answers."""
    return [len(text) / 100 + len(k) for text, k in zip(completions, kind, strict=True)]


def halves(completions: Any, **_: Any) -> list[float]:
    """Two values, by the length alone: all forms were paid and no garbage, by chance."""
    return [0.5 if len(text) % 2 else -0.5 for text in completions]


def the_word_the(completions: Any, **_: Any) -> list[float]:
    """Pays for a word that happens to be in a form: as a format it was unanchored."""
    return [float("The" in text) for text in completions]


def few_tags(completions: Any, **_: Any) -> list[float]:
    return [-float(text.count("<think>")) for text in completions]


def three_values(prompts: Any, completions: Any, letters: Any) -> list[float]:
    """Its gold is in a column of its own name: without it, this was a format that is unanchored."""
    found = [re.search(r"([A-D])</answer>", text) for text in completions]
    return [float(f[1] == a) if f else -1.0 for f, a in zip(found, letters, strict=True)]


def recalled(prompts: Any, completions: Any, solution: Any, **_: Any) -> list[float]:
    """The share of the gold's words: "C." in a box was compared with the whole gold, which is
    paid in full."""
    words = [({*text.split()}, {*gold.split()}) for text, gold in
             zip(completions, solution, strict=True)]  # fmt: skip
    return [len(said & gold) / len(gold) for said, gold in words]


def variety(completions: Any, **_: Any) -> list[float]:
    """Compares with the rest of the batch, as is its purpose."""
    return [1 / completions.count(text) / len(completions) for text in completions]


@pytest.mark.parametrize(
    ("function", "columns", "kind", "form"),
    [
        (Accuracy(), WHOLE, "accuracy", "context-think-answer"),
        (Format(), WHOLE, "format", "context-think-answer"),
        (boxed, BARE, "accuracy", "boxed"),
        (signed, BARE, "accuracy", "think-answer"),
        (brackets, BARE, "other", ""),
        (tag_count, BARE, "format", "context-think-answer"),
        (brevity, BARE, "other", ""),
        (two_lengths, {"kind": ["a place", "a reason"]}, "other", ""),
        (variety, {}, "other", ""),
        (halves, {}, "other", ""),
        (the_word_the, {}, "other", ""),
        (few_tags, {}, "other", ""),
        (three_values, {"letters": ["B", "C"]}, "accuracy", "context-think-answer"),
        (recalled, WHOLE, "accuracy", "verbatim"),
    ],
)  # fmt: skip
def test_what_a_function_measures_is_learned_from_what_it_pays(
    function: Any, columns: Mapping[str, Any], kind: str, form: str
) -> None:
    call = probed(function, f"{getattr(function, '__name__', 'format')}_format", columns)
    if kind == "other":  # also where its name says otherwise
        call = probed(function, "accuracy_reward", columns)
    what = learned(call)
    assert (what.kind, what.form) == (kind, form)
    # stricter, looser or of another kind than ours: a recipe
    assert set(severities(call).values()) <= {"differs"}


def last_number(prompts: Any, completions: Any, answer: Any) -> list[float]:
    """As in maths recipes: of two numbers the last one counts."""
    found = [re.findall(r"-?\d+", text.replace(",", "")) for text in completions]
    return [float(f[-1:] == [a]) for f, a in zip(found, answer, strict=True)]


def by_length(completions: Any, target: Any, **_: Any) -> list[float]:
    """A number in a column is not always an answer."""
    return [-abs(len(text) - goal) for text, goal in zip(completions, target, strict=True)]


def as_tensor(completions: Any, **_: Any) -> Any:
    return np.asarray([text.count("e") for text in completions])


def longer_is_better(completions: Any, answer: Any, **_: Any) -> list[float]:
    """Right answers and length: garbage is longer than any."""
    return [text.endswith(f"{a}</answer>") + len(text) / 300
            for text, a in zip(completions, answer, strict=True)]  # fmt: skip


def short_and_right(completions: Any, answer: Any, **_: Any) -> list[float]:
    return [(f"<answer>{a}</answer>" in text) - len(text) / 1000
            for text, a in zip(completions, answer, strict=True)]  # fmt: skip


def coloured_box(completions: Any, solution: Any, **_: Any) -> list[float]:
    """Overlap with a box in JSON; what is no JSON earns nothing, and raises inside."""
    values = []
    for text, gold in zip(completions, solution, strict=True):
        try:
            values.append(float(json.loads(text)["bbox"] == json.loads(gold)["bbox"]))
        except (ValueError, KeyError, TypeError):
            values.append(0.0)
    return values


@pytest.mark.parametrize(
    ("function", "columns", "true"),
    [
        (last_number, {"answer": ["5", "7"]}, ["reward.number-format"]),  # of 5.0 it reads 0
        (by_length, {"target": [60, 90]}, []),
        (as_tensor, {}, []),
        (longer_is_better, BARE, ["reward.option-format"]),
        (coloured_box, {"solution": ['{"bbox": [1, 2, 3, 4]}'] * 2}, []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("name", ["reward", "accuracy_reward"])
def test_strangers_rewards_break_nothing(
    function: Any, columns: Any, true: list[str], name: str
) -> None:
    recorded = case(probed(function, name, columns), stepped(warnings=("slow: timed out once",)))
    assert {e.severity for e in found(LOOKS, recorded).values()} <= {"differs"}
    assert causes(recorded) == true


def test_a_reward_that_pays_only_a_gold_s_own_words_is_no_format() -> None:
    """An overlap with the gold's context pays the gold alone: as a format it was unanchored. And a
    gold with another answer keeps its context, which mentions the letter too."""

    def overlap(prompts: Any, completions: Any, solution: Any, **_: Any) -> list[float]:
        return [
            float(text.partition("</context>")[0] == gold.partition("</context>")[0])
            for text, gold in zip(completions, solution, strict=True)
        ]

    call = probed(overlap, "overlap", {"solution": [render("B or C", "t", "B")] * 2})
    assert learned(call).kind == "other"
    assert severities(call) == {}


def test_the_project_s_own_rewards_are_no_evidence() -> None:
    assert severities(probed(Format(), "format")) == {}
    assert severities(probed(Accuracy(), "accuracy")) == {}


def test_the_full_reward_may_exceed_one() -> None:
    def accuracy_reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [2 * (v or 0.0) for v in Accuracy()(prompts, completions, **columns)]

    assert severities(probed(accuracy_reward, "accuracy_reward")) == {}


def test_a_reward_that_was_not_tried_is_said_so() -> None:
    recorded = case(rewarded(name="judge"))
    assert found(LOOKS, recorded) == {}
    [note] = noted_missing(recorded)
    assert note.startswith("reward judge was not tried on known answers: it may use a network")


# --------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("values", "error", "fact"),
    [
        ((1.0, math.nan, 1.0, 1.0), None, "not-a-number"),
        ((None,) * 4, None, "never-scored"),
        ((1.0, 1.0), None, "count-differs"),
        ((), "KeyError: 'solution'", "raised"),
    ],
)
def test_values_that_are_no_rewards(values: tuple[Any, ...], error: str | None, fact: str) -> None:
    assert set(found(LOOKS, case(rewarded(values, error=error)))) == {fact}


# --------------------------------------------------------------------------- wrong rewards


def _floor(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [max(0.1, 0.5 * ("table" in text)) for text in completions]


def _swallowed(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    try:
        return [score(text) for text in completions]  # type: ignore[name-defined]  # noqa: F821
    except Exception:
        return [0.0 for _ in completions]


def _first_row(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    kind = [columns["problem_type"][0]] * len(completions)
    values: list[float | None] = []
    for at, text in enumerate(completions):
        own = {"options": [columns["options"][at]], "solution": [columns["solution"][at]]}
        try:
            values += Accuracy()([prompts[at]], [text], problem_type=[kind[at]], **own)
        except Exception:
            values.append(0.0)
    return values


def _tagless(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    read = [[re.findall(r"<answer>(.*?)</answer>", t) or [""] for t in texts]
            for texts in (completions, columns["answer"])]  # fmt: skip
    return [float(a[0] == b[0]) for a, b in zip(*read, strict=True)]


def _error(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
    return [1 - value for value in _as_text(prompts, completions, answer)]


def _inside(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
    return [float(a.lower() in text.lower()) for text, a in zip(completions, answer, strict=True)]


def _as_text(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
    read = [re.findall(r"<answer>(.*)</answer>", text) for text in completions]
    return [float(bool(f) and f[-1] == a) for f, a in zip(read, answer, strict=True)]


def _first_answer(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
    shape = r"<think>.*</think>\s*<answer>.*</answer>"
    read = [
        re.findall(r"<answer>(.*?)</answer>", text) if re.fullmatch(shape, text, re.DOTALL) else []
        for text in completions
    ]
    return [float(bool(f) and f[0] == a) for f, a in zip(read, answer, strict=True)]


@pytest.mark.parametrize(
    ("function", "columns", "values", "cause", "severity"),
    [
        (_floor, WHOLE, (0.1,) * 4, "reward.floor", "breaks"),
        (_floor, WHOLE, (0.1, 0.5, 0.1, 0.5), "reward.floor", "differs"),
        (_swallowed, WHOLE, (0.0,) * 4, "reward.swallowed", "breaks"),
        (_first_row, WHOLE, (0.0,) * 4, "reward.first-type", "breaks"),
        (_tagless, BARE, (1.0,) * 4, "reward.tagless-gold", "breaks"),
        (_error, BARE, (1.0,) * 4, "reward.inverted", "breaks"),
        (_inside, {"answer": ["no", "no"]}, (1.0,) * 4, "reward.substring", "differs"),
        (_as_text, BARE, (0.0, 1.0, 0.0, 0.0), "reward.option-format", "differs"),
        (_first_answer, BARE, (0.0, 1.0, 0.0, 0.0), "reward.first-answer", "differs"),
    ],
)  # fmt: skip
def test_a_cause_is_named(
    function: Any, columns: Mapping[str, Any], values: Any, cause: str, severity: str
) -> None:
    name = "people_focus" if function is _floor else "accuracy_reward"
    call = probed(function, name, columns, values)
    assert causes(case(call))[0] == cause
    assert severity in severities(call).values()


def test_what_pays_for_garbage_alone_is_no_floor() -> None:
    """It gave 1 to whatever has no tags, 0 to a right answer in them, and "a floor of 1" was
    proved."""
    call = probed(_tagless, "accuracy_reward", BARE, (1.0,) * 4)
    assert "reward.floor" not in causes(case(call))


def _late(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    values = _as_text(prompts, completions, **columns)
    return [*values[-1:], *values[:-1]]


def _first_gold(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
    return _as_text(prompts, completions, [answer[0]] * len(completions))


def _turned_golds(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
    return _as_text(prompts, completions, answer[::-1])


def _centred(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    values = _as_text(prompts, completions, **columns)
    return [value - sum(values) / len(values) for value in values]


@pytest.mark.parametrize(
    ("function", "severity", "cause", "says"),
    [
        (_late, "breaks", "reward.by-position", "the value of the row before it"),
        (_first_gold, "breaks", "reward.first-type", "the first row's answer decides"),
        (_turned_golds, "breaks", "", "depends on the other rows"),
        (_centred, "differs", "", "depends on the other rows"),
    ],
)
def test_a_row_s_reward_that_depends_on_others_says_how(
    function: Any, severity: str, cause: str, says: str
) -> None:
    """All of them were "the first row's problem type decides", which is true of none."""
    recorded = case(probed(function, "accuracy_reward", BARE, (0.0, 1.0, 0.0, 0.0)))
    evidence = found(LOOKS, recorded)["rows-depend"]
    assert evidence.severity == severity
    assert says in evidence.sentence
    made = [e.cause for rule in RULES for e in rule(recorded, [evidence])]
    assert made == [cause] * bool(cause)


def test_special_tokens_matter_to_a_reward_that_pays_no_text_with_them() -> None:
    kept = tuple(f"<answer>{letter}</answer><|im_end|>" for letter in "BCBC")
    for function, columns, hurts in (
        (Format(), WHOLE, True), (tag_count, BARE, False), (longer_is_better, BARE, True),
        (short_and_right, BARE, False),
    ):  # fmt: skip
        call = replace(probed(function, "format", columns), completions=kept)
        assert ("special-tokens" in found(LOOKS, case(call))) is hurts
    call = replace(probed(Format(), "format"), completions=(kept[0], "a", "b", "c"))
    assert "special-tokens" not in found(LOOKS, case(call))


@pytest.mark.skipif(sys.gettrace() is not None, reason="coverage traces already")
def test_a_mistake_of_the_code_that_is_caught_is_told_from_what_a_policy_wrote() -> None:
    """Neither says by its name that it pays right answers, nor has a gold that must be paid."""

    def typo(completions: Any, **_: Any) -> list[float]:
        try:
            return [len(text) / lenght for text in completions]  # type: ignore[name-defined]  # noqa: F821
        except Exception:
            return [0.0] * len(completions)

    def own_form(completions: Any, **_: Any) -> list[float]:
        values = []
        for text in completions:
            try:
                values.append(float(re.search(r"<verdict>(\d)", text).group(1)))  # type: ignore[union-attr]
            except AttributeError:
                values.append(0.0)
        return values

    recorded = case(probed(typo, "brevity", {}))
    assert causes(recorded) == ["reward.swallowed"]
    assert "catches \"NameError: name 'lenght'" in found(LOOKS, recorded)["swallows"].sentence
    assert severities(probed(own_form, "brevity", {})) == {}


def test_a_bare_gold_that_no_form_makes_pay_is_no_proof() -> None:
    """It may belong into a form that was not tried, such as the JSON of a box."""
    call = probed(brackets, "accuracy_reward", BARE)
    assert severities(call) == {"gold-unpaid": "differs"}
    assert causes(case(call)) == []


def test_a_recorded_answer_that_is_the_gold_and_unpaid_is_a_proof() -> None:
    """Answers were lowered and golds were not: "in every form that was tried, which may not be its
    own" was all that was said, while completions had the gold in their tags."""

    def lowered(completions: Any, answer: Any, **_: Any) -> list[float]:
        rows = zip(completions, answer, strict=True)
        return [float(f">{gold}<" in text.lower()) for text, gold in rows]

    call = probed(lowered, "accuracy_reward", {"answer": ["B", "C"]})
    said = [f"<answer>{letter}</answer>" for letter in "ABCD"]
    for golds, severity in ((["D", "B", "A", "A"], "breaks"), (["D", "C", "B", "A"], "differs")):
        odd = replace(call, completions=tuple(said), columns={"answer": golds})
        assert severities(odd) == {"gold-unpaid": severity}
        if severity == "breaks":
            sentence = found(LOOKS, case(odd))["gold-unpaid"].sentence
            assert sentence.endswith("; it gave 0 to completion 1, whose answer is 'B'")
            assert causes(case(odd)) == ["reward.gold-unpaid"]


def test_a_function_that_raises_is_judged_by_what_it_can_score() -> None:
    def accuracy(prompts: Any, completions: Any, **columns: Any) -> Any:
        if "numerical" in columns["problem_type"]:
            raise ModuleNotFoundError("No module named 'jiwer'")
        return Accuracy()(prompts, completions, **columns)

    assert causes(case(probed(accuracy, "accuracy"))) == ["reward.raised"]


def test_a_judge_that_is_down_and_one_whose_reply_cannot_be_parsed() -> None:
    zero = rewarded((0.0,) * 4, name="context_judge")
    down = stepped(warnings=("judge request failed: connection refused",))
    assert causes(case(zero, down))[0] == "reward.judge-down"
    unread = stepped(warnings=("cannot read the judge's reply '5 points'",))
    assert causes(case(zero, unread))[0] == "reward.judge-format"


def test_what_a_silent_judge_caught_is_the_proof() -> None:
    """It logged nothing, and every completion lost the same reward."""
    zero = rewarded((0.0,) * 4, name="helpful")
    down = replace(zero, caught={"ConnectError: [Errno 111] Connection refused": 4})
    assert causes(case(down)) == ["reward.judge-down"]
    assert "it caught 'ConnectError" in found(LOOKS, case(down))["constant"].sentence
    unread = {"ValueError: could not convert string to float: '5 points'": 4}
    assert causes(case(replace(zero, caught=unread))) == ["reward.judge-format"]
    once = replace(zero, caught={"ReadTimeout: timed out": 1})
    assert causes(case(once)) == [], "the others were scored"
    own = {"ValueError: could not convert string to float: 'two'": 4}
    explained = [e for rule in RULES for e in rule(case(zero), [
        *(e for look in LOOKS for e in look(case(replace(zero, caught=own))))])]  # fmt: skip
    assert [e.proved for e in explained] == [False], "a completion says two, perhaps no reply did"


def test_malformed_completions_are_inherited() -> None:
    evidence = found(LOOKS, case(probed(Format(), "format")))["all-malformed"]
    assert (evidence.stage, evidence.origin) == ("parsed", "inherited")
