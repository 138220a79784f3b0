"""The parts that edges are judged with: what an edge is, and what a step holds at each end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from omni_grpo_core.doctor.bundles import FedRow, rows_in
from omni_grpo_core.doctor.evidence import Case, Evidence, Origin, Severity
from omni_grpo_core.doctor.rollouts import Completion
from omni_grpo_core.trace.calls import ProcessorCall, TemplateCall
from omni_grpo_core.types import Stage

State = Literal["ok", "broken", "not judged"]


@dataclass(frozen=True, slots=True)
class Edge:
    """From the calls of kind ``start`` to call number ``number`` of kind ``end``. ``rows``: those
    of the end that ``state`` is about. ``relation``: what was done to them on the way
    (``"each row four times, cast to bfloat16"``). ``why``: what is broken, or why nothing could be
    judged."""

    start: str
    end: str
    number: int
    rows: tuple[int, ...]
    relation: str
    state: State
    why: str = ""


Between = tuple[str, str, int]
"""The kinds of two calls, and the number of the later one."""


@dataclass(slots=True)
class _Broken:
    """Rows that broke at one edge in one way; the first says how."""

    stage: Stage
    sentence: str
    origin: Origin
    values: Mapping[str, Any]
    rows: list[int]
    severity: Severity


@dataclass(slots=True)
class Trail:
    """The edges of a step so far, what is wrong with them, and rows of generate by id. ``blamed``:
    whose content is wrong there, so that scores of it follow. ``moved``: those of them that are not
    the rows which their places stand for, so that what is beside them later follows as well.
    ``changed``: bare texts of completions whose ids were changed after generate."""

    case: Case
    edges: list[Edge] = field(default_factory=list)
    evidence: list[Evidence] = field(default_factory=list)
    blamed: set[int] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    moved: set[int] = field(default_factory=set)
    _broken: dict[tuple[Between, str, str], _Broken] = field(default_factory=dict)

    def ok(self, between: Between, rows: Iterable[int], relation: str = "") -> None:
        self.edges.append(Edge(*between, tuple(rows), relation, "ok"))

    def unjudged(self, between: Between, rows: Iterable[int], why: str) -> None:
        self.edges.append(Edge(*between, tuple(rows), "", "not judged", why))

    def broken(
        self,
        between: Between,
        rows: Sequence[int],
        found: tuple[Stage, str, str],
        values: Mapping[str, Any],
        *,
        key: str = "",
        origin: Origin = "added",
        severity: Severity = "breaks",
    ) -> None:
        """``found``: stage, fact and sentence. Rows of one ``key`` are one finding."""
        stage, fact, sentence = found
        at = (between, fact, key)
        if at in self._broken:
            self._broken[at].rows += rows
        else:
            self._broken[at] = _Broken(stage, sentence, origin, values, list(rows), severity)

    def finish(self) -> None:
        """Adds the broken edges, and what is wrong with them."""
        for (between, fact, _), one in self._broken.items():
            start, end, _ = between
            more = len(one.rows) - 1
            sentence = one.sentence + (f" (and {more} more rows like it)" if more > 0 else "")
            self.edges.append(Edge(*between, tuple(one.rows), "", "broken", sentence))
            values = {"edge": f"{start} -> {end}", "call": end, "rows": one.rows, **one.values}
            row = one.rows[0] if one.rows else None
            self.evidence.append(
                Evidence(one.stage, f"edge-{fact}", sentence, one.origin, row, values, one.severity)
            )


def times(held: Sequence[object], pool: Iterable[object]) -> str:
    """How often each of ``pool`` occurs in ``held``, where that is more than once.

    >>> times("aabb", "ab"), times("ab", "ab"), times("aab", "ab")
    ('each 2 times', '', '1 to 2 times each')
    """
    counts = sorted(held.count(one) for one in set(pool) if one in held)
    if not counts or counts[-1] == 1:
        return ""
    if counts[0] == counts[-1]:
        return f"each {counts[0]} times"
    return f"{counts[0]} to {counts[-1]} times each"


# --------------------------------------------------------------------------- what a step holds


def made_before(case: Case, call: object) -> list[FedRow]:
    """Rows that a processor made in this step before ``call``, in order."""
    found: list[FedRow] = []
    for value in case.values:
        if value is call:
            break
        if isinstance(value, ProcessorCall):
            found += rows_in(case, value)
    return found


def earlier_steps(case: Case) -> Iterator[tuple[str, Case]]:
    """Recorded steps before this one that had a rollout, the latest first, by name."""
    before = case.before
    while before is not None:
        yield f"step {before.trace.header.get('step', 'before')}", before
        before = before.before


def prompt_texts(case: Case, completion: Completion) -> tuple[str, ...]:
    """What is known of a completion's prompt as text: as the processor got it, the messages that it
    was rendered from, alone and together."""
    return case.once(_prompt_texts, completion)


def _prompt_texts(case: Case, completion: Completion) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for call in case.processed:
        rows = rows_in(case, call)
        if len(rows) == len(call.texts):
            for row, text in zip(rows, call.texts, strict=True):
                if row.ids == completion.prompt.ids:
                    found[text] = None
    for template in case.templates:
        for text, parts in _said_in(template):
            if text in found:
                found |= dict.fromkeys((*parts, "".join(parts)))
    return tuple(text for text in found if text.strip())


def _said_in(call: TemplateCall) -> Iterator[tuple[str, list[str]]]:
    """Each rendered text of a call with the texts of its messages."""
    messages = call.messages
    one = bool(messages) and isinstance(messages[0], Mapping)
    many = (messages,) if one else messages
    if len(many) == len(call.texts):
        for text, conversation in zip(call.texts, many, strict=True):
            yield text, [_text_of(m) for m in conversation if isinstance(m, Mapping)]


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) else ()
    return "".join(str(p.get("text") or "") if isinstance(p, Mapping) else str(p) for p in parts)
