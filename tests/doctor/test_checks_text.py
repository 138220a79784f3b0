"""Looks at prompts, on recordings of a few lines."""

from __future__ import annotations

import joined_calls
import pytest
import torch
from doctor_recordings import SYSTEM, case, facts, medium, only, processed, rendered, template, user

from omni_grpo_core.doctor.checks import batch
from omni_grpo_core.doctor.checks import text as looks
from omni_grpo_core.doctor.diagnose import diagnose
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.replay.text import foreign_mark

FIRST, SECOND = (
    (SYSTEM, user("video a.mp4")),
    (SYSTEM, user("audio b.wav", question="How high?")),
)


def step(*passed: str, nested: bool = False):  # type: ignore[no-untyped-def]
    return case(template(*FIRST), template(*SECOND), processed(*passed, nested=nested))


@pytest.mark.parametrize("order", [(0, 1), (0, 0, 1, 1), (0, 1, 0, 1)])
def test_every_prompt_equally_often_is_right(order: tuple[int, ...]) -> None:
    texts = [rendered((FIRST, SECOND)[number]) for number in order]
    assert [e for look in looks.LOOKS for e in look(step(*texts))] == []


def test_only_the_first_prompt_is_kept() -> None:
    """Row 1 of the incident: prepare_prompt(...)[0] for all, each with its own clip."""

    def with_pictures(texts: list[str], pictures: list[float]) -> Case:
        inputs = joined_calls.rows([joined_calls.SEEN] * len(texts), pictures)
        rendering = (template(*FIRST), template(*SECOND))
        return joined_calls.step(*rendering, joined_calls.made(texts, inputs))

    first, second = rendered(FIRST), rendered(SECOND)
    found = only(looks.look_one_for_all, with_pictures([first, first], [1, 2]))
    assert found.fact == "prompts-lost"
    assert "2 prompts were rendered" in found.sentence
    assert facts(looks.look_one_for_all, with_pictures([first, second], [1, 2])) == []
    # the other was rendered for another step, or only counted
    assert facts(looks.look_one_for_all, with_pictures([first, first], [1, 1])) == []


def test_lists_of_lists() -> None:
    texts = (rendered(FIRST), rendered(SECOND))
    assert only(looks.look_processed_texts, step(*texts, nested=True)).fact == "prompts-nested"


@pytest.mark.parametrize(
    ("old", "new", "fact"),
    [
        ("<|im_start|>assistant\n", "", "no-generation-prompt"),
        ("<|im_start|>assistant", "<|im_start|>assitant", "role-unknown"),
        ("<|vision_bos|><|VIDEO|><|vision_eos|>", "", "placeholders-differ"),
        ("<|im_end|>\n", "<|im_end|>", "text-differs"),
    ],
)
def test_what_a_template_gets_wrong(old: str, new: str, fact: str) -> None:
    text = rendered(FIRST).replace(old, new)
    assert facts(looks.look_rendering, case(template(*FIRST, text=text))) == [fact]
    # changed between template and processor it is reported as well
    assert facts(looks.look_processed_texts, step(text, rendered(SECOND))) == [fact]
    # and rules name it
    [finding] = diagnose(case(template(*FIRST, text=text))).findings
    assert finding.stage == "text"
    assert finding.causes


def test_a_role_that_messages_and_text_agree_on() -> None:
    """'human' was rendered as it was passed: text and messages were equal, and that was healthy."""
    human = {**user("video a.mp4"), "role": "human"}
    found = only(looks.look_rendering, case(template(SYSTEM, human)))
    assert (found.fact, found.values["role"]) == ("role-unknown", "human")


def test_the_default_system_message_of_qwens_template_is_no_fault() -> None:
    bare = (user("video a.mp4"),)
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for text in (rendered(bare), default + rendered(bare)):
        assert facts(looks.look_rendering, case(template(*bare, text=text))) == []


def test_expanded_placeholders_are_reported_by_the_batch() -> None:
    video = rendered(FIRST).replace("<|VIDEO|>", "<|VIDEO|>" * 8)
    sound = rendered(SECOND).replace("<|AUDIO|>", "<|AUDIO|>" * 25)
    assert facts(looks.look_processed_texts, step(video, sound)) == []
    inside = "<|audio_bos|>" + "<|VIDEO|>" * 8 + "<|AUDIO|>" * 26 + "<|audio_eos|>"
    interleaved = rendered(FIRST).replace("<|VIDEO|>", inside)
    assert facts(looks.look_processed_texts, step(interleaved, rendered(SECOND))) == []


def test_other_chat_formats_are_not_judged() -> None:
    text = "[INST] Which way? [/INST]"
    odd = case(template(*FIRST, text=text), processed(text))
    assert [e for look in looks.LOOKS for e in look(odd)] == []


def test_without_a_template_call_the_shape_is_judged() -> None:
    good, bad = rendered(FIRST), rendered(FIRST).replace("assistant", "assitant")
    assert facts(looks.look_processed_texts, case(processed(good))) == []
    assert facts(looks.look_processed_texts, case(processed(bad))) == ["role-unknown"]


def test_media_that_no_prompt_has_a_place_for() -> None:
    """Tokens of another family were plain words to this one: the run died on a number of features,
    which was all that was said."""
    foreign = rendered(FIRST).replace("<|VIDEO|>", "<|video_pad|>")
    clip = medium("video", torch.zeros(4, 3, 28, 28))
    found = only(looks.look_processed_texts, case(processed(foreign, videos=(clip,))))
    assert (found.stage, found.fact, found.severity) == ("text", "placeholders-differ", "breaks")
    assert "1 videos, and none has <|VIDEO|>" in found.sentence
    assert facts(looks.look_processed_texts, case(processed(rendered(FIRST), videos=(clip,)))) == []


def test_a_placeholder_without_its_marks() -> None:
    """Two of them side by side were said to be one, expanded already."""
    bare = rendered(FIRST).replace("<|vision_bos|><|VIDEO|><|vision_eos|>", "<|VIDEO|><|VIDEO|>")
    odd = case(processed(bare))
    found = only(looks.look_processed_texts, odd)
    assert (found.fact, found.severity) == ("placeholder-unmarked", "breaks")
    assert facts(batch.look_expanded, odd) == []
    assert diagnose(odd).findings[0].causes[0].cause == "text.marks-lost"


def test_prompts_made_once_and_passed_one_by_one_are_all_there() -> None:
    """TRL tokenizes twice, and many loops call the processor once a prompt: every one of them was
    said to have lost the others."""
    texts = [rendered(FIRST), rendered(SECOND)]
    one_by_one = case(template(*FIRST), template(*SECOND), *map(processed, texts))
    twice = case(template(*FIRST), processed(texts[0]), processed(texts[0]))
    for step_ in (one_by_one, twice):
        assert [e for look in looks.LOOKS for e in look(step_)] == []


def test_a_prompt_rendered_twice() -> None:
    """The rendered text became the content of a user turn and was rendered again."""
    inner = rendered(FIRST)
    for content in (inner, ({"type": "text", "text": inner},)):
        found = only(looks.look_rendering, case(template({"role": "user", "content": content})))
        assert (found.fact, found.severity) == ("rendered-twice", "breaks")
    quoting = user(question="What does <|im_start|> mean?")
    assert "rendered-twice" not in facts(looks.look_rendering, case(template(quoting)))


def test_a_prompt_that_was_rendered_and_not_used() -> None:
    """The processor got the bare question, and nothing was said of it but that the conversation has
    no system message, which it has."""
    inputs = joined_calls.rows([[7, 8]])
    bare = joined_calls.made(["Which way?"], inputs)
    used = joined_calls.sampled(inputs, [[70, 9]], ["c0"])
    found = only(looks.look_processed_texts, joined_calls.step(template(*FIRST), bare, used))
    assert (found.fact, found.severity) == ("template-dropped", "breaks")
    # a text that is only counted, such as an answer, is no prompt
    other = joined_calls.sampled(joined_calls.rows([[7, 8, 9]]), [[70, 9]], ["c0"])
    counted = joined_calls.step(template(*FIRST), bare, other)
    assert facts(looks.look_processed_texts, counted) == []


def test_a_changed_prompt_is_compared_with_its_own_rendering() -> None:
    """With a turn more behind the system message, a prompt without media was taken for another
    row's: "prompt 1 has 0 video placeholders for 1 in the messages"."""
    spoken = (SYSTEM, user(question="Is water wet?"))
    more = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user"
    texts = [rendered(one).replace("<|im_start|>user", more) for one in (FIRST, spoken)]
    changed = case(template(*FIRST), template(*spoken), processed(*texts))
    assert facts(looks.look_processed_texts, changed) == ["text-differs"] * 2


def test_an_answer_may_be_begun() -> None:
    """DeepSeek's R1-Zero prompts end inside the assistant's turn."""
    text = rendered(FIRST) + "<think>"
    assert [e for look in looks.LOOKS for e in look(step(text, rendered(SECOND)))] == []


def test_other_words_are_a_recipe_and_a_lost_line_break_is_a_fault() -> None:
    other = rendered(FIRST).replace("Answer inside", "Reply in")
    broken = rendered(FIRST).replace("<|im_end|>\n", "<|im_end|>")
    for text, severity in ((other, "differs"), (broken, "breaks")):
        found = only(looks.look_rendering, case(template(*FIRST, text=text)))
        assert (found.fact, found.severity) == ("text-differs", severity)


@pytest.mark.parametrize(
    ("old", "new", "fact", "severity"),
    [
        ("How high?<|im_end|>\n", "How high?\n", "turn-open", "breaks"),
        (rendered((SYSTEM,)).partition("<|im_start|>assistant")[0], "", "", ""),
        ("<|im_start|>user", "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
         "<|im_start|>user", "turn-repeated", "differs"),
        ("assistant\n", "assistant\n<context>A bar moves to the left.", "answer-begun", "differs"),
    ],
)  # fmt: skip
def test_turns_of_a_prompt_by_hand(old: str, new: str, fact: str, severity: str) -> None:
    """Without a template call nothing was compared with anything: a user's turn that is never
    closed was healthy."""
    text = rendered(SECOND).replace(old, new, 1)
    found = [(one.fact, one.severity) for one in looks.look_processed_texts(case(processed(text)))]
    assert found == ([(fact, severity)] if fact else [])


def test_marks_of_another_family() -> None:
    texts = ("<s>[INST] Why? [/INST]", "<start_of_turn>user", "Why?")
    assert list(map(foreign_mark, texts)) == ["[INST]", "<start_of_turn>", None]
