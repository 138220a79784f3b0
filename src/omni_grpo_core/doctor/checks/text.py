"""Looks at rendered prompts: each conversation's own text, whole, as Qwen-Omni was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin
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
            if prompt.text not in wanted:
                yield _differs(prompt.text, wanted[0], names, prompt.number, "rendered")


def look_handed_over(case: Case) -> Iterator[Evidence]:
    """The processor gets each rendered text, whole and unchanged, equally often."""
    names = marks(case)
    for one in rendered_batches(case):
        rendered = [prompt.text for prompt in one.prompts if prompt.text is not None]
        for call in one.processed:
            if call.nested:
                yield Evidence(
                    "text",
                    "prompts-nested",
                    f"the processor was handed a list of lists of prompts ({len(call.texts)} in "
                    "all), not a list of texts",
                    values={"prompts": len(call.texts)},
                )
            if not rendered or not call.texts or not is_chatml(rendered[0]):
                continue
            handed = [collapsed(text, names) for text in call.texts]
            # conversations that no row asked for are told where they were made
            whole = not one.rows or not len(one.prompts) % len(one.rows)
            yield from _lost(rendered, handed, "added" if whole else "inherited")
            right = {w for prompt in one.prompts for w in reference_texts(prompt.messages, names)}
            right |= set(rendered)
            for row, text in enumerate(call.texts):
                if collapsed(text, names) in right or text in right:
                    continue
                nearest = max(rendered, key=lambda other: first_difference(text, other)[0])
                yield _differs(collapsed(text, names), nearest, names, row, "handed over")


def look_unrendered(case: Case) -> Iterator[Evidence]:
    """Where nobody saw the template: the texts have known roles and end in a generation prompt."""
    for one in rendered_batches(case):
        if one.prompts:
            continue
        for call in one.processed:
            for row, text in enumerate(call.texts):
                if is_chatml(text):
                    yield from _shape(text, row, "handed over")


def _lost(rendered: list[str], handed: list[str], origin: Origin) -> Iterator[Evidence]:
    """Prompts of the batch that never reach the processor, or too few of them."""
    had, got = Counter(rendered), Counter(handed)
    lost = [text for text in had if not got[text]]
    known = sum(got[text] for text in had)
    # a text that was changed on the way is told by what was changed
    strangers = len(handed) - known
    fewer = bool(known) and not strangers and len(handed) < len(rendered)
    if fewer or strangers < len(lost):
        yield Evidence(
            "text",
            "prompts-lost",
            f"{len(rendered)} prompts were rendered and {len(handed)} handed to the processor, "
            f"of which {len(set(handed))} different: {max(len(lost), len(rendered) - len(handed))} "
            "never reach the model",
            origin=origin,
            values={
                "rendered": len(rendered),
                "handed": len(handed),
                "different": len(set(handed)),
                "lost": len(lost),
            },
        )
    elif not lost and not strangers:
        shares = {got[text] * len(rendered) - had[text] * len(handed) for text in had}
        if shares != {0}:
            yield Evidence(
                "text",
                "prompts-uneven",
                f"{len(rendered)} rendered prompts became {len(handed)}, not each equally often",
                origin=origin,
                values={"rendered": len(rendered), "handed": len(handed)},
            )


def _differs(text: str, wanted: str, names: Names, row: int, how: str) -> Evidence:
    """The most telling way in which a text is not what it should be."""
    for evidence in _shape(text, row, how):
        return evidence
    got, want = placeholders(text, names), placeholders(wanted, names)
    gone = [m for m in want if got[m] != want[m]]
    if gone:
        told = ", ".join(f"{got[m]} {m} placeholders for {want[m]} in the messages" for m in gone)
        return Evidence(
            "text",
            "placeholders-differ",
            f"prompt {row}, as {how}, has {told}",
            row=row,
            values={"got": dict(got), "want": dict(want)},
        )
    place, found, expected = first_difference(text, wanted)
    return Evidence(
        "text",
        "text-differs",
        f"prompt {row}, as {how}, has {found!r} at character {place} where {expected!r} belongs",
        row=row,
        values={"place": place, "got": found, "want": expected, "how": how},
    )


def _shape(text: str, row: int, how: str) -> Iterator[Evidence]:
    """What any ChatML prompt must have."""
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
            f"prompt {row}, as {how}, ends in {text[-30:]!r}, not in {GENERATION_PROMPT!r}",
            row=row,
            values={"end": text[-30:]},
        )


LOOKS: tuple[Look, ...] = (look_rendering, look_handed_over, look_unrendered)
