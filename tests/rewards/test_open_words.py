from __future__ import annotations

from pathlib import Path

import pytest

from omni_grpo_core.errors import ConfigError, DataError
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.open_words import OpenWords, polarity
from omni_grpo_core.rewards.parse import render


def score(kind: str, gold: str, answer: str, accuracy: Accuracy | None = None) -> float | None:
    [value] = (accuracy or Accuracy())(
        ["q"],
        [render("c", "t", answer)],
        problem_type=[kind],
        solution=[f"<answer>{gold}</answer>"],
    )
    return value


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("happy, anxious", 1.0),
        ("Anxiety and Joy.", 1.0),
        ("焦虑、开心", 1.0),
        ("joy, happiness, glad, anxious", 1.0),  # synonyms are one word
        ("happy", 2 / 3),
        ("happy, sad", 1 / 2),
        ("happy, anxious, sad, angry, calm, proud", 4 / 8),  # naming everything lowers the score
        ("flabbergasted", 0.0),
        ("not happy", 0.0),
    ],
)
def test_open_words_are_scored_as_sets(answer: str, value: float) -> None:
    assert score("emer_ov", "happy, anxious", answer) == value


def test_a_users_table_replaces_ours(tmp_path: Path) -> None:
    table = tmp_path / "mine.yaml"
    table.write_text("wistful: [blue]\n", encoding="utf-8")
    mine = Accuracy({"emer_ov": OpenWords.from_file(table)})
    assert score("emer_ov", "wistful", "Blue", mine) == 1.0
    assert score("emer_ov", "happy", "joy", mine) == 0.0


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("joy: [yes]", "under 'joy'"),
        ("joy: glad", "under 'joy'"),
        ("- joy", "found list"),
        ("", "found NoneType"),
        ("joy: [", "found invalid YAML"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path: Path, text: str, got: str) -> None:
    table = tmp_path / "mine.yaml"
    table.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=got) as caught:
        OpenWords.from_file(table)
    assert "mine.yaml" in str(caught.value)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        OpenWords.from_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("yes", True),
        ("Yes.", True),
        ("YES, he is", True),
        ("Yes, there is no doubt", True),
        ("是的，他在笑", True),
        ("no", False),
        ("No! He can't know", False),
        ("不是。", False),
        ("I cannot know", None),
        ("yes and no", None),
        ("yes. no.", None),
        ("nothing", None),
        ("yesterday", None),
        ("not", None),
        ("", None),
        ("maybe, yes", None),
    ],
)
def test_yes_and_no_must_be_separate_words(answer: str, verdict: bool | None) -> None:
    assert polarity(answer) is verdict


def test_judge_rows() -> None:
    assert score("judge", "Yes", "yes.") == 1.0
    assert score("judge", "Yes", "No") == 0.0
    assert score("judge", "No", "I cannot know") == 0.0
    with pytest.raises(DataError, match="wanted yes or no"):
        score("judge", "perhaps", "yes")


def test_an_open_gold_without_words_is_a_data_error() -> None:
    with pytest.raises(DataError, match="words separated by commas"):
        score("emer_ov", ", .", "happy")
