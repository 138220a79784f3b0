"""A golden suite as tests: a ``suite.yaml`` gives one for each case, or for each of its stages.

Imported by :mod:`omni_grpo_core.pytest_plugin` where a file of that name is collected. What loads
torch is imported by the first test that runs, or by ``--omni-stages``. A process loads a checkpoint
once and computes a case once.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import yaml

from omni_grpo_core.errors import OmniGrpoError
from omni_grpo_core.golden.suite import Suite, load_suite
from omni_grpo_core.io.bounded import Unreadable, read_text
from omni_grpo_core.io.bounded_yaml import MAX_YAML_BYTES, yaml_value

if TYPE_CHECKING:
    from omni_grpo_core.core.policy import Policy
    from omni_grpo_core.golden.results import CaseResult

K = TypeVar("K")
V = TypeVar("V")
_PENDING = "omni_pending"
"""A property in a test's report: the case whose goldens now wait for review, as FOLDER/CASE."""


def is_suite(path: Path) -> bool:
    """Whether a ``suite.yaml`` is a golden suite: other tools have files of that name."""
    try:
        text = read_text(path, MAX_YAML_BYTES)
    except Unreadable:
        return False
    try:
        content = yaml_value(text)
    except Unreadable:
        # a slip of the pen must not make its tests vanish
        return all(re.search(key, text, re.MULTILINE) for key in (r"^cases:", r"\brows:"))
    cases = content.get("cases") if isinstance(content, dict) else None
    return isinstance(cases, dict) and (
        "checkpoint" in content or any(isinstance(c, dict) and "rows" in c for c in cases.values())
    )


class GoldenSuite(pytest.File):
    """A ``suite.yaml``."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        checkpoint = self.config.getoption("--omni-checkpoint")
        try:
            suite = load_suite(self.path.parent, checkpoint=checkpoint)
        except OmniGrpoError as error:
            raise self.CollectError(str(error)) from None
        by_stage = self.config.getoption("--omni-stages")
        lines = _lines(self.path)
        for name in suite.cases:
            place = {"name": name, "suite": suite, "case": name, "line": lines.get(name)}
            made: GoldenCase | GoldenTest = (
                GoldenCase.from_parent(self, **place)
                if by_stage
                else GoldenTest.from_parent(self, **place)
            )
            for mark in _marks(suite, name):
                made.add_marker(mark)
            yield made


class GoldenCase(pytest.Collector):
    """A case, with a test for each stage."""

    def __init__(self, *, suite: Suite, case: str, line: int | None, **node: Any) -> None:
        super().__init__(**node)
        self.suite, self.case, self.line = suite, case, line
        if self.config.pluginmanager.hasplugin("xdist"):
            # with --dist loadgroup one worker computes it
            self.add_marker(pytest.mark.xdist_group(self.nodeid))

    def collect(self) -> Iterable[pytest.Item]:
        from omni_grpo_core.golden.steps import golden_stages

        place = {"suite": self.suite, "case": self.case, "line": self.line}
        for stage in golden_stages(self.suite.cases[self.case]):
            yield GoldenTest.from_parent(self, name=stage, stage=stage, **place)


class GoldenTest(pytest.Item):
    """A case, or one of its stages, compared with its goldens."""

    def __init__(
        self, *, suite: Suite, case: str, line: int | None, stage: str | None = None, **node: Any
    ) -> None:
        super().__init__(**node)
        self.suite, self.case, self.line, self.stage = suite, case, line, stage

    def runtest(self) -> None:
        text = self._difference()
        if text:
            pytest.fail(text, pytrace=False)

    def _difference(self) -> str:
        """What differs, or why that is unknown; empty if nothing does, or it is pending now."""
        runs = self.config.stash.setdefault(_RUNS, _Runs())
        update = self.config.getoption("--snapshot-update", False)
        folder, here = Path(self.suite.file).parent, self.config.invocation_params.dir
        # as commands that run here name it
        folder = folder.relative_to(here) if folder.is_relative_to(here) else folder
        try:
            checked = runs.checked(self.suite, self.case, update=update)
        except OmniGrpoError as error:
            return str(error)
        if checked.pending:
            self.user_properties.append((_PENDING, str(folder / self.case)))
            return ""
        other = self.config.getoption("--omni-checkpoint")
        options = [] if other is None else ["--checkpoint", str(other)]
        return "\n".join(_failure(checked.result, self.stage, folder, options))

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, self.line, " ".join(filter(None, ("golden", self.case, self.stage)))


def pending_summary(reports: Iterable[pytest.TestReport]) -> Iterator[str]:
    """How many cases these tests left pending in each golden folder, and how to review them."""
    cases = {
        Path(str(text))
        for report in reports
        for name, text in report.user_properties
        if name == _PENDING
    }
    for folder, count in sorted(Counter(case.parent for case in cases).items()):
        named = [] if folder == Path("golden") else ["--golden", str(folder)]
        review = shlex.join(["omni-grpo", "golden", "review", *named])
        yield f"{count} {'case' if count == 1 else 'cases'} pending: {review}"


@dataclass(frozen=True, slots=True)
class _Checked:
    """``pending``: whether goldens of the case were written for review."""

    result: CaseResult
    pending: bool


@dataclass(frozen=True, slots=True)
class _Runs:
    """What this process has loaded and computed, an error included."""

    policies: dict[tuple[object, ...], tuple[Policy, str] | OmniGrpoError] = field(
        default_factory=dict
    )
    cases: dict[tuple[str, str], _Checked | OmniGrpoError] = field(default_factory=dict)
    trees: dict[Path, Mapping[str, str] | OmniGrpoError] = field(default_factory=dict)

    def checked(self, suite: Suite, case: str, *, update: bool) -> _Checked:
        with _no_logs():
            return _once(self.cases, (suite.file, case), lambda: self._check(suite, case, update))

    def _check(self, suite: Suite, case: str, update: bool) -> _Checked:
        from omni_grpo_core.golden.checking import checked_cases, load_suite_policy
        from omni_grpo_core.golden.git_tree import tree_state
        from omni_grpo_core.golden.pending import regen_case
        from omni_grpo_core.golden.results import FINE
        from omni_grpo_core.io.console import quiet_transformers

        quiet_transformers()  # nor progress bars
        model = (suite.checkpoint_dir(), suite.processor_dir(), *suite.placed(None, None))
        policy, key = _once(self.policies, model, lambda: load_suite_policy(suite))
        folder = Path(suite.file).parent
        ((result, replay),) = checked_cases(policy, suite, folder, key, names=(case,))
        if not update:
            return _Checked(result, pending=False)
        tree = _once(self.trees, folder, lambda: tree_state(folder))
        files = regen_case(result, replay, suite, folder, key, tree).files
        return _Checked(result, pending=bool(files) and result.verdict not in FINE)


_RUNS = pytest.StashKey[_Runs]()


def _once(known: dict[K, V | OmniGrpoError], key: K, make: Callable[[], V]) -> V:
    if key not in known:
        try:
            known[key] = make()
        except OmniGrpoError as error:
            known[key] = error
    found = known[key]
    if isinstance(found, OmniGrpoError):
        raise found
    return found


@contextmanager
def _no_logs() -> Iterator[None]:
    """pytest shows what libraries log below a difference; their errors are raised as well."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _marks(suite: Suite, case: str) -> Iterator[pytest.MarkDecorator]:
    names = [*suite.marks, *suite.cases[case].marks]
    if suite.placed(None, None)[0] == "cuda":
        names.append("gpu")
    if suite.has_shipped_checkpoint:
        names.append("tiny")
    yield from (getattr(pytest.mark, name) for name in dict.fromkeys(names))


def _lines(path: Path) -> dict[str, int]:
    """The line of each case in a valid file, from 0; none for a case merged from elsewhere."""
    root = yaml.compose(read_text(path), Loader=yaml.SafeLoader)
    if root is None:
        return {}
    return {
        name.value: name.start_mark.line
        for key, cases in root.value
        if key.value == "cases"
        for name, _ in cases.value
    }


def _failure(
    result: CaseResult, stage: str | None, folder: Path, options: Sequence[str]
) -> Iterator[str]:
    """Why a case, or one of its stages, fails: as ``golden diff`` prints it, then what to do, which
    is all that there is to say without a golden."""
    from omni_grpo_core.golden.classify import base_stage
    from omni_grpo_core.golden.commands import advice
    from omni_grpo_core.golden.results import FINE
    from omni_grpo_core.report.terminal.golden import case_text

    shown, verdict, reason = result, result.verdict, result.reason
    if stage is not None:
        (found,) = (one for one in result.stages if one.stage == stage)
        generations = result.generations if base_stage(stage) == "completion" else ()
        shown = replace(result, stages=(found,), generations=generations)
        verdict, reason = found.verdict, f"{stage}: {found.reason}"
    if verdict in FINE:
        return
    do = advice(replace(result, verdict=verdict), folder, options)
    if any(one.golden for one in shown.stages):
        yield case_text(shown)
        yield f"do: {do}"
    else:
        yield f"{result.case}: {verdict}: {reason}: {do}"
