"""Which data row each prompt of a step was made from, as far as a recording tells.

Rows that the trainer noted are matched with the conversation that fits them; otherwise the columns
that reward functions got belong to the prompt of the completion that they were given with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from omni_grpo_core.doctor.bundles import rows_in
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.rendered import (
    RenderedBatch,
    RenderedPrompt,
    flag_of,
    order_of,
    paths_of,
    question_of,
    rendered_batches,
)
from omni_grpo_core.doctor.rollouts import Completion, is_decode, joined
from omni_grpo_core.recorder.probe_cases import GOLDS

_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """``prompt``: with its messages; those of its text where no template call was recorded.
    ``row``: the data row's columns, as far as known. ``batch``: of the prompt, ``None`` likewise.
    ``completion``: that was rewarded with these columns; ``None`` where the trainer itself noted
    the row."""

    prompt: RenderedPrompt
    row: Mapping[str, Any]
    batch: RenderedBatch | None
    completion: Completion | None

    @property
    def sounds(self) -> bool:
        """Whether the processor was called with audio-in-video on."""
        return self.batch is not None and carries_sound(self.batch)


def asked(case: Case) -> tuple[Asked, ...]:
    """Every prompt of a step whose row is known: one for each noted row, else for each completion
    that was rewarded."""
    return noted(case) or rewarded(case)


def noted(case: Case) -> tuple[Asked, ...]:
    """Prompts of the rows that the trainer noted."""
    return tuple(
        Asked(prompt, row, one, None)
        for one in rendered_batches(case)
        for row, prompt in _pairs(one)
    )


def rewarded(case: Case) -> tuple[Asked, ...]:
    """Prompts of rewarded completions."""
    return case.once(_rewarded)


def _rewarded(case: Case) -> tuple[Asked, ...]:
    texts = _texts_by_ids(case)
    rendered = {
        prompt.text: (prompt, one)
        for one in rendered_batches(case)
        for prompt in one.prompts
        if prompt.text is not None
    }
    found = []
    for number, (completion, row) in enumerate(_columns(case).items()):
        text = texts.get(completion.prompt.ids) or _of_cut(completion.prompt.ids, texts)
        if text is None and case.reference is not None:
            tokenizer = case.reference.policy.processor.tokenizer
            text = tokenizer.decode(list(completion.prompt.ids))
        if text is None:
            continue
        turns = tuple({"role": r, "content": words} for r, words in _CHATML.findall(text))
        by_text = (RenderedPrompt(number, turns, text), None)
        prompt, batch = rendered.get(text, by_text)
        found.append(Asked(prompt, row, batch, completion))
    return tuple(found)


def _columns(case: Case) -> dict[Completion, dict[str, Any]]:
    """What reward functions got with each completion, by the name of the argument: without the
    completion itself, whatever its argument is called. A gold is that of a right answer too, but
    not of all of them."""
    given: dict[str, list[tuple[Completion, Any]]] = {}
    for call, entries in zip(case.rewards, joined(case).entries, strict=True):
        for name, held in call.columns.items():
            each = isinstance(held, list | tuple) and len(held) == len(entries)
            if each or len(entries) == 1:
                values = held if each else [held]
                by_entry = zip(entries, values, strict=True)
                given.setdefault(name, []).extend((c, v) for c, v in by_entry if c is not None)
    rows: dict[Completion, dict[str, Any]] = {
        completion: {} for entries in joined(case).entries for completion in entries if completion
    }
    for name, pairs in given.items():
        if not all(isinstance(value, str) and is_decode(value, one) for one, value in pairs):
            for completion, value in pairs:
                rows[completion].setdefault(name, value)
    return rows


def _texts_by_ids(case: Case) -> dict[tuple[int, ...], str]:
    """The text of each row that the processor made, by its ids."""
    found: dict[tuple[int, ...], str] = {}
    for call in case.processed:
        rows = rows_in(case, call)
        if len(rows) == len(call.texts):
            found |= {row.ids: text for row, text in zip(rows, call.texts, strict=True)}
    return found


def _of_cut(ids: tuple[int, ...], texts: Mapping[tuple[int, ...], str]) -> str | None:
    """The text of a row that lost one end on its way to generate."""
    whole = (text for row, text in texts.items() if ids in (row[: len(ids)], row[-len(ids) :]))
    return next(whole, None) if ids else None


def carries_sound(one: RenderedBatch) -> bool:
    """Whether a batch's processor was called with audio-in-video on."""
    return any(flag_of(call.keywords) for call in one.processed)


def _pairs(one: RenderedBatch) -> Sequence[tuple[Mapping[str, Any], RenderedPrompt]]:
    """Noted rows with their conversations, in the order that matches most of them."""
    best: list[tuple[Mapping[str, Any], RenderedPrompt]] = []
    most = -1
    for owners in order_of(len(one.rows), len(one.prompts)).values():
        pairs = [(one.rows[o], prompt) for o, prompt in zip(owners, one.prompts, strict=True)]
        fit = sum(_fits(row, prompt) for row, prompt in pairs)
        if fit > most:
            best, most = pairs, fit
    return best


def _fits(row: Mapping[str, Any], prompt: RenderedPrompt) -> bool:
    """Whether a conversation asks a row's question about a row's media."""
    files = {name_of(path) for _, path in paths_of(row)}
    same = bool(files & {name_of(ref.path) for ref in prompt.media}) or not files
    return same and (question_of(row) or "") in prompt.text_of("user")


def name_of(path: str) -> str:
    """A file's name without its folder."""
    return PurePath(path).name or path


def golds_of(row: Mapping[str, Any]) -> list[str]:
    """What the completion should be, under any of a row's usual column names."""
    return [
        row[name].strip()
        for name in (*GOLDS, "response")
        if isinstance(row.get(name), str) and row[name]
    ]
