from __future__ import annotations

from dataclasses import fields

from hand_made_check import result

from omni_grpo_core.pipeline.check import Health
from omni_grpo_core.pipeline.hints import STAGE_SUMMARY, advice
from omni_grpo_core.report.html.words import first_failure, health_words
from omni_grpo_core.types import MADE_STAGES, STAGES, Check


def test_every_stage_of_a_pass_is_described() -> None:
    assert tuple(STAGE_SUMMARY) == MADE_STAGES
    assert all(advice(stage) for stage in STAGES)


def test_every_health_metric_is_explained() -> None:
    for field in fields(Health):
        assert health_words(field.name) != field.name.replace("_", " ")


def test_nothing_failed() -> None:
    assert first_failure(result()) is None


def test_the_first_stage_in_order_is_blamed_and_the_others_are_counted() -> None:
    failing = {"reward": Check("r", False, "late"), "media": Check("m", False, "early")}
    failure = first_failure(result(verdict="fail", failing=failing, shift=0.0))
    assert failure is not None
    assert (failure.where, failure.what, failure.seen) == ("media", "m", "early")
    assert failure.others == 2
    assert failure.fix == advice("media", "m")


def test_a_modality_that_does_not_reach_the_model_is_blamed() -> None:
    failure = first_failure(result(verdict="fail", shift=0.0))
    assert failure is not None
    assert (failure.where, failure.what) == ("video proof", "video reaches the model")
    assert failure.others == 0
