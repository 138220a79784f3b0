"""What went into a call is what came out of the call before: the edges of a recorded step.

Nothing is known here of what may go wrong. Rows are followed by content from the processor to
generate and to the scoring forward, completions to the texts that reward functions get. Rows may be
repeated, sliced, padded, cast and, on the way to the scoring forward, reordered: an edge says so. A
row for which that explains nothing is broken there, and is not judged at later edges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from omni_grpo_core.doctor import edge_rows, edge_texts
from omni_grpo_core.doctor.bundles import markers_of, rows_in
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged
from omni_grpo_core.doctor.trail import Edge, Trail, times

__all__ = ["Edge", "edges", "look_at_edges", "misplaced"]


def edges(case: Case) -> tuple[Edge, ...]:
    """The edges of a step, in order of their later calls' kinds; broken ones last."""
    return tuple(case.once(_trail).edges)


def look_at_edges(case: Case) -> Iterable[Evidence]:
    """Whatever changes between two calls, or is exchanged, dropped or left over from before."""
    return tuple(case.once(_trail).evidence)


_MOVED = frozenset(
    f"edge-{fact}"
    for fact in ("order", "stale", "ids", "media-exchanged", "arguments", "columns", "group-order",
                 "text-stale")
)  # fmt: skip


def misplaced(case: Case) -> bool:
    """Whether completions stand in each other's place before rewards, or what they answer was
    changed such that prompts became equal, or copies of one unequal, or cannot be told: what groups
    and weights make of them follows from that."""
    broken = look_at_edges(case)
    if any(evidence.fact in _MOVED for evidence in broken):
        return True
    made, taken = (
        [row for call in calls for row in rows_in(case, call)]
        for calls in (case.processed, case.generated)
    )
    markers = markers_of(case)
    # placeholders that may be anybody's; media without any belong to none
    tokens = {} if markers is None else markers.tokens
    if any(
        row.media.get(m, ()) is None and token in row.ids
        for row in taken
        for m, token in tokens.items()
    ):
        return True
    changed = any(e.values.get("call") == "generate" and e.severity == "breaks" for e in broken)
    return changed and len({row.key for row in made}) != len({row.key for row in taken})


def _trail(case: Case) -> Trail:
    # a rollout of the step before may be scored in this one
    before = Trail(case) if case.before is None else case.before.once(_trail)
    trail = Trail(case, blamed={*before.blamed}, moved={*before.moved})
    if case.dumped:
        return trail
    _texts_to_processor(trail)
    edge_rows.to_generate(trail)
    edge_rows.to_scoring(trail)
    edge_texts.to_rewards(trail)
    trail.finish()
    return trail


def _texts_to_processor(trail: Trail) -> None:
    """Whether each text was rendered; what must be in it is judged elsewhere."""
    case = trail.case
    rendered = [text for call in case.templates for text in call.texts]
    known = set(rendered)
    for number, call in enumerate(case.processed):
        between = ("rendered text", "processor", number)
        every = range(len(call.texts))
        if not known or not call.texts:
            trail.unjudged(between, every, "no rendered text was recorded")
            continue
        strange = [row for row in every if call.texts[row] not in known]
        if strange:
            trail.unjudged(between, strange, "not a text that was rendered in this step")
        else:
            note_judged(case, "text")
            same = Counter(rendered) == Counter(call.texts)
            trail.ok(between, every, "" if same else times(call.texts, known))


LOOKS: tuple[Look, ...] = (look_at_edges,)
