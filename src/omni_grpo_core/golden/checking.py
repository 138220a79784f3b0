"""``check``: a fresh pass of every case compared with its goldens, stage by stage.

A stage that diverges is run again on the golden's own inputs. If it still diverges it *added* an
error; if not it *inherited* one. A value that the golden stores only as a fingerprint is replaced
by the fresh value if the fingerprints match; if they do not, the stage's origin is unknown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.golden.environment import changed_settings, environment, platform_key
from omni_grpo_core.golden.replay import Replay, replay_case, stage_header
from omni_grpo_core.golden.results import CaseResult, GoldenReport
from omni_grpo_core.golden.store import Found, changed_header, find_goldens
from omni_grpo_core.golden.suite import Suite
from omni_grpo_core.golden.tolerances import StageTolerances, load_tolerances
from omni_grpo_core.golden.verdicts import case_result
from omni_grpo_core.pipeline.inputs import header
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.pipeline.stages import Context


def load_suite_policy(
    suite: Suite, device: str | None = None, dtype: str | None = None
) -> tuple[Policy, str]:
    """The suite's checkpoint, and the platform's key; device and dtype as in
    :meth:`~omni_grpo_core.golden.suite.Suite.placed`. Raises as ``load_policy``."""
    on, asked = suite.placed(device, dtype)
    policy = load_policy(
        suite.checkpoint_dir(), processor=suite.processor_dir(), device=on, dtype=asked
    )
    return policy, platform_key(on, asked)


def contexts(policy: Policy, suite: Suite, names: Sequence[str]) -> dict[str, Context]:
    """Policy, settings and samples of each case."""
    return {
        name: Context(policy, suite.run_settings(name), samples, suite.cases[name].steps)
        for name, samples in suite.samples(names).items()
    }


def run_header(policy: Policy, settings: Settings, key: str) -> dict[str, str]:
    """The header of this run's goldens."""
    entries = {**environment(), **header(policy, settings)}
    # the platform's key names both
    entries = {name: text for name, text in entries.items() if name not in ("device", "dtype")}
    return {**entries, "settings": changed_settings(settings), "platform": key}


def check_case(
    context: Context,
    name: str,
    goldens: Mapping[str, Found],
    tolerances: StageTolerances,
    key: str,
    sidecar: Path | None = None,
) -> tuple[CaseResult, Replay]:
    """One case compared with its goldens, and the values computed on the way."""
    head = run_header(context.policy, context.settings, key)
    replay = replay_case(context, goldens, tolerances, head, sidecar)
    result = case_result(replay, name)
    versions: dict[str, tuple[str, str]] = {}
    for stage, found in goldens.items():
        if stage in replay.seen:
            now = {**head, **stage_header(context, stage)}
            versions |= changed_header(found.golden.header, now)
    return replace(result, versions=versions), replay


class CheckOptions(TypedDict, total=False):
    """``names``: cases, by default all. ``sidecar``: folder with the tensors that goldens store
    only as fingerprints, see :mod:`~omni_grpo_core.golden.sidecar`. ``on_case``: called with each
    case's name before it runs."""

    names: Sequence[str]
    sidecar: Path | None
    on_case: Callable[[str], None]


def checked_cases(
    policy: Policy, suite: Suite, folder: Path, key: str, **how: Unpack[CheckOptions]
) -> Iterator[tuple[CaseResult, Replay]]:
    """Case by case, compared with its goldens in ``folder``, as by :func:`check_case`.

    ``key``: the platform, with the requested dtype. Raises ``TraceError`` naming file and line of
    a broken golden before anything is run.
    """
    chosen = suite.chosen(how.get("names", ()))
    goldens = {name: find_goldens(folder, name, key, suite) for name in chosen}
    tolerances = load_tolerances(folder, key)
    for name, context in contexts(policy, suite, chosen).items():
        if "on_case" in how:
            how["on_case"](name)
        yield check_case(context, name, goldens[name], tolerances, key, how.get("sidecar"))


def check(
    policy: Policy, suite: Suite, folder: Path, key: str, **how: Unpack[CheckOptions]
) -> GoldenReport:
    """Compare every case with the goldens in ``folder``; arguments and errors as in
    :func:`checked_cases`."""
    begin = time.perf_counter()
    results = tuple(result for result, _ in checked_cases(policy, suite, folder, key, **how))
    seconds = time.perf_counter() - begin
    return GoldenReport(str(folder), key, results, seconds, suite.options(key))
