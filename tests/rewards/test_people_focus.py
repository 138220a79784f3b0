from __future__ import annotations

from pathlib import Path

import pytest

from omni_grpo_core.errors import ConfigError, DataError
from omni_grpo_core.rewards.parse import render
from omni_grpo_core.rewards.people_focus import CueLists, PeopleFocus, _shipped
from omni_grpo_core.types import Score

GOLD = render(
    "A man in a blue shirt smiles and leans forward; the woman looks at him and nods, her voice "
    "soft. They seem to be friends.",
    "t",
    "A",
)


def score(context: str, think: str = "So be it.", *, gold: str | None = GOLD) -> Score:
    columns = {} if gold is None else {"solution": [gold]}
    [result] = PeopleFocus().explain(["q"], [render(context, think, "A")], **columns)
    return result


def test_the_gold_earns_one() -> None:
    assert PeopleFocus()(["q"], [GOLD], solution=[GOLD]) == [1.0]


def test_by_hand() -> None:
    # gold: who 2 of man, woman, him, her, they; face smil*; gaze looks; gesture lean*, nods;
    # voice voice*; relation friend*
    result = score("A man waves and smiles at a boy.")
    assert result.reason == "who 2/2, face 1/1, gaze 0/1, gesture 1/2, voice 0/1, relation 0/1"
    assert result.value == pytest.approx((1 + 1 + 0 + 0.5 + 0 + 0) / 6, abs=1e-12)  # summing order


def test_reasoning_counts_as_well_as_context() -> None:
    assert score("A table.", "The man smiles.").value == score("The man smiles.", "A table.").value


def test_an_answer_in_chinese_meets_an_english_gold() -> None:
    text = "一名男子微笑着前倾身体，女子看着他点头，声音柔和，二人似乎是朋友。"
    assert score(text).value == 1.0


def test_text_without_people_earns_nothing() -> None:
    assert score("A red car passes a stone wall at night.").value == 0.0


def test_repeating_and_inflecting_a_word_is_one_hit() -> None:
    once = score("A man smiles.")
    again = score("A man smiles and smiled, smiling a smile. The man, a man.")
    assert once == again


def test_cues_that_the_gold_lacks_pay_nothing() -> None:
    gold = render("A man is there.", "t", "A")
    [plain, more] = PeopleFocus()(
        ["q"] * 2,
        [render("A man.", "t", "A"), render("A man smiles, nods and whispers.", "t", "A")],
        solution=[gold] * 2,
    )
    assert plain == more == 1.0


def test_a_list_of_the_cue_words_earns_nothing() -> None:
    stuffed = "man woman smile frown gaze look nod wave voice laugh friend mother"
    assert score(stuffed) == Score(0.0, "a list of cue words: 100% of the letters")
    assert score("男子，女子，微笑，皱眉，目光，注视，点头，挥手，声音，语气").value == 0.0


def test_every_word_of_our_lists_earns_nothing() -> None:
    words = [word.rstrip("*") for entries in _shipped().values() for word in entries]
    assert score(" ".join(words)).value == 0.0


def test_degenerate_text_earns_nothing() -> None:
    result = score("the man smiles at the woman " * 40)
    assert result == Score(0.0, "degenerate: tail cycle: 6 words repeated 40 times")


@pytest.mark.parametrize("completion", ["", "A man smiles at his friend.", GOLD + " bye"])
def test_malformed_earns_nothing(completion: str) -> None:
    [result] = PeopleFocus().explain(["q"], [completion], solution=[GOLD])
    assert result.value == 0.0
    assert result.reason.startswith("malformed")


def test_a_gold_without_people_is_unscored() -> None:
    gold = render("A red car passes.", "t", "A")
    assert score("A man smiles.", gold=gold) == Score(None, "the gold context attends to no people")


def test_without_a_gold_context_four_cues_in_full_are_enough() -> None:
    result = score(
        "A man and a boy in the garden smile and frown, then they look and gaze at the pond, "
        "nod and wave.",
        gold=None,
    )
    assert result.value == 1.0
    assert score("A man and a boy.", gold=None).value == 0.25
    assert score("A man and a boy.", gold="<answer>A</answer>").value == 0.25


def test_a_gold_without_answer_is_a_data_error() -> None:
    with pytest.raises(DataError, match="row 0"):
        score("A man.", gold="A man smiles.")


def test_lists_can_be_replaced(tmp_path: Path) -> None:
    german = tmp_path / "de.yaml"
    german.write_text("who: [mann, frau]\nface: [lächel*]\n", encoding="utf-8")
    reward = PeopleFocus.from_files(german)
    gold = render("Ein Mann lächelt.", "t", "A")
    completions = [
        render("Der Mann mit lächelndem Gesicht.", "t", "A"),
        render("A man smiles.", "t", "A"),
    ]
    assert reward(["q"] * 2, completions, solution=[gold] * 2) == [1.0, 0.0]


def test_a_cue_that_the_rubric_lacks_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cue 'smell'"):
        CueLists({"smell": ["odor"]})


def test_shipped_lists_name_each_word_once() -> None:
    words = [word for entries in _shipped().values() for word in entries]
    assert sorted({word for word in words if words.count(word) > 1}) == []
    assert set(_shipped()) == {"who", "face", "gaze", "gesture", "voice", "relation"}
