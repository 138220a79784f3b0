"""The one parser of completions, and its inverse.

Rules
-----
A completion is well formed if it is exactly this, with only white space (``str.isspace``) before,
between and after::

    <context>…</context> <think>…</think> <answer>…</answer>

* The six tags are ASCII, lower case, without inner spaces. Each occurs once, in this order.
  A tag anywhere else (nested, repeated, unclosed, unopened) makes the completion malformed.
  So an ``<answer>`` inside ``<think>`` is never *the* answer.
* A section with empty or white-space content is malformed: tags without content are not an
  answer.
* Anything that merely resembles a tag is text: ``<ANSWER>``, ``< answer >``, ``＜answer＞``,
  ``&lt;answer&gt;``, ``<answer/>``. Inside a section it is content, outside it is junk.
* Carriage returns and ideographic spaces are white space. NUL, zero-width characters, byte order
  marks, lone surrogates and direction marks are ordinary characters: content inside a section,
  junk outside. Right-to-left text is read in logical order, as stored.
* Offsets count Python characters (code points) of the completion as given; content is never
  stripped, so ``completion[section.start:section.end] == section.text``.

The text is scanned once from left to right for the next literal tag, and the scan ends at the
first tag that is out of order, so time is linear in the length for any text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from omni_grpo_core.errors import DataError
from omni_grpo_core.rewards import RewardRow
from omni_grpo_core.types import Malformed, Parsed, Section

SECTIONS = ("context", "think", "answer")
TAG = re.compile(r"<(/?)(context|think|answer)>")
_NOT_SPACE = re.compile(r"\S")


def parse(completion: str) -> Parsed | Malformed:
    """Parse a completion.

    >>> parse("<context>a man</context><think>he smiles</think>\\n<answer>B</answer>").answer
    Section(text='B', start=57, end=58)
    >>> parse("<context>a</context><think>t</think><answer>B</answer> bye")
    Malformed(what="text outside the tags: 'bye'", where=55)
    """
    found = sections(completion, SECTIONS)
    if isinstance(found, Malformed):
        return found
    return Parsed(context=found["context"], think=found["think"], answer=found["answer"])


def sections(text: str, wanted: tuple[str, ...]) -> dict[str, Section] | Malformed:
    """Exactly the sections ``wanted``, in that order, or the first thing that is wrong.

    A tag of any other section is out of order anywhere.
    """
    found: dict[str, Section] = {}
    open_name: str | None = None
    last = 0
    for tag in TAG.finditer(text):
        closing, name = tag.group(1) == "/", tag.group(2)
        if open_name is not None:
            if not closing or name != open_name:
                return Malformed(f"{tag.group()} inside <{open_name}>", tag.start())
            if not _NOT_SPACE.search(text, last, tag.start()):
                return Malformed(f"nothing in <{name}>", last)
            found[name] = Section(text[last : tag.start()], last, tag.start())
            open_name = None
        else:
            junk = _NOT_SPACE.search(text, last, tag.start())
            if junk:
                return _outside(text, junk.start(), tag.start())
            due = wanted[len(found)] if len(found) < len(wanted) else None
            if closing or name != due:
                return Malformed(_out_of_order(tag.group(), due, found), tag.start())
            open_name = name
        last = tag.end()
    if open_name is not None:
        return Malformed(f"<{open_name}> is never closed", last - len(open_name) - 2)
    junk = _NOT_SPACE.search(text, last)
    if junk:
        return _outside(text, junk.start(), len(text))
    if len(found) < len(wanted):
        return Malformed(f"no <{wanted[len(found)]}>", len(text))
    return found


def render(context: str, think: str, answer: str) -> str:
    """A completion that :func:`parse` reads back.

    Raises :class:`~omni_grpo_core.errors.DataError` if a part is blank or contains a tag.

    >>> render("a man", "he smiles", "B")
    '<context>a man</context>\\n<think>he smiles</think>\\n<answer>B</answer>'
    """
    for name, part in zip(SECTIONS, (context, think, answer), strict=True):
        tag = TAG.search(part)
        if tag or not part.strip():
            raise DataError(
                f"<{name}> of a completion to write",
                got=f"the tag {tag.group()} in it" if tag else "nothing but white space",
                want="text without tags",
                fix="remove tags and blank parts: the completion could not be parsed",
            )
    return f"<context>{context}</context>\n<think>{think}</think>\n<answer>{answer}</answer>"


def _outside(text: str, where: int, end: int) -> Malformed:
    return Malformed(f"text outside the tags: {text[where : min(end, where + 24)]!r}", where)


def _out_of_order(tag: str, due: str | None, found: dict[str, Section]) -> str:
    if tag.strip("</>") in found:
        return f"{tag} a second time"
    return f"{tag} where {f'<{due}>' if due else 'the end'} should be"


@dataclass(frozen=True, slots=True)
class Gold:
    """The stripped sections of a gold solution; data sets may omit context and think."""

    answer: str
    context: str | None
    think: str | None


def gold(row: RewardRow) -> Gold:
    """Read the gold of a row: any of the three sections in order, with an answer among them.

    Raises :class:`~omni_grpo_core.errors.DataError` naming the row if the answer is not inside
    ``<answer>`` tags or is blank, or the tags are out of order.

    >>> gold(RewardRow(0, "q", "t", {"solution": "<answer> B </answer>"}))
    Gold(answer='B', context=None, think=None)
    """
    solution = row.solution
    found = gold_sections(solution)
    if isinstance(found, Malformed):
        raise DataError(
            row.item,
            got=f"gold {solution[:60]!r}: {found.what} at {found.where}",
            want="a gold of the form <answer>…</answer>, <context> and <think> before it if any",
            fix="correct the row; a gold without an answer would match garbage",
        )
    context, think = (found[name].text.strip() if name in found else None for name in SECTIONS[:2])
    return Gold(answer=found["answer"].text.strip(), context=context, think=think)


def gold_sections(solution: str) -> dict[str, Section] | Malformed:
    """The answer, with context and think if present, or what is wrong with the tags."""
    wanted = tuple(name for name in SECTIONS if name == "answer" or f"<{name}>" in solution)
    return sections(solution, wanted)


def bad_gold(row: RewardRow, answer: str, want: str) -> DataError:
    """The error for a gold answer that its own problem type cannot read."""
    return DataError(
        row.item,
        got=f"gold answer {answer[:60]!r} for problem_type {row.problem_type!r}",
        want=want,
        fix="correct the gold or the problem_type of the row",
    )
