"""``check``: a fresh pass of every case held against its goldens, stage by stage.

A stage that diverges is run again on the golden's own inputs. If it still diverges it *added* an
error; if not it *inherited* one. What the golden keeps only as a fingerprint is replaced by the
fresh value where the fingerprint says that the two are the same; where it does not, the stage's
origin stays open.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.golden.environment import environment, told_settings
from omni_grpo_core.golden.replay import Replay, own_header, replay_case
from omni_grpo_core.golden.results import CaseResult, GoldenReport
from omni_grpo_core.golden.store import Found, changed_header, find_goldens
from omni_grpo_core.golden.suite import Suite
from omni_grpo_core.golden.tolerances import StageTolerances, load_tolerances
from omni_grpo_core.golden.verdicts import case_result
from omni_grpo_core.pipeline.inputs import header
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.pipeline.stages import Context


def contexts(policy: Policy, suite: Suite, names: Sequence[str]) -> dict[str, Context]:
    """What each case runs on."""
    return {
        name: Context(policy, suite.run_settings(name), samples, suite.cases[name].steps)
        for name, samples in suite.samples(names).items()
    }


def run_header(policy: Policy, settings: Settings, key: str) -> dict[str, str]:
    """What a golden of this run says that it was made under."""
    told = {**environment(), **header(policy, settings)}
    # the platform tells both
    told = {name: text for name, text in told.items() if name not in ("device", "dtype")}
    return {**told, "settings": told_settings(settings), "platform": key}


def check_case(
    context: Context,
    name: str,
    goldens: Mapping[str, Found],
    tolerances: StageTolerances,
    key: str,
    sidecar: Path | None = None,
) -> tuple[CaseResult, Replay]:
    """One case against its goldens, and what was made on the way."""
    head = run_header(context.policy, context.settings, key)
    replay = replay_case(context, goldens, tolerances, head, sidecar)
    result = case_result(replay, name)
    versions: dict[str, tuple[str, str]] = {}
    for stage, found in goldens.items():
        if stage in replay.seen:
            now = {**head, **own_header(context, stage)}
            versions |= changed_header(found.golden.header, now)
    return replace(result, versions=versions), replay


class CheckOptions(TypedDict, total=False):
    """``names``: of cases, all if there are none. ``sidecar``: folder of what the goldens
    keep only as fingerprints, see :mod:`~omni_grpo_core.golden.sidecar`. ``on_case``: called with
    each case's name before it runs."""

    names: Sequence[str]
    sidecar: Path | None
    on_case: Callable[[str], None]


def checked_cases(
    policy: Policy, suite: Suite, folder: Path, key: str, **how: Unpack[CheckOptions]
) -> Iterator[tuple[Context, dict[str, Found], StageTolerances, CaseResult]]:
    """Case by case: what it runs on, its goldens in ``folder``, tolerances, and what was found.

    ``key``: the platform, by the dtype that was asked for. Raises ``TraceError`` naming file and
    line for a golden that is broken, before anything is run.
    """
    chosen = suite.chosen(how.get("names", ()))
    goldens = {name: find_goldens(folder, name, key, suite) for name in chosen}
    tolerances = load_tolerances(folder, key)
    for name, context in contexts(policy, suite, chosen).items():
        if "on_case" in how:
            how["on_case"](name)
        result, _ = check_case(context, name, goldens[name], tolerances, key, how.get("sidecar"))
        yield context, goldens[name], tolerances, result


def check(
    policy: Policy, suite: Suite, folder: Path, key: str, **how: Unpack[CheckOptions]
) -> GoldenReport:
    """Every case against the goldens in ``folder``; arguments and errors as in
    :func:`checked_cases`."""
    begin = time.perf_counter()
    results = tuple(case[-1] for case in checked_cases(policy, suite, folder, key, **how))
    return GoldenReport(str(folder), key, results, time.perf_counter() - begin)
