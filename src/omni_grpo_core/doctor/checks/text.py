"""Looks at prompts: each conversation's whole text, in the form that Qwen-Omni was trained on.

Only what makes a prompt wrong whatever its author meant is said to break a run: turns that no
checkpoint knows, an answer that is not begun, media without placeholders. Other words than the
checkpoint's template writes are a recipe of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from operator import eq

from omni_grpo_core.doctor.bundles import rows_in
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Severity, note_judged, quoted
from omni_grpo_core.doctor.rendered import RenderedPrompt, rendered_batches
from omni_grpo_core.doctor.replay.batch import totals
from omni_grpo_core.doctor.replay.text import (
    answers,
    begun_answer,
    collapsed,
    first_difference,
    foreign_mark,
    is_chatml,
    is_whole,
    marks,
    open_turn,
    placeholders,
    reference_texts,
    unknown_roles,
)
from omni_grpo_core.trace.calls import ProcessorCall
from omni_grpo_core.types import Modality

_FEW = 5
"""Words by which a prompt may begin the answer, as ``Let me solve this. <think>`` does."""

Names = Mapping[Modality, tuple[str, str, str]]


def look_rendering(case: Case) -> Iterator[Evidence]:
    """Each text is the reference rendering of its messages."""
    names = marks(case)
    for one in rendered_batches(case):
        for prompt in one.prompts:
            if prompt.text is None or not is_chatml(prompt.text):
                continue
            note_judged(case, "text")
            inside = _rendered_inside(prompt)
            if inside is not None:
                yield inside
            elif unknown_roles(prompt.text):
                # messages may have it too, and be rendered as they are
                yield from _shape(prompt.text, prompt.number, "rendered")
            elif prompt.text not in _right(case, prompt, names):
                wanted = reference_texts(prompt.messages, names)
                nearest = min(wanted, key=lambda text: abs(len(text) - len(str(prompt.text))))
                yield from _differs(prompt.text, nearest, names, prompt.number, "rendered")


def _rendered_inside(prompt: RenderedPrompt) -> Evidence | None:
    """A message that is itself a rendered prompt."""
    for message in prompt.messages:
        role = str(message.get("role"))
        words = RenderedPrompt(0, (message,), None).text_of(role)
        if is_chatml(words) and "<|im_end|>\n" in words:
            return Evidence(
                "text",
                "rendered-twice",
                f"the {role} turn of conversation {prompt.number} is itself a rendered prompt, "
                f"{quoted(words)}: the template was applied twice",
                row=prompt.number,
                values={"role": role},
            )
    return None


def _right(case: Case, prompt: RenderedPrompt, names: Names) -> set[str]:
    """What the checkpoint's own template may write, which knows more forms than we do; a message
    that it cannot render is not judged by it."""
    right = set(reference_texts(prompt.messages, names))
    processor = None if case.reference is None else case.reference.policy.processor
    if processor is not None and not unknown_roles(str(prompt.text)):
        try:
            text = processor.apply_chat_template(
                [dict(message) for message in prompt.messages],
                add_generation_prompt=True,
                tokenize=False,
            )
            right.add(text if isinstance(text, str) else text[0])
        except Exception:  # messages in a form of another template
            return right
    return right


def look_processed_texts(case: Case) -> Iterator[Evidence]:
    """Each text that reaches the processor or generate is a prompt; where it was rendered, the same
    one."""
    names = marks(case)
    rendered = [p.text for one in rendered_batches(case) for p in one.prompts if p.text is not None]
    for one in rendered_batches(case):
        for call in one.processed:
            if call.nested:
                yield Evidence(
                    "text",
                    "prompts-nested",
                    f"the processor was passed a list of lists of prompts ({len(call.texts)} in "
                    "total), not a list of texts",
                    values={"prompts": len(call.texts)},
                )
            yield from _for_nothing(case, call, names)
            sources = [other for other in rendered if is_chatml(other)]
            for row, text in enumerate(call.texts):
                if text in rendered:
                    continue
                if not is_chatml(text):
                    if _is_sampled_from(case, call, row):
                        yield from [_raw(text, row)] if sources else _without_turns(case, text, row)
                    continue
                note_judged(case, "text")
                yield from _begun(text, row)
                passed = collapsed(text, names)
                nearest = max(sources, key=lambda other: _shared(passed, other), default=None)
                if nearest is None:
                    yield from _shape(text, row, "passed")
                    yield from _turns(text, row)
                    yield from _unmarked(text, row, names)
                elif passed != nearest:
                    yield from _differs(passed, nearest, names, row, "passed")


def _without_turns(case: Case, text: str, row: int) -> Iterator[Evidence]:
    """A prompt by hand that has none of the marks that the checkpoint's own template writes."""
    template = getattr(case.reference and case.reference.policy.processor, "chat_template", None)
    if not is_chatml(str(template)):
        return
    note_judged(case, "text")
    foreign = foreign_mark(text)
    yield Evidence(
        "text",
        "no-turns",
        f"prompt {row}, as passed, is {quoted(text)}, without any of the turns that the "
        "checkpoint was trained on"
        + (f": {foreign!r} is another family's, and plain words to it" if foreign else ""),
        row=row,
        severity="breaks" if foreign else "differs",
    )


def _turns(text: str, row: int) -> Iterator[Evidence]:
    """Turns of a prompt by hand that are not closed, or said twice."""
    if role := open_turn(text):
        yield Evidence(
            "text",
            "turn-open",
            f"prompt {row}, as passed, has a {role} turn that is never closed: the next one begins "
            "inside it",
            row=row,
        )
    turns = text.split("<|im_start|>")[1:]
    if again := next((one for one, other in pairwise(turns) if one == other), None):
        yield Evidence(
            "text",
            "turn-repeated",
            f"prompt {row}, as passed, says its turn {quoted(again)} twice",
            row=row,
            severity="differs",
        )


def _begun(text: str, row: int) -> Iterator[Evidence]:
    """An answer of which more than a few words are given."""
    words = begun_answer(text).strip()
    if len(words.split()) > _FEW:
        yield Evidence(
            "text",
            "answer-begun",
            f"prompt {row}, as passed, has begun the assistant's answer itself, with "
            f"{quoted(words)}",
            row=row,
            severity="differs",
        )


def _for_nothing(case: Case, call: ProcessorCall, names: Names) -> Iterator[Evidence]:
    """Media of a kind that no text of the call has a placeholder for."""
    count = totals(call, case)
    given = {"image": call.images, "video": call.videos}
    gone: list[Modality] = [m for m in ("image", "video") if given[m] and not count[m]]
    if not gone or call.nested:
        return
    parts = " and ".join(f"{len(given[m])} {m}s, and none has {names[m][1]}" for m in gone)
    yield Evidence(
        "text",
        "placeholders-differ",
        f"the {len(call.texts)} texts were passed to the processor with {parts}",
        values={"got": dict(count), "want": {m: len(given[m]) for m in gone}},
    )


def _unmarked(text: str, row: int, names: Names) -> Iterator[Evidence]:
    """A placeholder without its begin and end, by which positions are counted."""
    for first, mark, last in names.values():
        bare = text.replace(f"{first}{mark}{last}", "")
        special = first.startswith("<") and last.startswith("<")  # others only set it apart
        if special and mark in bare:
            yield Evidence(
                "text",
                "placeholder-unmarked",
                f"prompt {row}, as passed, has {mark} without {first} before it and {last} after "
                "it, between which every checkpoint was trained to find it",
                row=row,
                values={"first": first, "mark": mark, "last": last},
            )
            return


def _is_sampled_from(case: Case, call: ProcessorCall, row: int) -> bool:
    """Whether a row of the processor is a prompt: it reaches generate."""
    rows = rows_in(case, call)
    taken = {fed.ids for generate in case.generated for fed in rows_in(case, generate)}
    return len(rows) == len(call.texts) and rows[row].ids in taken


def _raw(text: str, row: int) -> Evidence:
    return Evidence(
        "text",
        "template-dropped",
        f"prompt {row}, as passed, is {quoted(text)}, without any turn: what the template rendered "
        "never reaches the model",
        row=row,
    )


def _shared(one: str, other: str) -> int:
    """Characters that two texts have in common at both ends: what was put into one in the middle,
    such as another turn, leaves its own media and question there."""
    return first_difference(one, other)[0] + first_difference(one[::-1], other[::-1])[0]


def look_ids(case: Case) -> Iterator[Evidence]:
    """Prompts that no processor made, such as ids joined by hand, decoded."""
    if case.reference is None:
        return
    tokenizer = case.reference.policy.processor.tokenizer
    made = {row.ids for call in case.processed for row in rows_in(case, call)}
    for call in case.generated:
        for row in rows_in(case, call):
            # a row that lost one end on the way, or some of its ids, is reported where it did
            size = len(row.ids)
            known = any(
                row.ids in (ids[:size], ids[-size:])
                or (len(ids) == size and 2 * sum(map(eq, ids, row.ids)) > size)
                for ids in made
            )
            text = "" if known else tokenizer.decode(list(row.ids))
            if is_chatml(text):
                note_judged(case, "text")
                yield from _shape(text, row.at, "generated from")


def look_one_for_all(case: Case) -> Iterator[Evidence]:
    """Rows whose media differ have different prompts where as many were rendered."""
    rendered = {p.text for one in rendered_batches(case) for p in one.prompts} - {None}
    shown: dict[str, set[object]] = {}
    for call in case.processed:
        for text, row in zip(call.texts, rows_in(case, call), strict=False):
            if text in rendered:
                shown.setdefault(text, set()).add(row.key)
    many = max(map(len, shown.values()), default=0)
    if many > 1 and len(shown) < len(rendered) == sum(map(len, shown.values())):
        lost = len(rendered) - len(shown)
        yield Evidence(
            "text",
            "prompts-lost",
            f"{len(rendered)} prompts were rendered, and the processor got one of them for "
            f"{many} different media: {lost} never reach the model",
            values={"rendered": len(rendered), "handed": many, "lost": lost},
        )


def _differs(text: str, wanted: str, names: Names, row: int, how: str) -> Iterator[Evidence]:
    """The most informative difference of a text from what it should be; none where it only goes on
    in the answer that it has begun."""
    for evidence in _shape(text, row, how):
        yield evidence
        return
    got, want = placeholders(text, names), placeholders(wanted, names)
    gone = [m for m in want if got[m] != want[m]]
    if gone:
        parts = ", ".join(f"{got[m]} {m} placeholders for {want[m]} in the messages" for m in gone)
        yield Evidence(
            "text",
            "placeholders-differ",
            f"prompt {row}, as {how}, has {parts}",
            row=row,
            values={"got": dict(got), "want": dict(want)},
        )
        return
    if answers(text) and text.startswith(wanted):
        return
    place, found, expected = first_difference(text, wanted)
    severity: Severity = "differs" if is_whole(text) else "breaks"
    edit = one_edit(wanted, text)
    more = f": every {edit[0]!r} became {edit[1]!r}" if edit else ""
    yield Evidence(
        "text",
        "text-differs",
        f"prompt {row}, as {how}, has {found!r} at character {place} instead of {expected!r}{more}",
        row=row,
        values={"place": place, "got": found, "want": expected, "how": how, "edit": edit},
        severity=severity,
    )


def one_edit(want: str, got: str) -> tuple[str, str] | None:
    r"""The one replacement that turns all of ``want`` into ``got``, with what stands before it;
    ``None`` where there is none.

    >>> one_edit("a.\nb.\nc", "a.b.c")
    ('\n', '')
    """
    matcher = difflib.SequenceMatcher(None, want, got, autojunk=False)
    changes = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    for _, start, stop, other, end in changes[:1]:
        for before in range(min(start, 12) + 1):
            old, new = want[start - before : stop], got[other - before : end]
            if old and want.replace(old, new) == got:
                return old, new
    return None


def _shape(text: str, row: int, how: str) -> Iterator[Evidence]:
    """The first violation of what every ChatML prompt must have."""
    strange = unknown_roles(text)
    if strange:
        yield Evidence(
            "text",
            "role-unknown",
            f"prompt {row}, as {how}, has a turn of role {strange[0]!r}, which no checkpoint was "
            "trained on",
            row=row,
            values={"role": strange[0]},
        )
    elif not answers(text):
        yield Evidence(
            "text",
            "no-generation-prompt",
            f"prompt {row}, as {how}, ends with {text[-30:]!r}: no answer of the assistant is "
            "begun",
            row=row,
            values={"end": text[-30:]},
        )


LOOKS: tuple[Look, ...] = (
    look_rendering,
    look_processed_texts,
    look_ids,
    look_one_for_all,
)
