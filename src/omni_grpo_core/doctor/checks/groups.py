"""Which row each completion belongs to: by the prompt it was generated from, the columns it was
scored with, and its group. The three must agree; the one that differs from both others is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_grpo_core.doctor.checks.completion import look_at_pixels
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, quoted
from omni_grpo_core.doctor.rollouts import Completion, RolloutRecord, joined, prompts_of, rollouts
from omni_grpo_core.recorder.probe_cases import GOLDS, answer_in
from omni_grpo_core.trace.calls import RewardCall

Owners = tuple[int | None, ...]
"""The data row that each completion belongs to, from one source; ``None``: unknown."""

_QUESTIONS = ("problem", "question", "query", "prompt")
_OPTION = re.compile(r"[a-z](\s*,\s*[a-z])*")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?")


@dataclass(frozen=True, slots=True)
class OwnersBySource:
    """``generated``: by the prompt passed to generate. ``scored``: by the columns passed to reward
    functions. ``grouped``: by the group of the advantage. ``None`` where not known for all
    completions."""

    generated: Owners | None
    scored: Owners | None
    grouped: Owners | None


def look_at_owners(case: Case) -> Iterable[Evidence]:
    """One of the three sources differs from the other two."""
    scrambled = any(True for _ in look_at_pixels(case))
    for rollout in rollouts(case):
        found = owners_by_source(case, rollout, by_prompt=not scrambled)
        generated, scored, grouped = found.generated, found.scored, found.grouped
        values = {"generated": generated, "scored": scored, "grouped": grouped}
        if scored and grouped and generated and scored == grouped != generated:
            yield Evidence(
                "completion",
                "group-order",
                f"completions were generated in the prompt order {_order(generated)}; rewards and "
                f"groups assume the order {_order(scored)}: answers are compared with other "
                "prompts' gold",
                values=values,
            )
        elif generated and scored and scored != generated and grouped in (generated, None):
            at = next(i for i, (a, b) in enumerate(zip(generated, scored, strict=True)) if a != b)
            yield Evidence(
                "reward",
                "columns-moved",
                f"completion {at} answers row {_row(generated[at])} of the data but is scored with "
                f"the columns of row {_row(scored[at])}; completions are in the order "
                f"{_order(generated)}, columns in the order {_order(scored)}",
                row=at,
                values=values,
            )
        elif grouped and (known := generated or scored) and _mixed(grouped, known):
            yield Evidence(
                "advantage",
                "groups-mixed",
                f"advantages were computed over groups in the order {_order(grouped)}, but the "
                f"completions answer the prompts {_order(known)}: a group compares answers to "
                "different questions",
                values=values,
            )
        elif scored and grouped and scored != grouped:
            yield Evidence(
                "reward",
                "columns-moved",
                f"completions are grouped in the order {_order(grouped)} but scored with columns "
                f"in the order {_order(scored)}: whole groups are scored by other prompts' gold",
                values=values,
            )


def look_at_rollouts_of_old(case: Case) -> Iterable[Evidence]:
    """A step that samples and rewards a rollout, and trains on an earlier one once more."""
    step = joined(case)
    own = {one for entries in step.entries for one in entries} & {*step.completions}
    trained = _trained(case)
    again = set() if case.before is None else trained & _trained(case.before)
    # a pipeline that samples one rollout ahead trains each of them for the first time
    if not own or not again or trained & {*step.completions}:
        return
    yield Evidence(
        "completion",
        "rollout-unused",
        f"{len(own)} completions were sampled and rewarded, and none of them is trained on: the "
        f"{len(trained)} in the loss are of the rollout before, on which the step before trained "
        "already",
        values={"sampled": len(own), "again": len(again)},
    )


def _trained(case: Case) -> set[Completion]:
    """The completions that are scored with a gradient."""
    scored = joined(case).scored.items()
    return {one for call, row in scored if call.modes.grad_enabled for one in row if one}


def _mixed(groups: Owners, owners: Owners) -> bool:
    """Whether some group has completions of several prompts; reordering whole groups mixes none."""
    return len(set(zip(groups, owners, strict=True))) > len(set(groups))


def look_at_columns(case: Case) -> Iterable[Evidence]:
    """Columns of one completion that come from several data rows."""
    for rollout in rollouts(case):
        for call in rollout.rewards:
            torn = _torn(rollout, call.columns, len(call.completions))
            if torn is None:
                continue
            at, origins = torn
            yield Evidence(
                "reward",
                "columns-moved",
                f"reward {call.name}: completion {at} is scored with columns of several rows of "
                f"the data ({origins})",
                row=at,
                values={"name": call.name},
            )
            break


def look_at_golds(case: Case) -> Iterable[Evidence]:
    """Golds that are not those of the row which the other columns, or the prompt, are from, nor of
    any other row of the rollout."""
    for rollout in rollouts(case):
        for call in rollout.rewards:
            wrong = list(_other_golds(case, rollout, call))
            # those of one question are all given one gold
            owns: dict[tuple[str, str], set[str]] = {}
            for one in wrong:
                owns.setdefault((one.question, one.given), set()).add(one.own)
            by_question = any(len(golds) > 1 for golds in owns.values())
            # numbers may be counted from another one
            if not wrong or not (by_question or any(one.own.isalpha() for one in wrong)):
                continue
            first = wrong[0]
            yield Evidence(
                "reward",
                "gold-of-another",
                f"reward {call.name}: completion {first.at} answers row {_row(first.owner)} of the "
                f"data, whose gold is {quoted(first.own)}, and is scored with "
                f"{quoted(first.given)} instead; so are {len(wrong) - 1} others with golds that "
                "are not their rows'",
                row=first.at,
                values={"name": call.name, "by_question": by_question},
            )
            return


@dataclass(frozen=True, slots=True)
class _OtherGold:
    """``own``: the answer in the gold of the row, ``given``: in that which its completion ``at``
    was scored with. ``question``: of the row, as text."""

    at: int
    owner: int
    own: str
    given: str
    question: str


def _other_golds(case: Case, rollout: RolloutRecord, call: RewardCall) -> Iterator[_OtherGold]:
    rows = () if rollout.samples is None else rollout.samples.rows
    number = next(n for n, one in enumerate(case.rewards) if one is call)
    groups = [None if one is None else one.group for one in joined(case).entries[number]]
    # rows that are equal but for their media are told apart by the prompts
    asked = labels_of(groups) if len({*groups} - {None}) == len(rows) else []
    for at, fit in enumerate(_fits(rollout, call.columns, len(call.completions)) or ()):
        beside = [found for name, found in fit.items() if name not in GOLDS]
        common = set.intersection(*beside) if beside else {*range(len(rows))}
        common = common & {asked[at]} if at < len(asked) and len(common) > 1 else common
        if len(common) != 1:
            continue
        [owner] = common
        row = rows[owner]
        for name in fit.keys() & {*GOLDS}:
            own, given = str(row[name]), str(call.columns[name][at])
            # a gold of another row of the rollout is a column that moved
            if not fit[name] and _says_another(own, given):
                question = " ".join(str(row.get(one, "")) for one in _QUESTIONS)
                yield _OtherGold(at, owner, answer_in(own), answer_in(given), question)


def _says_another(own: str, given: str) -> bool:
    """Whether a gold of the same form has another answer: letters for letters, numbers for numbers.
    What a collator makes of a gold has another form, or the same answer."""
    if (own == answer_in(own)) != (given == answer_in(given)):
        return False
    answers = [answer_in(text).casefold().strip(" .()") for text in (own, given)]
    kinds = ["option" if _OPTION.fullmatch(one) else "number" if _NUMBER.fullmatch(one) else ""
             for one in answers]  # fmt: skip
    return kinds[0] == kinds[1] != "" and answers[0] != answers[1]


def owners_by_source(
    case: Case, rollout: RolloutRecord, *, by_prompt: bool = True
) -> OwnersBySource:
    """Data rows from each source. Without recorded rows, prompts are numbered as they appear, which
    still distinguishes groups."""
    generated = _generated(case, rollout) if by_prompt else None
    scored = None
    for call in rollout.rewards:
        scored = scored or _scored(rollout, call.columns, len(call.completions))
    grouped = _grouped(rollout)
    count = max((len(o) for o in (generated, scored, grouped) if o), default=0)
    return OwnersBySource(
        *(
            o if o and len(o) == count and None not in o else None
            for o in (generated, scored, grouped)
        )
    )


def _generated(case: Case, rollout: RolloutRecord) -> Owners | None:
    labels = None if rollout.generated is None else prompts_of(case, rollout.generated)
    if labels is None:
        return None
    # equal prompts cannot be numbered: unknown
    rows = None if rollout.samples is None else len(rollout.samples.rows)
    return tuple(labels) if rows is None or len(set(labels)) == rows else None


def _scored(rollout: RolloutRecord, columns: Mapping[str, Any], count: int) -> Owners | None:
    fits = _fits(rollout, columns, count)
    if fits is None:
        return None
    owners: list[int | None] = []
    for fit in fits:
        common = set.intersection(*fit.values())
        owners.append(next(iter(common)) if len(common) == 1 else None)
    return tuple(owners)


def _torn(rollout: RolloutRecord, columns: Mapping[str, Any], count: int) -> tuple[int, str] | None:
    for at, fit in enumerate(_fits(rollout, columns, count) or ()):
        if all(fit.values()) and not set.intersection(*fit.values()):
            return at, ", ".join(f"{name} of row {min(rows)}" for name, rows in fit.items())
    return None


def _fits(
    rollout: RolloutRecord, columns: Mapping[str, Any], count: int
) -> list[dict[str, set[int]]] | None:
    """For each completion and column, the data rows with this value."""
    rows = () if rollout.samples is None else rollout.samples.rows
    names = [
        name
        for name, values in columns.items()
        if isinstance(values, list | tuple)
        and len(values) == count
        and rows
        and all(name in row for row in rows)
    ]
    fits = {
        name: [
            {k for k, row in enumerate(rows) if _plain(row[name]) == _plain(value)}
            for value in columns[name]
        ]
        for name in names
    }
    # a column that never is a row's was made of it, as a conversation that the completion ends
    fits = {name: found for name, found in fits.items() if any(found) or name in GOLDS}
    return (
        [{name: found[at] for name, found in fits.items()} for at in range(count)] if fits else None
    )


def _grouped(rollout: RolloutRecord) -> Owners | None:
    if rollout.advantage is None:
        return None
    names = rollout.advantage.group_ids
    ids = None if rollout.samples is None else rollout.samples.group_ids
    if ids is not None and set(names) <= set(ids) and len(set(ids)) == len(ids):
        return tuple(ids.index(name) for name in names)
    return tuple(labels_of(names))


def labels_of(values: Sequence[Any]) -> list[int]:
    """One number per distinct value, in order of appearance.

    >>> labels_of(["b", "a", "b"])
    [0, 1, 0]
    """
    seen: dict[Any, int] = {}
    return [seen.setdefault(value, len(seen)) for value in values]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _row(owner: int | None) -> str:
    return "?" if owner is None else str(owner)


def _order(owners: Owners) -> str:
    shown = " ".join("?" if owner is None else str(owner + 1) for owner in owners[:12])
    return shown + (" …" if len(owners) > 12 else "")


LOOKS: tuple[Look, ...] = (
    look_at_owners,
    look_at_columns,
    look_at_golds,
    look_at_rollouts_of_old,
)
