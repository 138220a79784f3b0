"""What a processor call should have returned: the reference processor on each row alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from omni_grpo_core.core.batch import process_row
from omni_grpo_core.core.media_config import TOKEN_SIDE
from omni_grpo_core.doctor.call_rows import PIXELS, CallRow
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.replay.text import collapsed, marks, placeholders
from omni_grpo_core.errors import OmniGrpoError
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, MediumSeen, ProcessorCall
from omni_grpo_core.types import (
    Audio,
    Conversation,
    Image,
    Media,
    Modality,
    Prompt,
    Row,
    Video,
)

if TYPE_CHECKING:
    from torch import Tensor

    from omni_grpo_core.core.policy import Policy

AudioRoute = Literal["interleaved", "items", "contradictory"]
"""How sound reaches a processor call, by its own counts: inside the videos, as items, or neither
matches."""
DEFAULT_RATE = 2.0
"""What transformers uses where ``fps`` is left out."""


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """One row of a processor call: its text, its media in call order, and the frames a second
    that the call assumes of its clips."""

    index: int
    text: str
    media: Mapping[Modality, tuple[MediumSeen, ...]]
    rate: float

    @property
    def every(self) -> tuple[MediumSeen, ...]:
        return tuple(medium for media in self.media.values() for medium in media)


def totals(call: ProcessorCall, case: Case) -> dict[Modality, int]:
    """Media that the texts of a call have placeholders for; an expanded one counts once."""
    names = marks(case)
    count: dict[Modality, int] = {"image": 0, "video": 0, "audio": 0}
    for text in call.texts:
        for modality, number in placeholders(collapsed(text, names), names).items():
            count[modality] += number
    return count


def audio_route(call: ProcessorCall, case: Case) -> AudioRoute:
    """What the audio-in-video flag must have been for texts and media to match.

    ``A`` placeholders and ``V`` videos with ``A`` sounds: separate items. ``A + V`` sounds: one
    inside each video.
    """
    count = totals(call, case)
    sounds = len(call.audios)
    if count["video"] and sounds == count["audio"] + count["video"]:
        return "interleaved"
    return "items" if sounds == count["audio"] else "contradictory"


def given_rows(call: ProcessorCall, case: Case) -> tuple[Given, ...] | None:
    """The rows of a call with their media; ``None`` where counts contradict each other."""
    how = audio_route(call, case)
    names = marks(case)
    count = totals(call, case)
    wrong = count["image"] != len(call.images) or count["video"] != len(call.videos)
    if how == "contradictory" or wrong or call.nested:
        return None
    pools: Mapping[Modality, Sequence[MediumSeen]] = {
        "image": call.images,
        "video": call.videos,
        "audio": call.audios,
    }
    used: dict[Modality, int] = dict.fromkeys(pools, 0)
    rows = []
    for index, text in enumerate(call.texts):
        needs = placeholders(collapsed(text, names), names)
        if how == "interleaved":
            needs["audio"] += needs["video"]
        media: dict[Modality, tuple[MediumSeen, ...]] = {}
        for modality, number in needs.items():
            media[modality] = tuple(pools[modality][used[modality] : used[modality] + number])
            used[modality] += number
        rate = _assumed(call, used["video"] - len(media["video"]))
        rows.append(Given(index, text, media, rate))
    return tuple(rows)


def _assumed(call: ProcessorCall, clip: int) -> float:
    """Frames a second assumed of one clip of a call: clips may have a rate each."""
    seconds = call.outputs.get("video_second_per_grid")
    if seconds is not None and clip < seconds.numel() and float(seconds.flatten()[clip]) > 0:
        return 2 / float(seconds.flatten()[clip])
    return rate_of(call.keywords) or DEFAULT_RATE


def rate_of(keywords: Mapping[str, Any]) -> float | None:
    """The frame rate passed to a processor call; ``None`` if none was."""
    inner = keywords.get("videos_kwargs")
    for place in (keywords, inner if isinstance(inner, Mapping) else {}):
        rate = place.get("fps")
        if isinstance(rate, Sequence) and not isinstance(rate, str) and rate:
            rate = rate[0]
        if isinstance(rate, int | float) and not isinstance(rate, bool):
            return float(rate)
    return None


def sides(medium: MediumSeen) -> tuple[int, int]:
    """Height and width of a picture or clip, channels first or last."""
    shape = medium.shape
    if len(shape) < 3:
        return (*shape, 1, 1)[0], (*shape, 1, 1)[1]  # a grey picture, or a path
    if shape[-1] == 3 and shape[-3] != 3:
        return shape[-3], shape[-2]
    return shape[-2], shape[-1]


def is_token_sized(medium: MediumSeen) -> bool:
    """Whether a picture is already resized for the model: its sides are whole tokens."""
    colours = len(medium.shape) >= 3 and 3 in (medium.shape[-1], medium.shape[-3])
    return colours and all(side % TOKEN_SIDE == 0 for side in sides(medium))


@dataclass(frozen=True, slots=True)
class GridSize:
    """Height and width in pixels of a picture as ``given`` to a processor, and as its grid says
    that it was ``made``."""

    name: str
    given: tuple[int, int]
    made: tuple[int, int]

    @property
    def again(self) -> bool:
        """Whether a picture that was already of whole tokens was resized."""
        return self.given != self.made and all(side % TOKEN_SIDE == 0 for side in self.given)


def grid_sizes(call: ProcessorCall, case: Case) -> list[GridSize]:
    """The sizes of every picture of a call that has a grid."""
    patch = 14 if case.reference is None else case.reference.policy.patch_size
    found = []
    for kind, media, key in (
        ("video", call.videos, "video_grid_thw"),
        ("image", call.images, "image_grid_thw"),
    ):
        grids = call.outputs.get(key)
        if grids is None or len(grids) != len(media):
            continue
        for index, (medium, grid) in enumerate(zip(media, grids.tolist(), strict=True)):
            if len(medium.shape) >= 3:
                made = (grid[1] * patch, grid[2] * patch)
                found.append(GridSize(f"{kind} {index}", sides(medium), made))
    return found


def reference_row(call: ProcessorCall, given: Given, case: Case) -> Row | str | None:
    """The reference processor's row, or why it rejects it, or ``None`` where it cannot run.

    The frame rate passed to the call is assumed to be true; that is checked with the media.
    """
    pictures = [*given.media["image"], *given.media["video"]]
    unkept = any(medium.values is None for medium in given.every)
    if case.reference is None or unkept or not all(map(is_token_sized, pictures)):
        return None
    interleaved = audio_route(call, case) == "interleaved" and bool(given.media["video"])
    key = repr((given.text, [medium.sha256 for medium in given.every], interleaved, given.rate))
    policy = case.reference.policy
    return case.once(_process, given, interleaved, given.rate, policy, key=key)


def as_called(case: Case, call: ProcessorCall) -> Mapping[str, Tensor] | None:
    """The outputs of the checkpoint's own processor for the same arguments and keywords; ``None``
    where they were not kept, or it does not take them."""
    media = (*call.images, *call.videos, *call.audios)
    if case.reference is None or call.error is not None or call.nested or not call.texts:
        return None
    if any(medium.values is None for medium in media):
        return None
    return case.once(_as_called, call)


def _as_called(case: Case, call: ProcessorCall) -> Mapping[str, Tensor] | None:
    if case.reference is None:
        return None
    keywords = {name: value for name, value in call.keywords.items() if name not in call.ignored}
    given: dict[str, Any] = {
        "images": [_values(m).numpy() for m in call.images] or None,
        "videos": [_values(m) for m in call.videos] or None,
        "audio": [_values(m).float().flatten().numpy() for m in call.audios] or None,
    }
    try:
        with warnings.catch_warnings(action="ignore"):
            made = case.reference.policy.processor(
                text=list(call.texts), **given, **{**keywords, "return_tensors": "pt"}
            )
        return {name: torch.as_tensor(value) for name, value in dict(made).items()}
    except Exception:  # a keyword that was not kept whole, or that another version takes
        return None


def _process(case: Case, given: Given, interleaved: bool, rate: float, policy: Policy) -> Row | str:
    names = marks(case)
    text = collapsed(given.text, names)
    prompt = Prompt("row", text, placeholders(text, names))
    media = _media(given, _owners(text, interleaved, names), rate)
    conversation = Conversation("row", (), "interleaved" if interleaved else "off")
    try:
        return process_row(prompt, conversation, media, policy.processor, policy.family)
    except OmniGrpoError as error:
        return f"{error.got}, wanted {error.want}"


def _media(given: Given, owners: Sequence[int | None], rate: float) -> Media:
    images = [Image(_channels_first(m).to(torch.uint8)) for m in given.media["image"]]
    clips = [_channels_first(m).float() for m in given.media["video"]]
    sounds = [_values(m).float().flatten() for m in given.media["audio"]]
    return Media(
        "row",
        tuple(images),
        tuple(Video(frames, rate, rate, len(frames) / rate) for frames in clips),
        tuple(Audio(sound, owner) for sound, owner in zip(sounds, owners, strict=True)),
        "recorded",
    )


def _owners(
    text: str, interleaved: bool, names: Mapping[Modality, tuple[str, str, str]]
) -> list[int | None]:
    """For each sound in reading order, the video that it is inside of."""
    videos = 0
    owners: list[int | None] = []
    either = f"{re.escape(names['video'][1])}|{re.escape(names['audio'][1])}"
    for found in re.findall(either, text):
        if found == names["audio"][1]:
            owners.append(None)
            continue
        if interleaved:
            owners.append(videos)
        videos += 1
    return owners


def _values(medium: MediumSeen) -> Tensor:
    if medium.values is None:
        raise ValueError("a medium that was not kept")
    return medium.values


def _channels_first(medium: MediumSeen) -> Tensor:
    values = _values(medium)
    if medium.shape[-1] == 3 and medium.shape[-3] != 3:
        return values.movedim(-1, -3)
    return values


def with_pixels(
    case: Case, call: GenerateCall | ForwardCall, rows: Sequence[CallRow]
) -> tuple[CallRow, ...]:
    """``rows`` of ``call`` with those of its pixels and mel features that were too large to keep,
    as the reference processor makes them from the recorded media; unchanged where none is missing
    or the call cannot be matched."""
    large = {name for name in PIXELS.values() if name in call.large}
    if not large:
        return tuple(rows)
    made = [found for found in case.once(_processed) if _of(found, rows)]
    if len(made) != 1:
        return tuple(rows)
    return tuple(
        row if row.row is None else replace(row, row=_filled(row.row, own, large))
        for row, own in zip(rows, made[0], strict=True)
    )


def _filled(row: Row, own: Row, names: Set[str]) -> Row:
    found = {name: tensor for name, tensor in own.tensors.items() if name in names}
    return replace(row, tensors={**found, **row.tensors})


def _of(made: Sequence[Row], rows: Sequence[CallRow]) -> bool:
    """Whether the rows of a model's call begin with those of a processor's."""
    return len(made) == len(rows) and all(
        row.row is not None and torch.equal(row.row.input_ids[: len(own.input_ids)], own.input_ids)
        for row, own in zip(rows, made, strict=True)
    )


def _processed(case: Case) -> list[tuple[Row, ...]]:
    """The reference rows of every processor call that can be replayed whole."""
    found = []
    for call in case.processed:
        rows = [reference_row(call, given, case) for given in given_rows(call, case) or ()]
        whole = tuple(row for row in rows if isinstance(row, Row))
        if whole and len(whole) == len(rows):
            found.append(whole)
    return found
