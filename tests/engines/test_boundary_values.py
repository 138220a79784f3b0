"""What crosses the boundary to a rollout engine, value by value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.engines import wire
from omni_grpo_core.engines.ids import compare_ids
from omni_grpo_core.engines.requests import Answer, Drawn, Request, Sampling
from omni_grpo_core.engines.vllm_backend import processor_keywords
from omni_grpo_core.engines.weights import WEIGHTS, fingerprint, write_checkpoint
from omni_grpo_core.errors import BatchError
from omni_grpo_core.types import Audio, Image, Media, Modality, Row, Span, Video

TOKENS: dict[Modality, int] = {"image": 7, "video": 9, "audio": 8}


def row(*ids: int) -> Row:
    return Row("a", torch.tensor(ids), "off", (Span("video", 0, 1, 2),), {})


@pytest.mark.parametrize(
    ("read", "stage", "name"),
    [
        ((1, 2), "media", "video reaches the engine"),
        ((1, 9, 9, 9, 2), "batch", "placeholders are expanded once"),
        ((1, 9, 9, 9, 9, 2), "batch", "media have the batch's size in the engine"),
        ((1, 9, 9, 3), "text", "the engine reads the batch's text"),
        ((9, 9, 1, 2), "batch", "the engine interleaves as the batch does"),
    ],
)
def test_other_ids_are_blamed_on_what_made_them(
    read: tuple[int, ...], stage: str, name: str
) -> None:
    (found,) = compare_ids([row(1, 9, 9, 2)], [read], TOKENS)
    assert (found.stage, found.name) == (stage, name)


@pytest.mark.parametrize(
    ("read", "stage", "name"),
    [
        # 4 and 5: where a clip begins and ends; 14 and 15: a sound
        ((1, 4, 9, 9, 5, 2), "media", "video reaches the engine"),
        ((1, 4, 9, 9, 5, 4, 9, 9, 5, 4, 9, 9, 5, 2), "media", "media are sent once"),
        ((1, 4, 9, 9, 9, 9, 5, 2), "media", "video reaches the engine"),
        ((1, 9, 9, 5, 4, 9, 9, 5, 2), "text", "the engine reads the batch's text"),
        ((1, 4, 9, 9, 5, 4, 9, 9, 5, 3), "text", "the engine reads the batch's text"),
    ],
)
def test_one_of_two_clips(read: tuple[int, ...], stage: str, name: str) -> None:
    (found,) = compare_ids([row(1, 4, 9, 9, 5, 4, 9, 9, 5, 2)], [read], TOKENS)
    assert (found.stage, found.name) == (stage, name)


def test_a_track_behind_its_clip_was_not_interleaved() -> None:
    (found,) = compare_ids(
        [row(1, 4, 14, 9, 9, 8, 8, 15, 5, 2)], [(1, 4, 9, 9, 5, 14, 8, 8, 15, 2)], TOKENS
    )
    assert (found.stage, found.name) == ("batch", "the engine interleaves as the batch does")


def test_what_an_expansion_leaves_behind_its_marks_is_no_other_clip() -> None:
    """vLLM puts a track's marks around the first placeholder of a clip, and so between it and the
    rest of those that were expanded already: 2 video, then 2 - 1."""
    (found,) = compare_ids(
        [row(1, 4, 14, 9, 9, 8, 8, 15, 5, 2)], [(1, 4, 14, 9, 9, 8, 8, 15, 9, 5, 2)], TOKENS
    )
    assert (found.stage, found.name) == ("batch", "placeholders are expanded once")


def test_rows_that_have_each_other_s_sound_are_not_called_resized() -> None:
    rows = [row(1, 8, 8, 2), row(3, 8, 8, 8, 2)]
    (found,) = compare_ids(rows, [(1, 8, 8, 8, 2), (3, 8, 8, 2)], TOKENS)
    assert (found.stage, found.name) == ("media", "audio stays with its row")
    assert [one.row for one in found.rows] == [0, 1]


def test_equal_ids_are_no_finding_and_swapped_rows_are_one() -> None:
    rows = [row(1, 9, 9, 2), row(3, 9, 9, 2)]
    assert compare_ids(rows, [(1, 9, 9, 2), (3, 9, 9, 2)], TOKENS) == []
    (found,) = compare_ids(rows, [(3, 9, 9, 2), (1, 9, 9, 2)], TOKENS)
    assert (found.stage, found.name) == ("completion", "answers belong to their prompts")


def clip(fps: float = 2.0) -> Video:
    return Video(torch.rand(4, 3, 28, 28), fps, 25.0, 2.0)


def request(media: Media) -> Request:
    return Request("text", media, "interleaved", (1.0,) * len(media.videos), 5)


def test_requests_and_answers_cross_the_wire_unchanged() -> None:
    """Two rows may share a file's arrays, and the bytes hold no code."""
    shared, sound = clip(), Audio(torch.rand(99), from_video=0)
    picture = Image(torch.randint(0, 255, (3, 28, 28)).byte())
    media = Media("a", (picture,), (shared,), (sound,), "pyav")
    sampling = Sampling(4, 8, 1.0, (2,), (1, 2, 3))
    sent = [request(media), request(replace(media, sample_id="b"))]
    received, asked = wire.unpack_requests(wire.pack_requests(sent, sampling))
    assert asked == sampling
    for there, here in zip(received, sent, strict=True):
        assert (there.text, there.audio_in_video, there.seed) == ("text", "interleaved", 5)
        assert there.media.sample_id == here.media.sample_id
        assert torch.equal(there.media.videos[0].frames, shared.frames)
        assert torch.equal(there.media.images[0].pixels, picture.pixels)
        assert torch.equal(there.media.audios[0].samples, sound.samples)
        assert there.media.audios[0].from_video == 0
    answers = [Answer((1, 2), (Drawn((3, 2), (-0.1, -1e-9), "stop"),))]
    assert wire.unpack_answers(wire.pack_answers(answers)) == answers


def test_a_fingerprint_tells_weights_apart_and_is_of_the_file(tmp_path: Path) -> None:
    from omni_grpo_core.tiny import checkpoint_dir

    policy: Policy = load_policy(checkpoint_dir())
    weights = policy.model.state_dict()
    written = write_checkpoint(policy, weights, tmp_path)
    assert fingerprint(tmp_path) == written
    assert "thinker.lm_head.weight" in load_file(tmp_path / WEIGHTS)
    name = next(iter(weights))
    weights[name].view(-1)[0] += 1
    assert write_checkpoint(policy, weights, tmp_path) != written
    again = load_policy(tmp_path)  # what an engine loads is a checkpoint like any other
    assert torch.equal(again.model.state_dict()[name], weights[name])


def test_interleaving_is_handed_over_with_its_seconds() -> None:
    media = Media("a", (), (clip(4.0),), (Audio(torch.rand(9), from_video=0),), "")
    found = processor_keywords(replace(request(media), second_per_grid=(0.5,)))
    assert found == {
        "do_resize": False,
        "fps": 4.0,
        "use_audio_in_video": True,
        "second_per_grid_ts": [0.5],
    }


@pytest.mark.parametrize(("seconds", "apart"), [(0.5, "6.5"), (0.7, "9.1")])
def test_positions_that_vllm_would_cut_are_refused(seconds: float, apart: str) -> None:
    """Qwen3-Omni: 13 positions a second; vLLM's are whole. 1 and 2 seconds are fine."""
    at = replace(request(Media("a", (), (clip(),), (), "")), second_per_grid=(seconds,))
    with pytest.raises(BatchError, match=f"lie {apart} positions apart"):
        processor_keywords(at, 13)
    for fine in (1.0, 2.0):
        assert "fps" in processor_keywords(replace(at, second_per_grid=(fine,)), 13)


@pytest.mark.parametrize(
    ("videos", "audios"),
    [
        ((clip(2.0), clip(4.0)), ()),
        ((clip(), clip()), (Audio(torch.rand(9), from_video=1),)),
        ((clip(),), (Audio(torch.rand(9)), Audio(torch.rand(9), from_video=0))),
    ],
    ids=["two-rates", "one-of-two-tracks", "a-sound-before-the-track"],
)
def test_what_vllm_would_pair_otherwise_is_refused(
    videos: tuple[Video, ...], audios: tuple[Audio, ...]
) -> None:
    with pytest.raises(BatchError, match="sample a"):
        processor_keywords(request(Media("a", (), videos, audios, "")))
