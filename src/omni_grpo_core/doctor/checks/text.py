"""Looks at rendered prompts: each conversation's whole text, as Qwen-Omni was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin, note_judged
from omni_grpo_core.doctor.rendered import rendered_batches
from omni_grpo_core.doctor.replay.text import (
    collapsed,
    first_difference,
    is_chatml,
    marks,
    placeholders,
    reference_texts,
    unknown_roles,
)
from omni_grpo_core.pipeline import GENERATION_PROMPT
from omni_grpo_core.types import Modality

Names = Mapping[Modality, tuple[str, str, str]]


def look_rendering(case: Case) -> Iterator[Evidence]:
    """Each text is the reference rendering of its messages."""
    names = marks(case)
    for one in rendered_batches(case):
        for prompt in one.prompts:
            if prompt.text is None or not is_chatml(prompt.text):
                continue
            wanted = reference_texts(prompt.messages, names)
            note_judged(case, "text")
            if prompt.text not in wanted:
                yield _differs(prompt.text, wanted[0], names, prompt.number, "rendered")


def look_processed_texts(case: Case) -> Iterator[Evidence]:
    """The processor gets each rendered text, whole and unchanged, equally often."""
    names = marks(case)
    for one in rendered_batches(case):
        rendered = [prompt.text for prompt in one.prompts if prompt.text is not None]
        for call in one.processed:
            if call.nested:
                yield Evidence(
                    "text",
                    "prompts-nested",
                    f"the processor was passed a list of lists of prompts ({len(call.texts)} in "
                    "total), not a list of texts",
                    values={"prompts": len(call.texts)},
                )
            if not rendered or not call.texts or not is_chatml(rendered[0]):
                continue
            note_judged(case, "text")
            passed = [collapsed(text, names) for text in call.texts]
            # conversations without a row are reported where they were made
            whole = not one.rows or not len(one.prompts) % len(one.rows)
            yield from _lost(rendered, passed, "added" if whole else "inherited")
            right = {w for prompt in one.prompts for w in reference_texts(prompt.messages, names)}
            right |= set(rendered)
            for row, text in enumerate(call.texts):
                if collapsed(text, names) in right or text in right:
                    continue
                nearest = max(rendered, key=lambda other: first_difference(text, other)[0])
                yield _differs(collapsed(text, names), nearest, names, row, "passed")


def look_unrendered(case: Case) -> Iterator[Evidence]:
    """Without a recorded template call: texts have known roles and end with a generation prompt."""
    for one in rendered_batches(case):
        if one.prompts:
            continue
        for call in one.processed:
            for row, text in enumerate(call.texts):
                if is_chatml(text):
                    note_judged(case, "text")
                    yield from _shape(text, row, "passed")


def _lost(rendered: list[str], passed: list[str], origin: Origin) -> Iterator[Evidence]:
    """Prompts of the batch that never reach the processor, or too few of them."""
    had, got = Counter(rendered), Counter(passed)
    lost = [text for text in had if not got[text]]
    known = sum(got[text] for text in had)
    # a text that was changed on the way is reported by what was changed
    unknown = len(passed) - known
    fewer = bool(known) and not unknown and len(passed) < len(rendered)
    if fewer or unknown < len(lost):
        yield Evidence(
            "text",
            "prompts-lost",
            f"{len(rendered)} prompts were rendered and {len(passed)} passed to the processor, "
            f"{len(set(passed))} different ones: {max(len(lost), len(rendered) - len(passed))} "
            "never reach the model",
            origin=origin,
            values={
                "rendered": len(rendered),
                "handed": len(passed),
                "different": len(set(passed)),
                "lost": len(lost),
            },
        )
    elif not lost and not unknown:
        shares = {got[text] * len(rendered) - had[text] * len(passed) for text in had}
        if shares != {0}:
            yield Evidence(
                "text",
                "prompts-uneven",
                f"{len(rendered)} rendered prompts became {len(passed)}, not all equally often",
                origin=origin,
                values={"rendered": len(rendered), "handed": len(passed)},
            )


def _differs(text: str, wanted: str, names: Names, row: int, how: str) -> Evidence:
    """The most informative difference of a text from what it should be."""
    for evidence in _shape(text, row, how):
        return evidence
    got, want = placeholders(text, names), placeholders(wanted, names)
    gone = [m for m in want if got[m] != want[m]]
    if gone:
        parts = ", ".join(f"{got[m]} {m} placeholders for {want[m]} in the messages" for m in gone)
        return Evidence(
            "text",
            "placeholders-differ",
            f"prompt {row}, as {how}, has {parts}",
            row=row,
            values={"got": dict(got), "want": dict(want)},
        )
    place, found, expected = first_difference(text, wanted)
    return Evidence(
        "text",
        "text-differs",
        f"prompt {row}, as {how}, has {found!r} at character {place} instead of {expected!r}",
        row=row,
        values={"place": place, "got": found, "want": expected, "how": how},
    )


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
    elif not text.endswith(GENERATION_PROMPT):
        yield Evidence(
            "text",
            "no-generation-prompt",
            f"prompt {row}, as {how}, ends with {text[-30:]!r}, not with {GENERATION_PROMPT!r}",
            row=row,
            values={"end": text[-30:]},
        )


LOOKS: tuple[Look, ...] = (look_rendering, look_processed_texts, look_unrendered)
