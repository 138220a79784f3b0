"""What is measured of the installed transformers, on the shipped checkpoint."""

from __future__ import annotations

import json
import logging
import warnings
from importlib.metadata import version
from pathlib import Path

from omni_grpo_core.pipeline import Inputs
from omni_grpo_core.policy import Policy
from omni_grpo_core.types import Sample
from omni_grpo_core.versions.generating import EVAL, NO_CACHE, TRAIN, batched, exam
from omni_grpo_core.versions.library import (
    audio_in_video_calls,
    feature_types,
    rope_deltas,
    template_type,
)

STORED = {
    v["facts"]["header"]["transformers"]: v["facts"]
    for v in json.loads((Path(__file__).parent / "matrix.json").read_text())["versions"].values()
}
INSTALLED = version("transformers")


def test_exactly_one_way_of_handing_a_track_along_is_right(policy: Policy, inputs: Inputs) -> None:
    row = inputs.batch.rows[0]
    assert row.audio_in_video == "interleaved"
    level = logging.getLogger("transformers").level
    calls = audio_in_video_calls(policy, inputs.prompts[0], inputs.media[0], row)
    assert logging.getLogger("transformers").level == level
    (right,) = [name for name, call in calls.items() if call["outcome"] == "right"]
    takes_indices = hasattr(policy.processor, "load_audio_from_video")
    assert ("audio_from_video_indices" in right) == takes_indices
    assert {call["outcome"] for call in calls.values()} <= {"right", "lost", "refused"}
    if INSTALLED in STORED:
        outcomes = {name: (c["outcome"], c["detail"]) for name, c in calls.items()}
        stored = STORED[INSTALLED]["calls"]
        assert outcomes == {name: (c["outcome"], c["detail"]) for name, c in stored.items()}


def test_what_comes_back(policy: Policy, inputs: Inputs) -> None:
    row = inputs.batch.rows[0]
    found = {
        "template": template_type(policy),
        "features": feature_types(policy, inputs.batch.rows),
        "rope_deltas": rope_deltas(policy, row),
    }
    # 145 tokens whose last position is 134: the next one is 10 less than the count of tokens
    assert found["rope_deltas"]["value"] == [-10]  # type: ignore[index]
    if INSTALLED in STORED:
        assert found == {key: STORED[INSTALLED][key] for key in found}


def test_generate_by_mode_leaves_the_model_as_it_was(
    policy: Policy, inputs: Inputs, samples: tuple[Sample, ...]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shares = exam(policy, inputs.batch.rows[:2], samples[:2])
    assert shares[EVAL] == shares[NO_CACHE] == [1.0, 1.0]
    if INSTALLED in STORED:
        assert shares[TRAIN] == STORED[INSTALLED]["exam"][TRAIN]
    assert not policy.model.training
    assert not policy.model.is_gradient_checkpointing
    assert batched(policy, inputs.batch.rows[:4]) == {"rows": 4, "equal": 4}
