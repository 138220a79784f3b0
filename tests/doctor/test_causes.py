"""From recorded values to the named cause: whole diagnoses of hand-written steps."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from small_recordings import EVAL, advantaged, case, generated, lost, rewarded, samples, stepped

from omni_grpo_core.doctor import reproduce
from omni_grpo_core.doctor.diagnose import diagnose
from omni_grpo_core.doctor.registry import CAUSES
from omni_grpo_core.doctor.upstream import SOURCES
from omni_grpo_core.faults.fault import CACHE_DROPPED
from omni_grpo_core.faults.plan import BY_ID

TRAINING = replace(EVAL, training=True, checkpointing=True)
OLD = torch.full((4, 3), 1 / 3).log()
SAME = ((5, 6, 9), (5, 6, 9), (7, 8, 9), (7, 8, 9))


@pytest.mark.parametrize(
    ("cause", "values"),
    [
        ("gen.checkpointing-train", [generated(cached=(0, 0), modes=TRAINING)]),
        ("gen.history-lost", [generated(cached=(0, 0))]),
        ("gen.history-twice", [generated(cached=(6, 10))]),
        ("gen.no-eos", [generated(config={"eos_token_id": None})]),
        ("gen.topk", [generated(config={"top_p": 0.9})]),
        ("gen.repetition-penalty", [generated(config={"repetition_penalty": 1.3})]),
        ("gen.identical", [generated(completions=SAME, config={"do_sample": False}),
                           advantaged()]),
        ("gen.group-order", [samples(), generated(prompts=(0, 1, 0, 1)), rewarded(),
                             advantaged()]),
        ("reward.by-position", [samples(), generated(), advantaged(),
                                rewarded(columns={"sample_id": ["b", "b", "a", "a"]})]),
        ("reward.nan", [rewarded((1.0, float("nan"), 2.0, 0.0))]),
        ("adv.group-mixed", [samples(), generated(), rewarded(),
                             advantaged(group_ids=("a", "b", "a", "b"))]),
        ("loss.hidden-beta", [lost(0.0, ref=OLD)]),
        ("step.detached", [lost(0.5, requires_grad=False), stepped()]),
        ("step.frozen-wrong", [stepped(trainable={"vision": 5})]),
        ("step.not-updated", [stepped(held={"text": 0, "head": 10})]),
        ("step.accumulation", [stepped(settings={"gradient_accumulation_steps": 4})]),
        ("step.nan-gradient", [stepped(norms={"text": float("nan")})]),
    ],
)  # fmt: skip
def test_the_likeliest_cause(cause: str, values: list[Any]) -> None:
    verdict = diagnose(case(*values))
    named = [finding.causes[0] for finding in verdict.findings if finding.causes]
    assert cause in [explanation.cause for explanation in named]
    for explanation in named:
        texts = (explanation.seen, explanation.harm, explanation.fix, explanation.confirm)
        assert all("unknown)" not in text for text in texts), "a value that was not recorded"
        assert all("{" not in text for text in texts)
    assert not [note for note in verdict.missing if "failed on this recording" in note]


def test_without_causes_the_stage_is_still_named() -> None:
    verdict = diagnose(case(generated(cached=(0, 0), modes=TRAINING)), causes=False)
    assert [finding.stage for finding in verdict.findings] == ["completion"]
    assert verdict.findings[0].causes == ()


def test_a_cause_from_upstream_links_it_and_gives_the_releases() -> None:
    verdict = diagnose(case(generated(cached=(0, 0), modes=TRAINING)))
    [cause] = [c for c in verdict.findings[0].causes if c.cause == "gen.checkpointing-train"]
    assert cause.links == ("https://github.com/huggingface/transformers/pull/38913",)
    assert cause.versions == f"transformers{CACHE_DROPPED}"


def test_every_source_is_of_a_cause_and_can_be_followed() -> None:
    assert set(SOURCES) <= {*CAUSES, *BY_ID}
    for source in SOURCES.values():
        assert all(link.startswith("https://") for link in source.links)
        assert not source.versions or Requirement(source.versions).specifier


def test_every_change_that_is_reproduced_can_be_allowed() -> None:
    """Their causes are made from the names of changes, so they are in no table."""
    folder = Path(reproduce.__file__).parent
    named = {
        name
        for file in folder.glob("reproduc*.py")
        for name in re.findall(r'Reproduction\(\s*"([^"]+)"', file.read_text())
    }
    assert len(named) > 25
    assert {f"media.{name}" for name in named} <= CAUSES
