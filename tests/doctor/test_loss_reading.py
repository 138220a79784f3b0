"""The loss of a hand-written loop, read back from its gradient with nothing handed over.

float32 factors are good to 1e-3: what the loop adds to a deviation (1e-4 of 0.3) is told apart from
another; bfloat16 rounds each weight by up to 2**-8, and a KL weight is that of the differences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from written_loop import LONGEST, OwnStepLoop, Written, WrittenLoop

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor.checks.loss import LOOKS
from omni_grpo_core.doctor.checks.policies import beta_read
from omni_grpo_core.doctor.checks.weights import sound_reading
from omni_grpo_core.doctor.evidence import Case, Evidence
from omni_grpo_core.doctor.loss_reading import Reading, reading
from omni_grpo_core.doctor.loss_rows import trained_rows
from omni_grpo_core.doctor.policy_term import policy_term

BF16 = torch.bfloat16


def facts(case: Case) -> dict[str, Evidence]:
    return {evidence.fact: evidence for look in LOOKS for evidence in look(case)}


TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "gspo", "cispo")
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "-kl": {"beta": 0.04},
    "-hot": {"temperature": 1.3},
    "-accumulated": {"accumulation": 2},
    "-accumulated-kl": {"accumulation": 2, "beta": 0.04},
    "-twice": {"updates": 2, "rate": 1e-3},
    "-bf16": {"dtype": BF16},
}
LOOPS = {"written": WrittenLoop, "own": OwnStepLoop}
CELLS = {
    f"{loop}-{kind}{name}": (loop, Written(loss_type=kind, **how))
    for loop in LOOPS
    for kind in TYPES
    for name, how in VARIANTS.items()
}
CELLS |= {
    f"written-{kind}-entropy": ("written", Written(loss_type=kind, entropy=0.01)) for kind in TYPES
}
QUICK = ("written-grpo-kl", "written-dapo-accumulated", "own-gspo", "own-bnpo-accumulated")


def divisor_of(how: Written, known: Reading) -> tuple[str, float]:
    """How the loss of a step is divided, beside the advantages."""
    count, tokens = len(known.rows), float(known.lengths.sum())
    if how.loss_type in ("grpo", "gspo"):
        return "sequence", count
    if how.loss_type == "dr_grpo":
        return "uniform", count * LONGEST
    return "uniform", tokens


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CELLS]
)
def test_a_sound_loss_is_read_back(name: str, policy: Policy, tmp_path: Path) -> None:
    loop, how = CELLS[name]
    steps = 1 if how.updates > 1 else 2
    for step, case in enumerate(LOOPS[loop](policy, how).run(tmp_path / "trace", steps)):
        rows, known = trained_rows(case), reading(case)
        assert known is not None
        assert not known.term.varies
        live = [row for row in rows if bool(row.counted.any())]
        first = how.updates == 1 or not step
        # clipping takes tokens out of a later update; without an advantage the KL of one may be 0
        assert not first or how.beta or all(bool(row.counted[: row.end].all()) for row in live)
        assert not any(bool(row.counted[row.end :].any()) for row in live)
        told = torch.cat([row.temperature[row.tokens >= 0] for row in live])
        rounding = 0.02 if how.dtype == BF16 else 1e-3
        assert float(told.median()) == pytest.approx(how.temperature, rel=rounding)
        found = [
            (a.divisor, 1 / a.factor) for a in sound_reading(case, known)[1] if a.scale == "group"
        ]
        divisor, by = divisor_of(how, known)
        if loop == "written" and how.loss_type == "bnpo" and how.accumulation > 1:
            divisor, by = "part", 2  # elsewhere a batch is a micro-batch
            if "part" not in known.divisors:  # two of equally many tokens
                divisor, by = "uniform", float(known.lengths.sum())
        assert any(d == divisor and b == pytest.approx(by, rel=rounding) for d, b in found), (
            step, found, (divisor, by)
        )  # fmt: skip
        if how.beta and step:
            assert beta_read(case, known.term) == pytest.approx(how.beta, rel=rounding)
        seen = facts(case)
        assert not [e for e in seen.values() if e.severity == "breaks"]
        assert ("entropy-in-loss" in seen) == bool(how.entropy)
        if how.entropy:
            assert seen["entropy-in-loss"].values["weight"] == pytest.approx(0.01, rel=rounding)


FAULTS = {
    "batch deviation": (Written(scale="batch"), "scale-differs", "advantage"),
    "no deviation": (Written(scale="none"), "scale-differs", "advantage"),
    "batch mean": (Written(base="batch", scale="none"), "advantage-differs", "advantage"),
    "sign": (Written(sign=-1.0), "advantages-negated", "advantage"),
    "another row": (Written(rolled=1), "advantages-of-other-rows", "advantage"),
    "undivided": (Written(accumulation=2, divided=False), "accumulation-undivided", "loss"),
    "reference is policy": (Written(beta=0.04, kl_used=False), "kl-left-out", "loss"),
    "kl subtracted": (Written(beta=-0.04), "kl-subtracted", "loss"),
    "one column early": (Written(early=1), "shifted", "loss"),
    "padding": (Written(padding_counts=True), "after-eos", "loss"),
    "no eos": (Written(eos_counts=False), "tokens-left-out", "loss"),
    "entropy": (Written(entropy=0.01), "entropy-in-loss", "loss"),
    "detached": (Written(detached=True), "loss-detached", "gradient"),
    "temperature": (Written(temperature=1.6, scored_at=1.0), "temperature-differs", "completion"),
}


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("another row", "sign") else pytest.param(n, marks=pytest.mark.slow)
        for n in FAULTS
    ],
)
def test_a_fault_is_found_with_its_stage(name: str, policy: Policy, tmp_path: Path) -> None:
    how, fact, stage = FAULTS[name]
    cases = WrittenLoop(policy, how).run(tmp_path / "trace")
    found = {f: e for case in cases for f, e in facts(case).items()}
    assert fact in found, found
    assert found[fact].stage == stage
    assert {e.fact for e in found.values() if e.severity == "breaks"} <= {fact}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "dapo", "cispo"])
def test_a_second_update_is_read_with_its_ratios(kind: str, policy: Policy, tmp_path: Path) -> None:
    how = Written(loss_type=kind, updates=2)
    _, second, *_ = WrittenLoop(policy, how).run(tmp_path / "trace", steps=1)
    term = policy_term(second)
    assert term is not None
    assert term.ratio == ("bounded" if kind == "cispo" else "clipped") or term.ratio == "token"
    assert not [e for e in facts(second).values() if e.severity == "breaks"]
