"""Every rule in the docstring of the parser has a case here."""

from __future__ import annotations

import pytest

from omni_grpo_core.errors import DataError
from omni_grpo_core.rewards.parse import parse, render
from omni_grpo_core.types import Malformed, Parsed

GOOD = "<context>c</context><think>t</think><answer>A</answer>"


def contents(completion: str) -> tuple[str, str, str] | str:
    parsed = parse(completion)
    if isinstance(parsed, Malformed):
        return parsed.what
    return (parsed.context.text, parsed.think.text, parsed.answer.text)


@pytest.mark.parametrize(
    ("completion", "sections"),
    [
        (GOOD, ("c", "t", "A")),
        ("\n " + GOOD + "\t\n", ("c", "t", "A")),
        (GOOD.replace("><", ">\r\n<"), ("c", "t", "A")),
        (GOOD.replace("><think", ">\u3000<think"), ("c", "t", "A")),
        ("<context> c\n</context><think>t\r\n</think><answer>\tA</answer>",
         (" c\n", "t\r\n", "\tA")),
        # what resembles a tag is content inside a section
        (GOOD.replace("t<", "<ANSWER>B</ANSWER><"), ("c", "<ANSWER>B</ANSWER>", "A")),
        (GOOD.replace("t<", "＜answer＞B<"), ("c", "＜answer＞B", "A")),
        (GOOD.replace("t<", "&lt;answer&gt;B<"), ("c", "&lt;answer&gt;B", "A")),
        (GOOD.replace("t<", "< answer >< /think ><answer/><"),
         ("c", "< answer >< /think ><answer/>", "A")),
        (GOOD.replace("t<", "a < b > c <<"), ("c", "a < b > c <", "A")),
        # ordinary characters, however odd
        (GOOD.replace("t<", "\x00<"), ("c", "\x00", "A")),
        (GOOD.replace("t<", "\ud800<"), ("c", "\ud800", "A")),
        (GOOD.replace("t<", "שלום\u202e<"), ("c", "שלום\u202e", "A")),
        (GOOD.replace("t<", "\u200b<"), ("c", "\u200b", "A")),
    ],
)  # fmt: skip
def test_well_formed(completion: str, sections: tuple[str, str, str]) -> None:
    assert contents(completion) == sections


@pytest.mark.parametrize(
    ("completion", "what", "where"),
    [
        ("", "no <context>", 0),
        (" \n", "no <context>", 2),
        ("A", "text outside the tags: 'A'", 0),
        ("<context>c</context>", "no <think>", 20),
        (GOOD + " bye", "text outside the tags: 'bye'", 55),
        ("Sure! " + GOOD, "text outside the tags: 'Sure! '", 0),
        (GOOD + GOOD, "<context> a second time", 54),
        ("<context>c<think>t</think></context>", "<think> inside <context>", 10),
        ("<context>c</context><think><answer>A</answer></think><answer>B</answer>",
         "<answer> inside <think>", 27),
        ("<context>c</context><answer>A</answer><think>t</think>",
         "<answer> where <think> should be", 20),
        ("<context><context>c</context>", "<context> inside <context>", 9),
        ("<context>c", "<context> is never closed", 0),
        ("<context>c</context><think>t", "<think> is never closed", 20),
        ("</context>c", "</context> where <context> should be", 0),
        ("<context>c</think>", "</think> inside <context>", 10),
        (GOOD + "</answer>", "</answer> a second time", 54),
        (GOOD.replace("A", " \n"), "nothing in <answer>", 44),
        (GOOD.replace("c<", "<", 1), "nothing in <context>", 9),
        (GOOD.upper(), "text outside the tags: '<CONTEXT>C</CONTEXT><THI'", 0),
        (GOOD.replace("<", "＜"), "text outside the tags: '＜context>c＜/context>＜thi'", 0),
        (GOOD.replace("<", "&lt;"), "text outside the tags: '&lt;context>c&lt;/contex'", 0),
        ("\ufeff" + GOOD, "text outside the tags: '\\ufeff'", 0),
        ("\x00" + GOOD, "text outside the tags: '\\x00'", 0),
        (GOOD + "<|im_end|>", "text outside the tags: '<|im_end|>'", 54),
    ],
)  # fmt: skip
def test_malformed_says_what_and_where(completion: str, what: str, where: int) -> None:
    assert parse(completion) == Malformed(what, where)


def test_offsets_count_characters_of_the_completion() -> None:
    completion = "\r\n<context>他 😀</context>\n<think>é</think> <answer>\ud800B </answer>"
    parsed = parse(completion)
    assert isinstance(parsed, Parsed)
    for section in (parsed.context, parsed.think, parsed.answer):
        assert completion[section.start : section.end] == section.text
    assert (parsed.context.start, parsed.context.text) == (11, "他 😀")


@pytest.mark.parametrize("part", ["", " \n", "a <answer> b", "</think>"])
def test_render_rejects_parts_that_could_not_be_parsed(part: str) -> None:
    with pytest.raises(DataError, match="wanted text without tags"):
        render("c", part, "A")
