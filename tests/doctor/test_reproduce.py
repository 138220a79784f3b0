"""Every small change of a right value is recognised as itself, and as nothing else that is not
equally true."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from omni_grpo_core.doctor.reproduce import difference, reproductions, told

_made = torch.Generator().manual_seed(7)
CLIP = torch.rand(5, 3, 8, 6, generator=_made) * 255
TABLE = torch.randn(9, 16, generator=_made)
WAVE = torch.sin(torch.arange(1600) / 9.0) * torch.linspace(0.2, 1.0, 1600)
IDS = torch.randperm(200, generator=_made)[:40]
VALUES = {"clip": CLIP, "table": TABLE, "wave": WAVE}

Change = Callable[[Tensor], Tensor]
OF_EACH: Mapping[str, Change] = {
    "reversed": lambda x: x.flip(0),
    "rolled": lambda x: x.roll(2, 0),
    "zero": torch.zeros_like,
    "constant": lambda x: torch.full_like(x, 3.0),
    "times": lambda x: x * 1.7,
    "plus": lambda x: x + 11.5,
    "normalised": lambda x: (x - 0.37) / 0.21,
    "negated": lambda x: -x,
    "cast-bfloat16": lambda x: x.bfloat16().float(),
    "cast-float16": lambda x: x.half().float(),
    "cast-integer": torch.round,
    "clipped": lambda x: x.clamp(0.1 * float(x.max()), 0.6 * float(x.max())),
    "last-dropped": lambda x: x[:-2],
    "first-dropped": lambda x: x[2:],
    "cropped": lambda x: x[1:-1],
    "strided": lambda x: x[::2],
    "repeated": lambda x: x.repeat_interleave(3, 0),
    "tiled": lambda x: torch.cat([x, x]),
    "padded": lambda x: torch.cat([torch.zeros_like(x[:2]), x, torch.zeros_like(x[:1])]),
    "shifted": lambda x: torch.cat([torch.zeros_like(x[:2]), x[:-2]]),
    "partly-constant": lambda x: torch.cat([x[:-3], torch.zeros_like(x[:3])]),
}


@pytest.mark.parametrize("name", OF_EACH)
@pytest.mark.parametrize("kind", VALUES)
def test_each_change_is_named_as_itself_and_as_nothing_else(name: str, kind: str) -> None:
    want = VALUES[kind]
    assert [found.name for found in reproductions(want, OF_EACH[name](want))] == [name]


CASES: Mapping[str, tuple[str, Tensor, Tensor]] = {
    "two items": ("items-swapped", CLIP, CLIP[[0, 3, 2, 1, 4]]),
    "an order without a rule": ("permuted", CLIP, CLIP[[2, 0, 1, 4, 3]]),
    "one item twice": ("chosen", CLIP, CLIP[[0, 0, 1, 2, 3]]),
    "red for blue": ("channels-swapped", CLIP, CLIP.flip(1)),
    "channels by hand": ("channels-permuted", CLIP, CLIP[:, [1, 2, 0]]),
    "left for right": ("mirrored-width", CLIP, CLIP.flip(-1)),
    "upside down": ("mirrored-height", CLIP, CLIP.flip(-2)),
    "rolled along a row": ("rolled", CLIP, CLIP.roll(2, -1)),
    "channels last": ("transposed", CLIP, CLIP.movedim(1, -1)),
    "reshaped": ("reshaped", CLIP, CLIP.reshape(5, 8, 6, 3)),
    "a smaller picture": (
        "resized",
        CLIP,
        torch.nn.functional.interpolate(CLIP, (4, 12), mode="bilinear", antialias=True),
    ),
    "half the detail": (
        "resized",
        CLIP,
        torch.nn.functional.interpolate(
            torch.nn.functional.interpolate(CLIP, (4, 3), mode="bilinear"), (8, 6)
        ),
    ),
    "pairs of rows averaged": (
        "resized",
        TABLE[:8],
        TABLE[:8].view(4, 2, 16).mean(1).repeat_interleave(2, 0),
    ),
    "pixels in a byte": ("overflowed", CLIP.round() + 40, (CLIP.round() + 40) % 256),
    "eight bits": ("cast-uint8", CLIP / 255, (CLIP / 255 * 255).round() / 255),
    "signs": ("absolute", TABLE, TABLE.abs()),
    "another rate": (
        "resampled",
        WAVE,
        torch.nn.functional.interpolate(WAVE[None, None], 2205, mode="linear")[0, 0],
    ),
    "a mask the other way": ("inverted", IDS % 2, 1 - IDS % 2),
    "one number more": ("inserted", IDS, torch.cat([IDS[:7], IDS[7:8] + 1, IDS[7:]])),
    "one number less": ("lost", IDS, torch.cat([IDS[:7], IDS[8:]])),
    "one other number": ("replaced", IDS, IDS + 500 * (torch.arange(40) == 9)),
    "off by three": ("plus", IDS, IDS + 3),
    "twice": ("times", IDS, IDS * 2),
}
AXES = ("frames", "channels", "height", "width")


@pytest.mark.parametrize("what", CASES)
def test_a_change_of_one_kind_of_value(what: str) -> None:
    name, want, got = CASES[what]
    axes = AXES if want.dim() == 4 else ()
    assert [found.name for found in reproductions(want, got, axes=axes)] == [name]


@pytest.mark.parametrize(
    ("got", "sentence"),
    [
        (WAVE * 32768, "times 32768 (int16 samples never divided by 32768)"),
        (WAVE / 255, "divided by 255 (divided by 255 once more)"),
        (WAVE * -0.5, "times -0.5"),
        (WAVE - 3, "minus 3"),
        (WAVE[:1000], "without its last 600 items (1000 of 1600)"),
    ],
)
def test_sentences_state_the_number(got: Tensor, sentence: str) -> None:
    assert [found.sentence for found in reproductions(WAVE, got)] == [sentence]


def test_a_cause_is_proved_in_low_precision_too() -> None:
    """A factor was applied to a bfloat16 tensor: equality would never find it."""
    low = TABLE.bfloat16()
    found = reproductions(TABLE, low * 2, limit=2**-8)
    assert [one.sentence for one in found] == ["times 2"]


def test_a_function_may_say_what_is_alike() -> None:
    """Two decoders of a clip differ by half a grey level: the order is still seen."""

    def alike(one: Tensor, other: Tensor) -> bool:
        return bool((one - other).abs().mean() < 1)

    noise = torch.rand(CLIP.shape, generator=torch.Generator().manual_seed(1))
    found = reproductions(CLIP, CLIP.flip(0) + noise, alike, axes=AXES)
    assert told("the frames are the file's", found) == (
        "the frames are the file's with its frames in reverse order"
    )


def test_two_changes_that_do_the_same_are_both_told() -> None:
    want = torch.tensor([[1.0, 2.0], [1.0, 2.0], [4.0, 5.0]])
    names = [found.name for found in reproductions(want, want.flip(0))]
    assert names == ["reversed", "rolled"]


def test_another_rows_value_comes_first() -> None:
    rows = {"row 1": TABLE.flip(0), "row 2": TABLE + 1}
    (found,) = reproductions(TABLE, TABLE.flip(0), others=rows)
    assert (found.name, found.sentence) == ("swapped-with", "of row 1 instead")


@pytest.mark.parametrize(
    "got",
    [
        TABLE + torch.randn(TABLE.shape, generator=torch.Generator().manual_seed(3)),
        torch.randn(TABLE.shape, generator=torch.Generator().manual_seed(4)),
        TABLE * TABLE,
        torch.cat([TABLE, TABLE[:4] + 1]),
        TABLE[:, :5] * 2 + TABLE[:, 5:10],
    ],
)
def test_what_no_small_change_gives_is_left_unknown(got: Tensor) -> None:
    assert reproductions(TABLE, got) == ()


def test_equal_values_have_no_change() -> None:
    assert reproductions(TABLE, TABLE.clone()) == ()
    assert reproductions(TABLE, TABLE.bfloat16()) == ()  # compared at the recording's precision
    assert reproductions(TABLE, TABLE * (1 + 1e-4), limit=1e-3) == ()


def test_an_unknown_difference_is_told_with_its_place() -> None:
    other = TABLE.clone()
    other[4, 2] += 1
    assert difference(TABLE, other).startswith("1 of 144 values differ, from place 4, 2 on (")
    assert difference(TABLE, TABLE[:2]) == "2 x 16 values instead of 9 x 16"
