"""What is measured about the installed transformers, on the shipped checkpoint."""

from __future__ import annotations

import json
import logging
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.pipeline.inputs import Inputs
from omni_grpo_core.types import Sample
from omni_grpo_core.versions.clips import by_path, mute_clip
from omni_grpo_core.versions.coming import cache_names, deprecations, removal
from omni_grpo_core.versions.facts import mute_and_heard
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


def test_exactly_one_way_of_passing_a_track_is_right(policy: Policy, inputs: Inputs) -> None:
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


def test_what_is_returned(policy: Policy, inputs: Inputs) -> None:
    row = inputs.batch.rows[0]
    found = {
        "template": template_type(policy),
        "features": feature_types(policy, inputs.batch.rows),
        "rope_deltas": rope_deltas(policy, row),
    }
    # 145 tokens whose last position is 134: the next is 10 less than the number of tokens
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


def test_a_clip_without_a_track_is_refused_or_spoils_the_positions(
    policy: Policy, inputs: Inputs
) -> None:
    """Since 5.23 a clip without a track is skipped silently. The model counts clips by their sound:
    that one gets positions of plain text, and the next one gets its grid."""
    rows = inputs.batch.rows
    pair = [(inputs.prompts[n], inputs.media[n], rows[n]) for n in mute_and_heard(rows)]
    found = mute_clip(policy, pair)
    if hasattr(policy.processor, "load_audio_from_video"):
        assert found == {"rows": 2, "ids": 2, "positions": 0, "told": False}
    else:
        assert found == {"rows": 2, "refused": "StopIteration: no message"}


def test_a_clip_passed_as_a_path_is_sampled_by_another_rule(
    policy: Policy, inputs: Inputs, samples: tuple[Sample, ...]
) -> None:
    found = by_path(policy, samples[0].media[0].path, inputs.media[0].videos[0].sample_fps)
    if "refused" not in found:  # 4.52 takes no paths
        assert (found["chosen"], found["frames"]) == ("torchcodec", [0, 2, 4, 6])
    if INSTALLED in STORED:  # more may be installed here than in a tox environment
        stored = dict(STORED[INSTALLED]["by path"], here=found["here"])
        assert found == stored


def test_what_is_deprecated_and_what_a_cache_is_called(policy: Policy, inputs: Inputs) -> None:
    training = policy.model.training
    found = deprecations(policy, inputs.prompts[0], inputs.media[0], inputs.batch.rows[0])
    names = cache_names(policy, inputs.batch.rows[0])
    assert policy.model.training == training
    assert not policy.model.is_gradient_checkpointing
    assert names["past_key_values"] == "filled"
    if "model(past_key_values=…)" in found:
        assert names["cache"] == "filled", "what is deprecated has a successor"
    if INSTALLED in STORED:
        assert (found, names) == (STORED[INSTALLED]["going"], STORED[INSTALLED]["cache"])


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("`a` is depreacted and will be removed in v5.25, use `b` instead", "5.25"),
        ("`a` is deprecated and will be removed in version 5.40.0 for `f`. Use `b`.", "5.40.0"),
        ("`a` is deprecated and will be removed in v6. Use `b` instead.", "6"),
        ("From v5.25 the entry will NOT be added automatically", "5.25"),
        ("Keyword argument `a` is not a valid argument and will be ignored.", None),
    ],
)
def test_the_version_in_which_something_is_removed(line: str, version: str | None) -> None:
    assert removal(["another warning", line]) == (None if version is None else (version, line))
