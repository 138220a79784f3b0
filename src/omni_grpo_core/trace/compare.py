"""``compare(a, b)``: how ``b`` differs from ``a``, stage by stage.

Throughout, ``a`` is the old side (a golden, a reference) and ``b`` the new one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from omni_grpo_core.tolerances import Tolerances, distance
from omni_grpo_core.trace.divergence import (
    Difference,
    Divergence,
    StageComparison,
    Verdict,
)
from omni_grpo_core.trace.fingerprint import Fingerprint, fingerprint
from omni_grpo_core.trace.floats import fingerprint_differences, float_differences
from omni_grpo_core.trace.integers import Decode, integer_differences, span_differences
from omni_grpo_core.trace.leaves import Kind, Leaf, Numbers, Ranking, Scalar, Spans, leaves
from omni_grpo_core.trace.place import name, row_of
from omni_grpo_core.types import StageRecord, Trace

_CONTEXT = 24
"""Characters quoted on either side of the first difference of two texts."""
_EMPTY = ("()", "{}")


def compare(
    a: Trace, b: Trace, tolerances: Tolerances | None = None, decode: Decode | None = None
) -> Divergence:
    """Compare two traces in the order of ``a``'s stages.

    Integers, masks, text, spans, shapes and dtypes must agree exactly, floats within the tolerance
    of their dtype. A check that passed must still pass. Seconds and headers are not compared.
    ``decode`` turns token ids into text for the sentences. A stage in only one trace differs.
    """
    stages = []
    for record, again in _paired(a, b):
        if record is None or again is None:
            present = record or again
            stage = present.stage if present else ""
            what = "is missing" if again is None else "is new"
            found = [Difference("self", "differs", f"the stage {stage} {what}")]
        else:
            stage = record.stage
            found = compare_leaves(leaves(record.value), leaves(again.value), tolerances, decode)
            found += _checks(record, again)
        stages.append(StageComparison(stage, tuple(found)))
    return Divergence(tuple(stages))


def _paired(
    a: Trace, b: Trace
) -> Iterator[tuple[StageRecord[object] | None, StageRecord[object] | None]]:
    left = list(b.stages)
    for record in a.stages:
        again = next((other for other in left if other.stage == record.stage), None)
        if again is not None:
            left.remove(again)
        yield record, again
    for again in left:
        yield None, again


def _checks(was: StageRecord[object], now: StageRecord[object]) -> Iterator[Difference]:
    failed = {check.name for check in was.checks if not check.ok}
    for check in now.checks:
        if not check.ok and check.name not in failed:
            sentence = f"check {check.name} now fails: {check.detail}"
            yield Difference(f"checks.{check.name}", "differs", sentence)


def compare_leaves(
    was: Mapping[str, Leaf],
    now: Mapping[str, Leaf],
    tolerances: Tolerances | None = None,
    decode: Decode | None = None,
) -> list[Difference]:
    """The differences of one value, in the order of the leaves of ``was``.

    >>> [d.sentence for d in compare_leaves(leaves({"fps": 1.0}), leaves({"fps": 0.5}))]
    ['fps is 0.5, was 1']
    """
    found: list[Difference] = []
    settled: set[str] = set()  # their parts need no separate sentence
    parents = {parent for path in (*was, *now) for parent in _parents(path)}
    for path in [*was, *(path for path in now if path not in was)]:
        if not settled.isdisjoint(_parents(path)):
            continue
        before, after = was.get(path), now.get(path)
        if before is None or after is None:
            present = before or after
            has_parts = path in parents or (path == "self" and len(was) + len(now) > 1)
            if isinstance(present, Kind) and present.name in _EMPTY and has_parts:
                continue
            settled.add(path)
            what = "is missing" if after is None else "is new"
            found.append(Difference(path, "differs", f"{name(path)} {what}", row_of(path)))
            continue
        if isinstance(before, Kind) and before != after:
            if path == "self":
                return [_changed(path, before, after)]
            settled.add(path)
        found += _leaf(path, before, after, tolerances or Tolerances(), decode)
    return found


def _parents(path: str) -> Iterator[str]:
    """Every path that ``path`` may be part of."""
    return (path[:at] for at, character in enumerate(path) if character in ".[")


def _leaf(
    path: str, was: Leaf, now: Leaf, tolerances: Tolerances, decode: Decode | None
) -> Iterator[Difference]:
    match was, now:
        case (Scalar(), Scalar()):
            yield from _scalars(path, was, now, tolerances)
        case (Spans(), Spans()):
            yield from span_differences(path, was, now)
        case (Ranking(), Ranking()):
            yield from ranking_differences(path, was, now, tolerances, decode)
        case (Numbers() | Fingerprint(), Numbers() | Fingerprint()):
            yield from _numbers(path, was, now, tolerances, decode)
        case _ if was != now:
            yield _changed(path, was, now)


def _numbers(
    path: str,
    was: Numbers | Fingerprint,
    now: Numbers | Fingerprint,
    tolerances: Tolerances,
    decode: Decode | None,
) -> Iterator[Difference]:
    if was.dtype != now.dtype:
        sentence = f"{name(path)}: dtype is {now.dtype}, was {was.dtype}"
        yield Difference(path, "differs", sentence, row_of(path))
        return
    if isinstance(was, Numbers) and isinstance(now, Numbers) and was.integral:
        yield from integer_differences(path, was, now, decode)
        return
    old, new = _shapes(was), _shapes(now)
    if old != new:
        sentence = f"{name(path)}: shape is {_lists(new)}, was {_lists(old)}"
        yield Difference(path, "differs", sentence, row_of(path))
    elif isinstance(was, Numbers) and isinstance(now, Numbers):
        yield from float_differences(path, was, now, tolerances)
    else:
        yield from fingerprint_differences(
            path, _fingerprinted(was), _fingerprinted(now), tolerances
        )


def _shapes(leaf: Numbers | Fingerprint) -> tuple[tuple[int, ...], ...]:
    if isinstance(leaf, Fingerprint):
        return leaf.shapes
    return tuple(tuple(part.shape) for part in leaf.parts)


def _lists(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " ".join(str(list(shape)) for shape in shapes)


def _fingerprinted(leaf: Numbers | Fingerprint) -> Fingerprint:
    return leaf if isinstance(leaf, Fingerprint) else fingerprint(*leaf.parts)


def _scalars(path: str, was: Scalar, now: Scalar, tolerances: Tolerances) -> Iterator[Difference]:
    a, b = was.value, now.value
    if type(a) is not type(b):
        yield _changed(path, was, now)
    elif isinstance(a, float) and isinstance(b, float):
        apart, near = distance(a, b), tolerances.of("float").allows(a, b)
        if not apart:
            return
        sentence = f"{name(path)} is {b:g}, was {a:g}{', within tolerance' if near else ''}"
        verdict: Verdict = "within" if near else "differs"
        yield Difference(path, verdict, sentence, row_of(path), None, apart, apart)
    elif a != b and isinstance(a, str) and isinstance(b, str):
        yield Difference(path, "differs", f"{name(path)} {_text(a, b)}", row_of(path))
    elif a != b:
        yield _changed(path, was, now)


def _text(was: str, now: str) -> str:
    if len(was) <= 2 * _CONTEXT and len(now) <= 2 * _CONTEXT:
        return f"is {_quoted(now)}, was {_quoted(was)}"
    pairs = enumerate(zip(was, now, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(was), len(now)))
    old, new = (side[max(at - _CONTEXT, 0) : at + _CONTEXT] for side in (was, now))
    return f"from character {at} is {_quoted(new)}, was {_quoted(old)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _changed(path: str, was: Leaf, now: Leaf) -> Difference:
    return Difference(
        path, "differs", f"{name(path)} is {_brief(now)}, was {_brief(was)}", row_of(path)
    )


def _brief(leaf: Leaf) -> str:
    match leaf:
        case Scalar(value=value):
            return json.dumps(value, ensure_ascii=False)[: 2 * _CONTEXT]
        case Kind(name=kind):
            return {"()": "empty", "{}": "empty"}.get(kind, f"a {kind}")
        case Spans(spans=spans):
            return "1 span" if len(spans) == 1 else f"{len(spans)} spans"
        case Ranking():
            return "a ranking of tokens"
        case Numbers() | Fingerprint():
            return f"{leaf.dtype} {_lists(_shapes(leaf))}"


def ranking_differences(
    path: str, was: Ranking, now: Ranking, tolerances: Tolerances, decode: Decode | None
) -> Iterator[Difference]:
    """At most one difference: a different likeliest token, or else the logprob that moved most.
    Tokens may swap ranks within tolerance."""
    tolerance = tolerances.of("float")
    old = dict(zip(was.ids, was.logprobs, strict=True))
    new = dict(zip(now.ids, now.logprobs, strict=True))
    # a token that only one side ranks is compared with the other side's lowest-ranked one
    last_old, last_new = was.logprobs[-1], now.logprobs[-1]
    pairs = {token: (old.get(token, last_old), new.get(token, last_new)) for token in old | new}
    apart = {token: distance(*pair) for token, pair in pairs.items()}
    others = [(was.logsumexp, now.logsumexp), (was.entropy, now.entropy)]
    if not any(apart.values()) and not any(distance(*pair) for pair in others):
        return
    token = max(apart, key=lambda candidate: apart[candidate])
    most, mean = apart[token], sum(apart.values()) / len(apart)
    if all(tolerance.allows(*pair) for pair in [*pairs.values(), *others]):
        sentence = f"{name(path)}: logprobs moved by up to {most:.3g}, within tolerance"
        yield Difference(path, "within", sentence, row_of(path), None, most, mean)
        return
    words = {**was.words, **now.words}

    def word(token: int) -> str:
        text = decode([token]) if decode else words.get(token)
        return f"{token}" if text is None else f"{token} {json.dumps(text, ensure_ascii=False)}"

    if was.ids[0] != now.ids[0]:
        what = (
            f"the likeliest token is {word(now.ids[0])}, was {word(was.ids[0])} "
            f"(by a margin of {was.margin:.3g})"
        )
    else:
        what = f"logprob of {word(token)} moved by {most:.3g}"
    sentence = f"{name(path)}: {what}; entropy is {now.entropy:.4g}, was {was.entropy:.4g}"
    yield Difference(path, "differs", sentence, row_of(path), None, most, mean)
