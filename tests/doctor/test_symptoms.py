"""What hurts, measured on hand-written steps before anything is explained."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_recordings import COMPLETIONS, EOS, EVAL, PROMPTS, case, generated, rewarded, stepped

from omni_grpo_core.doctor.evidence import Evidence, Finding
from omni_grpo_core.doctor.symptoms import Symptom, symptoms
from omni_grpo_core.doctor.verdict import Diagnosis, Felt
from omni_grpo_core.trace.calls import ForwardCall, LossGradient, ProcessorCall

LIKELY = torch.tensor([[0.5] * 3] * 4).log()
FLAT = (1.0, 1.0, 2.0, 2.0)


def names(*steps: list[Any]) -> list[str]:
    return [symptom.name for symptom in symptoms([case(*values) for values in steps])]


def scored(logprob: float, own: bool = True) -> ForwardCall:
    """The scoring forward of ``generated()``: two prompts of three tokens, two completions each;
    every token has the same logprob."""
    ids = torch.tensor([[*PROMPTS[row // 2], *COMPLETIONS[row]] for row in range(4)])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    logprobs = torch.full((4, 5), logprob)
    return ForwardCall(inputs, {}, EVAL, None, None, logprobs, "float32", (), None, own=own)


def processed(**outputs: torch.Tensor) -> ProcessorCall:
    return ProcessorCall(("?",), False, (), (), (), {}, (), (), outputs, "left", None)


def test_a_healthy_run_has_none() -> None:
    pixels = torch.arange(8.0)
    step = [
        processed(pixel_values=pixels),
        generated(logprobs=LIKELY, inputs={"pixel_values": pixels}),
        rewarded(),
        replace(scored(math.log(0.5)), inputs={**scored(0.0).inputs, "pixel_values": pixels}),
        stepped(),
    ]
    assert names(step, step) == []


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("garbage", [generated(completions=((EOS, 0, 0),) * 4)]),
        ("capped", [generated(completions=((5, 6, 7), (5, 7, 6), (7, 8, 5), (8, 5, 5)))]),
        ("rewards-zero", [rewarded((0.0,) * 4)]),
        ("rewards-stuck", [rewarded((0.1,) * 4)]),
        ("reward-stuck", [rewarded(), rewarded((0.0,) * 4, name="format")]),
        ("no-advantage", [rewarded(FLAT)]),
        ("scores-disagree", [generated(logprobs=LIKELY), scored(math.log(0.25))]),
        ("image-unused", [processed(pixel_values=torch.arange(8.0)), generated()]),
        ("audio-constant", [processed(input_features=torch.zeros(8))]),
        ("no-gradient", [stepped(norms={"text": 0.0})]),
        ("gradient-not-finite", [stepped(norms={"text": math.inf})]),
        ("loss-not-finite", [stepped(losses=(math.nan,))]),
        ("weights-still", [stepped(changed={"text": False})]),
    ],
)
def test_what_hurts(name: str, step: list[Any]) -> None:
    assert names(step) == [name]


def test_scoring_without_media_explains_that_scores_disagree() -> None:
    """The headline had no stage, and the proved cause, an image that only generate got, stood
    below it."""
    [apart] = symptoms([case(generated(logprobs=LIKELY), scored(math.log(0.25)))])
    assert apart.explained_by(Finding("media", (), ()))
    assert apart.closeness(Finding("logits", (), ())) < apart.closeness(Finding("media", (), ()))


def test_what_follows_is_not_said_again() -> None:
    """Rewards of 0 have no advantage, no gradient and no update."""
    step = [rewarded((0.0,) * 4), stepped(norms={"text": 0.0}, changed={"text": False})]
    assert names(step) == ["rewards-zero"]


def test_a_policy_that_gets_everything_right_is_not_ill() -> None:
    """The tiny checkpoint answered all of a sound loop's questions, which was BROKEN: no reward
    ever moved."""
    right = rewarded((1.0,) * 4)
    still = stepped(norms={"text": 0.0}, changed={"text": False})
    [symptom] = symptoms([case(right, still)] * 3)
    assert (symptom.name, symptom.severity) == ("rewards-stuck", "differs")
    assert "all that there is to earn" in symptom.sentence
    assert not symptom.idle
    golds = {"gold": {"alone": 2.0}, "empty": {"alone": 0.0}}
    symptom, *_ = symptoms([case(replace(right, probe=golds))] * 2)
    assert symptom.idle, "half of what a gold earns"


@pytest.mark.parametrize(
    ("paid", "values", "steps", "severity"),
    [
        ((1.0, 0.0), (0.0,) * 4, 2, "differs"),
        ((1.0, 0.0), (0.0,) * 4, 8, "breaks"),  # 32 completions of 8 steps
        ((1.0, 0.0, -1.0), (-1.0,) * 4, 2, "differs"),
        ((0.0, 0.0), (0.0,) * 4, 1, "breaks"),  # whatever is said
        ((), (0.0,) * 4, 1, "breaks"),  # not probed
    ],
)
def test_a_policy_that_earns_nothing_yet_is_not_healthy_and_not_broken(
    paid: tuple[float, ...], values: tuple[float, ...], steps: int, severity: str
) -> None:
    """A sound loop with one signed reward: the tiny model got nothing right in two steps, which was
    BROKEN. Nothing was learned all the same. A function that pays the same for anything that it is
    asked, or of which nothing is known, is another matter."""
    probe = {str(at): {"alone": value} for at, value in enumerate(paid)}
    [symptom] = symptoms([case(rewarded(values, name="accuracy", probe=probe))] * steps)
    assert (symptom.severity, symptom.idle) == (severity, True)
    verdict = Diagnosis((), (), (), symptoms=(Felt(symptom, None),))
    assert (verdict.healthy, verdict.broken) == (False, severity == "breaks")
    assert (verdict.exit_code(), verdict.exit_code(strict=True)) == (severity == "breaks", 1)


def test_a_step_without_advantage_among_others_is_usual() -> None:
    assert names([rewarded(FLAT)], [rewarded()]) == []
    # one group that does not get everything right may be chance; four of them are not
    assert [s.severity for s in symptoms([case(rewarded(FLAT))])] == ["differs"]
    assert [s.severity for s in symptoms([case(rewarded(FLAT))] * 4)] == ["breaks"]


@pytest.mark.parametrize(("mark", "severity"), [(1.0, "differs"), (0.0, "breaks")])
def test_a_penalty_is_no_mark_of_being_right(mark: float, severity: str) -> None:
    """Every answer right and of its group's length: a length penalty made the run BROKEN."""

    def probed(right: float, other: float) -> dict[str, Any]:
        return {"a": {"role": "right", "alone": right}, "b": {"role": "empty", "alone": other}}

    answers = rewarded((mark,) * 4, name="accuracy", probe=probed(1.0, 0.0))
    penalty = rewarded((-0.4, -0.4, -0.3, -0.3), name="length", probe=probed(-0.6, 0.0))
    found = {one.name: one.severity for one in symptoms([case(answers, penalty)] * 8)}
    assert found["no-advantage"] == severity


def test_groups_that_earn_the_same_for_a_short_time_taught_nothing() -> None:
    """Functions known to tell completions apart, and too few steps for a policy to earn more: four
    groups of a policy that was sure of its answers were called BROKEN."""
    probe = {"a": {"role": "right", "alone": 1.0}, "b": {"role": "empty", "alone": 0.0}}
    paid = rewarded(FLAT, probe=probe)
    few, many = ({s.name: s for s in symptoms([case(paid)] * n)} for n in (4, 8))
    assert (few["no-advantage"].severity, few["no-advantage"].idle) == ("differs", True)
    assert (many["no-advantage"].severity, many["no-advantage"].idle) == ("breaks", False)


def test_another_instance_does_not_score_the_policy() -> None:
    assert names([generated(logprobs=LIKELY), scored(math.log(0.25), own=False)]) == []


@pytest.mark.parametrize(("read", "felt"), [(1.5, ["scores-disagree"]), (1.0, []), (None, [])])
def test_a_fused_head_scores_at_its_own_temperature(read: float | None, felt: list[str]) -> None:
    """TRL's head makes no logits: that its rollouts came without the adapter was not felt. At
    another temperature than sampling's, the two differ in a sound run as well."""
    fused = replace(scored(0.0), logprobs=None, sampling_logprobs=torch.full((4, 5), -2.0))
    nothing = torch.zeros(4, 5)
    gradient = LossGradient(
        0, "hidden", nothing.long(), nothing + 1, nothing + (read or 0.0), nothing, nothing
    )
    rollout = generated(logprobs=LIKELY, config={"temperature": 1.5})
    assert names([rollout, fused, *([] if read is None else [gradient])]) == felt


def test_a_run_that_raised_says_where() -> None:
    died = case(generated(), rewarded((), error="KeyError: 'solution'"))
    header = {"raised": "KeyError: 'solution'"}
    [symptom] = symptoms([replace(died, trace=replace(died.trace, header=header))])
    assert symptom.sentence == "the run raised KeyError: 'solution', in stage reward"
    assert symptom.stages[0] == "reward"


def test_only_a_finding_that_breaks_explains() -> None:
    symptom = Symptom("garbage", "", ("completion", "batch"))
    top_k = Finding("completion", (Evidence("completion", "topk", "", severity="differs"),), ())
    lost = Finding("completion", (Evidence("completion", "history-lost", ""),), ())
    media = Finding("batch", (Evidence("batch", "grid", ""),), ())
    assert [symptom.explained_by(found) for found in (top_k, lost, media)] == [False, True, True]
    assert symptom.closeness(lost) < symptom.closeness(media)
