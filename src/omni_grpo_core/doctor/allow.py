"""What a user accepts: findings that are known, and do not count.

On the command line ``--allow NAME``; for good, and with a reason, in ``pyproject.toml``::

    [tool.omni-grpo.doctor]
    allow = [{ cause = "gen.topk", why = "the published recipe samples with top_k = 50" }]

A name is a cause (``gen.topk``), or, where no cause is known, the evidence itself
(``completion/eos-left-out``) or a symptom (``symptom/rewards-zero``), as reports show them.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omni_grpo_core.doctor.evidence import Evidence, Explanation, Finding
from omni_grpo_core.doctor.verdict import Allow, Allowed, Coverage, Diagnosis, Felt
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.bounded import Unreadable, read_bytes
from omni_grpo_core.io.strict import merge
from omni_grpo_core.types import STAGES

FILE = "pyproject.toml"
_MOST_BYTES = 1 << 20
_SYMPTOM = "symptom"
_EXAMPLE = 'allow = [{ cause = "gen.topk", why = "the recipe samples so" }]'


def without_allowed(diagnosis: Diagnosis, allow: Sequence[Allow]) -> Diagnosis:
    """``diagnosis`` without what is allowed, which is listed instead."""
    findings: list[Finding] = []
    allowed: list[Allowed] = []
    for finding in diagnosis.findings:
        left = finding
        for one in allow:
            taken = _accounted(left, one.cause)
            if taken:
                allowed.append(Allowed(one, finding.stage, taken))
                left = _less(left, taken)
        if left.evidence:
            findings.append(left)
    kept = {finding.stage: finding for finding in findings}
    names = {one.cause for one in allow}
    felt = tuple(_felt(one, kept.keys(), names) for one in diagnosis.symptoms)
    used = {one.by.cause for one in allowed}
    used |= {f"{_SYMPTOM}/{one.symptom.name}" for one in felt}
    reasons = {one.stage: one.by.why for one in allowed}
    return replace(
        diagnosis,
        findings=tuple(findings),
        coverage=tuple(_covered(c, kept.get(c.stage), reasons) for c in diagnosis.coverage),
        symptoms=felt,
        allowed=tuple(allowed),
        unused=tuple(one for one in allow if one.cause not in used),
    )


def _accounted(finding: Finding, name: str) -> tuple[Evidence, ...]:
    """The evidence of a finding that a name stands for."""
    stage, slash, fact = name.partition("/")
    if slash:
        return tuple(e for e in finding.evidence if (e.stage, e.fact) == (stage, fact))
    cause = next((cause for cause in finding.causes if cause.cause == name), None)
    return () if cause is None else tuple(e for e in finding.evidence if _explains(cause, e))


def _explains(cause: Explanation, evidence: Evidence) -> bool:
    return evidence in cause.explains if cause.explains else evidence.sentence in cause.seen


def _less(finding: Finding, taken: Sequence[Evidence]) -> Finding:
    left = tuple(e for e in finding.evidence if e not in taken)
    causes = tuple(c for c in finding.causes if any(_explains(c, e) for e in left))
    return Finding(finding.stage, left, causes)


def _felt(felt: Felt, kept: Iterable[str], names: Iterable[str]) -> Felt:
    by_finding = felt.stage is not None and felt.stage not in kept
    return replace(felt, allowed=by_finding or f"{_SYMPTOM}/{felt.symptom.name}" in names)


def _covered(coverage: Coverage, kept: Finding | None, reasons: dict[Any, str]) -> Coverage:
    if kept is None and coverage.stage in reasons:
        return Coverage(coverage.stage, "allowed", reasons[coverage.stage])
    if kept is not None and kept.severity == "differs":
        return Coverage(coverage.stage, "differs")
    return coverage


def require_known(unused: Iterable[Allow], known: Iterable[str]) -> None:
    """Raises:
    ConfigError: a name that stands for nothing that was found is also no cause, and no evidence or
        symptom of that form. The nearest names are listed.
    """
    known = sorted(known)
    for one in unused:
        stage, slash, fact = one.cause.partition("/")
        if one.cause in known or (slash and fact and stage in (*STAGES, _SYMPTOM)):
            continue
        near = difflib.get_close_matches(one.cause, known, n=3, cutoff=0.4)
        raise ConfigError(
            f"allow {one.cause!r}",
            got="no known cause",
            want=f"a cause ({', '.join(near or known[:3])} …), or the evidence as stage/fact",
            fix="copy the name from the report; omni-grpo faults --list has them all",
        )


def read_allowed(folder: Path) -> tuple[Allow, ...]:
    """What the nearest ``pyproject.toml`` at or above ``folder`` allows.

    Raises:
        ConfigError: the section is not as documented, or an entry has no reason.
    """
    for one in (folder, *folder.parents):
        if (file := one / FILE).is_file():
            return tuple(_entries(file))
    return ()


def _entries(file: Path) -> Iterator[Allow]:
    item = f"{file}: [tool.omni-grpo.doctor]"
    try:
        whole = tomllib.loads(read_bytes(file, _MOST_BYTES).decode("utf-8"))
        section = whole.get("tool", {}).get("omni-grpo", {}).get("doctor", {})
        entries = section.get("allow", [])
        unknown = section.keys() - {"allow"}
    except (Unreadable, ValueError, RecursionError, AttributeError) as error:
        raise _wrong(item, f"what cannot be read ({error})") from error
    if unknown or not isinstance(entries, list):
        raise _wrong(item, f"{', '.join(map(str, section))} = {entries!r}")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise _wrong(item, f"the entry {entry!r}")
        yield merge(Allow, entry, f"{item}: allow[{number}]")


def _wrong(item: str, got: str) -> ConfigError:
    return ConfigError(
        item,
        got=got,
        want=f"{_EXAMPLE}, each entry with a reason",
        fix="correct the section; --allow accepts a cause for one run",
    )
