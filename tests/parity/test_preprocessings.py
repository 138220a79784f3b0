"""Ninety preprocessings were once written from the documentation alone, each with one mistake or
none; these are of them. A mistake is named, and nothing else; what only looks different is equal.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray
from preprocessings import ROWS, Careful, Frames, Messages, Output, write_files
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, rgb_to_grayscale

from omni_grpo_core import tiny
from omni_grpo_core.core.media import MediaConfig
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.parity.compare import compare_paths
from omni_grpo_core.parity.given import Setup, row_reader, setup_of
from omni_grpo_core.parity.results import RowResult
from omni_grpo_core.parity.run import run_path
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.types import Sample, Trace

PICTURES = ["picture", "pictures", "transparent", "turned"]
CLIPS = ["silent clip", "odd clip", "long clip", "clip and sound", "two clips"]
INSIDE = ["odd clip", "long clip"]
SOUNDS = ["sound", "stereo", "two sounds", "clip and sound"]
HEARD = [*SOUNDS, *INSIDE]
MEDIA = [name for name in ROWS if name != "text"]
EVERY = list(ROWS)
Found = dict[str, set[str]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    folder = tmp_path_factory.mktemp("media")
    data = folder / "rows.json"
    data.write_text(json.dumps(write_files(folder)), encoding="utf-8")
    return load_samples(data)


@pytest.fixture(scope="module", params=[28, pytest.param(32, marks=pytest.mark.slow)])
def setup(request: pytest.FixtureRequest) -> Setup:
    """Qwen2.5-Omni, whose tokens cover 28 x 28 pixels, and Qwen3-Omni, 32 x 32. Every picture and
    frame is 2 by 3 tokens."""
    area = 6 * request.param**2
    media = MediaConfig(4.0, 4, 16, area, area, area, area)
    folder = tiny.checkpoint_dir() if request.param == 28 else tiny.checkpoint_dir("qwen3")
    return setup_of(folder, Settings(media=media))


@pytest.fixture(scope="module")
def ours(setup: Setup, samples: tuple[Sample, ...]) -> tuple[Trace, ...]:
    return run_path("ours", setup, samples)


@pytest.fixture
def compared(
    setup: Setup, samples: tuple[Sample, ...], ours: tuple[Trace, ...]
) -> Callable[[Careful], dict[str, RowResult]]:
    def compare(path: Careful) -> dict[str, RowResult]:
        theirs = run_path(path, setup, samples)
        report = compare_paths(ours, theirs, setup, row_reader(setup, samples))
        return {row.sample_id: row for row in report.rows}

    return compare


def named(rows: Mapping[str, RowResult]) -> Found:
    """The causes of each row that differs."""
    return {
        name: {cause.name for cause in row.causes}
        for name, row in rows.items()
        if row.verdict not in ("equal", "within")
    }


def with_(base: type[Careful] = Careful, **steps: Any) -> Careful:
    made: Careful = type("Changed", (base,), steps)()
    return made


# --------------------------------------------------------------------------- nothing wrong


def as_arrays(self: Careful, output: Output, processor: Any) -> Output:
    return {key: value.numpy() for key, value in output.items()}


def as_doubles(self: Careful, output: Output, processor: Any) -> Output:
    return {k: v.double() if v.is_floating_point() else v.int() for k, v in output.items()}


def one_row(self: Careful, output: Output, processor: Any) -> Output:
    ids, mask = output.pop("input_ids"), output.pop("attention_mask")
    return {**output, "input_ids": ids[0].tolist(), "attention_mask": mask[0].tolist(), "labels": 0}


def padded_left(self: Careful, output: Output, processor: Any) -> Output:
    """In a batch with a longer prompt."""
    pad = torch.full((1, 9), processor.tokenizer.pad_token_id)
    ids = torch.cat([pad, output["input_ids"]], 1)
    mask = torch.cat([torch.zeros_like(pad), output["attention_mask"]], 1)
    return {**output, "input_ids": ids, "attention_mask": mask}


def other_names(self: Careful, output: Output, processor: Any) -> Output:
    seconds = output.pop("video_second_per_grid", None)
    if seconds is not None:
        output["second_per_grid_ts"] = [float(one) for one in seconds]
    return output


def to_bytes(self: Careful, path: str, side: int) -> tuple[Any, float]:
    clip, rate = Careful.clip(self, path, side)
    return clip.clamp(0, 255).round().byte().numpy(), rate


@pytest.mark.parametrize(
    "path",
    [
        Careful(),
        *(
            pytest.param(with_(after=step), marks=pytest.mark.slow)
            for step in (as_arrays, as_doubles, one_row, padded_left, other_names)
        ),
        pytest.param(with_(clip=to_bytes), marks=pytest.mark.slow),
    ],
)
def test_the_same_in_other_clothes(
    path: Careful, compared: Callable[[Careful], dict[str, RowResult]]
) -> None:
    assert named(compared(path)) == {}


# --------------------------------------------------------------------------- texts and ids


def no_system(self: Careful, messages: Messages) -> Messages:
    return [m for m in messages if m["role"] != "system"]


def system(self: Careful, messages: Messages) -> Messages:
    content = [{"type": "text", "text": "You are Qwen, created by Alibaba."}]
    return [{"role": "system", "content": content}, *no_system(self, messages)]


def media_last(self: Careful, messages: Messages) -> Messages:
    parts = messages[-1]["content"]
    messages[-1]["content"] = sorted(parts, key=lambda part: part["type"] != "text")
    return messages


def joined(self: Careful, messages: Messages) -> Messages:
    words = messages[-1]["content"][-1]
    words["text"] = " ".join(words["text"].split())
    return messages


def on_text(change: Callable[[str], str]) -> Careful:
    def text(self: Careful, messages: Messages, processor: Any) -> str:
        return change(Careful.text(self, messages, processor))

    return with_(text=text)


def tokens(processor: Any) -> tuple[set[int], set[int]]:
    """Placeholders, and the marks around them."""
    ids = processor.tokenizer.convert_tokens_to_ids
    pads = {ids(getattr(processor, f"{kind}_token")) for kind in ("image", "video", "audio")}
    marks = {
        ids(getattr(processor, f"{kind}_{end}_token"))
        for kind in ("vision", "audio")
        for end in ("bos", "eos")
    }
    return pads, marks


def on_ids(change: Callable[[list[int], set[int], set[int]], list[int]]) -> Careful:
    def after(self: Careful, output: Output, processor: Any) -> Output:
        ids = change(output["input_ids"][0].tolist(), *tokens(processor))
        return {**output, "input_ids": [ids], "attention_mask": None}

    return with_(after=after)


def by_run(length: Callable[[int], int]) -> Careful:
    def change(ids: list[int], pads: set[int], marks: set[int]) -> list[int]:
        runs = [(token, len(list(run))) for token, run in groupby(ids)]
        return [t for t, n in runs for _ in range(length(n) if t in pads else n)]

    return on_ids(change)


def in_parts(self: Careful, output: Output, processor: Any) -> Output:
    """A prompt that is tokenized in two halves, cut inside a word."""
    ids = output["input_ids"][0].tolist()
    text = processor.tokenizer.decode(ids[-30:])
    cut = text.index("letter") + 2
    halves = [processor.tokenizer(part)["input_ids"] for part in (text[:cut], text[cut:])]
    return {**output, "input_ids": [ids[:-30] + halves[0] + halves[1]], "attention_mask": None}


def keeping(*left: str) -> Callable[..., Output]:
    def after(self: Careful, output: Output, processor: Any) -> Output:
        return {key: value for key, value in output.items() if key not in left}

    return after


TEXTS: dict[str, tuple[Careful, str, list[str]]] = {
    "another system message": (with_(chat=system), "other-system", EVERY),
    "no generation prompt": (with_(generation_prompt=False), "no-generation-prompt", EVERY),
    "twice": (on_text(lambda t: t + "<|im_start|>assistant\n"), "generation-prompt-twice", EVERY),
    "an answer begun": (on_text(lambda t: t + "<think>"), "answer-begun", EVERY),
    "stripped": (on_text(str.strip), "whitespace", EVERY),
    "joined": (with_(chat=joined), "whitespace", EVERY),
    "padding before it": (on_text(lambda t: "<|endoftext|>" * 3 + t), "padded", EVERY),
    "media after the question": (with_(chat=media_last), "content-order", MEDIA),
    "marks dropped": (on_ids(lambda i, p, m: [t for t in i if t not in m]), "marks-dropped", MEDIA),
    "marks doubled": (
        on_ids(lambda i, p, m: [t for t in i for _ in range(1 + (t in m))]),
        "marks-doubled",
        MEDIA,
    ),
    "cut on the left": (on_ids(lambda i, p, m: i[-40:]), "truncated", EVERY),
    "cut on the right": (on_ids(lambda i, p, m: i[:60]), "truncated", EVERY),
    "not expanded": (by_run(lambda n: 1), "not-expanded", MEDIA),
    "expanded twice": (by_run(lambda n: 2 * n - 1), "expanded-twice", MEDIA),
    "one fewer": (by_run(lambda n: n - 1), "off-by-one", MEDIA),
    "in two halves": (with_(after=in_parts), "tokenized-in-parts", EVERY),
    "rate not passed on": (
        with_(flags=lambda self, rates: {"do_resize": False}),
        "frame-rate",
        CLIPS,
    ),
    "seconds lost": (with_(after=keeping("video_second_per_grid")), "features-missing", CLIPS),
    "mel features lost": (with_(after=keeping("input_features")), "features-missing", HEARD),
}


def checked(
    mistake: tuple[Careful, str, list[str]],
    stages: tuple[str, ...],
    compared: Callable[[Careful], dict[str, RowResult]],
) -> None:
    path, cause, where = mistake
    rows = compared(path)
    assert named(rows) == {name: {cause} for name in where}
    assert {rows[name].stage for name in where} <= set(stages)


QUICK = ("cut on the right",)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TEXTS]
)
def test_texts_and_ids(name: str, compared: Callable[[Careful], dict[str, RowResult]]) -> None:
    checked(TEXTS[name], ("text", "batch"), compared)


# --------------------------------------------------------------------------- pictures and clips


def seen(change: Callable[[Tensor], Tensor]) -> Careful:
    """Pictures and frames (…, 3, H, W), 0 to 255, changed before the processor gets them."""

    def picture(self: Careful, path: str, side: int) -> Any:
        whole = torch.from_numpy(np.array(Careful.picture(self, path, side))).permute(2, 0, 1)
        return change(whole.float())

    def clip(self: Careful, path: str, side: int) -> tuple[Tensor, float]:
        made, rate = Careful.clip(self, path, side)
        return change(made), rate

    return with_(picture=picture, clip=clip)


def flagged(**flags: Any) -> Careful:
    def given(self: Careful, rates: list[float]) -> Output:
        return {**Careful.flags(self, rates), **flags}

    return with_(flags=given)


def numbered(choose: Callable[[int, int], list[int]]) -> Careful:
    def numbers(self: Careful, total: int) -> list[int]:
        return choose(total, len(Careful.numbers(self, total)))

    return with_(numbers=numbers)


def opened(change: Callable[[str], PIL.Image.Image]) -> Careful:
    return with_(opened=lambda self, path: change(path))


def through_jpeg(path: str) -> PIL.Image.Image:
    stored = io.BytesIO()
    Careful().opened(path).save(stored, "JPEG", quality=75)
    return PIL.Image.open(stored).convert("RGB")


def even(self: Careful, path: str) -> tuple[Frames, float]:
    frames, rate = Careful.frames(self, path)
    return frames[: len(frames) // 2 * 2], rate


def swapped(self: Careful, messages: Messages, side: int) -> dict[str, list[Any]]:
    return {kind: items[::-1] for kind, items in Careful.media(self, messages, side).items()}


def bilinear(path: str, side: int) -> PIL.Image.Image:
    size = Careful().picture(path, side).size
    return Careful().opened(path).resize(size, PIL.Image.Resampling.BILINEAR)


def plainly(ending: str) -> Callable[[Careful, str], PIL.Image.Image]:
    """Files of this ending are opened as Pillow's first example does."""
    return lambda self, path: (
        PIL.Image.open(path).convert("RGB") if path.endswith(ending) else Careful.opened(self, path)
    )


def rounded(self: Careful, output: Output, processor: Any) -> Output:
    return {k: v.bfloat16() if k.startswith("pixel") else v for k, v in output.items()}


SEEN: dict[str, tuple[Careful, str, list[str]]] = {
    "BGR": (seen(lambda x: x.flip(-3)), "channels-swapped", [*PICTURES, *CLIPS]),
    "divided by 255 twice": (seen(lambda x: x / 255), "times", [*PICTURES, *CLIPS]),
    "not divided": (flagged(do_rescale=False), "times", [*PICTURES, *CLIPS]),
    "not normalised": (flagged(do_normalize=False), "normalised", [*PICTURES, *CLIPS]),
    "ImageNet's mean": (
        flagged(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]),
        "normalised",
        [*PICTURES, *CLIPS],
    ),
    "bfloat16": (with_(after=rounded), "cast-bfloat16", [*PICTURES, *CLIPS]),
    "blank": (seen(torch.zeros_like), "zero", [*PICTURES, *CLIPS]),
    "grey": (seen(lambda x: rgb_to_grayscale(x, 3)), "grey", [*PICTURES, *CLIPS]),
    "mirrored": (seen(lambda x: x.flip(-1)), "mirrored-width", [*PICTURES, *CLIPS]),
    "cropped": (
        seen(lambda x: center_crop(x, [min(x.shape[-2:])] * 2)), "cropped", [*PICTURES, *CLIPS],
    ),
    "letterboxed": (
        seen(lambda x: center_crop(x, [x.shape[-2], 2 * x.shape[-1]])),
        "padded",
        [*PICTURES, *CLIPS],
    ),
    "JPEG in between": (opened(through_jpeg), "jpeg", PICTURES),
    "bilinear": (
        with_(bicubic=InterpolationMode.BILINEAR, picture=lambda s, p, side: bilinear(p, side)),
        "other-kernel",
        [*PICTURES, *CLIPS],
    ),
    "EXIF ignored": (
        with_(opened=plainly("jpg")),
        "exif-ignored",
        ["turned"],
    ),
    "transparency dropped": (
        with_(opened=plainly("clear.png")),
        "transparency-dropped",
        ["transparent"],
    ),
    "media exchanged": (
        with_(media=swapped), "swapped-with", ["pictures", "two sounds", "two clips"],
    ),
}  # fmt: skip

FRAMES: dict[str, tuple[Careful, list[str]]] = {
    "by steps": (numbered(lambda t, n: [i * t // n for i in range(n)]), CLIPS),
    "rounded down": (numbered(lambda t, n: np.linspace(0, t - 1, n).astype(int).tolist()), CLIPS),
    "the first ones": (numbered(lambda t, n: list(range(n))), CLIPS),
    "backwards": (
        numbered(lambda t, n: torch.linspace(t - 1, 0, n).round().long().tolist()), CLIPS,
    ),
    "two more": (
        numbered(lambda t, n: torch.linspace(0, t - 1, n + 2).round().long().tolist()), CLIPS,
    ),
    "the odd one dropped": (with_(frames=even), ["odd clip", "clip and sound"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SEEN))
def test_pictures_and_clips(
    name: str, setup: Setup, compared: Callable[[Careful], dict[str, RowResult]]
) -> None:
    if name == "bilinear" and setup.policy.patch_size == 16:
        pytest.skip("64 x 96 pixels are 2 x 3 tokens: nothing is resized")
    path, cause, where = SEEN[name]
    rows = compared(path)
    kinds = ("image", "video", "audio")
    found = named(rows)
    assert found.keys() == {*where}
    for causes in found.values():
        assert causes <= {f"{kind}-{cause}" for kind in kinds}, found
    assert {rows[row].stage for row in where} == {"media"}


@pytest.mark.parametrize(
    "name",
    [n if n.startswith("the odd") else pytest.param(n, marks=pytest.mark.slow) for n in FRAMES],
)
def test_frames(name: str, compared: Callable[[Careful], dict[str, RowResult]]) -> None:
    path, where = FRAMES[name]
    rows = compared(path)
    found = named(rows)
    assert found.keys() == {*where}
    for causes in found.values():
        assert {"other-frames"} <= causes <= {"other-frames", "frame-rate"}
    if name == "the odd one dropped":
        assert (
            "frames 0 2 4 6 9 11 13 15 of the file's 17, where the first takes 0 2 5 7 9 11 14 16"
        ) in rows["odd clip"].causes[0].sentence


# --------------------------------------------------------------------------- sounds


def heard(change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Careful:
    return with_(sound=lambda self, path: change(Careful.sound(self, path)))


def raw(path: str) -> tuple[NDArray[np.float32], int]:
    import av

    with av.open(path) as container:
        stream = container.streams.audio[0]
        return np.concatenate([f.to_ndarray() for f in container.decode(stream)], 1), stream.rate


def from_raw(change: Callable[[NDArray[np.float32], int], NDArray[np.float32]]) -> Careful:
    """Of recordings: (channels, n) at their own rate, as packed samples."""

    def sound(self: Careful, path: str) -> NDArray[np.float32]:
        if not path.endswith("stereo.wav"):
            return Careful.sound(self, path)
        samples, rate = raw(path)
        return np.ascontiguousarray(change(samples.reshape(-1, 2).T, rate), np.float32)

    return with_(sound=sound)


STEREO = ["stereo", "clip and sound"]
WAVES: dict[str, tuple[Careful, str, list[str]]] = {
    "cut at a second": (heard(lambda w: w[:16_000]), "audio-last-dropped", HEARD),
    "the beginning lost": (heard(lambda w: w[3_200:]), "audio-first-dropped", HEARD),
    "silence after it": (heard(lambda w: np.pad(w, (0, 5_000))), "audio-padded", HEARD),
    "silent": (heard(np.zeros_like), "audio-zero", HEARD),
    "louder": (heard(lambda w: w / np.abs(w).max()), "audio-times", HEARD),
    "int16": (heard(lambda w: (w * 32768).round()), "audio-times", HEARD),
    "rate ignored": (from_raw(lambda r, n: r.mean(0)), "audio-rate-ignored", STEREO),
    "left": (from_raw(lambda r, n: r[0, ::3]), "audio-other-channels", STEREO),
    "packed": (from_raw(lambda r, n: r.T.reshape(-1)), "audio-other-channels", STEREO),
    "every third": (from_raw(lambda r, n: r.mean(0)[::3]), "audio-other-resampler", STEREO),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WAVES))
def test_sounds(name: str, compared: Callable[[Careful], dict[str, RowResult]]) -> None:
    checked(WAVES[name], ("media",), compared)


@pytest.mark.slow
def test_two_mistakes_are_two(compared: Callable[[Careful], dict[str, RowResult]]) -> None:
    """Another system message, and frames by steps."""
    steps = partial(type, "Both", (type(FRAMES["by steps"][0]),))
    found = named(compared(steps({"chat": system})()))
    assert found == {
        name: {"other-system", *(["other-frames"] if name in CLIPS else [])} for name in EVERY
    }
