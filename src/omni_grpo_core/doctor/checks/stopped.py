"""Looks at what a run of ours had checked itself before it was stopped."""

from __future__ import annotations

from collections.abc import Iterator

from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged
from omni_grpo_core.pipeline.hints import advice
from omni_grpo_core.types import EngineSeen


def look_checks(case: Case) -> Iterator[Evidence]:
    """Every check of the pipeline's own holds; of a rollout engine that disagrees with the trainer,
    what was seen row by row."""
    engines = [value for value in case.values if isinstance(value, EngineSeen)]
    seen = {(one.stage, one.name): one for engine in engines for one in engine.disagreements}
    for record in case.trace.stages:
        for check in record.checks:
            note_judged(case, record.stage)
            if check.ok:
                continue
            # a finding of the run ends in what to do
            detail = check.detail.removesuffix(f"; {advice(record.stage, check.name)}")
            one = seen.get((record.stage, check.name))
            rows = one.rows if one else ()
            first = rows[0] if rows and detail.startswith(rows[0].sentence) else None
            if first is not None:  # what the check shows is that row
                detail, rows = first.sentence, rows[1:]
            yield Evidence(
                record.stage,
                check.name,
                f"the check {check.name!r} fails: {detail}",
                row=None if first is None else first.row,
                values={**(first.values if first else {}), "proved": bool(one and one.proved)},
            )
            for row in rows:
                yield Evidence(
                    record.stage, check.name, row.sentence, row=row.row, values=row.values
                )


LOOKS: tuple[Look, ...] = (look_checks,)
