"""What public trainers' rewards got wrong, one test per row of the fault catalogue.

Each test states what happened, reproduces the faulty code where that says more than words, and
requires the right behaviour of ours.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from omni_grpo_core.errors import DataError, RewardError
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.compose import Component, Composition
from omni_grpo_core.rewards.conformance import run
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.health import Step, alarms
from omni_grpo_core.rewards.parse import render
from omni_grpo_core.rewards.people_focus import PeopleFocus
from omni_grpo_core.types import Score

GARBAGE = "<contextsystemsystemsystem schöne " + "system" * 300
CONTEXT = "A man smiles at a woman."


def completion(answer: str, think: str = "So be it.") -> str:
    return render(CONTEXT, think, answer)


def accuracy(kind: str, gold: str, *answers: str, options: list[str] | None = None) -> list[Any]:
    n = len(answers)
    return Accuracy()(
        ["q"] * n,
        [completion(answer) for answer in answers],
        problem_type=[kind] * n,
        options=[options] * n,
        solution=[f"<answer>{gold}</answer>"] * n,
    )


def test_reward_floor_a_default_paid_to_anything() -> None:
    """The incident. People focus paid 0.3 for any text; its weight made 0.10 of it. Format and
    accuracy were 0, so the reward sat at exactly 0.10 from the first step, and looked like a
    reward that had not started to rise yet.
    """
    rewards = [Format(), Accuracy(), PeopleFocus()]
    columns = {"problem_type": ["judge"], "solution": [render(CONTEXT, "t", "yes")]}
    assert [r(["q"], [GARBAGE], **columns) for r in rewards] == [[0.0], [0.0], [0.0]]

    def people_focus(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [0.3 for _ in completions]

    theirs = run({"people_focus": people_focus}, clock=lambda: 0.0)
    assert {"garbage", "gold"} <= {failure.check for failure in theirs.failures}

    scores = {"format": [0.0] * 2, "accuracy": [0.0] * 2, "people_focus": [0.3] * 2}
    steps = [Step(scores, [0.1] * 2, ["clip"] * 2, [True] * 2)] * 5
    [pinned] = [alarm for alarm in alarms(steps) if alarm.name == "pinned"]
    assert pinned.reward == "people_focus"


def test_reward_tagless_gold_matches_garbage() -> None:
    """Gold and completion went through one extractor that returned "" when it found no tags. A
    gold written without tags then equalled every malformed completion, and garbage scored 1.0.
    """

    def extract(text: str) -> str:
        found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
        return found.group(1).strip() if found else ""

    assert extract(GARBAGE) == extract("B")  # the fault: full marks for this

    for gold in ("B", "", "<answer></answer>"):
        with pytest.raises(DataError, match=r"row 0 \(sample_id 'clip7'\)"):
            Accuracy()(
                ["q"],
                [GARBAGE],
                sample_id=["clip7"],
                problem_type=["multiple choice"],
                solution=[gold],
            )


def test_reward_first_type_rules_the_whole_batch() -> None:
    """``problem_type[0]`` picked the measure for all rows, so a row's score depended on the first
    row: "1,000" was right after a numerical row and wrong after a multiple choice.
    """
    rows = [("numerical", "1000", "1,000"), ("judge", "yes", "Yes."), ("OCR", "stop", "stop")]

    def score(order: list[int]) -> list[float | None]:
        chosen = [rows[i] for i in order]
        return Accuracy()(
            ["q"] * len(chosen),
            [completion(answer) for _, _, answer in chosen],
            problem_type=[kind for kind, _, _ in chosen],
            solution=[f"<answer>{gold}</answer>" for _, gold, _ in chosen],
        )

    assert score([0, 1, 2]) == score([2, 0, 1]) == score([1, 2, 0]) == [1.0, 1.0, 1.0]


def test_reward_first_answer_an_answer_inside_think_wins() -> None:
    """The first ``<answer>`` anywhere counted. A policy that listed "maybe <answer>A</answer>,
    maybe <answer>B</answer>" while thinking was graded on its first guess.
    """
    musing = completion("B").replace("So be it.", "maybe <answer>A</answer> after all")
    columns = {"problem_type": ["multiple choice"], "solution": ["<answer>A</answer>"]}
    assert Accuracy()(["q"], [musing], **columns) == [0.0]
    [score] = Format().explain(["q"], [musing])
    assert score == Score(0.0, f"<answer> inside <think> at {musing.index('<answer>')}")


def test_reward_unanchored_junk_passes_and_a_newline_fails() -> None:
    """``re.match(r"<context>.*?</answer>", text)`` is not anchored at the end: text could follow
    the answer, and did, up to the limit. At the beginning it is: a leading newline cost the whole
    reward.
    """
    usual = re.compile(r"<context>.*?</context>\s*<think>.*?</think>\s*<answer>.*?</answer>", re.S)
    good = completion("A")
    trailing, newline = good + " and on it goes" * 50, "\n" + good
    assert [bool(usual.match(text)) for text in (trailing, newline)] == [True, False]  # the fault
    assert Format()(["q"] * 3, [good, trailing, newline]) == [1.0, 0.0, 1.0]


def test_reward_substring_a_word_inside_another() -> None:
    """``"no" in answer.lower()`` made "I cannot know" a No, and ``"yes" in …`` made "yes and no" a
    Yes: hedging and not knowing got full marks.
    """
    assert "no" in "i cannot know"  # the fault
    hedges = ("I cannot know", "yes and no", "Yes. No.", "nobody", "yesterday")
    assert accuracy("judge", "No", *hedges) == [0.0] * 5
    assert accuracy("judge", "Yes", *hedges) == [0.0] * 5
    assert accuracy("judge", "No", "No.", "no, he is not") == [1.0, 1.0]


def test_reward_option_format_the_right_letter_in_other_clothes() -> None:
    """Answer and gold were compared as strings: "A.", "(A)", "a" and "A. Urgent" scored 0 against
    "A", so the policy was trained away from right answers.
    """
    options = ["A. Urgent", "B. Calm"]
    clothes = ("A", "A.", "(A)", "a", "A. Urgent", "Urgent")
    assert accuracy("multiple choice", "A", *clothes, options=options) == [1.0] * 6
    assert accuracy("multiple choice", "A", "B", "A. Calm", options=options) == [0.0, 0.0]


def test_reward_option_set_order_spacing_and_repetition() -> None:
    """``"A, E".split(",")`` contains " E", which is not "E": half marks for a right answer. And as
    a list "A,A" counted twice, so repeating a certain letter raised the score.
    """
    options = [f"{letter}. {letter}word" for letter in "ABCDE"]
    assert accuracy("emer_ov_mc", "A,E", "A, E", "E,A", " a ,e", options=options) == [1.0] * 3
    once, twice, thrice = accuracy("emer_ov_mc", "A,E", "A", "A,A", "A, A, A", options=options)
    assert once == twice == thrice == 2 / 3


def test_reward_number_format_and_a_none_that_falls_through() -> None:
    """``float("1,000")`` raised, the parser returned ``None``, and ``None == None`` matched any
    answer that was not a number either, while "1,000" itself was wrong.
    """
    assert accuracy("numerical", "1000", "1,000", "1000.0", "1e3") == [1.0, 1.0, 1.0]
    assert accuracy("numerical", "3", "3.0", "3.", " 3") == [1.0, 1.0, 1.0]
    assert accuracy("numerical", "1,000", "a lot", "None", "nan") == [0.0, 0.0, 0.0]
    with pytest.raises(DataError, match="wanted a number"):
        accuracy("numerical", "a lot", "very many")


def test_reward_word_wer_a_sentence_without_spaces_is_one_word() -> None:
    """Word error rate splits at spaces. A Chinese line is then one word: a single wrong character
    out of six cost everything, exactly as much as garbage.
    """
    gold, near = "禁止在此停车", "禁止在此停放"
    assert len(gold.split()) == 1  # the fault: rate 1 for any difference
    [score] = accuracy("OCR", gold, near)
    assert score == pytest.approx(5 / 6, abs=1e-12)  # float division only
    assert accuracy("OCR", gold, "完全不同的字") == [0.0]


def test_reward_swallowed_an_undefined_scorer_scored_zero_for_a_whole_run() -> None:
    """The free-form branch called a scorer that was never imported. ``except Exception: reward =
    0.0`` turned the NameError into a score, and for a whole run no free-form row could earn any.
    """

    def theirs(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        try:
            return [rouge(text) for text in completions]  # type: ignore[name-defined]  # noqa: F821
        except Exception:
            return [0.0 for _ in completions]

    assert theirs(["q"], [completion("yes")]) == [0.0]  # the fault
    report = run({"theirs": theirs}, clock=lambda: 0.0)
    assert {failure.check for failure in report.failures} == {"gold"}

    def honest(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [rouge(text) for text in completions]  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(RewardError, match="reward 'honest': found NameError: name 'rouge'"):
        Composition([Component(honest)])(["q"], [completion("yes")])


def judged(url: str) -> Score:
    from omni_grpo_core.rewards.judge import Endpoint, Judge, JudgeReward

    judge = Judge(Endpoint(url, "m", attempts=2, backoff=0.0))
    [score] = JudgeReward("context", judge).explain(
        ["q"], [completion("A")], solution=[completion("A")]
    )
    return score


def test_reward_judge_down_is_unscored_not_zero() -> None:
    """The judge's server went down overnight. Every context reward became 0, and the policy learned
    for hours that describing the clip does not pay.
    """
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as once:
        url = f"http://127.0.0.1:{once.server_port}/v1"
    score = judged(url)
    assert score.value is None
    assert score.reason.startswith("judge: no connection")


@pytest.mark.parametrize("reply", ["5 points", "Score: 5", "5/10", "five"])
def test_reward_judge_format_is_unscored_not_zero_and_not_guessed(reply: str) -> None:
    """The judge was asked for "5" and answered "5 points"; ``float`` raised, and the row got 0.
    Taking the first number instead would be no better: "1 of 10 aspects is wrong, so 9".
    """

    class Talkative(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Talkative) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        score = judged(f"http://127.0.0.1:{server.server_port}/v1")
        server.shutdown()
        thread.join()
    assert score == Score(None, f"judge: bad verdict: not JSON: {reply!r}")


def test_reward_by_position_columns_read_after_reordering() -> None:
    """Completions were regrouped by problem type, the solutions were not: row 0's completion was
    compared with row 1's gold. Ours never regroup, and a column that has lost rows is refused.
    """
    columns = {
        "problem_type": ["multiple choice", "numerical", "multiple choice"],
        "solution": [f"<answer>{gold}</answer>" for gold in ("A", "5", "B")],
    }
    answers = [completion("A"), completion("5"), completion("B")]
    assert Accuracy()(["q"] * 3, answers, **columns) == [1.0, 1.0, 1.0]
    short = {**columns, "solution": columns["solution"][1:]}
    with pytest.raises(RewardError, match="column 'solution': found 2 values, wanted a list of 3"):
        Accuracy()(["q"] * 3, answers, **short)


def test_reward_nan_from_one_reward_spoils_nothing_else() -> None:
    """One division by the length of an empty answer gave NaN. The sum of the rewards was NaN, the
    group's mean and deviation were NaN, the loss was NaN, and after the step so were the weights.
    """

    def brevity(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float("nan") if not text else 0.5 for text in completions]

    both = Composition([Component(brevity), Component(Format())])
    report = both.report(["q"] * 2, ["", completion("A")])
    assert [score.value for score in report.total] == [0.0, 0.75]
    assert report.scores["brevity"][0] == Score(None, "the function returned nan")
    theirs: dict[str, Callable[..., Any]] = {"brevity": brevity}
    assert "value" in {failure.check for failure in run(theirs, clock=lambda: 0.0).failures}
    step = Step({"brevity": [float("nan"), 0.5]}, [0.0, 0.75], ["a", "a"], [False] * 2)
    [alarm] = alarms([step], patience=1)
    assert (alarm.name, alarm.reward) == ("not-a-number", "brevity")
