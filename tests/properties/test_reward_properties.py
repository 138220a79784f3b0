"""Properties that hold for every text, not only for hand-picked ones.

``HYPOTHESIS_PROFILE=slow`` runs 20,000 examples of each.
"""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from omni_grpo_core.rewards import Reward
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.compose import Component, Composition, Gate
from omni_grpo_core.rewards.degenerate import degenerate
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.judge_prompt import BadVerdict, Question, read_verdict
from omni_grpo_core.rewards.parse import SECTIONS, TAG, parse, render
from omni_grpo_core.rewards.people_focus import PeopleFocus
from omni_grpo_core.types import Malformed, Parsed

CHARACTERS = st.characters(exclude_categories=())  # lone surrogates too
PIECES = st.sampled_from(
    [f"<{slash}{name}>" for slash in ("", "/") for name in SECTIONS]
    + ["\n", " ", "A", "B.", "(c)", "A, E", "1,000", "-3.5e2", "50%", "1/0", "½", "10²", "$"]
    + ["\\frac{1}{2}", "^{9}", "yes", "No.", "he smiles at her", "他看着她笑", "，", "<", "\\"]
    + ["NaN", "joy, 高兴", "\x00", "\ud800"]
)  # fmt: skip
FREE = st.text(CHARACTERS, max_size=60)
MIXED = st.lists(PIECES | FREE, max_size=12).map("".join)


def no_tag(text: str) -> bool:
    return not TAG.search(text)


CONTENT = (MIXED | FREE).filter(lambda text: bool(text.strip()) and no_tag(text))
WELL_FORMED = st.builds(render, CONTENT, CONTENT, CONTENT)
COMPLETIONS = FREE | MIXED | WELL_FORMED

OPTIONS = ["A. Calm", "B. Angry", "C. Sad, but hopeful", "D. Joy", "E. Plan B"]
CONTEXT = "A man smiles at a woman; she nods and speaks softly."
GOLDS = {
    "multiple choice": "C",
    "emer_ov_mc": "A, D",
    "numerical": "1,250.5",
    "regression": "-12.5",
    "OCR": "no entry 禁止入内",
    "free-form": "because he tells an old joke",
    "emer_ov": "joy, curiosity",
    "judge": "no",
}
REWARDS: list[Reward] = [Format(), Format(graded=True, name="graded"), Accuracy(), PeopleFocus()]


def columns(kinds: list[str]) -> dict[str, list[object]]:
    return {
        "problem_type": list(kinds),
        "options": [OPTIONS for _ in kinds],
        "solution": [render(CONTEXT, "t", GOLDS[kind]) for kind in kinds],
    }


def accuracy(kind: str, answer: str) -> float:
    [value] = Accuracy()(["q"], [render("c", "t", answer)], **columns([kind]))
    assert value is not None
    return value


@given(COMPLETIONS, st.sampled_from(list(GOLDS)))
def test_any_text_gets_a_score_or_a_reason_and_never_an_exception(
    completion: str, kind: str
) -> None:
    for reward in REWARDS:
        [score] = reward.explain(["q"], [completion], **columns([kind]))
        assert score.value is None or 0.0 <= score.value <= 1.0
        assert score.reason


@pytest.mark.parametrize("kind", GOLDS)
@given(MIXED | FREE)
def test_any_well_formed_answer_gets_a_score(kind: str, answer: str) -> None:
    assume(answer.strip() and no_tag(answer))
    assert 0.0 <= accuracy(kind, answer) <= 1.0


@given(COMPLETIONS)
def test_parse_reports_exact_positions(completion: str) -> None:
    parsed = parse(completion)
    if isinstance(parsed, Malformed):
        assert parsed.what
        assert 0 <= parsed.where <= len(completion)
        return
    ends = [0]
    for name, section in zip(SECTIONS, (parsed.context, parsed.think, parsed.answer), strict=True):
        assert completion[section.start : section.end] == section.text
        assert completion[: section.start].endswith(f"<{name}>")
        assert completion[section.end :].startswith(f"</{name}>")
        assert section.text.strip()
        assert section.start > ends[-1]
        ends.append(section.end)


@given(CONTENT, CONTENT, CONTENT)
def test_parse_after_render_is_the_identity(context: str, think: str, answer: str) -> None:
    parsed = parse(render(context, think, answer))
    assert isinstance(parsed, Parsed)
    assert (parsed.context.text, parsed.think.text, parsed.answer.text) == (context, think, answer)


@given(COMPLETIONS, st.text(st.sampled_from(" \t\r\n\u3000"), max_size=5))
def test_whitespace_at_the_ends_changes_no_reward(completion: str, space: str) -> None:
    for reward in REWARDS:
        values = reward(["q"] * 2, [completion, space + completion + space], **columns(["OCR"] * 2))
        assert values[0] == values[1]


@given(WELL_FORMED, FREE)
def test_junk_at_the_end_scores_zero(completion: str, junk: str) -> None:
    assume(junk.strip())
    assert Format()(["q"], [completion + junk]) == [0.0]
    assert Accuracy()(["q"], [completion + junk], **columns(["free-form"])) == [0.0]


@given(
    st.lists(st.tuples(COMPLETIONS, st.sampled_from(list(GOLDS))), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_permuting_rows_permutes_scores_and_a_batch_scores_like_its_rows(rows, random) -> None:  # type: ignore[no-untyped-def]
    order = random.sample(range(len(rows)), len(rows))
    mixture = Composition([Component(reward) for reward in REWARDS])
    explained: list[Reward | Composition] = [*REWARDS, mixture]
    for reward in explained:
        texts = [text for text, _ in rows]
        kinds = [kind for _, kind in rows]
        batch = reward.explain(["q"] * len(rows), texts, **columns(kinds))
        shuffled = reward.explain(
            ["q"] * len(rows), [texts[i] for i in order], **columns([kinds[i] for i in order])
        )
        assert shuffled == [batch[i] for i in order]
        singles = [reward.explain(["q"], [text], **columns([kind]))[0] for text, kind in rows]
        assert singles == batch


@given(st.sets(st.sampled_from("ABCDE")), st.sampled_from("AD"))
def test_another_correct_option_never_lowers_a_set_answer(given_set: set[str], right: str) -> None:
    assume(given_set)
    before = accuracy("emer_ov_mc", ",".join(sorted(given_set)))
    assert accuracy("emer_ov_mc", ",".join(sorted(given_set | {right}))) >= before


@given(st.sets(st.sampled_from("ABCDE"), min_size=1), st.sampled_from("BCE"))
def test_another_wrong_option_never_raises_a_set_answer(given_set: set[str], wrong: str) -> None:
    before = accuracy("emer_ov_mc", ",".join(sorted(given_set)))
    assert accuracy("emer_ov_mc", ",".join(sorted(given_set | {wrong}))) <= before


WORDS = st.sampled_from(["joy", "glad", "curious", "disgust", "calm", "xyz", "开心"])


@given(st.lists(WORDS, min_size=1), st.sampled_from(["happy", "curiosity"]))
def test_another_correct_word_never_lowers_an_open_answer(words: list[str], right: str) -> None:
    assert accuracy("emer_ov", ", ".join([*words, right])) >= accuracy("emer_ov", ", ".join(words))


@given(st.lists(WORDS, min_size=1), st.randoms(use_true_random=False))
def test_order_and_repetition_of_words_do_not_matter(words, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = random.sample(words * 2, len(words) * 2)
    assert accuracy("emer_ov", ", ".join(shuffled)) == accuracy("emer_ov", "，".join(words))


@given(st.integers(-10_000, 10_000), st.integers(-10_000, 10_000))
def test_a_closer_number_never_scores_less(a: int, b: int) -> None:
    near, far = sorted((a, b), key=lambda n: abs(n / 100 + 12.5))
    assert accuracy("regression", f"{near / 100:.2f}") >= accuracy("regression", f"{far / 100:.2f}")


@given(st.integers(-(10**12), 10**12))
def test_an_integer_equals_itself_however_it_is_written(n: int) -> None:
    gold = {"problem_type": ["numerical"], "solution": [f"<answer>{n}</answer>"]}
    signed = f" +{n}" if n >= 0 else f"−{-n}"
    for way in (f"{n:,}", f"{n}.0", f"{n}.", f"{100 * n}%", f"{2 * n}/2", f"{n}e0", signed):
        assert Accuracy()(["q"], [render("c", "t", way)], **gold) == [1.0], way


@given(st.lists(st.none() | st.floats(0, 1), min_size=2, max_size=2), st.floats(0, 1))
def test_a_composition_stays_in_range_and_is_unscored_only_if_every_part_is(
    values: list[float | None], at_least: float
) -> None:
    def fixed(name: str, value: float | None) -> Reward:
        class Fixed(Format):
            def __call__(self, prompts, completions, **columns):  # type: ignore[no-untyped-def]
                return [value for _ in completions]

            explain = None  # type: ignore[assignment]

        return Fixed(name=name)

    a, b = fixed("a", values[0]), fixed("b", values[1])
    [total] = Composition([Component(a), Component(b, 2.0, Gate("a", at_least))])(["q"], ["t"])
    if values[0] is None:
        # a is the gate of b: while a is unscored, b is excluded from the mean too
        assert total is None
    else:
        assert total is not None
        assert 0.0 <= total <= 1.0


@given(st.lists(st.integers(0, 300), max_size=300), FREE)
def test_the_degeneracy_check_accepts_any_input(ids: list[int], text: str) -> None:
    reasons = degenerate(ids, text, finish_reason="stop", eos_ids={0}, special_ids={0, 1})
    assert all(isinstance(reason, str) and reason for reason in reasons)


KEYS = st.sampled_from(["score", "reason", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(CHARACTERS, max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


@given(JSON.map(json.dumps) | FREE)
def test_a_judges_reply_is_an_integer_score_in_range_or_refused(reply: str) -> None:
    try:
        verdict = read_verdict(reply)
    except BadVerdict:
        return
    assert set(json.loads(reply)) == {"score", "reason"}
    assert verdict.score in range(11)
    assert not math.isnan(verdict.score)


@given(FREE | MIXED, FREE)
def test_a_judge_gets_the_unchanged_text_between_unpredictable_delimiters(
    judged: str, question: str
) -> None:
    asked = Question("answer", question, ("A",), None, "gold", judged)
    system, user = (message["content"] for message in asked.messages())
    begin, data, end = user.split("\n")
    nonce = begin.removeprefix("BEGIN ")
    assert (begin, end) == (f"BEGIN {nonce}", f"END {nonce}")
    assert f"`BEGIN {nonce}`" in system
    assert data.isascii()
    assert data.isprintable()
    assert json.loads(data)["judged"] == judged
    assert json.loads(data)["question"] == question
    assert asked.key("m") == asked.key("m") != asked.key("other")
