"""``check`` and ``golden check`` as JUnit XML, for a CI's test report.

The schema that CI servers agree on (Jenkins' ``junit-10.xsd``): ``testsuites`` with a ``testsuite``
for the command or each golden case, and in it a ``testcase`` for each check or stage.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omni_grpo_core.golden.commands import advice
from omni_grpo_core.golden.results import FINE, CaseResult, GoldenReport, StageResult
from omni_grpo_core.pipeline.check import CheckResult
from omni_grpo_core.report import shortened, visible
from omni_grpo_core.report.html.words import Failure, failures, not_judged

_LONGEST = 1000
"""Characters per message."""
_SHOWN = 20
"""Differences shown per stage."""


@dataclass(frozen=True, slots=True)
class _Test:
    """``kind``: ``failure``, ``skipped``, or empty if it passed. ``type``: of the failure.
    ``detail``: the text below ``message``."""

    classname: str
    name: str
    kind: Literal["", "failure", "skipped"] = ""
    type: str = ""
    message: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Suite:
    name: str
    properties: Mapping[str, str]
    tests: tuple[_Test, ...]

    def counts(self) -> dict[str, int]:
        return {
            "tests": len(self.tests),
            "failures": sum(test.kind == "failure" for test in self.tests),
            "errors": 0,
            "skipped": sum(test.kind == "skipped" for test in self.tests),
        }


def check_junit(result: CheckResult) -> bytes:
    """One suite with a test for every check of every stage and for every modality. A modality that
    was not judged is skipped."""
    # in the order of the tests below
    failed = iter(failures(result))
    tests = [
        _checked(f"check.{record.stage}", check.name, None if check.ok else next(failed))
        for record in result.trace.stages
        for check in record.checks
    ]
    for proof in result.modalities:
        name = f"{proof.modality} reaches the model"
        if why := not_judged(proof):
            tests.append(_Test("check.modality", name, "skipped", message=why))
        else:
            tests.append(_checked("check.modality", name, None if proof.ok else next(failed)))
    seconds = sum(record.seconds for record in result.trace.stages)
    suite = _Suite("omni-grpo check", result.trace.header, tuple(tests))
    return _xml("omni-grpo check", seconds, [suite])


def _checked(classname: str, name: str, failed: Failure | None) -> _Test:
    if failed is None:
        return _Test(classname, name)
    detail = f"seen: {failed.seen}\ndo: {failed.fix}"
    return _Test(classname, name, "failure", "check", failed.seen, detail)


def golden_junit(report: GoldenReport) -> bytes:
    """A suite for every case with a test for every stage, which fails if its verdict does. Stages
    of a case that have no golden yet are one test together."""
    suites = [_case(case, report) for case in report.cases]
    return _xml(f"omni-grpo golden check {report.platform}", report.seconds, suites)


def _case(case: CaseResult, report: GoldenReport) -> _Suite:
    changed = {key: f"{was} → {now}" for key, (was, now) in case.versions.items()}
    properties = {"golden": report.folder, "platform": report.platform, **changed}
    classname, fix = f"golden.{case.case}", advice(case, Path(report.folder), report.options)
    tests = [_stage(classname, stage, fix) for stage in case.stages if stage.verdict != "new"]
    new = [stage.stage for stage in case.stages if stage.verdict == "new"]
    if new:
        message = f"no golden for {report.platform} yet"
        if tests:
            message = f"{', '.join(new)}: {message}"
        tests.append(_Test(classname, "new", "failure", "new", message, f"do: {fix}"))
    return _Suite(case.case, properties, tuple(tests))


def _stage(classname: str, stage: StageResult, fix: str) -> _Test:
    if stage.verdict in FINE:
        return _Test(classname, stage.stage)
    differences = [d.sentence for d in stage.differences if d.verdict == "differs"]
    lines = [f"{stage.verdict}, origin of the divergence: {stage.origin}"]
    lines += differences[:_SHOWN]
    if len(differences) > _SHOWN:
        lines.append(f"… and {len(differences) - _SHOWN} more")
    lines.append(f"do: {fix}")
    return _Test(
        classname, stage.stage, "failure", stage.verdict, stage.reason, "\n".join(lines)
    )  # fmt: skip


def _xml(name: str, seconds: float, suites: Iterable[_Suite]) -> bytes:
    root = ET.Element("testsuites", name=_text(name), time=f"{seconds:.3f}")
    totals = dict.fromkeys(("tests", "failures", "errors"), 0)
    for suite in suites:
        counts = suite.counts()
        numbers = {key: str(count) for key, count in counts.items()}
        element = ET.SubElement(root, "testsuite", {"name": _text(suite.name), **numbers})
        properties = ET.SubElement(element, "properties")
        for key, value in suite.properties.items():
            ET.SubElement(properties, "property", name=_text(key), value=_text(value))
        for test in suite.tests:
            _add(element, test)
        totals = {key: total + counts[key] for key, total in totals.items()}
    root.attrib |= {key: str(total) for key, total in totals.items()}
    ET.indent(root)
    data: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _add(suite: ET.Element, test: _Test) -> None:
    names = {"classname": _text(test.classname), "name": _text(test.name)}
    element = ET.SubElement(suite, "testcase", names)
    if not test.kind:
        return
    outcome = ET.SubElement(element, test.kind, message=_text(test.message))
    if test.type:
        outcome.set("type", test.type)
    outcome.text = _text(test.detail) or None


def _text(text: str) -> str:
    """Only characters that XML allows, which are fewer than Unicode's."""
    return shortened(visible(text), _LONGEST)
