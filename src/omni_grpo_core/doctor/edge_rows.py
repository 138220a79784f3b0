"""Edges between rows of ids and media: processor to generate, both to the scoring forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_grpo_core.doctor.bundles import Fed, FedRow, ids_in, markers_of, rows_in
from omni_grpo_core.doctor.edge_media import Handed, hands_on, judge_dropped, judge_media
from omni_grpo_core.doctor.evidence import Case, note_judged
from omni_grpo_core.doctor.rendered import flag_of
from omni_grpo_core.doctor.reproduce import plain, reproductions, told
from omni_grpo_core.doctor.rollouts import (
    Completion,
    bare,
    is_scored_as,
    joined,
    same_media,
    texts_in,
)
from omni_grpo_core.doctor.trail import Between, Trail, earlier_steps, made_before, times
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, ProcessorCall
from omni_grpo_core.types import Stage

GENERATE, FORWARD = "generate", "the scoring forward"


@dataclass(frozen=True, slots=True)
class IdsChange:
    """How a row's ids are not the ones they should be. ``fact``: cut, mask or ids."""

    fact: str
    how: str
    values: dict[str, object]


# --------------------------------------------------------------------------- to generate


def to_generate(trail: Trail) -> None:
    """Each row of generate is a row that the processor made in this step, in that order."""
    for number, call in enumerate(trail.case.generated):
        between = ("processor", GENERATE, number)
        taken, made = rows_in(trail.case, call), made_before(trail.case, call)
        every = range(len(taken))
        if not taken:
            trail.unjudged(between, (), "generate was given no ids")
        elif not made:
            _without_processor(trail, between, taken)
        else:
            _rows_to_generate(trail, between, taken, _relevant(made, taken))
        if scrambles(call):
            trail.blamed |= {id(taken[row]) for row in every}


def scrambles(call: GenerateCall) -> bool:
    """Whether generate itself may repeat pixels patch by patch, which another look reports; some
    families repeat pictures, so that a prompt's copies have the very same embeddings."""
    copies = int(call.config.get("num_return_sequences") or 1)
    embeds = call.digests.get("inputs_embeds")
    if embeds is not None and embeds.dim() == 2 and len(embeds) % copies == 0:
        own = embeds.view(-1, copies, embeds.shape[1])
        if bool((own == own[:, :1]).all()):
            return False
    return copies > 1 and any(
        name in call.inputs or name in call.large
        for name in ("pixel_values", "pixel_values_videos")
    )


def _relevant(made: Sequence[FedRow], taken: Sequence[FedRow]) -> list[FedRow]:
    """The rows of the latest processor call that has all of ``taken``, with their media if one has:
    the same prompts may be processed twice. Else all, if these explain them: a call for each row,
    of equal words about different media; or the latest with their ids."""
    calls: dict[int, list[FedRow]] = {}
    for row in made:
        calls.setdefault(id(row.call), []).append(row)
    wanted = {row.ids for row in taken}
    whole = [rows for rows in reversed(calls.values()) if wanted <= {row.ids for row in rows}]
    same = (
        rows
        for rows in (*whole, list(made))
        if all(any(hands_on(one, row) for one in rows if one.ids == row.ids) for row in taken)
    )
    return next(same, whole[0] if whole else list(made))


def _rows_to_generate(
    trail: Trail, between: Between, taken: Sequence[FedRow], made: Sequence[FedRow]
) -> None:
    alike = [
        [n for n, row in enumerate(made) if row.ids == one.ids and same_media(row, one)]
        for one in taken
    ]
    whole = [row.at for row, found in zip(taken, alike, strict=True) if found]
    if len(whole) < len(taken) and _stale(trail, between, taken):
        return
    note_judged(trail.case, "batch")
    handed: list[Handed] = []
    broken: set[int] = set()
    for row, found in zip(taken, alike, strict=True):
        base = made[found[0]] if found else _partner(row, taken, made, alike)
        if base is not None and row.ids == base.ids:
            handed.append(Handed(row, (base,)))
        elif base is not None:
            _judge_ids(trail, between, row, base)
            broken.add(row.at)
    broken |= judge_media(trail, between, handed, made, "batch")
    unknown = {row.at for row in taken} - broken - {*whole}
    if unknown:
        trail.unjudged(between, sorted(unknown), "no row of the processor is comparable")
    if not broken and not unknown:
        _judge_order(trail, between, taken, made, alike)
    elif whole:
        trail.ok(between, whole)
    # ids and mask are cut or replaced for all rows at once, where some had only padding to lose
    changed = any(row.ids not in {one.ids for one in made} for row in taken)
    trail.blamed |= {id(row) for row in taken if row.at in broken or changed}


def _partner(
    row: FedRow, taken: Sequence[FedRow], made: Sequence[FedRow], alike: Sequence[Sequence[int]]
) -> FedRow | None:
    """The row that should have been handed on: of the same ids, else the one that most of its ids
    are from, else the one at the same place."""
    expected = _expected(len(taken), len(made), alike)
    place = made[expected[row.at]] if expected else None
    same = [other for other in made if other.ids == row.ids]
    if same:
        return place if place in same else same[0]
    near = max(made, key=lambda other: (_common(row, other.ids), other is place))
    if 2 * _common(row, near.ids) >= max(len(near.ids), len(row.ids)):
        return near
    return place


def _expected(rows: int, pool: int, alike: Sequence[Sequence[int]]) -> list[int] | None:
    """Places in order, each repeated or all repeated, whichever explains more rows."""
    if not pool or rows % pool:
        return None
    copies = rows // pool
    ways = ([row // copies for row in range(rows)], [row % pool for row in range(rows)])
    return max(ways, key=lambda way: sum(p in a for p, a in zip(way, alike, strict=True)))


def _judge_ids(trail: Trail, between: Between, row: FedRow, base: FedRow) -> None:
    change = ids_change(row, base.ids)
    said = f"row {row.at} of {between[1]}: {change.how}"
    key = str(change.values.get("how", ""))
    if change.fact == "ids":
        trail.moved.add(id(row))
    trail.broken(between, [row.at], ("batch", change.fact, said), change.values, key=key)


def ids_change(row: FedRow, want: Sequence[int]) -> IdsChange:
    """How a row's ids became others than ``want``."""
    got, whole = row.ids, tuple(want)
    place = _inside(whole, row.raw)
    if place is not None:
        if not row.masked:
            how = (
                f"no attention mask was passed: {len(row.raw) - len(whole)} tokens of padding count"
            )
            return IdsChange("mask", how, {"how": "dropped"})
        more, less = len(set(_kept(row)) - set(place)), len(set(place) - set(_kept(row)))
        parts = [f"keeps {more} tokens of padding"] * bool(more)
        parts += [f"hides {less} of the row's {len(whole)} tokens"] * bool(less)
        how = "all ones" if bool(row.kept.all()) else "changed"
        return IdsChange("mask", "the attention mask " + " and ".join(parts), {"how": how})
    lost = len(whole) - len(got)
    if got and lost > 0 and got in (whole[:-lost], whole[lost:]):
        side = "right" if got == whole[:-lost] else "left"
        how = f"{len(got)} of {len(whole)} tokens, truncated on the {side}"
        return IdsChange("cut", how, {"side": side, "got": len(got), "want": len(whole)})
    found = reproductions(torch.tensor(whole), torch.tensor(got))
    if found:
        return IdsChange("ids", told("its ids are the right ones", found), plain(found))
    off = sum(a != b for a, b in zip(got, whole, strict=False)) + abs(lost)
    how = f"{len(got)} tokens, {off} of them others than the {len(whole)} that it should have"
    return IdsChange("ids", how, {"got": len(got), "want": len(whole)})


def _inside(whole: tuple[int, ...], raw: tuple[int, ...]) -> range | None:
    """Where ``whole`` lies in a padded row, if it does; from the right, as prompts are padded on
    the left."""
    for start in range(len(raw) - len(whole), -1, -1):
        if raw[start : start + len(whole)] == whole:
            return range(start, start + len(whole))
    return None


def _kept(row: FedRow) -> list[int]:
    kept: list[int] = row.kept.nonzero().flatten().tolist()
    return kept


def _judge_order(
    trail: Trail, between: Between, taken: Sequence[FedRow], made: Sequence[FedRow],
    alike: Sequence[Sequence[int]],
) -> None:  # fmt: skip
    every = range(len(taken))
    places = _in_order(alike)
    if places is None:
        places = [found[0] for found in alike]
        found = reproductions(torch.arange(len(made)), torch.tensor(places))
        order = " ".join(str(place + 1) for place in places[:12])
        moved = [row for row, place in enumerate(places) if place != row] or list(every)
        sentence = (
            f"the rows of {between[1]} are the processor's in the order {order}"
            + (f": {found[0].sentence}" if found else "")
            + ", while what follows counts on their own order"
        )
        trail.broken(between, moved, ("batch", "order", sentence), plain(found))
        trail.blamed |= {id(row) for row in taken}
        trail.moved |= {id(row) for row in taken}
        return
    cast = _casts(taken, [made[place] for place in places])
    trail.ok(between, every, ", ".join(filter(None, (times(places, places), cast))))


def _in_order(alike: Sequence[Sequence[int]]) -> list[int] | None:
    """A place for each row such that none goes back, or all are repeated as a whole.

    >>> _in_order([[0], [0], [1]]), _in_order([[0], [1], [0], [1]]), _in_order([[1], [0]])
    ([0, 0, 1], [0, 1, 0, 1], None)
    """
    runs: list[list[int]] = [[]]
    for found in alike:
        last = runs[-1][-1] if runs[-1] else -1
        after = [place for place in found if place > last]
        if last + 1 in found:
            runs[-1].append(last + 1)
        elif last in found:
            runs[-1].append(last)
        elif after:
            runs[-1].append(after[0])
        else:
            runs.append([found[0]])
    if len({tuple(run) for run in runs}) > 1:
        return None
    return [place for run in runs for place in run]


def _casts(taken: Sequence[FedRow], made: Sequence[FedRow]) -> str:
    names = {
        one.gives(other)
        for row, base in zip(taken, made, strict=True)
        for modality, items in base.media.items()
        for one, other in zip(items or (), row.media.get(modality) or (), strict=False)
    }
    cast = next((name for name in names if name), "")
    return f"cast to {cast}" if cast else ""


def _stale(trail: Trail, between: Between, taken: Sequence[FedRow]) -> bool:
    """Whether whole rows are those of an earlier step, although this one has made its own."""
    for name, before in earlier_steps(trail.case):
        old = [row for call in before.processed for row in rows_in(before, call)]
        if all(any(o.ids == r.ids and same_media(o, r) for o in old) for r in taken):
            sentence = (
                f"{between[1]} got the rows that the processor made in {name}; those of this step "
                "never reach it"
            )
            every = [row.at for row in taken]
            trail.broken(between, every, ("batch", "stale", sentence), {"of": name})
            trail.blamed |= {id(row) for row in taken}
            trail.moved |= {id(row) for row in taken}
            return True
    return False


def _without_processor(trail: Trail, between: Between, taken: Sequence[FedRow]) -> None:
    """A step without a processor call of its own: rows made once may be used again, unless other
    texts were rendered since."""
    rendered = {text for call in trail.case.templates for text in call.texts}
    for name, before in earlier_steps(trail.case):
        made = [row for call in before.processed for row in rows_in(before, call)]
        alike = [[r for r in made if r.ids == t.ids and same_media(r, t)] for t in taken]
        if not all(alike):
            continue
        own = {text for found in alike for row in found for text in _text_of(row)}
        if rendered and own and not rendered & own:
            _stale(trail, between, taken)
        else:
            trail.ok(between, (row.at for row in taken), f"made in {name}")
        return
    trail.unjudged(
        between, (row.at for row in taken), "no call of the processor was recorded in this step"
    )


def _text_of(row: FedRow) -> tuple[str, ...]:
    call = row.call
    return call.texts[row.at : row.at + 1] if isinstance(call, ProcessorCall) else ()


# --------------------------------------------------------------------------- to scoring


def to_scoring(trail: Trail) -> None:
    """Each scored row is a prompt and the completion that was sampled from it, with its media and
    at its positions, in any order."""
    case = trail.case
    step = joined(case)
    pool = (*step.completions, *step.earlier)
    for number, call in enumerate(case.forwards):
        between = (GENERATE, FORWARD, number)
        rows = rows_in(case, call)
        every = range(len(rows))
        if call.error is not None or _continues(call):
            trail.unjudged(between, every, "it continues from a cache, or raised")
        elif not rows:
            trail.unjudged(between, every, "it was given no ids")
        elif not pool:
            _prompts_to_scoring(trail, number, rows)
        else:
            _scored_rows(trail, between, rows, step.scored[call], pool)


def _prompts_to_scoring(trail: Trail, number: int, rows: Sequence[FedRow]) -> None:
    """Where completions were sampled out of sight: each scored row has the media of the processor's
    row with which it begins."""
    between = ("processor", FORWARD, number)
    made = made_before(trail.case, rows[0].call)
    handed, strange = [], []
    for row in rows:
        bases = tuple(one for one in made if one.ids and row.ids[: len(one.ids)] == one.ids)
        if bases:
            handed.append(Handed(row, bases))
        else:
            strange.append(row.at)
    wrong = judge_media(trail, between, handed, made, "media")
    ok = [one.row.at for one in handed if one.row.at not in wrong]
    if ok:
        trail.ok(between, ok, "its prompts, with completions that were sampled out of sight")
    if strange:
        trail.unjudged(between, strange, "not rows of the processor, and none of generate was seen")


def _continues(call: ForwardCall) -> bool:
    ids = ids_in(call)
    names = {*call.keywords, *call.inputs}
    cached = any(
        name in names and call.keywords.get(name, True) is not None
        for name in ("past_key_values", "cache_position", "cache")
    )
    return cached or (ids is not None and ids.shape[1] == 1)


def _scored_rows(
    trail: Trail, between: Between, rows: Sequence[FedRow],
    scored: Sequence[Completion | None], pool: Sequence[Completion],
) -> None:  # fmt: skip
    follows: list[int] = []
    strange: list[int] = []
    several: list[int] = []
    handed: dict[Handed, Completion] = {}
    markers = markers_of(trail.case)
    tokens = set() if markers is None else {*markers.tokens.values()}
    # a sampled placeholder takes an item of this row or a later one
    taken = any(tokens & {*c.sampled} for c in scored if c is not None)
    for row, found in zip(rows, scored, strict=True):
        completion = found or _nearest(row, pool)
        if completion is None:
            strange.append(row.at)
        elif found is None and is_scored_as(row.ids, completion):
            several.append(row.at)
        elif taken or id(completion.prompt) in trail.blamed:
            follows.append(row.at)
            judge_dropped(trail, between, completion.prompt, row)
        elif found is None:
            _blame_ids(trail, between, row, completion)
        else:
            bases = (completion.prompt, *_processed(trail, completion))
            handed[Handed(row, bases)] = completion
    wrong = judge_media(trail, between, [*handed], _prompts(pool), "media")
    order = {
        one.row.at: completion
        for one, completion in handed.items()
        if one.row.at not in wrong and _judge_positions(trail, between, one.row, completion)
    }
    if ok := [*order]:
        places = [pool.index(completion) for completion in order.values()]
        moved = "in another order" if places != sorted(places) else ""
        trail.ok(between, ok, ", ".join(filter(None, (times(places, places), moved))))
    if follows:
        trail.unjudged(between, follows, "they follow from what is wrong in generate")
    if strange:
        trail.unjudged(between, strange, "not rows of this rollout")
    if several:
        trail.unjudged(between, several, "their ids are those of several completions")


def _blame_ids(trail: Trail, between: Between, row: FedRow, completion: Completion) -> None:
    change = ids_change(row, _whole(completion))
    how = str(change.values.get("how", ""))
    text = _rewarded_as(trail.case, row, completion)
    if text:
        trail.changed.add(text)
        sentence = (
            f"row {row.at} of {between[1]}: {change.how}; rewards got the text of these ids, so "
            "they were changed on their way from generate to both"
        )
        trail.broken(
            between, [row.at], ("completion", f"sampled-{change.fact}", sentence), change.values,
            key=how,
            # as by a stop string: what is scored is what is rewarded
            severity="differs" if change.values.get("side") == "right" else "breaks",
        )  # fmt: skip
        return
    # positions are counted over the mask: without one they are those of plain text
    stage: Stage = "positions" if how == "dropped" else "logits"
    sentence = f"row {row.at} of {between[1]}: {change.how}"
    trail.broken(
        between, [row.at], (stage, f"scored-{change.fact}", sentence), change.values, key=how
    )


def _rewarded_as(case: Case, row: FedRow, completion: Completion) -> str:
    """The text, other than the completion's, that a scored row's ids are and that a reward got."""
    start = len(completion.prompt.ids)
    if case.reference is None or row.ids[:start] != completion.prompt.ids:
        return ""
    tokenizer = case.reference.policy.processor.tokenizer
    text = bare(tokenizer.decode(list(row.ids[start:])))
    cases = (case,) if case.before is None else (case.before, case)
    calls = [call for held in cases for call in held.rewards]
    given = {bare(one) for call in calls for many in texts_in(call) for one in many}
    return text if text in given - {bare(own) for own in completion.texts} else ""


def _nearest(row: FedRow, pool: Sequence[Completion]) -> Completion | None:
    """The completion that most of a row's ids are from; ``None`` where less than half are."""
    best = max(pool, key=lambda completion: _common(row, _whole(completion)))
    whole = _whole(best)
    near = _common(row, whole) >= max(len(whole), len(row.ids)) / 2
    return best if near and whole else None


def _whole(completion: Completion) -> tuple[int, ...]:
    return (*completion.prompt.ids, *completion.sampled)


def _common(row: FedRow, whole: tuple[int, ...]) -> int:
    """Tokens that a row shares with other ids, from both ends; all where it only has another
    mask."""
    if _inside(whole, row.raw) is not None:
        return len(row.raw) + len(whole)
    size = min(len(whole), len(row.ids))
    front = next((n for n in range(size) if whole[n] != row.ids[n]), size)
    back = next((n for n in range(size) if whole[-1 - n] != row.ids[-1 - n]), size)
    return min(front + back, size)


def _processed(trail: Trail, completion: Completion) -> list[FedRow]:
    """Processor rows that were handed to generate: scoring may take theirs."""
    case, prompt = trail.case, completion.prompt
    made = [row for call in case.processed for row in rows_in(case, call)]
    return [row for row in made if row.ids == prompt.ids and hands_on(row, prompt)]


def _prompts(pool: Sequence[Completion]) -> list[FedRow]:
    return list({id(c.prompt): c.prompt for c in pool}.values())


def _judge_positions(trail: Trail, between: Between, row: FedRow, completion: Completion) -> bool:
    """Whether a scored prompt is at the positions at which it was sampled from, up to one shift of
    all, which a rotary embedding does not see; blamed where it is not."""
    generate, forward = completion.call, row.call
    if not isinstance(forward, ForwardCall):
        return True
    want = positions_of(generate, completion.at, completion.prompt)
    got = positions_of(forward, row.at, row)
    if want is None or got is None or got.shape[1] < want.shape[1]:
        return True
    note_judged(trail.case, "positions")
    width = want.shape[1]
    gaps = got[:, :width] - want
    after = got[:, width:] - got[:, :width].max() - 1 - torch.arange(got.shape[1] - width)
    if bool((gaps == gaps[0, 0]).all()) and bool((after == 0).all()):
        return True
    how = "the prompt" if not bool((gaps == gaps[0, 0]).all()) else "the completion"
    flags = [flag_of(call.keywords) for call in (generate, forward)]
    sentence = (
        f"row {row.at} of {between[1]}: {how} is at other positions than in generate, up to "
        f"{float(gaps.abs().max() if how == 'the prompt' else after.abs().max()):g} off"
    )
    if not row.masked:
        sentence += "; it was called without attention_mask"
    found = reproductions(want, got[:, :width]) if how == "the prompt" else ()
    if found:
        sentence += told("; they are generate's", found)
    trail.broken(
        between,
        [row.at],
        ("positions", "positions", sentence),
        {"how": how, "mask": row.masked, "flags": flags, **plain(found)},
        key=how,
        # a wrong flag is blamed where it is passed; one that is missing belongs here
        origin="inherited" if flags[1] is not None and flags[0] != flags[1] else "added",
    )
    return False


def positions_of(call: Fed, at: int, row: FedRow) -> Tensor | None:
    """(3, L): positions of a row's tokens inside the model."""
    held = call.position_ids if isinstance(call, GenerateCall | ForwardCall) else None
    if held is None and isinstance(call, ForwardCall):
        # a text model that is given none counts every token of the row
        held = torch.arange(len(row.kept)).expand(3, 1, -1)
    if held is None or held.dim() != 3 or held.shape[-1] != len(row.kept):
        return None
    rows = held.shape[1]
    # num_return_sequences repeats rows inside generate; positions of one row may be broadcast
    place = 0 if rows == 1 else row.at if rows == _rows(call) else at
    return held[-3:, place, row.kept].double() if place < rows else None


def _rows(call: Fed) -> int:
    ids = ids_in(call)
    return 0 if ids is None else len(ids)
