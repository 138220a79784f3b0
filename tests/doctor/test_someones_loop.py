"""Mistakes in a loop that nobody of ours wrote for the purpose, recorded with two lines alone.

The old doctor recognised its own catalogue and found 11 of 30 of such mistakes; here nothing but
the recorder's own eyes tell it what went wrong.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from someones_loop import recorded

RunCli = Callable[..., tuple[int, str, str]]

KL = {"beta": 0.1}
TWICE = {"accumulation": 2}
FLAWS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    # the mistake: stage, what the sentence must say, settings
    "frames-reversed": ("media", r"in reverse order", {}),
    "pixels-resized": ("batch", r"video of row 0 of generate .* and back", {}),
    "batch-deviation": ("advantage", r"(deviation|scaled).*batch|batch.*deviation", {}),
    "reference-is-policy": ("loss", r"reference", KL),
    "layer-zeroed": ("gradient", r"text layer 1 .*is 0 before the step", {}),
    "lr-zero": ("gradient", r"learning rate of all .* is 0", {}),
    "prompt-in-reward": ("reward", r"prompt in front", {}),
    "accumulation-not-divided": ("loss", r"not divided|divided by", TWICE),
    "advantage-sign": ("advantage", r"sign", {}),
    "kl-forgotten": ("loss", r"KL", KL),
    "rows-exchanged": ("batch", r"row 0 of generate has the video of row", {}),
}
MORE: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "channels-swapped": ("media", r"red and blue", {}),
    "int16-never-divided": ("media", r"32768", {}),
    "sound-at-half-rate": ("media", r"only every second of its samples", {}),
    "sounds-exchanged": ("media", r"of row 1", {}),
    "mel-scaled": ("batch", r"times 2", {}),
    "pixels-stale": ("batch", r"made in step 0", {"rows": (3, 6, 8), "turning": True}),
    "mask-of-ones": ("batch", r"padding tokens", {}),
    "pixels-rolled": ("batch", r"rolled|generate .*video", {}),
    "rewards-rolled": ("advantage", r"row|order", {}),
    "mean-of-batch": ("advantage", r"mean", {}),
    "advantages-rolled": ("advantage", r"row|order", {}),
    "video-not-scored": ("media", r"did not reach the scoring forward", {}),
    "ids-truncated": ("logits", r"truncated", {}),
    "one-column-late": ("loss", r"column|next|shift", {}),
    "padding-in-loss": ("loss", r"after|padding", {}),
    "gradients-kept": ("gradient", r"before the first backward", {}),
    "sound-late": ("media", r"0\.375 s later", {}),
    "sound-backwards": ("media", r"in reverse order", {}),
    "frames-duplicated": ("media", r"each of its 2 frames 2 times", {}),
    "clips-of-a-row-exchanged": ("media", r"its own at another place", {"two": True}),
    "one-clip-twice": ("media", r"its own at another place", {"two": True}),
    "grids-exchanged": ("batch", r"do not fill|features of another row", {"rows": (3, 10)}),
    "mel-stretched": ("batch", r"mel frames 0 0 1 1", {}),
    "sounds-shifted": ("batch", r"20 mel frames later", {}),
    "prompt-cut-left": ("batch", r"110 of 116 tokens, truncated on the left", {}),
    "prompt-cut-right": ("batch", r"110 of 116 tokens, truncated on the right", {}),
    "mask-of-ones-in-scoring": ("logits", r"scoring forward: .* tokens of padding", {}),
    "processed-again": ("media", r"scoring forward has another time per grid step", {}),
    "adapter-off": ("logits", r"with the adapter off", {"lora": True}),
}
HEALTHY: tuple[Mapping[str, Any], ...] = (
    {},
    {"group": 2},
    {"resize": True},
    {"beta": 0.04},
    {"beta": 0.04, "steps": 3},
    {"accumulation": 2},
    {"rows": (3, 10), "steps": 3},
    {"temperature": 1.0},
    {"two": True},
    {"lora": True},
)


def diagnosed(run_cli: RunCli, folder: Path, flaw: str, **settings: Any) -> dict[str, Any]:
    with contextlib.suppress(RuntimeError):  # some mistakes end the run, which is recorded
        recorded(folder / "run", flaw, **settings)
    code, out, _ = run_cli("doctor", folder / "run", "--json")
    report: dict[str, Any] = json.loads(out)
    assert report["exit"] == code
    return report


def _breaking(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (found["stage"], found["evidence"][0]["sentence"])
        for found in report["findings"]
        if found["severity"] == "breaks"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("flaw", [*FLAWS, *MORE])
def test_a_mistake_is_found_at_its_stage(run_cli: RunCli, tmp_path: Path, flaw: str) -> None:
    stage, says, settings = {**FLAWS, **MORE}[flaw]
    report = diagnosed(run_cli, tmp_path, flaw, **settings)
    found = [f for f in report["findings"] if f["stage"] == stage]
    sentences = [e["sentence"] for f in found for e in f["evidence"]]
    sentences += [c["seen"] for f in found for c in f["causes"]]
    assert any(re.search(says, sentence) for sentence in sentences), report["findings"]
    others = [stage_of for stage_of, _ in _breaking(report) if stage_of != stage]
    assert not others, _breaking(report)


@pytest.mark.slow
def test_pixels_rounded_on_their_way_are_said_and_break_nothing(
    run_cli: RunCli, tmp_path: Path
) -> None:
    report = diagnosed(run_cli, tmp_path, "pixels-halved")
    [found] = [f for f in report["findings"] if f["stage"] == "batch"]
    assert (found["severity"], report["exit"]) == ("differs", 0)
    assert "rounded to float16" in found["evidence"][0]["sentence"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", HEALTHY, ids=str)
def test_without_a_mistake_nothing_breaks(
    run_cli: RunCli, tmp_path: Path, settings: Mapping[str, Any]
) -> None:
    report = diagnosed(run_cli, tmp_path, "", **settings)
    assert (report["exit"], _breaking(report)) == (0, [])
