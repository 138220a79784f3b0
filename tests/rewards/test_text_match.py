from __future__ import annotations

import pytest

from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.parse import render
from omni_grpo_core.types import Score


def explain(kind: str, gold: str, answer: str) -> Score:
    [result] = Accuracy().explain(
        ["q"],
        [render("c", "t", answer)],
        problem_type=[kind],
        solution=[f"<answer>{gold}</answer>"],
    )
    return result


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [
        ("no entry after dark", "no entry after dark", 1.0),
        ("no entry after dark", " no  entry\nafter dark ", 1.0),
        ("no entry after dark", "no entry after", 0.75),
        ("no entry after dark", "no exit after dark", 0.75),
        ("no entry after dark", "NO ENTRY AFTER DARK", 0.0),
        ("no entry after dark", "x " * 8, 0.0),
        ("禁止入内", "禁止入内", 1.0),
        ("禁止入内", "禁止 入内", 1.0),
        ("禁止入内", "禁止入门", 0.75),
        ("ＯＰＥＮ now", "OPEN now", 1.0),
        ("ห้ามเข้า", "ห้ามเข้า", 1.0),
        ("!?", "!?", 1.0),
    ],
)
def test_ocr_pays_one_minus_the_error_rate(gold: str, answer: str, value: float) -> None:
    assert explain("OCR", gold, answer).value == value


def test_ocr_says_which_rate() -> None:
    assert explain("OCR", "禁止入内", "禁止").reason == "character error rate 0.500"
    assert explain("OCR", "no entry", "entry").reason == "word error rate 0.500"


def test_megabytes_are_not_aligned() -> None:
    result = explain("OCR", "no entry", "a b " * 100_000)
    assert result == Score(0.0, "word error rate at least 1: 200000 words for 2")
    assert explain("free-form", "no entry", "a b " * 100_000).value == 0.0


@pytest.mark.parametrize(
    "gold", ["he smiles at her", "joy", "他对她微笑", "笑", "他笑 smiles", "😀", "!!"]
)
def test_the_gold_itself_earns_one(gold: str) -> None:
    assert explain("free-form", gold, gold).value == 1.0
    assert explain("OCR", gold, gold).value == 1.0


def test_free_form_by_hand() -> None:
    # tokens a b c d against a b x d: rouge1 3/4, rouge2 1/3 (ab), rougeL 3/4
    value = explain("free-form", "a b c d", "A, b: x d!").value
    assert value == pytest.approx((3 / 4 + 1 / 3 + 3 / 4) / 3, abs=1e-12)  # float rounding only
    # the same with characters, where the script has no spaces
    assert explain("free-form", "他对她笑", "他对我笑").value == pytest.approx(
        (3 / 4 + 1 / 3 + 3 / 4) / 3,
        abs=1e-12,  # float rounding only
    )


def test_nothing_in_common_earns_nothing() -> None:
    assert explain("free-form", "he smiles at her", "42").value == 0.0
