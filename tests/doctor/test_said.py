"""What prompts say in words, on recordings of a few lines: all of it passed as a healthy run."""

from __future__ import annotations

from typing import Any

from doctor_recordings import (
    SYSTEM,
    case,
    facts,
    only,
    processed,
    rendered,
    samples,
    template,
    user,
)

from omni_grpo_core import tiny
from omni_grpo_core.doctor.checks import said
from omni_grpo_core.doctor.evidence import Case


def asked(*questions: str, golds: str = "AB", media: tuple[str, ...] = ("video a.mp4",)) -> Case:
    """A conversation a question, whose rows have these golds."""
    talks = [(SYSTEM, user(*media, question=question)) for question in questions]
    rows = [
        {"problem": question, "answer": gold}
        for question, gold in zip(questions, golds, strict=True)
    ]
    calls: list[Any] = [template(*talk) for talk in talks]
    return case(samples(*rows), *calls, processed(*map(rendered, talks)))


def test_a_template_that_was_never_filled_in() -> None:
    """``"{problem}"`` without the f. Braces of another kind are somebody's own words."""
    found = list(said.look_fields(asked("{problem}\nA. left", 'Say {"answer": 1}\nA. left')))
    assert [(one.row, one.values["field"]) for one in found] == [(0, "{problem}")]


def test_a_file_that_is_named_in_words() -> None:
    path = str(tiny.data_file().parent / "clip-00.mp4")
    named = (f"{path}\nWhich way?", "How many?")
    assert facts(said.look_files, asked(*named, media=())) == ["file-in-words"]
    assert facts(said.look_files, asked(*named)) == [], "it is passed as well"
    assert facts(said.look_files, asked("Is /no/such.mp4 a path?", "Why?", media=())) == []


def test_each_prompt_has_its_own_answer_between_tags() -> None:
    """The reward gets a letter, which any text has; a whole example answer has it between tags. One
    example for all rows is right for some of them."""
    own = asked("E.g. <answer>A</answer>", "E.g. <answer>B</answer>")
    assert facts(said.look_answers, own) == ["gold-shown"] * 2
    same = asked("E.g. <answer>A</answer>", "E.g. <answer>A</answer>")
    assert facts(said.look_answers, same) == []


def test_letters_that_nothing_explains() -> None:
    """A picture may show the options: it is no more than a difference."""
    bare = asked("Which way? Answer with a letter.", "How many? Answer with a letter.")
    assert only(said.look_letters, bare).severity == "differs"
    for options in ("A. left\nB. right", "(A) left (B) right", "A: left, B: right"):
        assert facts(said.look_letters, asked(f"Which? {options}", f"What? {options}")) == []
