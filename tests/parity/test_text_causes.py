"""Each way in which a prompt's text goes wrong is named, and only that; two mistakes are two."""

from __future__ import annotations

import pytest

from omni_grpo_core.parity.text_causes import explain_text

SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
CLIP = "<|vision_bos|><|VIDEO|><|vision_eos|>"
PICTURE = "<|vision_bos|><|IMAGE|><|vision_eos|>"
SOUND = "<|audio_bos|><|AUDIO|><|audio_eos|>"
ANSWER = "<|im_start|>assistant\n"


def user(content: str) -> str:
    return f"<|im_start|>user\n{content}<|im_end|>\n"


WHOLE = SYSTEM + user(f"{CLIP}Which way?\nA. left\nB. right") + ANSWER


@pytest.mark.parametrize(
    ("now", "names"),
    [
        (WHOLE, []),
        (WHOLE.removesuffix(ANSWER), ["no-generation-prompt"]),
        (WHOLE + ANSWER, ["generation-prompt-twice"]),
        (WHOLE + "<think>\n", ["answer-begun"]),
        (WHOLE + "<|im_end|>", ["text"]),
        (WHOLE.removeprefix(SYSTEM), ["no-system"]),
        (SYSTEM.replace("brief", "kind") + WHOLE, ["default-system"]),
        (WHOLE.replace("Be brief.", "You are Qwen."), ["other-system"]),
        # a begin mark twice is no missing system message
        ("<|im_start|>" + WHOLE, ["text"]),
        (WHOLE.rstrip(), ["whitespace"]),
        (WHOLE.replace("right<", "right\n<"), ["whitespace"]),
        (WHOLE.replace("\nA. left\nB. ", " A. left B. "), ["whitespace"]),
        (WHOLE.replace("left", "Left"), ["text"]),
        (SYSTEM + user(f"Which way?\nA. left\nB. right{CLIP}") + ANSWER, ["content-order"]),
        (WHOLE.replace(CLIP, PICTURE * 4), ["video-as-images"]),
        (WHOLE.replace(CLIP, PICTURE), ["text"]),
        (
            f"[INST] Be brief. {CLIP}Which way?\nA. left\nB. right [/INST]",
            ["other-template"],
        ),
        ("system\nBe brief.\nuser\nWhich way?\nA. left\nB. right\nassistant\n",
         ["special-tokens-dropped"]),
        # two mistakes
        (SYSTEM.replace("brief", "kind") + user(f"{CLIP}Which way?\nA. left\nB. right"),
         ["other-system", "no-generation-prompt"]),
        (user(f"Which way?\nA. left\nB. right{CLIP}") + ANSWER, ["no-system", "content-order"]),
    ],
)  # fmt: skip
def test_what_happened_to_a_text(now: str, names: list[str]) -> None:
    assert [cause.name for cause in explain_text(WHOLE, now)] == names


def test_two_media_that_are_exchanged() -> None:
    was = user(f"{CLIP}{SOUND}What?") + ANSWER
    (cause,) = explain_text(was, user(f"{SOUND}{CLIP}What?") + ANSWER)
    assert cause.name == "content-order"
    assert cause.sentence == f"media in the order {SOUND + CLIP!r} instead of {CLIP + SOUND!r}"


def test_a_difference_is_shown_by_whole_words_and_tokens() -> None:
    """Never "without 'eos|><|vision_'", which a comparison of characters finds."""
    (cause,) = explain_text(WHOLE, WHOLE.replace("<|vision_eos|>", ""))
    assert cause.sentence == f"without '<|vision_eos|>' at character {len(SYSTEM) + 40}"
    (cause,) = explain_text(WHOLE, WHOLE.replace("left", "loft"))
    assert cause.sentence == f"'loft' instead of 'left' at character {WHOLE.index('left')}"
    (cause,) = explain_text(WHOLE, WHOLE.replace("brief", "brisk"))
    assert cause.sentence == "in the system message, 'brisk' instead of 'brief' at character 22"
