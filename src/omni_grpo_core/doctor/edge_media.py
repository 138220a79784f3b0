"""What became of rows' media between two calls: dropped, exchanged, left over, or changed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni_grpo_core.doctor.bundles import Fed, FedRow, Item, held_in, markers_of, rows_in
from omni_grpo_core.doctor.call_rows import GRIDS, PIXELS
from omni_grpo_core.doctor.evidence import Case, Severity
from omni_grpo_core.doctor.patches import pictures_of
from omni_grpo_core.doctor.reproduce import Reproduction, difference, plain, reproductions, told
from omni_grpo_core.doctor.trail import Between, Trail, earlier_steps
from omni_grpo_core.trace.calls import GenerateCall, ProcessorCall
from omni_grpo_core.types import MODALITIES, Modality, Stage

_UNITS = {"image": "patches", "video": "patches", "audio": "mel frames"}
_PICTURES = ("frames", "channels", "height", "width")


@dataclass(frozen=True, slots=True, eq=False)
class Handed:
    """A row of a later call. ``bases``: the rows of the same ids that calls before it made or took,
    of which it should have the media of one; the first says what they should be."""

    row: FedRow
    bases: tuple[FedRow, ...]


@dataclass(frozen=True, slots=True)
class _Change:
    """``fact`` and ``key``: of its kind, so that rows with the same change are one finding."""

    stage: Stage
    fact: str
    sentence: str
    key: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    severity: Severity = "breaks"


def judge_media(
    trail: Trail,
    between: Between,
    handed: Sequence[Handed],
    pool: Sequence[FedRow],
    stage: Stage,
) -> set[int]:
    """Blame every modality of a row that is that of none of its bases. ``handed``: all rows of a
    call that have any. ``pool``: rows that may have been mistaken for one. Returns the rows blamed,
    by number."""
    blamed: set[int] = set()
    for modality in MODALITIES:
        wrong = [
            one for one in handed if not any(_same(base, one.row, modality) for base in one.bases)
        ]
        # what happened to one row shows in the others
        judge = _Judge(trail.case, between[1], modality, stage, handed, wrong, pool)
        for one in wrong:
            change = judge.change(one)
            if change is not None:
                blamed.add(one.row.at)
                if change.fact == "media-exchanged":
                    trail.moved.add(id(one.row))
                trail.broken(
                    between,
                    [one.row.at],
                    (change.stage, change.fact, change.sentence),
                    {"modality": modality, **change.values},
                    key=f"{modality} {change.key}",
                    severity=change.severity,
                )
    return blamed


def judge_dropped(trail: Trail, between: Between, base: FedRow, row: FedRow) -> None:
    """Blame what is gone altogether from a row that was wrong in the call before: that follows from
    nothing."""
    markers = markers_of(trail.case)
    for modality, token in markers.tokens.items() if markers is not None else ():
        name = PIXELS[modality]
        gone = _has(base.call, name) and not _has(row.call, name) and not _encoded(row.call)
        if gone and token in row.ids:
            change = _dropped(between[1], modality, base, row)
            found = (change.stage, change.fact, change.sentence)
            values = {"modality": modality, **change.values}
            trail.broken(between, [row.at], found, values, key=modality)


def _dropped(name: str, modality: Modality, base: FedRow, row: FedRow) -> _Change:
    # sounds without placeholders may be lost beside a clip
    lost = [m for m, pixels in PIXELS.items()
            if _has(base.call, pixels) and not _has(row.call, pixels)]  # fmt: skip
    return _Change(
        "media",
        "media-dropped",
        f"{PIXELS[modality]} did not reach {name}, although the call before it had them: the model "
        f"gets no {modality}",
        values={"grid": GRIDS[modality] in held_in(row.call), "lost": lost},
    )


def hands_on(base: FedRow, row: FedRow) -> bool:
    """Whether a later row holds all media of ``base``, or says nothing of their contents."""
    held = [item for items in row.media.values() for item in items or ()]
    unknown = not all(item.contents for item in held) or _encoded(row.call)
    return unknown or all(_same(base, row, modality) for modality in MODALITIES)


def _same(base: FedRow, row: FedRow, modality: Modality) -> bool:
    made, taken = base.media.get(modality, ()), row.media.get(modality, ())
    if made is None or taken is None or len(made) != len(taken):
        return False
    placed = "position_ids" in held_in(row.call)  # made from the seconds, in their place
    return all(
        one.gives(other) is not None
        and ((placed and other.seconds is None) or _same_seconds(one.seconds, other.seconds))
        for one, other in zip(made, taken, strict=True)
    )


def _same_seconds(made: float | None, taken: float | None) -> bool:
    """All floats of a batch are cast together, these too: bfloat16 keeps 8 bits."""
    if made is None or taken is None:
        return made is None
    return math.isclose(made, taken, rel_tol=2**-7)


@dataclass(frozen=True, eq=False)
class _Judge:
    """What happened to one modality of the ``wrong`` rows among those ``handed`` to a call."""

    case: Case
    name: str
    modality: Modality
    stage: Stage
    handed: Sequence[Handed]
    wrong: Sequence[Handed]
    pool: Sequence[FedRow]

    def change(self, one: Handed) -> _Change | None:
        """How a row's media are not those of its base; ``None`` where that cannot be told."""
        row, base, name, stage = one.row, one.bases[0], self.name, self.stage
        made, taken = (each.media.get(self.modality, ()) for each in (base, row))
        pixels, grid = PIXELS[self.modality], GRIDS[self.modality]
        if made is None or any(not item.contents for item in made) or _encoded(row.call):
            return None
        if grid in row.call.large or (pixels in row.call.large and pixels not in row.call.digests):
            return None
        if made and not _has(row.call, pixels):
            return _dropped(name, self.modality, base, row)
        if made and grid not in held_in(row.call):
            return _Change(stage, "grid-dropped", f"{name} got {pixels} without {grid}")
        where = f"row {row.at} of {name}"
        if taken is None:
            items = len(held_in(row.call).get(grid, ()))
            return _Change(
                stage, "media-number",
                f"the {items} {self.modality} items of {name} do not fill the placeholders of its "
                "rows", values={"items": items},
            )  # fmt: skip
        if len(made) != len(taken):
            return _Change(
                stage, "media-number",
                f"{where} has {len(taken)} {self.modality} items instead of {len(made)}",
            )  # fmt: skip
        wrong = next(
            (pair for pair in zip(made, taken, strict=True) if pair[0].gives(pair[1]) is None), None
        )
        if wrong is None:
            return _Change(
                stage, "seconds",
                f"{where} has another time per grid step than the call before it",
            )  # fmt: skip
        return (
            self._moved(where, wrong[1], base)
            or self._resized(where, *wrong)
            or self._changed(row, base, where, *wrong)
        )

    # -------------------------------------------------------------- from elsewhere

    def _moved(self, where: str, taken: Item, base: FedRow) -> _Change | None:
        """Content of an earlier step, of another row, or of this one at other places."""
        # blank content is no sign of where it is from
        blank = _is_plain(taken)
        if self._older and not blank:
            return self._stale(where, self._older)
        fact, of = "media-exchanged", self._owner(taken, (base, *self.pool))
        if of is base:
            said = f"{where} has its own {self.modality} items in another order"
            return _Change(self.stage, fact, said, values={"of": base.at})
        if of is not None:
            said = f"{where} has the {self.modality} of {self._named(of)}"
            return _Change(self.stage, fact, said, values={"of": of.at})
        units = _UNITS[self.modality]
        if self._others:
            one, owners, number = self._others
            said = (
                f"{owners[0][1]} of {number} {self.modality} {units} of row {one.row.at} of "
                f"{self.name} are those of {self._named(owners[0][0])}"
            )
            if self._order:
                said += told(": all of the call before it,", self._order)
            return _Change(self.stage, fact, said, values={"of": owners[0][0].at})
        if self._order:
            said = told(f"the {self.modality} {units} of {self.name} are those of the call before "
                        "it,", self._order)  # fmt: skip
            return _Change(self.stage, "media-changed", said, "order", plain(self._order))
        for name, before in () if blank else earlier_steps(self.case):
            if self._owner(taken, list(self._rows_before(before))) is not None:
                return self._stale(where, name)
        return None

    def _stale(self, where: str, step: str) -> _Change:
        said = f"{where} has {self.modality} content that the processor made in {step}"
        return _Change(self.stage, "media-stale", said, step, {"of": step})

    @cached_property
    def _older(self) -> str:
        """The earlier step whose rows at the same places explain every wrong row."""
        for name, before in earlier_steps(self.case):
            rows = {_place(before, row): row for row in self._rows_before(before)}
            old = [rows.get(_place(self.case, one.bases[0])) for one in self.wrong]
            if old and all(
                row is not None and _same(row, one.row, self.modality)
                for row, one in zip(old, self.wrong, strict=True)
            ):
                return name
        return ""

    def _rows_before(self, before: Case) -> Iterator[FedRow]:
        """An earlier step's rows that may have been kept. What that step itself changed before
        generate is compared with nothing here: this step changes it as well."""
        later = any(isinstance(b.call, GenerateCall) for one in self.wrong for b in one.bases)
        calls = before.generated if later else before.processed
        return chain.from_iterable(rows_in(before, call) for call in calls)

    def _owner(self, taken: Item, rows: Sequence[FedRow]) -> FedRow | None:
        """The row that an item belongs to, whatever its grid."""
        for row in rows:
            for item in row.media.get(self.modality) or ():
                same = item.contents and taken.contents
                if same and item._replace(size=taken.size).gives(taken) is not None:
                    return row
        return None

    @cached_property
    def _order(self) -> tuple[Reproduction, ...]:
        """What was done to the order of all units of the call before, taken as one."""
        once: dict[int, Handed] = {}
        for one in self.handed:
            once.setdefault(id(one.bases[0]), one)
        got = [_units(one.row, self.modality) for one in once.values()]
        for cast in range(3):
            want = [_units(one.bases[0], self.modality, cast) for one in once.values()]
            made, taken = (np.concatenate([np.empty(0, np.int64), *held]) for held in (want, got))
            if len(made) > 2 and np.array_equal(np.sort(made), np.sort(taken)):
                break
        else:
            return ()
        axes = (_UNITS[self.modality],)
        found = reproductions(torch.from_numpy(made), torch.from_numpy(taken), axes=axes)
        return tuple(one for one in found if one.name in ("reversed", "rolled", "items-swapped"))

    @cached_property
    def _others(self) -> tuple[Handed, list[tuple[FedRow, int]], int] | None:
        """The first row most of whose units are other rows', these by number of units, and its own
        number; ``None`` where there is none."""
        for one in self.wrong:
            units = _units(one.row, self.modality).tolist()
            own = {unit for held in one.bases[0].media.get(self.modality) or ()
                   for content in held.contents for unit in _numbers(content)}  # fmt: skip
            foreign = [unit for unit in units if unit not in own]
            owners = Counter(self._homes[unit] for unit in foreign if unit in self._homes)
            if 2 * len(foreign) > len(units) and owners.total() == len(foreign):
                return one, owners.most_common(), len(units)
        return None

    @cached_property
    def _homes(self) -> dict[int, FedRow]:
        """The first row of this step that has a unit."""
        found: dict[int, FedRow] = {}
        for row in self.pool:
            for item in row.media.get(self.modality) or ():
                for content in item.contents:
                    for unit in _numbers(content):
                        found.setdefault(unit, row)
        return found

    def _named(self, of: FedRow) -> str:
        """A row of the call before by the number that its own copies have in this one."""
        same = [one.row.at for one in self.handed if one.bases[0] is of]
        same = same or [one.row.at for one in self.handed if one.bases[0].ids == of.ids]
        if same:
            return f"row {same[0]}"
        call = "the processor" if isinstance(of.call, ProcessorCall) else "another generate"
        return f"row {of.at} of {call}"

    # -------------------------------------------------------------- changed on the way

    def _resized(self, where: str, made: Item, taken: Item) -> _Change | None:
        if made.size == taken.size:
            return None
        sizes = [" x ".join(map(str, item.size)) for item in (taken, made)]
        sentence = f"{where} has a {GRIDS[self.modality]} of {sizes[0]} instead of {sizes[1]}"
        sizes_of = ((row, i.size) for row in self.pool for i in row.media.get(self.modality) or ())
        of = next((row for row, size in sizes_of if size == taken.size), None)
        sentence += "" if of is None else f", that of {self._named(of)}"
        values = {"got": taken.size, "want": made.size}
        return _Change(self.stage, "grid", sentence, values=values)

    def _changed(self, row: FedRow, base: FedRow, where: str, made: Item, taken: Item) -> _Change:
        want, got = (_values(r.call, i, self.modality) for r, i in ((base, made), (row, taken)))
        other = f"{where} has other {self.modality} values than the call before it"
        if want is None or got is None:
            return _Change(self.stage, "media-changed", other)
        sound = self.modality == "audio"
        axes = ("mel frames", "mel bins") if sound else ("patches", "values")
        found = reproductions(want, got, axes=axes)
        markers = markers_of(self.case)
        if not found and not sound and markers is not None:
            shown = [pictures_of(part, made.size, markers.merge) for part in (want, got)]
            if shown[0] is not None and shown[1] is not None:
                found = reproductions(shown[0], shown[1], axes=_PICTURES)
        if found:
            subject = f"the {self.modality} of {where} is what the call before it had,"
            said, key = told(subject, found), found[0].name
            rounded = {one.name for one in found} <= {"cast-bfloat16", "cast-float16"}
            severity: Severity = "differs" if rounded else "breaks"
            return _Change(self.stage, "media-changed", said, key, plain(found), severity)
        return _Change(self.stage, "media-changed", f"{other}: {difference(want, got)}")


def _place(case: Case, row: FedRow) -> tuple[type, int, int]:
    """Which row of which call of its kind."""
    calls: Sequence[Fed] = case.processed if isinstance(row.call, ProcessorCall) else case.generated
    at = next((n for n, call in enumerate(calls) if call is row.call), -1)
    return type(row.call), at, row.at


def _is_plain(item: Item) -> bool:
    """Whether all units are equal, as of silence."""
    return all(len({*_numbers(content)}) < 2 for content in item.contents[:1])


def _numbers(content: bytes) -> list[int]:
    """The digests of an item's units."""
    found: list[int] = np.frombuffer(content, np.int64).tolist()
    return found


def _units(row: FedRow, modality: Modality, cast: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Digests of all units of a row; ``cast``: number of the precision that they are in."""
    items = row.media.get(modality) or ()
    held = [np.frombuffer(i.contents[cast], np.int64) for i in items if len(i.contents) > cast]
    return np.concatenate([np.empty(0, np.int64), *held])


def _values(call: Fed, item: Item, modality: Modality) -> Tensor | None:
    """An item's own values: (patches, C) of a picture or clip, (frames, mel) of a sound."""
    held = held_in(call).get(PIXELS[modality])
    if held is None:
        return None
    if modality == "audio":
        return held[item.start][..., : item.units].T
    return held[item.start : item.start + item.units]


def _has(call: Fed, name: str) -> bool:
    return name in held_in(call) or name in call.large or name in call.digests


def _encoded(call: Fed) -> bool:
    """Whether the towers' output was passed instead of pixels."""
    names = (*held_in(call), *call.keywords)
    return any("encoder_outputs" in name or name == "inputs_embeds" for name in names)
