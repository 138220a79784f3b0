"""Edges between texts: a completion's ids to its decode, the decode to a reward's argument, and
that argument to the columns of data beside it."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import combinations
from typing import Any

import torch

from omni_grpo_core.doctor import probed
from omni_grpo_core.doctor.evidence import Case, note_judged, quoted
from omni_grpo_core.doctor.probed import needed_markup
from omni_grpo_core.doctor.reproduce import plain, reproductions
from omni_grpo_core.doctor.rollouts import (
    Completion,
    bare,
    is_decode,
    joined,
    sampled_before,
    texts_in,
)
from omni_grpo_core.doctor.trail import Between, Trail, earlier_steps, prompt_texts, times
from omni_grpo_core.recorder.probe_cases import GOLDS
from omni_grpo_core.trace.calls import RewardCall, SamplesSeen

_TAG = re.compile(r"</?\w+>")
_FIRST_TAG = re.compile(r"\s*<\w*(?:>[^<>]{0,12})?")
"""What is lost: a tag from the very begin, or a part of it, or a word more."""
_LEAST = 12
"""Characters, without white space, of a text that is certainly part of a prompt."""
_ALIKE = 0.6
"""Likeness from which a text may be a changed decode: two answers in one format have more, a text
of another tokenizer .2 to .4."""
_BEGUN = 3
"""Tokens, and characters, that two completions share at their begin."""


def to_rewards(trail: Trail) -> None:
    """Each text that a reward function scores is the decode of a completion of this rollout, with
    its own prompt and its own row of the data, in order."""
    step = joined(trail.case)
    every = [c for c in (*step.completions, *step.earlier) if c.texts]
    seen: dict[str, str] = {}
    asked: Counter[str] = Counter()
    for number, call in enumerate(trail.case.rewards):
        between = ("generate", f"reward {call.name}", number)
        pool = sampled_before(trail.case, call, every)
        texts = _argument(call, pool)
        same = seen.setdefault(repr((call.prompts, texts, call.columns)), call.name)
        if same != call.name:
            trail.unjudged(between, range(len(texts)), f"the arguments of {same}, judged there")
            continue
        if not pool or not texts:
            why = "no completion was recorded as text" if not pool else "it was given no texts"
            trail.unjudged(between, (), why)
            continue
        note_judged(trail.case, "completion")
        strange = [row for row, text in enumerate(texts) if not _decoded(text, pool)]
        cut = _cut_at_a_length(texts, strange, pool)
        # texts come in order of generation, and a function's next call goes on after its last
        turn = deque(step.completions)
        turn.rotate(-asked[call.name])
        asked[call.name] += len(texts)
        by_another = _is_of_another_tokenizer(texts, list(turn)) if strange else False
        broken = [
            row for row in strange if _judge_text(trail, between, row, texts, pool, cut, by_another)
        ]
        if strange and not broken and not _judge_markup(trail, between, call, texts, strange, pool):
            trail.unjudged(between, strange, "part of a completion, or made from one")
        if not strange:
            _judge_arguments(trail, between, call, texts, pool)


def _argument(call: RewardCall, pool: Sequence[Completion]) -> tuple[str, ...]:
    many = texts_in(call)
    if call.completions or not many:
        return call.completions
    return next((t for t in many if any(_decoded(text, pool) for text in t)), ())


def _decoded(text: str, pool: Sequence[Completion]) -> list[Completion]:
    """The completions of which a text is the decode, changed in white space and case at most."""
    exact = [c for c in pool if is_decode(text, c)]
    return exact or [c for c in pool if bare(text) in map(bare, c.texts)]


# --------------------------------------------------------------------------- one text


def _judge_text(
    trail: Trail, between: Between, row: int, texts: Sequence[str], pool: Sequence[Completion],
    cut: int | None, by_another: bool,
) -> bool:  # fmt: skip
    """Blame a text that is no completion's decode; ``False`` where it may well be made from one.
    ``by_another``: all texts of the call are decodes by another tokenizer."""
    text, name = texts[row], between[1]
    said = bare(text)
    if said in trail.changed:
        return False
    around = [(c, whole) for c in pool for whole in c.texts if len(bare(whole)) > 2
              and bare(whole) in said]  # fmt: skip
    if around:
        completion, whole = max(around, key=lambda pair: len(pair[1]))
        front = said.partition(bare(whole))[0]
        prompts = prompt_texts(_case_of(trail.case, completion), completion)
        if not any(_in_prompt(front, prompt) for prompt in prompts):
            return False
        trail.broken(
            between,
            [row],
            ("reward", "prompt-inside",
             f"{name}: text {row} is the completion with its prompt in front: it is scored on "
             "what it was asked"),
            {"name": name},
        )  # fmt: skip
        return True
    within = [whole for c in pool for whole in c.texts if said and said
              in bare(whole)]  # fmt: skip
    if within and cut is None:
        if not _lost_begin(texts, pool):
            return False
        whole = next(w for c in pool for w in c.texts if w.strip().endswith(text.strip()))
        sentence = (
            f"{name}: text {row} is a completion without its begin, "
            f"{quoted(whole.strip().removesuffix(text.strip()))}, as are all others"
        )
        trail.broken(between, [row], ("completion", "text-begin", sentence), {"name": name})
        return True
    if within:
        sentence = (
            f"{name}: text {row} is a completion cut off after {cut} characters, as are the others "
            "that are longer"
        )
        trail.broken(between, [row], ("completion", "text-cut", sentence), {"characters": cut})
        return True
    if any(2 * len(said) > len(bare(_TAG.sub("", whole))) and _is_left_of(said, bare(whole))
           for c in pool for whole in c.texts):  # fmt: skip
        return False
    asked = [p for c in pool for p in prompt_texts(_case_of(trail.case, c), c)]
    if len(said) >= _LEAST and any(said in bare(prompt) for prompt in asked):
        sentence = f"{name}: text {row} is its prompt, without what was answered"
        trail.broken(between, [row], ("reward", "prompt-inside", sentence), {"name": name})
        return True
    wanted = next((c for c in pool if c.at == row), pool[0]).texts[0]
    sentence = (
        f"{name}: text {row} is {quoted(text)}, which is no completion's decode (the one at its "
        f"place is {quoted(wanted)})"
    )
    sentence += "; ids that begin alike give texts that begin alike" if by_another else ""
    values = {"got": text, "want": wanted, "by_another": by_another}
    trail.broken(between, [row], ("completion", "text", sentence), values)
    return True


def _judge_markup(
    trail: Trail, between: Between, call: RewardCall, texts: Sequence[str],
    strange: Sequence[int], pool: Sequence[Completion],
) -> bool:  # fmt: skip
    """Blame texts made from completions that lost on the way what the function pays for."""
    needed = needed_markup(call)
    whole = {row: _made_from(texts[row], pool) for row in strange} if needed else {}
    had = {row: {mark for mark in needed if mark in text} for row, text in whole.items()}
    rows = [row for row, marks in had.items() if marks]
    lost = {mark for row in rows for mark in had[row] if mark not in texts[row]}
    if not rows or any(lost <= {mark for mark in needed if mark in texts[row]} for row in rows):
        return False
    sentence = (
        f"{between[1]}: text {rows[0]} is {quoted(texts[rows[0]])}, made from "
        f"{quoted(whole[rows[0]])} without its {' and '.join(sorted(lost))}: nothing without that "
        "is paid, as its probes show"
    )
    trail.broken(between, rows, ("completion", "text-unmarked", sentence), {"name": call.name})
    return True


def _made_from(text: str, pool: Sequence[Completion]) -> str:
    """The shortest completion of which this is a part, or all without its tags."""
    said = bare(text)
    found = [
        whole
        for whole in (c.texts[0] for c in pool)
        if said and (said in bare(whole) or said == bare(_TAG.sub("", whole)))
    ]
    return min(found, key=len, default="")


def _lost_begin(texts: Sequence[str], pool: Sequence[Completion]) -> bool:
    """Whether all texts are the ends of completions that were cut inside or just behind their first
    tag, as by ids that are sliced too late. An answer taken out of its tags begins later."""
    fronts = [
        next(
            (w.strip().removesuffix(text.strip()) for c in pool for w in c.texts
             if text.strip() and w.strip().endswith(text.strip()) and w.strip() != text.strip()),
            None,
        )
        for text in texts
    ]  # fmt: skip
    return len(texts) > 1 and all(front and _FIRST_TAG.fullmatch(front) for front in fronts)


def _is_of_another_tokenizer(texts: Sequence[str], completions: Sequence[Completion]) -> bool:
    """Whether texts follow from the ids of completions in this order, and are yet unlike their
    decodes: other ids are another text, and ids that begin alike give texts that begin alike."""
    rows = list(zip(texts, completions, strict=False))
    if len(rows) < max(2, len(texts)) or any(_likeness(t, c.texts[0]) > _ALIKE for t, c in rows):
        return False
    shared = False
    for (one, first), (other, second) in combinations(rows, 2):
        if (first.sampled == second.sampled) != (one == other):
            return False
        if first.sampled[:_BEGUN] == second.sampled[:_BEGUN]:
            shared = True
            if one[:_BEGUN] != other[:_BEGUN]:
                return False
    return shared


def _is_left_of(text: str, whole: str) -> bool:
    """Whether a text is another without some of its characters.

    >>> _is_left_of("bold", "**bold**"), _is_left_of("dlob", "**bold**")
    (True, False)
    """
    rest = iter(whole)
    return all(character in rest for character in text)


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def _in_prompt(front: str, prompt: str) -> bool:
    """Whether what precedes a completion is its prompt, or the end of it: more than the turn that
    it continues."""
    whole = bare(prompt)
    turn = bare(prompt.rpartition("<|im_start|>")[2]) if "<|im_start|>" in prompt else ""
    if front == turn.removeprefix("assistant") or front == turn:
        return False
    return len(front) >= _LEAST and (front in whole or whole in front)


def _cut_at_a_length(
    texts: Sequence[str], strange: Sequence[int], pool: Sequence[Completion]
) -> int | None:
    """The length at which every text that was cut was cut; ``None`` where they end differently,
    as those do that are cut after a tag."""
    begun = [row for row in strange if any(w.startswith(texts[row]) for c in pool for w in c.texts)]
    lengths = {len(texts[row]) for row in begun}
    if len(begun) != len(strange) or len(lengths) != 1 or len(begun) < 2:
        return None
    ends = {texts[row][-4:] for row in begun}
    return lengths.pop() if len(ends) > 1 else None


def _case_of(case: Case, completion: Completion) -> Case:
    """The step that a completion is from."""
    for _, before in earlier_steps(case):
        if any(call is completion.call for call in before.generated):
            return before
    return case


# --------------------------------------------------------------------------- all of a call


def _judge_arguments(
    trail: Trail, between: Between, call: RewardCall, texts: Sequence[str],
    pool: Sequence[Completion],
) -> None:  # fmt: skip
    """Texts with their prompts, in order within a prompt, and the data's columns with both."""
    note_judged(trail.case, "reward")
    among = [_decoded(text, pool) for text in texts]
    if any(id(c.prompt) in trail.moved for found in among for c in found):
        trail.unjudged(between, range(len(texts)), "their rows were already others in generate")
        return
    paired = [_paired(trail.case, call.prompts[row : row + 1], found, pool)
              for row, found in enumerate(among)]  # fmt: skip
    wrong = [row for row, found in enumerate(paired) if not found]
    old = _stale(trail.case, among)
    stale, wrong = bool(old), old or wrong
    order = None if wrong else _in_order(paired, pool)
    if wrong or order is None:
        places = [pool.index(found[0]) for found in among]
        how = _moved(places)
        sentence = (
            f"{between[1]}: {len(wrong) or 'some'} of {len(texts)} texts "
            + ("are of the rollout before" if stale
               else "are beside another completion's prompt" if wrong
               else "are in another order than they were sampled in")
            + (f" (completions in the order {how})" if how else "")
        )  # fmt: skip
        found = reproductions(torch.tensor(sorted(places)), torch.tensor(places))
        fact = "text-stale" if stale else "arguments"
        rows = wrong or list(range(len(texts)))
        trail.broken(between, rows, ("reward", fact, sentence), {"name": call.name, **plain(found)})
        return
    if _judge_repeated(trail, between, call, order) or _judge_columns(trail, between, call, order):
        return
    if _judge_case(trail, between, call, texts):
        return
    moved = "in another order" if order != sorted(order, key=pool.index) else ""
    said = (times(order, order), _how_decoded(texts, order), moved)
    trail.ok(between, range(len(texts)), ", ".join(filter(None, said)))


def _judge_case(trail: Trail, between: Between, call: RewardCall, texts: Sequence[str]) -> bool:
    """Completions in capitals, or without: tags and golds are compared letter by letter. A recipe,
    unless no completion is paid and others would be."""
    how = "capitals" if all(text.isupper() for text in texts) else "lower case"
    if how != "capitals" and not all(text.islower() for text in texts):
        return False
    pool = [text.strip() for c in joined(trail.case).completions for text in c.texts]
    # one of few may have been sampled like this, beside others, or with a special token in capitals
    if all(one.isupper() or one.islower() for one in pool) or {t.strip() for t in texts} <= {*pool}:
        return False
    others = [v for case in call.probe.values() if (v := probed.number(case)) is not None]
    unpaid = len({*call.values}) == 1 and max(others, default=0.0) > (call.values[0] or 0.0)
    sentence = f"{between[1]}: its {len(texts)} texts are the completions in {how}"
    sentence += ", and none of them is paid, as others are" if unpaid else ""
    trail.broken(
        between, range(len(texts)), ("completion", "text-case", sentence), {"name": call.name},
        severity="breaks" if unpaid else "differs",
    )  # fmt: skip
    return True


def _stale(case: Case, among: Sequence[Sequence[Completion]]) -> list[int]:
    """Texts of the rollout before, in a step that trains on its own one instead."""
    step = joined(case)
    own = {id(c.call) for c in step.completions}
    trained = {
        id(completion.call)
        for forward, row in step.scored.items()
        for completion in row
        if completion is not None and forward.modes.grad_enabled
    }
    old = [row for row, found in enumerate(among) if not any(id(c.call) in own for c in found)]
    before = {id(c.call) for row in old for c in among[row]}
    return old if own & trained and not before & trained else []


def _judge_repeated(
    trail: Trail, between: Between, call: RewardCall, order: Sequence[Completion]
) -> bool:
    """A function scores all completions of a prompt equally often: none in another's place."""
    counts = Counter(map(id, order))
    groups = {c.group for c in order}
    others = [one for one in trail.case.rewards if one is not call and one.name == call.name]
    never = [
        c
        for c in joined(trail.case).completions
        if c.group in groups
        and not counts[id(c)]
        and not any(is_decode(text, c) for one in others for text in one.completions)
    ]
    often = next((c for c in order if counts[id(c)] > 1), None)
    if often is None or not never:
        return False
    sentence = (
        f"{between[1]}: completion {often.at + 1} of generate is scored {counts[id(often)]} times, "
        f"completion {never[0].at + 1} never: its row gets another's reward"
    )
    rows = [row for row, c in enumerate(order) if c is often][1:]
    trail.broken(between, rows, ("reward", "arguments", sentence), {"name": call.name})
    return True


def _how_decoded(texts: Sequence[str], order: Sequence[Completion]) -> str:
    kept = all(t.strip() == c.texts[0].strip() for t, c in zip(texts, order, strict=True))
    return "" if kept else "special tokens left out, or padding left in"


def _paired(
    case: Case, prompt: Sequence[str], among: Sequence[Completion], pool: Sequence[Completion]
) -> list[Completion]:
    """Those of ``among`` whose prompt this may be; all where the prompt is not known."""
    if not prompt or not bare(prompt[0]):
        return list(among)
    said = bare(prompt[0])

    # a system message is part of every prompt: the longest part that is common tells
    shared: dict[int, int | None] = {}
    for completion in pool:
        if id(completion.prompt) not in shared:
            known = [*map(bare, prompt_texts(_case_of(case, completion), completion))]
            alike = (min(len(said), len(one)) for one in known
                     if one and (said in one or one in said))  # fmt: skip
            # nothing is known of a prompt that was changed before generate
            shared[id(completion.prompt)] = max(alike, default=0) if known else None
    most = max(filter(None, shared.values()), default=0)
    if not most:
        return list(among)
    # equal texts with other media are other prompts, which a text does not tell apart
    return [c for c in among if shared[id(c.prompt)] in (most, None)]


def _in_order(
    among: Sequence[Sequence[Completion]], pool: Sequence[Completion]
) -> list[Completion] | None:
    """A completion for each text such that those of each prompt come in the order in which they
    were sampled, or again from the first; ``None`` where there is none."""
    place = {id(completion): at for at, completion in enumerate(pool)}
    last: dict[int, int] = {}
    first: dict[int, int] = {}
    chosen: list[Completion] = []
    for found in among:
        by_group = sorted(found, key=lambda c: place[id(c)])
        after = [c for c in by_group if place[id(c)] > last.get(c.group, -1)]
        again = [c for c in by_group if place[id(c)] == first.get(c.group)]
        if not after and not again:
            return None
        taken = after[0] if after else again[0]
        last[taken.group] = place[id(taken)]
        first.setdefault(taken.group, place[id(taken)])
        chosen.append(taken)
    return chosen


def _moved(places: Sequence[int]) -> str:
    return " ".join(str(place + 1) for place in places[:12]) if places != sorted(places) else ""


# --------------------------------------------------------------------------- columns


def _judge_columns(
    trail: Trail, between: Between, call: RewardCall, order: Sequence[Completion]
) -> bool:
    """Columns of the data belong to the prompt beside them: equal prompts have equal columns, and a
    text that is part of one prompt is not a column of another."""
    labels = _labels([c.group for c in order])
    if len(set(labels)) < 2:
        return False
    known_names = _of_data(trail.case, call, labels)
    for name, values in call.columns.items():
        if not isinstance(values, list | tuple) or len(values) != len(order):
            continue
        column = _labels([repr(value) for value in values])
        sizes = [sorted(Counter(numbers).values()) for numbers in (labels, column)]
        # where groups alone are uneven, it is a prompt that is another row's
        if sizes[0][0] < sizes[0][-1] and sizes[1][0] == sizes[1][-1]:
            continue
        told = name in known_names and sizes[0] == sizes[1]
        if not told or not _regrouped(labels, column):
            column = _owners(trail.case, values, order, labels)
        if column == labels:
            continue
        tiled = column == sorted(column) and labels == _in_turn(labels)
        sentence = (
            f"{between[1]}: its column {name} is in the order {_said(column)}, the completions "
            f"answer their prompts in the order {_said(labels)}: answers are compared with other "
            "rows' values"
        )
        stage, fact = ("completion", "group-order") if tiled else ("reward", "columns")
        rows = [row for row, (a, b) in enumerate(zip(labels, column, strict=True)) if a != b]
        known = {"name": call.name, "column": name}
        trail.broken(between, rows, (stage, fact, sentence), known)  # type: ignore[arg-type]
        return True
    return False


def _of_data(case: Case, call: RewardCall, labels: Sequence[int]) -> set[str]:
    """Columns that equal prompts should have equal: those of noted rows and golds; all, where none
    follows the prompts. Beside one that does, another may say something of a completion, such as
    why it ended."""
    lists = {n: held for n, held in call.columns.items() if isinstance(held, list | tuple)}
    if not any(_labels([repr(one) for one in held]) == list(labels) for held in lists.values()):
        return {*lists}
    noted = (seen.rows for seen in case.values if isinstance(seen, SamplesSeen))
    return {*GOLDS, *(name for rows in noted for row in rows for name in row)}


def _regrouped(labels: Sequence[int], column: Sequence[int]) -> bool:
    """Whether a column with as many values as there are prompts, each as often, has others for
    completions of one prompt."""
    counts = Counter(labels)
    return max(counts.values()) > 1 and len({*zip(labels, column, strict=True)}) > len(counts)


def _owners(
    case: Case, values: Sequence[Any], order: Sequence[Completion], labels: Sequence[int]
) -> list[int]:
    """For each value the label of the only prompt that it is a part of; ``labels`` themselves where
    every value is a part of its own, or one of none or of several."""
    known = {
        label: bare("".join(prompt_texts(_case_of(case, c), c)))
        for label, c in zip(labels, order, strict=True)
    }
    said = [bare(value) if isinstance(value, str) else "" for value in values]
    found = [[n for n, text in known.items() if len(one) >= _LEAST and one in text] for one in said]
    own = all(label in n for label, n in zip(labels, found, strict=True))
    return [*labels] if own or any(len(n) != 1 for n in found) else [n[0] for n in found]


def _in_turn(labels: Sequence[int]) -> list[int]:
    """The order of prompts that are repeated as a whole.

    >>> _in_turn([0, 0, 1, 1])
    [0, 1, 0, 1]
    """
    return [at % len({*labels}) for at in range(len(labels))]


def _labels(values: Sequence[Any]) -> list[int]:
    """One number per distinct value, in order of appearance."""
    seen: Mapping[Any, int] = {v: n for n, v in enumerate(dict.fromkeys(values))}
    return [seen[value] for value in values]


def _said(labels: Sequence[int]) -> str:
    shown = " ".join(str(label + 1) for label in labels[:12])
    return shown + (" …" if len(labels) > 12 else "")
