"""Looks at what prompts say in words: no template's braces, no file's name in the place of the
file, no answer, and the options that their letters stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator

from omni_grpo_core.doctor.asked import Asked, asked, golds_of, name_of
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, quoted
from omni_grpo_core.doctor.replay.media import file_of
from omni_grpo_core.doctor.replay.text import marks, placeholders
from omni_grpo_core.recorder.probe_cases import answer_in

_FIELD = re.compile(
    r"\{(?:\w+\[[\"']\w+[\"']\]|(?:row|example|sample|item)\.\w+"
    r"|problem|question|query|instruction|prompt|options|choices|caption)\}"
)
"""A column's name in braces, as a template has it before it is filled in."""
_FILE = re.compile(r"(?:/[^\s<>:\"'|]+|[A-Z]:\\[^\s<>:\"'|]+)\.\w{2,4}\b")
_TAGGED = re.compile(r"<answer>\s*(\S[^<>]*?)\s*</answer>")
_LISTED = r"(?:^|[\s(\[]){letter}\s*[).:\]]"


def _text(one: Asked) -> str:
    return str(one.prompt.text or one.prompt.text_of("user"))


def look_fields(case: Case) -> Iterator[Evidence]:
    """No prompt has the name of a column where its value should be."""
    for one in asked(case):
        if found := _FIELD.search(one.prompt.text_of("user")):
            yield Evidence(
                "conversation",
                "field-unfilled",
                f"conversation {one.prompt.number} says {found.group()!r}: the template was never "
                "filled in with its row",
                row=one.prompt.number,
                values={"field": found.group()},
            )


def look_files(case: Case) -> Iterator[Evidence]:
    """A file that is named in words is passed as a medium too: its name says nothing of it."""
    for one in asked(case):
        if any(placeholders(_text(one), marks(case)).values()):
            continue
        named = [path for path in _FILE.findall(one.prompt.text_of("user")) if file_of(path)]
        if named:
            yield Evidence(
                "conversation",
                "file-in-words",
                f"conversation {one.prompt.number} names {name_of(named[0])} in words and has no "
                "media: the model reads the name of the file instead of what is in it",
                row=one.prompt.number,
                values={"file": name_of(named[0])},
            )


def look_answers(case: Case) -> Iterator[Evidence]:
    """No prompt has its own row's answer between tags: of several rows, each its own."""
    shown: dict[str, set[str]] = {}
    leaks: list[tuple[Asked, str]] = []
    for one in asked(case):
        golds = {answer_in(gold) for gold in golds_of(one.row)}
        told = set(_TAGGED.findall(_text(one)))
        for gold in golds:
            shown.setdefault(gold, set()).update(told)
        leaks += [(one, gold) for gold in golds & told]
    own = [gold for gold, told in shown.items() if told == {gold}]
    if len(own) < 2 or len(own) < len(shown):
        return  # an example, which is the same for all
    for one, gold in leaks:
        yield Evidence(
            "conversation",
            "gold-shown",
            f"conversation {one.prompt.number} says {quoted(f'<answer>{gold}</answer>')}, which is "
            "its row's gold, as do all others with theirs",
            row=one.prompt.number,
            values={"role": "user"},
        )


def look_letters(case: Case) -> Iterator[Evidence]:
    """Where golds are letters, prompts say what the letters stand for; a picture may say it."""
    every = [(one, gold) for one in asked(case) for gold in golds_of(one.row)[:1]]
    letters = [(one, gold) for one, gold in every if re.fullmatch("[A-H]", answer_in(gold))]
    if len(letters) < len(every) or len({answer_in(gold) for _, gold in letters}) < 2:
        return
    for one, gold in letters:
        listed = _LISTED.format(letter=answer_in(gold))
        if re.search(listed, one.prompt.text_of("user"), re.MULTILINE):
            return
    yield Evidence(
        "conversation",
        "letters-unexplained",
        f"the golds are letters, such as {answer_in(letters[0][1])!r}, and no conversation says in "
        "words what any of them stands for",
        severity="differs",
    )


LOOKS: tuple[Look, ...] = (look_fields, look_files, look_answers, look_letters)
