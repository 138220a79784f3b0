"""Each rule is tripped once on its own, and sound answers trip none."""

from __future__ import annotations

import random

import pytest

from omni_grpo_core.rewards.degenerate import degenerate, degenerate_text
from omni_grpo_core.rewards.parse import render
from omni_grpo_core.types import FinishReason

EOS, IM_START = 1, 2
SOUND = "a man smiles"
VARIED = " ".join(f"{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(40))


def gate(
    ids: list[int],
    text: str = SOUND,
    *,
    finish_reason: FinishReason = "stop",
    golden_ended: bool | None = None,
    nonfinite: bool = False,
    logprobs: tuple[float, ...] = (),
) -> tuple[str, ...]:
    return degenerate(
        ids,
        text,
        finish_reason=finish_reason,
        eos_ids={EOS},
        golden_ended=golden_ended,
        nonfinite=nonfinite,
        special_ids={EOS, IM_START},
        logprobs=logprobs,
    )


def numbers(n: int, distinct: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [10 + draw.randrange(distinct) for _ in range(n)]


@pytest.mark.parametrize(
    ("failed", "reasons"),
    [
        (gate([]), ("empty: no tokens",)),
        (gate([EOS], ""), ("empty: eos is the first token",)),
        (gate([5, 5, EOS], " \n"), ("empty: 2 tokens of white space",)),
        # 16 distinct tokens, then 24 times the pair (3, 4): 48 tokens of cycle at a normal length
        (gate([*range(10, 24), *[3, 4] * 24, EOS]), ("tail cycle: 2 tokens repeated 24 times",)),
        # the same 16 tokens four times, separated by different ones: no cycle at the end
        (
            gate([t for i in range(4) for t in (*range(10, 26), 90 + i)]),
            ("seq-rep-4 0.60 > 0.35",),
        ),
        (gate(numbers(1000, 50)), ("distinct-1 0.05 < 0.15 over 1000 tokens",)),
        (gate([5, IM_START, 6, EOS]), ("special tokens: 1, the first is id 2 at token 1",)),
        (gate([5, 6], nonfinite=True), ("non-finite logits",)),
        # 20 different tokens, none likelier than e**-7: neither cycle nor salad shows them
        (
            gate([*range(10, 30), EOS], VARIED, logprobs=(-7.0,) * 21),
            ("unlikely: mean logprob -7.0 < -5 over 21 tokens",),
        ),
        (
            gate([5, 6], finish_reason="length", golden_ended=True),
            ("cap hit after 2 tokens, the golden ended in eos",),
        ),
    ],
)  # fmt: skip
def test_each_rule_on_ids_trips_alone(failed: tuple[str, ...], reasons: tuple[str, ...]) -> None:
    assert failed == reasons


def test_a_cap_is_sound_without_a_golden_that_ended() -> None:
    assert gate([5, 6], finish_reason="length") == ()
    assert gate([5, 6], finish_reason="length", golden_ended=False) == ()


def test_text_loop_with_a_counting_percentage_is_a_loop() -> None:
    counting = " ".join(f"{VARIED} loading {i}%" for i in range(3))
    assert degenerate_text(counting) == ("tail cycle: 43 words repeated 3 times",)


def test_few_words_over_and_over_in_any_order() -> None:
    draw = random.Random(1)
    long_words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=60)) for _ in range(29)]
    words = [word for i in range(8) for word in draw.sample(long_words, 29)]
    # separated by 460 different letters, so that no window of 500 characters repeats much
    text = " ".join(words)
    assert degenerate_text(text) == ("distinct-1 0.12 < 0.15 over 232 words",)


def test_a_window_that_compresses_too_well() -> None:
    # the same 47 letters, each time followed by another word: 32 words, no cycle
    repeated = " ".join(
        "q" + "abcdefghijklmnopqrstuvw" * 2 + f" {c}{c}" for c in "abcdefghijklmnop"
    )
    [reason] = degenerate_text(repeated)
    assert reason.startswith("zlib ratio ")
    assert reason.endswith("> 2.4 at characters 0–500")


def test_the_incident() -> None:
    garbage = "<contextsystemsystemsystem schöne " + "system" * 200
    assert any(reason.startswith("zlib ratio") for reason in degenerate_text(garbage))


def test_a_window_is_found_at_any_offset() -> None:
    prose = "".join(random.Random(3).choices("abcdefghijklmnopqrstuvwxyz ", k=2000))
    loop = "and then he said it was " * 32  # 768 characters hold a whole window at any offset
    for place in (0, 333, 1100, 2000):
        assert degenerate_text(prose[:place] + loop + prose[place:])


ENGLISH = (
    "Two people sit on opposite sides of a table with a laptop and a vase between them. The man "
    "in the blue shirt speaks fast and leans forward; the woman nods, smiles, and slows her voice "
    "to ease the tension. Behind them a stone wall and plants give the studio a calm look. He "
    "points at the screen twice while she laughs, and the subtitle mentions a new feature. "
)
CHINESE = (
    "视频中有两个人面对面坐在桌子两侧，中间放着一台笔记本电脑和一个花瓶。穿浅蓝色衬衫的男子语速很快，"
    "身体前倾，显得十分兴奋；穿黑色连衣裙的女子不断点头微笑，用柔和的声音回应他，气氛因此缓和下来。"
    "背景是石墙和绿色植物，画面左上角能看到节目的标志。男子两次指向屏幕，介绍产品的新功能，女子笑着表示感谢，"
    "并说这是她最喜欢的环节之一。从他们的神情和语气判断，二人关系友好，很可能正在合作录制一期推广节目。"
)


@pytest.mark.parametrize(
    "text", [ENGLISH + "He then turns to the camera. " + ENGLISH[::-1], CHINESE * 2]
)
def test_sound_prose_trips_no_window(text: str) -> None:
    assert len(text) > 390
    assert degenerate_text(text[:700]) == ()


def test_short_structured_answers_never_trip() -> None:
    draw = random.Random(0)
    for _ in range(500):
        n = draw.randint(20, 60)
        distinct = draw.randint(12, 60)
        ids = [*numbers(n, distinct, draw.randrange(10**6)), EOS]
        text = render("red, up, low", "none", draw.choice("ABCD"))
        assert gate(ids, text, golden_ended=True) == ()
