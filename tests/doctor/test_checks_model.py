"""Looks at embeddings and positions: a recorded step with one change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from doctor_recordings import facts, only, steps_with

from omni_grpo_core.doctor.checks import embeddings as checks_embeddings
from omni_grpo_core.doctor.checks import positions as checks_positions
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall
from omni_grpo_core.types import Trace

VIDEO, AUDIO = 562, 552


def with_forward(step: Case, **change: Any) -> Case:
    """``step`` with other fields in its scoring forward."""
    records = tuple(
        replace(r, value=replace(r.value, **change)) if type(r.value) is ForwardCall else r
        for r in step.trace.stages
    )
    return Case(Trace(step.trace.header, records), step.reference)


@pytest.fixture(scope="module")
def step() -> Case:
    (made,) = steps_with(rows=(12, 5))
    return made  # type: ignore[no-any-return]


def forward(step: Case) -> ForwardCall:
    [call] = step.forwards
    return call


def test_the_ids_that_these_tests_use(step: Case) -> None:
    assert step.reference is not None
    convert = step.reference.policy.processor.tokenizer.convert_tokens_to_ids
    assert (convert("<|VIDEO|>"), convert("<|AUDIO|>")) == (VIDEO, AUDIO)


def positions(step: Case, change: Any) -> list[str]:
    held = forward(step).position_ids
    assert held is not None
    return facts(checks_positions.look_positions, with_forward(step, position_ids=change(held)))


def test_right_positions_are_right(step: Case) -> None:
    assert positions(step, lambda held: held) == []


def test_every_frame_at_one_time(step: Case) -> None:
    frames = forward(step).inputs["input_ids"] == VIDEO

    def still(held: torch.Tensor) -> torch.Tensor:
        flat = held.clone()
        flat[0][frames] = 70
        return flat

    assert positions(step, still) == ["time-collapsed"]


def test_one_rows_positions_for_all(step: Case) -> None:
    assert positions(step, lambda held: held[:, :1].expand_as(held)) == ["another-rows"]
    assert positions(step, lambda held: held[:, :1]) == ["another-rows"], "broadcast"


def test_plain_counting(step: Case) -> None:
    def line(held: torch.Tensor) -> torch.Tensor:
        return torch.arange(held.shape[-1]).expand_as(held)

    without = {k: v for k, v in forward(step).inputs.items() if k != "attention_mask"}
    counted = with_forward(step, inputs=without, position_ids=line(forward(step).position_ids))  # type: ignore[arg-type]
    assert facts(checks_positions.look_positions, counted) == ["one-dimensional"]
    # where the model computes them itself, none are passed
    unseen = with_forward(step, inputs=without, position_ids=None)
    found = only(checks_positions.look_positions, unseen)
    assert (found.fact, found.values["mask"]) == ("one-dimensional", False)


def test_positions_that_were_scaled_say_by_how_much(step: Case) -> None:
    held = forward(step).position_ids
    assert held is not None
    twice = only(checks_positions.look_positions, with_forward(step, position_ids=held * 2))
    assert (
        twice.sentence
        == "the positions of row 0 of the scoring forward are the reference's times 2"
    )
    frames = (forward(step).inputs["input_ids"] == VIDEO)[0].nonzero().flatten()
    slow = held.clone()
    slow[0, 0, frames] = held[0, 0, frames[0]] + 2 * (held[0, 0, frames] - held[0, 0, frames[0]])
    found = only(checks_positions.look_positions, with_forward(step, position_ids=slow))
    assert found.values["reproduced"] == ("time-scaled",)
    assert "the time inside its video times 2" in found.sentence


def test_a_completion_with_shifted_positions(step: Case) -> None:
    prompt = step.generated[0].inputs["input_ids"].shape[1]

    def late(held: torch.Tensor) -> torch.Tensor:
        shifted = held.clone()
        shifted[:, :, prompt:] += 7
        return shifted

    assert positions(step, late) == ["tail-shifted"]


def test_generation_that_continues_at_other_positions(step: Case) -> None:
    def off(call: GenerateCall) -> GenerateCall:
        return replace(call, step_positions=tuple(n + 7 for n in call.step_positions))

    records = tuple(
        replace(r, value=off(r.value)) if type(r.value) is GenerateCall else r
        for r in step.trace.stages
    )
    moved = Case(Trace(step.trace.header, records), step.reference)
    assert facts(checks_positions.look_next_positions, step) == []
    assert facts(checks_positions.look_next_positions, moved) == ["steps-off"]


def test_positions_after_padding_on_the_right_follow_from_it(step: Case) -> None:
    """Stale deltas were "proved" beside the wrong side of the padding."""

    def padded(call: GenerateCall) -> GenerateCall:
        mask = call.inputs["attention_mask"].clone()
        mask[:, -1] = 0
        off = tuple(n + 7 for n in call.step_positions)
        inputs = {**call.inputs, "attention_mask": mask}
        return replace(call, inputs=inputs, step_positions=off)

    records = tuple(
        replace(r, value=padded(r.value)) if type(r.value) is GenerateCall else r
        for r in step.trace.stages
    )
    moved = Case(Trace(step.trace.header, records), step.reference)
    assert facts(checks_positions.look_next_positions, moved) == []


def embeddings(step: Case, change: Any) -> list[str]:
    call = forward(step)
    assert call.inputs_embeds is not None
    changed = change(call.inputs_embeds.clone(), call.inputs["input_ids"])
    return facts(checks_embeddings.look_injected, with_forward(step, inputs_embeds=changed))


def test_right_embeddings_are_right(step: Case) -> None:
    assert embeddings(step, lambda held, ids: held) == []


def test_slightly_trained_weights_are_no_fault(step: Case) -> None:
    # an optimizer step of 1e-3 on embeddings of standard deviation .06
    noise = torch.Generator().manual_seed(0)
    assert embeddings(step, lambda h, ids: h + 1e-3 * torch.randn(h.shape, generator=noise)) == []


def test_placeholders_that_keep_their_own_embedding(step: Case) -> None:
    assert step.reference is not None
    table = step.reference.policy.model.get_input_embeddings().weight.detach()

    def bare(held: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        held[ids == VIDEO] = table[VIDEO]
        return held

    assert embeddings(step, bare) == ["features-not-injected"]


def test_sounds_in_another_order(step: Case) -> None:
    def reversed_(held: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        held[ids == AUDIO] = held[ids == AUDIO].flip(0)
        return held

    assert embeddings(step, reversed_) == ["features-misordered"]


def test_features_of_unknown_origin(step: Case) -> None:
    def noise(held: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seeded = torch.Generator().manual_seed(0)
        held[ids == VIDEO] = 9 * torch.randn(held[ids == VIDEO].shape, generator=seeded)
        return held

    assert embeddings(step, noise) == ["features-off"]


def test_rope_sections_of_another_model(step: Case) -> None:
    assert facts(checks_positions.look_rope, step) == []
    other = Case(Trace({**step.trace.header, "rope_sections": "16 24 24"}, ()), step.reference)
    assert only(checks_positions.look_rope, other).values == {"got": "16 24 24", "want": "4 6 6"}
