"""Looks at conversations, on recordings of a few lines."""

from __future__ import annotations

from typing import Any

import joined_calls
import pytest
from doctor_recordings import (
    SYSTEM,
    case,
    facts,
    medium,
    only,
    processed,
    rendered,
    samples,
    template,
    user,
)

from omni_grpo_core.doctor.checks import conversation as looks
from omni_grpo_core.doctor.diagnose import diagnose
from omni_grpo_core.doctor.evidence import Case

ROW = {"problem": "Which way?", "path": "a.mp4", "data_type": "video", "options": ["A. left"]}
ASKED = "Which way?\nA. left"


def step(*parts: str, row: Any = ROW, question: str = ASKED, system: Any = SYSTEM, **call: Any):  # type: ignore[no-untyped-def]
    messages = [*([system] if system else []), user(*parts, question=question)]
    text = rendered(messages)
    return case(samples(row), template(*messages), processed(text, text, **call))


def test_a_right_conversation_is_no_evidence() -> None:
    right = step("video a.mp4", flag=True)
    assert [e for look in looks.LOOKS for e in look(right)] == []


def test_a_clip_listed_twice_while_interleaved() -> None:
    """Rows 4 and 13 of the incident: 1 video, 2 audios."""
    given: Any = {"videos": (medium("video"),) * 2, "audios": (medium("audio"),) * 4}
    twice = step("video a.mp4", "audio a.mp4", flag=True, **given)
    found = only(looks.look_media_twice, twice)
    assert "2 sounds for 1 track" in found.sentence
    assert found.values["file"] == "a.mp4"
    [finding] = diagnose(twice).findings
    assert finding.stage == "conversation"
    assert finding.causes[0].cause == "conv.media-twice"
    assert "drop one" in finding.causes[0].fix


def test_a_clip_listed_twice_is_right_where_its_sound_is_an_item() -> None:
    row = {**ROW, "path": {"video": "a.mp4", "audio": "a.mp4"}}
    separate = step("video a.mp4", "audio a.mp4", row=row, flag=False)
    assert [e for look in looks.LOOKS for e in look(separate)] == []


@pytest.mark.parametrize("words", ["a video without sound", "a silent clip", "There is no audio"])
def test_sound_that_the_text_denies(words: str) -> None:
    denied = step("video a.mp4", question=f"{words}. {ASKED}", flag=True)
    assert facts(looks.look_sound_denied, denied) == ["sound-denied"]
    assert facts(looks.look_sound_denied, step("video a.mp4", question=f"{words}. {ASKED}")) == []
    asking = step("video a.mp4", question=f"Is this {words}?\n{ASKED}", flag=True)
    assert facts(looks.look_sound_denied, asking) == []


def test_another_rows_question_and_media() -> None:
    other = {**ROW, "problem": "How many?", "path": "b.mp4"}
    one, two = (
        (SYSTEM, user("video a.mp4", question=ASKED)),
        (SYSTEM, user("video b.mp4", question=ASKED)),
    )
    wrong = case(samples(ROW, other), template(*one), template(*two))
    assert facts(looks.look_questions, wrong) == ["question-differs"]
    assert facts(looks.look_media_listed, wrong) == []
    crossed = case(samples(ROW, other), template(*one), template(*one))
    assert facts(looks.look_media_listed, crossed) == ["media-foreign"]
    # a question in other words, or frames cut from the file, are the loop's own affair
    own = step("video frames/a/0001.jpg", question="In which direction?")
    assert [e for look in looks.LOOKS for e in look(own)] == []


def completions_of(*prompts: str, **columns: Any) -> Case:
    """A completion of each prompt, and a reward that got the columns."""
    different = list(dict.fromkeys(prompts))
    inputs = joined_calls.rows([[10 + different.index(prompt)] for prompt in prompts])
    words = [f"c{number}" for number in range(len(prompts))]
    return joined_calls.step(
        joined_calls.made(prompts, inputs),
        joined_calls.sampled(inputs, [[70 + n, 9] for n in range(len(words))], words),
        joined_calls.rewarded(prompts, words, **columns),
    )


def test_a_copy_of_a_group_that_asks_something_else() -> None:
    """open-r1-multimodal's data set draws a random other row where one cannot be read; nothing but
    the columns of the rewards tells what the row was."""
    mine, other = (
        rendered([SYSTEM, user("video a.mp4", question=q)]) for q in (ASKED, "How many bars?")
    )
    columns = {"answer": ["A"] * 4}
    found = only(looks.look_copies, completions_of(mine, mine, mine, other, **columns))
    assert found.fact == "row-foreign"
    assert "How many bars?" in found.sentence
    assert facts(looks.look_copies, completions_of(mine, mine, mine, mine, **columns)) == []
    # two rows whose columns are equal
    assert facts(looks.look_copies, completions_of(mine, mine, other, other, **columns)) == []


COLOURS = ("A. red", "B. green", "C. blue")


def asked(*lines: str, **columns: Any) -> Case:
    """Two completions of one prompt with these lines, rewarded with the row's columns."""
    prompt = rendered([SYSTEM, user("image a.png", question="\n".join(lines))])
    row = {"problem": "What colour can be seen?", "options": COLOURS, **columns}
    return completions_of(prompt, prompt, **{name: (held, held) for name, held in row.items()})


def test_a_question_that_is_not_asked() -> None:
    """The data set calls its question "problem", and the loop read "question"."""
    lost = asked("None", *COLOURS)
    assert facts(looks.look_question_lost, lost) == ["question-missing"] * 2
    # in other words, cut or with line breaks of its own it is asked
    for question in ("Which colour can be seen here?", "What\ncolour can be\nseen?"):
        assert facts(looks.look_question_lost, asked(question, *COLOURS)) == []
    # in another language nothing of the row is there to compare with
    chinese = ("看到什么颜色?", "A. 红", "B. 绿", "C. 蓝")
    assert facts(looks.look_question_lost, asked(*chinese)) == []


def test_options_beside_other_letters() -> None:
    """Options were reversed and lettered anew, and the gold is a letter of the row."""
    question = "What colour can be seen?"
    found = next(iter(looks.look_option_letters(asked(question, "A. blue", "B. green", "C. red"))))
    assert found.fact == "options-permuted"
    assert "shows 'A. blue' where its row has 'A. red'" in found.sentence
    for lines in (COLOURS, COLOURS[::-1], ("A: blue", "B: green", "C: red"), ("A. blue sky",)):
        assert facts(looks.look_option_letters, asked(question, *lines)) == []
    # columns of another row are the reward's fault
    mine, other = (
        rendered([user(question="\n".join(o))]) for o in (COLOURS, ("A. blue", "B. red"))
    )
    rolled = {"options": [("A. blue", "B. red")] * 2 + [COLOURS] * 2}
    assert (
        facts(looks.look_option_letters, completions_of(mine, mine, other, other, **rolled)) == []
    )


def test_a_prompt_that_was_cut_has_no_system_message_to_miss() -> None:
    """The system message was cut off on the way to the model: that is said of the batch."""
    row = {"solution": "<answer>A</answer>"}
    cut = "way?<|im_end|>\n<|im_start|>assistant\n"
    whole = template(SYSTEM, user("image a.png"))
    step = completions_of(cut, cut, solution=[row["solution"]] * 2)
    assert facts(looks.look_instructions, step) == ["system-missing"] * 2
    rendered_first = joined_calls.step(whole, *step.values)
    assert facts(looks.look_instructions, rendered_first) == []


def test_an_audio_item_that_is_left_out() -> None:
    row = {**ROW, "path": {"video": "a.mp4", "audio": "a.wav"}}
    found = only(looks.look_media_listed, step("video a.mp4", row=row))
    assert found.fact == "audio-not-shown"


def test_arrays_in_rows_are_not_paths() -> None:
    row = {"problem": "Which way?", "videos": ("<tensor float32 (4, 3, 56, 56)>",)}
    assert facts(looks.look_media_listed, step("video a.mp4", row=row)) == []


def test_options_that_are_not_shown() -> None:
    row = {**ROW, "options": ["A. left", "B. right"], "answer": "A"}
    found = only(looks.look_options, step("video a.mp4", row=row, question="Which way?"))
    assert found.values["options"] == ["left", "right"]
    shown = step("video a.mp4", row=row, question="Which way? (a) left")
    assert facts(looks.look_options, shown) == []
    # an open question: options are only what the reward accepts
    spoken = {**row, "answer": "to the left"}
    assert facts(looks.look_options, step("video a.mp4", row=spoken, question="Which way?")) == []


def test_a_gold_in_the_prompt() -> None:
    row = {**ROW, "solution": "<answer>A</answer>"}
    shown = step("video a.mp4", row=row, question=f"{ASKED}\n<answer>A</answer>")
    assert facts(looks.look_gold, shown) == ["gold-shown"]
    short = {**ROW, "solution": "A"}
    assert facts(looks.look_gold, step("video a.mp4", row=short)) == [], "'A' occurs in any text"
    quoted = {**ROW, "answer": "Which way? it asks"}
    reading = step("video a.mp4", row=quoted, question=f"{ASKED} Which way? it asks")
    assert facts(looks.look_gold, reading) == [], "an answer that is read off the prompt"


@pytest.mark.parametrize(
    ("system", "fact"),
    [
        (None, "system-missing"),
        ({"role": "system", "content": "Be brief."}, "instructions-changed"),
    ],
)
def test_a_prompt_that_does_not_ask_for_the_tags(system: Any, fact: str) -> None:
    row = {**ROW, "solution": "<answer>A</answer>"}
    found = only(looks.look_instructions, step("video a.mp4", row=row, system=system))
    assert (found.fact, found.severity) == (fact, "differs"), "as R1-Zero's own prompts"
    bare = {**ROW, "solution": "A"}
    assert facts(looks.look_instructions, step("video a.mp4", row=bare, system=system)) == []


def test_a_track_that_one_clip_of_the_batch_lost(tmp_path: Any) -> None:
    from omni_grpo_core import tiny

    folder = tiny.data_file().parent
    with_track, silent_film = folder / "clip-00.mp4", folder / "clip-10.mp4"
    heard = template(SYSTEM, user(f"video {folder / 'clip-01.mp4'}", f"audio {folder / 'x.wav'}"))
    for path, found in ((with_track, ["track-not-given"]), (silent_film, [])):
        mute = template(SYSTEM, user(f"video {path}"))
        both = case(samples(ROW, ROW), heard, mute, processed("", "", audios=(medium("audio"),)))
        assert facts(looks.look_sound_lost, both) == found
