"""The same failure gets the same advice, whichever command finds it.

It did not: for a missing generation prompt, ``check`` advised to restore the base model's chat
template, ``train`` to pass ``add_generation_prompt``, and only the doctor said how.
"""

from __future__ import annotations

import io
from importlib import import_module
from pkgutil import iter_modules
from typing import get_args

import pytest
from hand_made_check import result
from hand_made_goldens import report
from rich.console import Console

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor import causes
from omni_grpo_core.doctor.signatures import Signature
from omni_grpo_core.golden.classify import base_stage
from omni_grpo_core.golden.results import ORDER
from omni_grpo_core.pipeline.hints import ADVICE, BY_ENGINE, FIXES, advice
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.pipeline.stages import GRAPH, run
from omni_grpo_core.report.html.words import first_failure
from omni_grpo_core.report.terminal.check import print_check
from omni_grpo_core.report.terminal.golden import print_report
from omni_grpo_core.rewards.health import AlarmName
from omni_grpo_core.training.guard import Finding, advised, failed_checks
from omni_grpo_core.types import MADE_STAGES, Check, Sample, Stage, StageRecord

GUARDS = {
    *(("reward", name) for name in get_args(AlarmName)),
    ("completion", "garbage"),
    ("completion", "generation in train mode under checkpointing"),
    ("logits", "sampling and scoring disagree"),
    ("loss", "not a number"),
    ("gradient", "not a number"),
    *BY_ENGINE,
}
SIGNATURES = [
    signature
    for name in iter_modules(causes.__path__, f"{causes.__name__}.")
    for table in vars(import_module(name.name)).values()
    if isinstance(table, tuple)
    for signature in table
    if isinstance(signature, Signature)
]
IN_A_PASS = [key for key in ADVICE if key[0] in GRAPH and key not in GUARDS]


@pytest.mark.parametrize(("stage", "name"), IN_A_PASS)
def test_check_and_training_give_the_same_advice(stage: Stage, name: str) -> None:
    failed = StageRecord(stage, None, (Check(name, False, "seen"),), 0.0)
    shown = result(verdict="fail", extra=(failed,))
    failure = first_failure(shown)
    assert failure is not None
    assert failure.fix == advice(stage, name)
    (finding,) = failed_checks(shown.trace.stages)
    assert finding.detail == f"seen; {failure.fix}"
    stream = io.StringIO()
    print_check(Console(file=stream, width=2000), shown)
    assert f"do:   {failure.fix}" in stream.getvalue()


@pytest.mark.parametrize("cause", FIXES)
def test_the_doctor_gives_the_advice_that_check_and_training_give(cause: str) -> None:
    fixes = [signature.fix for signature in SIGNATURES if signature.cause == cause]
    assert any(FIXES[cause] in fix for fix in fixes)
    assert any(FIXES[cause] in known for known in ADVICE.values())


def test_a_golden_gives_the_same_advice() -> None:
    found = report()
    stream = io.StringIO()
    print_report(Console(file=stream, width=2000), found, every=False)
    assert found.first is not None
    assert f"do: {advice(base_stage(found.first))}" in stream.getvalue()


def test_every_guard_finding_has_advice_of_its_own() -> None:
    assert set(ADVICE) >= GUARDS
    assert advised("garbage", "completion", "4 of 4") == Finding(
        "garbage", "completion", f"4 of 4; {ADVICE['completion', 'garbage']}"
    )


def test_no_advice_is_for_a_check_that_does_not_exist(
    policy: Policy, samples: tuple[Sample, ...], settings: Settings
) -> None:
    trace = run(policy, samples[:1], settings).trace
    assert set(IN_A_PASS) <= {(r.stage, check.name) for r in trace.stages for check in r.checks}


def test_the_graph_and_the_goldens_order_stages_alike() -> None:
    beside = {"library", "sampled"}
    assert [s for s in GRAPH if s not in beside] == [s for s in ORDER if s in GRAPH]
    assert tuple(s for s in ORDER if s != "scoring") == MADE_STAGES
