from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omni_grpo_core.core.family import published_name
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.pipeline.ablation import ModalityProof, blanked, donor, swapped
from omni_grpo_core.pipeline.check import check
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.pipeline.stages import Context, Values, make, put
from omni_grpo_core.types import Audio, Image, Media, Sample, Video


def clip(name: str, level: float, videos: int = 1, audios: int = 1) -> Media:
    return Media(
        name,
        images=(),
        videos=(Video(torch.full((2, 3, 2, 2), level), 2.0, 2.0, 1.0),) * videos,
        audios=(Audio(torch.full((4,), level), from_video=0),) * audios,
        decoder="none",
    )


def test_blanking_changes_one_modality_and_leaves_the_others() -> None:
    gone = blanked(clip("a", 3.0), "video")
    assert float(gone.videos[0].frames.abs().max()) == 0
    assert float(gone.audios[0].samples[0]) == 3
    assert float(blanked(clip("a", 3.0), "audio").audios[0].samples.abs().max()) == 0


def test_swapped_audio_keeps_its_link_to_the_video() -> None:
    other = replace(clip("b", 5.0), audios=(Audio(torch.full((4,), 5.0), from_video=None),))
    both = swapped(clip("a", 3.0), other, "audio")
    assert (float(both.audios[0].samples[0]), both.audios[0].from_video) == (5, 0)
    assert float(both.videos[0].frames[0, 0, 0, 0]) == 3


def test_the_donor_has_as_many_items_and_different_content() -> None:
    media = [clip("a", 1.0), clip("b", 1.0), clip("c", 2.0, videos=2), clip("d", 4.0)]
    assert donor(media, [0, 1, 2, 3], 0, "video").sample_id == "d"
    assert donor(media, [0, 1, 2, 3], 3, "video").sample_id == "a"


def test_a_single_row_is_swapped_with_its_own_negative() -> None:
    lone = replace(clip("a", 1.0), images=(Image(torch.full((3, 2, 2), 5, dtype=torch.uint8)),))
    assert int(donor([lone], [0], 0, "image").images[0].pixels[0, 0, 0]) == 250
    assert float(donor([lone], [0], 0, "video").videos[0].frames[0, 0, 0, 0]) == 254


@pytest.fixture(scope="module")
def few(samples: tuple[Sample, ...]) -> list[Sample]:
    """Two clips with sound and two pictures: enough to swap with."""
    clips = [s for s in samples if [r.modality for r in s.media] == ["video"]]
    pictures = [s for s in samples if [r.modality for r in s.media] == ["image"]]
    different = {s.media[0].path: s for s in clips}
    return [*list(different.values())[:2], *pictures[:2]]


def test_a_healthy_policy_passes(policy: Policy, few: list[Sample], settings: Settings) -> None:
    result = check(policy, few, replace(settings, max_new_tokens=96))
    assert result.verdict == "pass", [
        (record.stage, c) for record in result.trace.stages for c in record.checks if not c.ok
    ]
    assert [proof.modality for proof in result.modalities] == ["image", "video", "audio"]


def test_a_dead_modality_fails(policy: Policy, few: list[Sample], settings: Settings) -> None:
    """The vision tower gives the same features for any input: nothing is raised, answers look
    fine."""
    model = copy.deepcopy(policy.model)
    modules = {published_name(name): module for name, module in model.named_modules()}
    torch.nn.init.zeros_(modules["visual.merger.mlp"][-1].weight)
    result = check(replace(policy, model=model), few, replace(settings, max_new_tokens=8))
    assert result.verdict == "fail"
    dead = [proof.modality for proof in result.modalities if not proof.ok]
    assert dead == ["image", "video"]
    assert [proof.shift for proof in result.modalities[:2]] == [0, 0]


@pytest.mark.parametrize("row", range(2))
def test_a_question_about_something_else_fails_no_modality(
    policy: Policy, samples: tuple[Sample, ...], settings: Settings, row: int
) -> None:
    """``check --limit 1`` on the shipped files failed: the only question is about a colour, and the
    audio moved the answer by 0.00079 nats per token, where a fixed threshold was 0.001."""
    result = check(policy, samples[row : row + 1], replace(settings, max_new_tokens=64))
    assert result.verdict == "pass"
    assert [proof.modality for proof in result.modalities] == ["video", "audio"]


@pytest.mark.parametrize(
    ("shift", "judgement"),
    [
        (0.0, "lost"),
        (1e-9, "not judged"),
        (8e-4, "not judged"),
        (2e-3, "not judged"),
        (4e-3, "reaches"),
    ],
)
def test_a_shift_is_judged_against_rounding(shift: float, judgement: str) -> None:
    proof = ModalityProof("audio", 1, 1.0, 1.0, 1.0, 0.0, shift, again=0.0, rounding=3e-3)
    assert proof.judgement == judgement
    assert proof.ok == (judgement != "lost")


def test_a_policy_of_random_weights_fails(
    policy: Policy, few: list[Sample], settings: Settings
) -> None:
    """The negative control: correct code, random weights."""
    torch.manual_seed(0)
    model = copy.deepcopy(policy.model)
    for parameter in model.model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    result = check(replace(policy, model=model), few, replace(settings, max_new_tokens=64))
    assert result.verdict == "fail"
    broken = {record.stage for record in result.trace.stages if not record.ok}
    assert "parsed" in broken
    assert not broken & {"sample", "conversation", "text", "media", "batch", "positions"}


def test_files_of_one_name_in_two_folders_are_two_files(
    policy: Policy, samples: tuple[Sample, ...], settings: Settings, tmp_path: Path
) -> None:
    """In a batch of two rows whose pictures had the same name, as data sets with a folder per
    source have, both rows were given the second picture: paths were looked up by name alone."""
    rows = []
    for sample in (row for row in samples if row.media and row.media[0].modality == "image"):
        (ref,) = sample.media
        copy = tmp_path / sample.sample_id.replace(":", "-") / "0.png"
        copy.parent.mkdir()
        shutil.copy(ref.path, copy)
        rows.append(replace(sample, media=(replace(ref, path=str(copy)),)))
    context = Context(policy, settings, tuple(rows))
    values: Values = {}
    for stage in ("sample", "conversation", "media"):
        put(values, stage, make(context, stage, values))
    first, second = (media.images[0].pixels for media in values["media"])
    assert not torch.equal(first, second)
