"""Rewards: what each function returned, also for completions whose score is known."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged, note_missing, quoted
from omni_grpo_core.doctor.probed import Learned, by_place, cases, learned, number, place_of, title
from omni_grpo_core.doctor.rollouts import is_decode, joined, rollouts
from omni_grpo_core.recorder.probe_cases import GOLDS, answer_in
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.tolerances import EQUAL_RECORDED_REWARDS
from omni_grpo_core.trace.calls import RewardCall
from omni_grpo_core.types import Malformed

_NEAR = 0.25
"""Of the way from a wrong answer's reward to a right one's: graded rewards differ by less."""
_FLOORS = 4
"""Kinds of garbage that are paid alike before that is called a floor."""
_ENDS = re.compile(r"(<\|[^|<>]+\|>|</s>|<eos>|<pad>)\s*$")
"""A special token at the end of a text."""
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BUGS = ("NameError", "UnboundLocalError", "ImportError", "ModuleNotFoundError", "TypeError",
         "AttributeError")  # fmt: skip
"""Errors of the code itself, rather than of what a policy wrote."""
_WITH_A_TOP = ("accuracy", "format")
_AS_RIGHT = "as much as for a right answer"


def calls_of(case: Case) -> Iterator[RewardCall]:
    """The last call of each function; later probes include the earlier ones."""
    last: dict[str, RewardCall] = {}
    for call in case.rewards:
        last[call.name] = call
    yield from last.values()


def look_at_values(case: Case) -> Iterable[Evidence]:
    """Errors, missing values and non-finite values."""
    for call in case.rewards:
        if call.error is not None:
            yield Evidence(
                "reward", "raised", f"reward {call.name} raised {call.error}",
                values={"name": call.name, "error": call.error},
            )  # fmt: skip
            continue
        bad = [i for i, v in enumerate(call.values) if v is not None and not math.isfinite(v)]
        if bad:
            yield Evidence(
                "reward",
                "not-a-number",
                f"reward {call.name} returned {call.values[bad[0]]} for completion {bad[0]}"
                + (f" and {len(bad) - 1} others" if len(bad) > 1 else ""),
                row=bad[0],
                values={"name": call.name, "rows": bad},
            )
        if call.completions and len(call.values) != len(call.completions):
            yield Evidence(
                "reward",
                "count-differs",
                f"reward {call.name} returned {len(call.values)} values for "
                f"{len(call.completions)} completions",
                values={"name": call.name},
            )
        elif call.values and all(v is None for v in call.values):
            yield Evidence(
                "reward",
                "never-scored",
                f"reward {call.name} scored none of {len(call.values)} completions",
                "unknown",
                values={"name": call.name},
                severity="differs" if _others_score(case, call) else "breaks",
            )


def _others_score(case: Case, call: RewardCall) -> bool:
    return any(
        value is not None for one in case.rewards if one.name != call.name for value in one.values
    )


# --------------------------------------------------------------------------- known answers


def look_at_probes(case: Case) -> Iterable[Evidence]:
    """What a function gives to completions of known worth, by what it measures."""
    for call in calls_of(case):
        what = learned(call)
        if what.kind == "unknown":
            _note_unprobed(case, call, what)
            continue
        if _broken(call):
            continue
        note_judged(case, "reward")
        if what.kind == "accuracy":
            yield from _paid_wrongly(call, what)
        elif what.kind == "inverted":
            yield _inverted(case, call, what)
        else:
            yield from _gold_unpaid(call)
        if what.kind == "format":
            yield from _structures(call, what)
        yield from _raising(call)
        yield from _swallowing(call)
        yield from _together(call, what)
        yield from _floor(call, what)


def _note_unprobed(case: Case, call: RewardCall, what: Learned) -> None:
    why = (
        f"it raised {_short(what.raised, 160)} on every completion"
        if what.raised
        else "a dump has its values, not the function"
        if case.dumped
        else "it may use a network, a model or state of its own, or probing is off"
    )
    note_missing(case, f"reward {call.name} was not tried on known answers: {why}", "reward")


def _broken(call: RewardCall) -> bool:
    """Whether the recorded rows already show non-finite values."""
    return any(v is not None and not math.isfinite(v) for v in call.values)


def _paid_wrongly(call: RewardCall, what: Learned) -> Iterator[Evidence]:
    """Of a function that compares with the gold. What can be exploited is a recipe all the same,
    and published ones are; what pays for any garbage is not."""
    garbage = {n: p for n, p in cases(call, "garbage") if _equal(number(p), what.top)}
    for name, probed in garbage.items():
        yield replace(
            _probed(call, name, probed, _AS_RIGHT, what.low),
            severity="breaks" if len(garbage) >= _FLOORS else "differs",
        )
    # the rest is compared with a plain right answer of the same type, in the same form
    right = {at: v for at, v in by_place(call, "right") if what.share(v) > 1 - _NEAR}
    plain = {
        n: (p, right[at])
        for n, p in cases(call, "evasion", "notation")
        if (at := place_of(p)) in right
    }
    evasions = {
        n: p for n, (p, top) in plain.items() if p["role"] == "evasion" and _equal(number(p), top)
    }
    for name, probed in evasions.items():
        # where the first or the last of two answers counts, only one order is paid
        plain_name = _case_of(name)
        turned = " or ".join(reversed(plain_name.split(" or ")))
        if name.replace(plain_name, turned) in evasions:
            yield replace(_probed(call, name, probed, _AS_RIGHT, what.low), severity="differs")
    strict: dict[str, Evidence] = {}
    for name, (probed, top) in plain.items():
        value = number(probed)
        if (
            probed["role"] == "notation"
            and value is not None
            and what.share(value) < what.share(top) - _NEAR
        ):
            spelt = _short(answer_in(str(probed["solution"])), 20)
            but = f"the gold as it is spelt, {spelt}, earns {top:g}"
            # one spelling of each problem type is enough; comparing as text is a recipe
            strict.setdefault(
                str(probed["problem_type"]),
                replace(_probed(call, name, probed, but, top), severity="differs"),
            )
    yield from strict.values()
    for kind in dict.fromkeys(str(probed["problem_type"]) for probed in call.probe.values()):
        own = {n: p for n, p in cases(call, "right", "foreign") if p["problem_type"] == kind}
        paid = [(p["role"], what.share(v)) for p in own.values() if (v := number(p)) is not None]
        name = next((n for n, p in own.items() if p["form"] == what.form), "")
        if name and paid and all(share < _NEAR for role, share in paid if role == "right"):
            yield _unpaid(call, name, own[name], sure=True)


def _gold_unpaid(call: RewardCall) -> Iterator[Evidence]:
    """Of a function that is to compare with the gold, by its name, and pays it no more than
    garbage in any form."""
    named = any(word in title(call) for word in ("acc", "correct"))
    right = dict(cases(call, "right"))
    paid = [v for probed in right.values() if (v := number(probed)) is not None]
    bad = {n: v for n, probed in cases(call, "garbage") if (v := number(probed)) is not None}
    if not (named and paid and bad) or max(paid) > min(bad.values()):
        return
    if min(paid) < min(bad.values()):
        name = next(iter(bad))
        but = f"a right answer with tags earns {min(paid):g}"
        yield _probed(call, name, call.probe[name], but, min(paid))
        return
    # a gold that is a whole completion must be paid; a bare one may belong into an unknown form
    whole = {name: probed for name, probed in right.items() if probed["form"] == "verbatim"}
    caught = {name: probed for name, probed in right.items() if probed["swallowed"]}
    name, probed = next(iter({**whole, **caught, **right}.items()))
    said = "" if whole else _answered(call, max(paid))
    yield _unpaid(call, name, probed, sure=bool(whole or said), said=said)


def _answered(call: RewardCall, most: float) -> str:
    """That a recorded completion answers with its very gold, and earns no more than ``most``."""
    for name in GOLDS:
        golds = call.columns.get(name)
        golds = [golds] if isinstance(golds, str) else golds
        if not isinstance(golds, list | tuple) or len(golds) != len(call.completions):
            continue
        rows = zip(call.completions, golds, call.values, strict=False)
        for at, (text, gold, value) in enumerate(rows):
            own = _TAGGED.findall(text)
            if value is not None and value <= most and own and own[-1].strip() == gold:
                return f"; it gave {value:g} to completion {at}, whose answer is {quoted(gold)}"
    return ""


def _inverted(case: Case, call: RewardCall, what: Learned) -> Evidence:
    """A penalty beside a reward of right answers may be meant so."""
    probed = next(p for _, p in cases(call, "wrong") if p["form"] == what.form)
    paid = any(learned(one).kind == "accuracy" for one in case.rewards)
    gold = str(probed["solution"])
    return Evidence(
        "reward",
        "inverted",
        f"reward {call.name} gives {what.top:g} to a wrong answer, "
        f"{_short(str(probed['completion']))} (gold {_short(gold, 40)}), and {what.low:g} to the "
        f"right one in its place, {_short(answer_in(gold), 20)}",
        values={"name": call.name},
        severity="differs" if paid else "breaks",
    )


def _unpaid(
    call: RewardCall, name: str, probed: Mapping[str, Any], *, sure: bool, said: str = ""
) -> Evidence:
    """``said``: of a recorded completion."""
    swallowed = probed["swallowed"]
    return Evidence(
        "reward",
        "gold-unpaid",
        f"reward {call.name} gives {probed['alone']:g} to a right answer, "
        f"{_short(str(probed['completion']))} (gold {_short(str(probed['solution']), 40)})"
        + (f", in every form that was tried{'' if sure else ', which may not be its own'}")
        + (said or (f"; it caught {swallowed}" if swallowed else "")),
        "added" if sure else "unknown",
        values={"name": call.name, "case": name, "swallowed": swallowed},
        severity="breaks" if sure else "differs",
    )


def _structures(call: RewardCall, what: Learned) -> Iterator[Evidence]:
    """Of a format reward: white space before its form, and text after it. Stricter or looser than
    ours is a recipe."""
    wanted = {"leading newline": (what.top, what.low), "trailing junk": (what.low, what.top)}
    for name, probed in cases(call, "structure"):
        want, bad = wanted.get(_case_of(name), (0.0, None))
        if probed["form"] == what.form and _equal(number(probed), bad):
            but = f"ours would give {want:g}"
            yield replace(_probed(call, name, probed, but, want), severity="differs")


def _probed(
    call: RewardCall, name: str, probed: Mapping[str, Any], but: str, wanted: float
) -> Evidence:
    return Evidence(
        "reward",
        "probe-differs",
        f"reward {call.name} gives {probed['alone']:g} to "
        f"{_short(str(probed['completion']))} ({name}; gold "
        f"{_short(str(probed['solution']), 40)}): {but}",
        values={
            "name": call.name, "case": _case_of(name), "value": probed["alone"],
            "wanted": wanted, "problem_type": probed["problem_type"],
        },
    )  # fmt: skip


def _raising(call: RewardCall) -> Iterator[Evidence]:
    for name, probed in cases(call, "right", "garbage"):
        if isinstance(probed["alone"], str):
            yield Evidence(
                "reward", "probe-raised",
                f"reward {call.name} raises on {_short(str(probed['completion']))} ({name}): "
                f"{probed['alone']}",
                values={"name": call.name, "case": name, "error": probed["alone"]},
            )  # fmt: skip
            return


def _swallowing(call: RewardCall) -> Iterator[Evidence]:
    """One mistake of the code itself, caught for whatever was tried of a problem type."""
    for kind in dict.fromkeys(probed["problem_type"] for probed in call.probe.values()):
        tried = [p for p in call.probe.values() if p["problem_type"] == kind]
        texts, values = {p["swallowed"] for p in tried}, {number(p) for p in tried}
        text, value = texts.pop(), values.pop()
        # of a match that was not found: an answer in no known form
        if texts or values or not text.startswith(_BUGS) or "NoneType" in text:
            continue
        yield Evidence(
            "reward",
            "swallows",
            f"reward {call.name} catches {_short(text, 120)} for each of {len(tried)} completions "
            f"that were tried{f' of type {kind}' if kind else ''}, and gives {_as_text(value)}",
            values={"name": call.name, "swallowed": text},
        )


def _together(call: RewardCall, what: Learned) -> Iterator[Evidence]:
    """One row's reward should not depend on the other rows."""
    scored = {n: p for n, p in call.probe.items() if number(p) is not None}
    differ = [n for n, p in scored.items() if not _equal(p["alone"], p["value"])]
    if not differ:
        return
    first = call.probe[differ[0]]
    moved = _moved([p["alone"] for p in scored.values()], [p["value"] for p in scored.values()])
    columns = first.get("decided", [])
    places = f"{moved} places " if moved > 1 else ""
    why = (
        f"the first row's {' or '.join(columns)} decides about all"
        if columns
        else f"each row gets the value of the row {places}before it"
        if moved
        else "a row's reward depends on the other rows"
    )
    yield Evidence(
        "reward",
        "rows-depend",
        f"reward {call.name} gives {_as_text(first['alone'])} to a completion alone and "
        f"{_as_text(first['value'])} to the same one among others ({differ[0]}; {len(differ)} "
        f"of {len(call.probe)} cases): {why}",
        values={"name": call.name, "cases": differ, "moved": moved, "columns": columns},
        # a rank or a rate of repetition over the batch is a recipe
        severity="breaks" if what.kind == "accuracy" or moved else "differs",
    )


def _moved(alone: Sequence[Any], together: Sequence[Any]) -> int:
    """By how many places one list was rolled to make the other; 0: it was not."""
    turns = range(1, len(alone))
    return next((k for k in turns if all(map(_equal, together, [*alone[-k:], *alone[:-k]]))), 0)


def _floor(call: RewardCall, what: Learned) -> Iterator[Evidence]:
    """Garbage of every kind earns the same, and more than nothing."""
    paid = [number(probed) for _, probed in cases(call, "garbage")]
    given = [v for v in call.values if v is not None]
    value = paid[0] if paid else None
    if value is None or value <= 0 or len(paid) < _FLOORS or len(set(paid)) > 1:
        return
    # what pays a right answer less has no floor there: it pays for garbage
    if any(earned < value for _, earned in by_place(call, "right")):
        return
    if what.kind != "accuracy" and given and min(given) >= value:
        yield Evidence(
            "reward",
            "floor",
            f"reward {call.name} gives {value:g} to garbage of every kind, the empty completion "
            f"included, and never less to the recorded ones: {given.count(value)} of {len(given)} "
            f"earn just that",
            values={"name": call.name, "value": value},
            severity="breaks" if given.count(value) == len(given) else "differs",
        )


def look_at_constants(case: Case) -> Iterable[Evidence]:
    """One value for different completions, and something that failed: a warning says so, or the
    function asks others and caught an exception for each of them."""
    for call in case.rewards:
        values = {v for v in call.values if v is not None}
        if len(values) != 1 or len(set(call.completions)) < 2:
            continue
        warnings = [w for step in case.steps for w in step.warnings if _about(w, call)]
        failed = [w for w in warnings if _failed(w)]
        caught = dict(call.caught) if sum(call.caught.values()) >= len(call.values) else {}
        if not (failed or caught):
            continue
        (value,) = values
        said = f"a warning of the step: {_short(failed[0], 120)}" if failed else ""
        if caught:
            first, times = next(iter(caught)), sum(caught.values())
            said = f"it caught {_short(first, 120)}, {times} exceptions in all"
        yield Evidence(
            "reward",
            "constant",
            f"reward {call.name} gave {value:g} to all {len(call.values)} completions, "
            f"{len(set(call.completions))} of them different; {said}",
            values={
                "name": call.name, "source": call.source, "value": value,
                "warnings": failed[:3], "caught": [*caught],
                # what it quotes can only be a reply
                "reply": _quotes_another(failed, call) or _quotes_another(caught, call),
            },
        )  # fmt: skip


def _quotes_another(texts: Iterable[str], call: RewardCall) -> bool:
    """Whether a text quotes something that is in no completion."""
    quoted = [found for text in texts for found in re.findall(r"'([^']+)'", text)]
    return any(not any(one in text for text in call.completions) for one in quoted)


def look_at_special_tokens(case: Case) -> Iterable[Evidence]:
    """Texts that still have their special tokens, for a function that pays no text that has."""
    for call in case.rewards:
        kept = [t for t in call.completions if _ENDS.search(t) and _sampled(case, t)]
        what = learned(call)
        if not kept or 2 * len(kept) < len(call.completions) or what.kind not in _WITH_A_TOP:
            continue
        right = dict(by_place(call, "right"))
        for name, probed in cases(call, "structure"):
            value, plain = number(probed), right.get(place_of(probed), what.low)
            lost = value is not None and what.share(value) < _NEAR < 1 - _NEAR < what.share(plain)
            if _case_of(name) == "special token" and lost:
                yield Evidence(
                    "reward",
                    "special-tokens",
                    f"reward {call.name} gets texts with their special tokens ({_short(kept[0])}, "
                    f"and {len(kept)} of {len(call.completions)} in all), and gives {value:g} to a "
                    f"right answer with one at its end, {plain:g} to the same without",
                    values={"name": call.name},
                )
                break


def _sampled(case: Case, text: str) -> bool:
    """Whether a text may be what was sampled: the decode of a completion, where some are known."""
    pool = [one for one in (*joined(case).completions, *joined(case).earlier) if one.texts]
    return not pool or any(is_decode(text, one) for one in pool)


def _failed(warning: str) -> bool:
    words = ("fail", "error", "refused", "timed out", "cannot", "could not", "unreachable")
    return any(word in warning.lower() for word in words)


def _about(warning: str, call: RewardCall) -> bool:
    """Whether a warning may be about a reward: it mentions it, or a judge."""
    words = ("judge", "reward", "score", call.name.lower())
    return any(word in warning.lower() for word in words)


def _case_of(name: str) -> str:
    """A case's name without its problem type."""
    return name.rpartition(": ")[2]


def _equal(a: Any, b: Any) -> bool:
    if not (isinstance(a, int | float) and isinstance(b, int | float)):
        return bool(a == b)
    return abs(a - b) <= EQUAL_RECORDED_REWARDS or (math.isnan(a) and math.isnan(b))


# --------------------------------------------------------------------------- parsed


def look_at_structure(case: Case) -> Iterable[Evidence]:
    """Completions without the required structure: a reward of 0 is then right. Parsing is not at
    fault, so the origin is always ``inherited``."""
    for rollout in rollouts(case):
        if not rollout.rewards or not any(map(_asks_for_structure, rollout.rewards)):
            continue
        texts = rollout.rewards[0].completions
        note_judged(case, "parsed")
        read = [parse(text) for text in texts]
        broken = [found for found in read if isinstance(found, Malformed)]
        if len(texts) > 1 and len(broken) == len(texts):
            yield Evidence(
                "parsed",
                "all-malformed",
                f"none of {len(texts)} completions has the required structure; the first has "
                f"{broken[0].what} at character {broken[0].where}",
                "inherited",
                values={"what": broken[0].what, "where": broken[0].where},
            )


def _asks_for_structure(call: RewardCall) -> bool:
    """Whether it pays for context, think and answer, and nothing else."""
    what = learned(call)
    return what.kind == "format" and what.form.startswith("context-think-answer")


def _short(text: str, most: int = 60) -> str:
    """Its end is what an answer is in."""
    head = most // 3
    return repr(text if len(text) <= most else f"{text[:head]}…{text[head + 1 - most :]}")


def _as_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


LOOKS: tuple[Look, ...] = (
    look_at_values,
    look_at_probes,
    look_at_constants,
    look_at_special_tokens,
    look_at_structure,
)
