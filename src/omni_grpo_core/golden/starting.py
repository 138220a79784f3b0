"""A golden suite of one's own rows and checkpoint: ``suite.yaml`` and the first goldens.

The checkpoint is checked first: goldens of a broken pipeline would keep it broken. Everything is
then made in a hidden folder beside the new one and appears by one rename, so that whenever it is
killed there is a whole golden folder or none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.errors import OmniGrpoError, TraceError
from omni_grpo_core.golden.checking import contexts
from omni_grpo_core.golden.choice import Choice, choose
from omni_grpo_core.golden.environment import platform_key
from omni_grpo_core.golden.git_tree import require_git
from omni_grpo_core.golden.new_suite import NewCase, Sources, new_cases, suite_text
from omni_grpo_core.golden.pending import Regenerated, regen
from omni_grpo_core.golden.rebuild import Lost, rebuild
from omni_grpo_core.golden.review import accept, require_reason
from omni_grpo_core.golden.steps import golden_stages
from omni_grpo_core.golden.store import PENDING, file_name, read_golden
from omni_grpo_core.golden.suite import SUITE, Suite, load_suite
from omni_grpo_core.io.atomic import new_folder, write_file
from omni_grpo_core.pipeline.check import CheckResult, check
from omni_grpo_core.pipeline.settings import load_settings
from omni_grpo_core.pipeline.stages import Values, make, put

_GIVEN = ("sample", "conversation", "text", "media", "batch", "positions")
_ANSWERED = ("completion", "parsed", "reward")


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """``choice`` of rows and the ``cases`` made of it; ``policy`` on platform ``key``, and what
    ``check`` found on a few of the rows."""

    sources: Sources
    choice: Choice
    cases: tuple[NewCase, ...]
    policy: Policy
    key: str
    check: CheckResult

    def to_json(self) -> dict[str, Any]:
        """A part of the object that ``--json`` prints."""
        return {
            "platform": self.key,
            "check": self.check.to_json(),
            "kinds": {
                "there": self.choice.kinds,
                "taken": [one.kind.name for one in self.choice.taken],
                "left_out": [kind.name for kind in self.choice.left_out],
                "tokens": {name: [*bounds] for name, bounds in self.choice.lengths.items()},
            },
        }


@dataclass(frozen=True, slots=True)
class Approval:
    """Why the first goldens are right, and who says so (default: the git user). ``no_git``: as of
    :func:`~omni_grpo_core.golden.review.accept`."""

    reason: str
    by: str | None = None
    no_git: bool = False

    def require(self, folder: Path) -> None:
        """Raises ``ConfigError`` where it would not be accepted: no reason, or the state of the git
        tree around ``folder``."""
        require_reason(self.reason)
        require_git(folder, no_git=self.no_git)


@dataclass(frozen=True, slots=True)
class StartedCase:
    """``files``: names of its goldens in stage order, with their bytes. ``degenerate``: why its
    completions are, else empty."""

    case: NewCase
    files: Mapping[str, int]
    degenerate: str = ""

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True, slots=True)
class Started:
    """What was made. ``approval``: of the goldens, ``None`` if they are pending. ``written``: false
    if degenerate completions were to be accepted; then there is nothing."""

    folder: Path
    cases: tuple[StartedCase, ...]
    approval: Approval | None
    written: bool
    seconds: float

    @property
    def accepted(self) -> bool:
        return self.written and self.approval is not None

    @property
    def goldens(self) -> Path:
        """The folder that has a folder for each case."""
        return self.folder if self.accepted else self.folder / PENDING

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.cases)

    @property
    def degenerate(self) -> tuple[StartedCase, ...]:
        return tuple(one for one in self.cases if one.degenerate)

    def to_json(self) -> dict[str, Any]:
        """The rest of that object."""
        return {
            "folder": str(self.folder),
            "written": self.written,
            "accepted": self.accepted,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "cases": [
                {
                    "name": one.case.name,
                    "rows": [*one.case.rows],
                    "steps": one.case.steps,
                    "kind": one.case.kind,
                    "why": one.case.why,
                    "degenerate": one.degenerate,
                    "bytes": one.bytes,
                    "files": [str(self.goldens / one.case.name / name) for name in one.files],
                }
                for one in self.cases
            ],
        }


class _Refused(Exception):
    """Degenerate completions are not accepted."""


def plan_suite(
    sources: Sources, *, most: int, steps: int, on_step: Callable[[str], None] = lambda name: None
) -> Plan:
    """Choose rows, load the checkpoint and check it. ``most``: as of
    :func:`~omni_grpo_core.golden.choice.choose`. ``steps``: GRPO steps of an additional case.
    ``on_step``: called with a name for what is done next.

    Raises as ``load_samples``, ``choose`` and ``load_policy``.
    """
    settings = load_settings(sources.checkpoint, sources.config)
    on_step("rows")
    samples = load_samples(sources.data, root=sources.root)
    choice = choose(samples, settings, sources.checkpoint, most)
    on_step("policy")
    device, dtype = Suite().placed(sources.device, sources.dtype)
    policy = load_policy(
        sources.checkpoint, processor=sources.processor, device=device, dtype=dtype
    )
    checked = check(
        policy,
        [samples[one.row] for one in choice.checked],
        settings,
        on_stage=lambda name: on_step(f"check, {name}"),
    )
    cases = new_cases(choice, steps)
    return Plan(sources, choice, cases, policy, platform_key(device, dtype), checked)


def start_suite(
    folder: Path,
    plan: Plan,
    *,
    approval: Approval | None = None,
    on_case: Callable[[str], None] = lambda name: None,
) -> Started:
    """Make ``folder`` with a ``suite.yaml`` and the goldens of the plan's cases: pending, or with
    an ``approval`` accepted. ``on_case``: called with each case's name before it runs.

    Raises:
        ConfigError: goldens are to be accepted that cannot be, as of
            :func:`~omni_grpo_core.golden.review.accept`.
        TraceError: the folder is not new or empty or cannot be written, or a stage of a case
            failed.
    """
    begin = time.perf_counter()
    made: tuple[StartedCase, ...] = ()
    written = False
    text = suite_text(folder, plan.sources, plan.key, plan.cases)
    with suppress(_Refused), new_folder(folder) as partial, _named(partial, folder):
        write_file(partial / SUITE, text.encode("utf-8"))
        suite = load_suite(partial)
        done = regen(plan.policy, suite, partial, plan.key, on_case=on_case)
        made = tuple(_started(case, one, suite) for case, one in zip(plan.cases, done, strict=True))
        if approval is not None:
            if any(one.degenerate for one in made):
                raise _Refused
            accept(
                partial, suite.chosen(()), approval.reason, suite,
                by=approval.by, no_git=approval.no_git,
            )  # fmt: skip
            made = tuple(replace(one, files=_sizes(partial, one)) for one in made)
        written = True
    return Started(folder, made, approval, written, time.perf_counter() - begin)


@contextmanager
def _named(partial: Path, folder: Path) -> Iterator[None]:
    """An error about a file of ``partial`` is told as one about ``folder``, where it would be."""
    try:
        yield
    except OmniGrpoError as error:
        for part in ("item", "got", "want", "fix"):
            setattr(error, part, getattr(error, part).replace(str(partial), str(folder)))
        raise


def _started(case: NewCase, done: Regenerated, suite: Suite) -> StartedCase:
    """A case whose goldens were just made. Raises ``TraceError`` if a stage has none."""
    files = {path.name: path for path in done.files}
    stages = golden_stages(suite.cases[case.name])
    names = {stage: file_name(stage, suite.base, suite.base) for stage in stages}
    missing = next((stage for stage, name in names.items() if name not in files), None)
    if missing is not None:
        raise TraceError(
            f"case {case.name}, rows {[*case.rows]}: {missing}",
            got=next((one.reason for one in done.result.stages if one.stage == missing), "nothing"),
            want="a value of every stage",
            fix="correct the row or the checkpoint's settings; nothing was written",
        )
    headers = [read_golden(path).header for path in done.files[:1]]
    return StartedCase(
        case=case,
        files={name: files[name].stat().st_size for name in names.values()},
        degenerate=next((header.get("degenerate", "") for header in headers), ""),
    )


def _sizes(goldens: Path, one: StartedCase) -> dict[str, int]:
    return {name: (goldens / one.case.name / name).stat().st_size for name in one.files}


def given(policy: Policy, started: Started, names: Sequence[str]) -> Iterator[tuple[str, Values]]:
    """Name and values of these cases: what the model was given, computed again, and what it
    answered, read from its goldens."""
    suite = load_suite(started.folder)
    for name, context in contexts(policy, suite, names).items():
        values: Values = {}
        for stage in _GIVEN:
            put(values, stage, make(context, stage, values))
        for stage in _ANSWERED:
            file = started.goldens / name / file_name(stage, suite.base, suite.base)
            if file.is_file():
                with suppress(Lost):
                    put(values, stage, rebuild(read_golden(file).leaves))
        yield name, values
