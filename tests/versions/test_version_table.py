"""The table of transformers versions: from stored data, never written by hand."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from small_traces import small_batch, with_value

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io import DEFAULT, TRANSFORMERS
from omni_grpo_core.report.terminal.versions import announced, holds, markdown, marks, put
from omni_grpo_core.types import Completion, Positions, Rollout, Stage, StageRecord, Trace
from omni_grpo_core.versions import against, interpreters, measure

ROOT = Path(__file__).parents[2]
STORED = {
    family: json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))
    for family, name in (("qwen2.5", "matrix.json"), ("qwen3", "matrix-qwen3.json"))
}
BEGIN, END = marks("qwen2.5")
PAGE = (ROOT / "docs/pages/versions.md").read_text(encoding="utf-8")
Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("family", STORED)
def test_the_docs_have_the_table_of_the_stored_data(family: str) -> None:
    begin, end = marks(family)
    table = PAGE.partition(f"{begin}\n")[2].partition(f"\n{end}")[0]
    fix = "regenerate both: omni-grpo versions compare (CONTRIBUTING.md)"
    assert table == markdown(STORED[family]), fix
    assert STORED[family]["family"] == family


@pytest.mark.parametrize(("family", "without"), [("qwen2.5", set()), ("qwen3", {"4.52.4"})])
def test_the_stored_data_cover_the_supported_versions_and_all_hold(
    family: str, without: set[str]
) -> None:
    (default,) = re.findall(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    stored = STORED[family]
    measured = [v["facts"]["header"]["transformers"] for v in stored["versions"].values()]
    assert measured == [version for version in TRANSFORMERS if version not in without]
    facts = stored["versions"][stored["default"]]["facts"]
    assert facts["header"]["transformers"] == default == DEFAULT
    assert holds(stored)


# --------------------------------------------------------------------------- the table


def facts(transformers: str, **changes: Any) -> dict[str, Any]:
    call = {"outcome": "right", "detail": "9 tokens for 9", "told": []}
    made: dict[str, Any] = {
        "header": {"transformers": transformers},
        "failing": [],
        "calls": {
            "use_audio_in_video": call,
            "load_audio_from_video": call,
            "load_audio_from_video, audio_from_video_indices": call,
        },
        "mute clip": {"rows": 2, "refused": "StopIteration: no message"},
        "by path": {"here": "ImportError: none", "chosen": "torchcodec", "frames": [0, 2]},
        "cache": {"past_key_values": "filled", "cache": "ignored"},
        "going": {},
        "template": "str",
        "features": dict.fromkeys(("image", "video", "audio"), "Tensor"),
        "rope_deltas": {"place": "thinker", "shape": [1, 1], "value": [-3]},
        "batched": {"rows": 2, "equal": 2},
        "exam": {
            "eval": [1.0, 1.0],
            "train, checkpointing": [0.0, 0.5],
            "train, checkpointing, use_cache=False": [1.0, 1.0],
        },
    }
    return {**made, **changes}


def stages(**changes: Any) -> dict[str, Any]:
    exact = {"verdict": "exact", "max_abs": 0.0, "differs": []}
    equal = {f"equal {name}": 2 for name in ("ids", "places", "answers")}
    return {**dict.fromkeys(("batch", "embeddings", "logits"), exact), **equal, **changes}


def two(other: dict[str, Any], **changes: Any) -> dict[str, Any]:
    versions = {
        "new": {"facts": facts("5.0")},
        "old": {"facts": other, "stages": stages(**changes)},
    }
    return {"default": "new", "rows": 2, "versions": versions}


def row(table: str, start: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


def test_a_version_that_changes_nothing() -> None:
    table = markdown(two(facts("4.0")))
    assert row(table, "transformers") == ["5.0 (default)", "4.0"]
    assert row(table, "prompt ids, 2 rows") == ["the default", "equal"]
    assert row(table, "logits") == ["the default", "bitwise equal"]
    assert row(table, "checks of") == ["none", "none"]
    assert row(table, "… in train mode") == ["**0.00 / 0.50**"] * 2
    widths = {len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}
    assert widths == {5}, "every line has a cell for every version"
    assert holds(two(facts("4.0")))


def test_what_differs_stands_out() -> None:
    near = {"verdict": "within", "max_abs": 2.4e-6, "differs": []}
    far = {"verdict": "differs", "max_abs": 3.0, "differs": ["row 1: values[3] is 1 | 2"]}
    table = markdown(two(facts("4.0"), logits=near, embeddings=far, **{"equal ids": 1}))
    assert row(table, "logits")[1] == "within 2.4e-06"
    assert row(table, "embeddings")[1] == r"**row 1: values[3] is 1 \| 2**"
    assert row(table, "prompt ids")[1] == "**1 of 2 equal**"
    assert not holds(two(facts("4.0"), embeddings=far))
    assert holds(two(facts("4.0"), logits=near))
    assert not holds(two(facts("4.0", failing=["batch: left padding"])))


def test_a_batch_that_generate_refuses() -> None:
    """Qwen3-Omni in 4.57.6: images and clips in one batch."""
    batched = {"rows": 2, "equal": 1, "refused": "RuntimeError: shape mismatch: [8, 64] to [512]"}
    table = markdown(two(facts("4.0", batched=batched)))
    cell = "**refused**: `RuntimeError`, shape mismatch: [8, 64] to [512]"
    assert row(table, "`generate`, left-padded batch") == ["equal", cell]


def test_calls_that_are_refused_ignored_or_deprecated() -> None:
    error = "ValueError: They should agree. Found 0 <|AUDIO|> tokens."
    gone = "`use_audio_in_video` will be removed in v5.25, use something else"
    lost = {"outcome": "lost", "detail": "5 tokens for 9", "told": ["ignored"]}
    calls = {
        "use_audio_in_video": {"outcome": "refused", "detail": error, "told": [gone]},
        "load_audio_from_video": lost,
        "load_audio_from_video, audio_from_video_indices": {**lost, "told": []},
    }
    table = markdown(two(facts("4.0", calls=calls)))
    assert row(table, "a clip with its track, `use_audio_in_video")[1] == (
        r"**refused**: `ValueError`, Found 0 &lt;\|AUDIO\|> tokens; deprecated, removed in 5.25"
    )
    assert row(table, "a clip with its track, `load_audio")[1] == (
        "**ignored**, no placeholder for the sound: 5 tokens for 9; a warning is logged"
    )
    assert row(table, "a clip with its track, the same")[1].endswith("5 tokens for 9; silent")


def test_a_mode_that_ends_in_an_exception() -> None:
    """5.14 loses the cache as its neighbours do, and then fails on it: one id, a full mask."""
    exam = {**facts("5.0")["exam"], "train, checkpointing": "IndexError: The shape of the mask"}
    table = markdown(two(facts("4.0", exam=exam)))
    assert row(table, "… in train mode")[1] == "**refused**: `IndexError`, The shape of the mask"


def test_a_clip_without_a_track_that_is_skipped_silently() -> None:
    skipped = {"rows": 2, "ids": 2, "positions": 0, "told": False}
    table = markdown(two(facts("6.0", **{"mute clip": skipped})))
    assert row(table, "a clip without a track") == [
        "**refused**: `StopIteration`",
        "**ids of 2, positions of 0 of 2 rows right; silent**",
    ]


def test_the_decoder_that_is_chosen_for_a_path() -> None:
    by_path = {"here": "torchvision", "chosen": "torchcodec", "frames": [0, 2, 4, 6]}
    none = {"here": "AttributeError: no shape", "refused": "AttributeError: no shape"}
    table = markdown(two(facts("4.0", **{"by path": by_path})))
    assert row(table, "decoder and frames") == [
        "`torchcodec`: 0 2; without it refused",
        "`torchcodec`: 0 2 4 6; without it `torchvision`",
    ]
    assert row(markdown(two(facts("4.0", **{"by path": none}))), "decoder and frames")[1] == (
        "**refused**: `AttributeError`, no shape"
    )
    # the title states which of these 8 frames qwen-omni-utils takes
    numbers = torch.linspace(0, 7, 4).round().int().tolist()
    assert f"(qwen-omni-utils: {' '.join(map(str, numbers))} of 8)" in table


def test_deprecations_are_listed_soonest_first() -> None:
    """5.25 removes ``use_audio_in_video``: users should know before they upgrade."""
    deprecated = {
        "model(past_key_values=…)": {"gone in": "5.40.0", "said": "…"},
        "processor(use_audio_in_video=…)": {"gone in": "5.25", "said": "…"},
        "processor(min_pixels=…)": {"gone in": "5.23", "said": "…"},
        "generate(past_key_values=…)": {"gone in": "6.0.0", "said": "…"},
    }
    matrix = two(facts("5.24.0", going=deprecated))
    assert row(markdown(matrix), "announced removals") == [
        "nothing",
        "5.23: `processor(min_pixels=…)`; 5.25: `processor(use_audio_in_video=…)`; "
        "5.40: `model(past_key_values=…)`; 6: `generate(past_key_values=…)`",
    ]
    assert announced(matrix) == [
        "processor(min_pixels=…) was to be removed in 5.23; transformers 5.24.0 still takes it",
        "processor(use_audio_in_video=…) will be removed in 5.25, according to transformers 5.24.0",
        "model(past_key_values=…) will be removed in 5.40, according to transformers 5.24.0",
        "generate(past_key_values=…) will be removed in 6, according to transformers 5.24.0",
    ]


@pytest.mark.parametrize("document", ["no marks", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n", END])
def test_a_document_without_one_place_for_it(document: str) -> None:
    with pytest.raises(ConfigError, match="places for the table, wanted one, between"):
        put(document, "table", "README.md")


# --------------------------------------------------------------------------- measuring


def trace(second: tuple[int, ...] = (3,), place: int = 1) -> Trace:
    ids = torch.zeros(3, 2, 4, dtype=torch.int64)
    ids[0, 1, 3] = place
    answers = tuple(
        Completion(str(i), 0, chosen, "", "stop", tuple(0.0 for _ in chosen))
        for i, chosen in enumerate(((3,), second))
    )
    records: dict[Stage, object] = {
        "batch": small_batch(),
        "positions": Positions(ids, torch.tensor([0, 0])),
        "completion": Rollout(answers, 1, 0.0, 0),
    }
    made = Trace({}, tuple(StageRecord(s, None, (), 0.0) for s in records))
    for stage, value in records.items():
        made = with_value(made, stage, value)
    return made


def test_equal_rows_are_counted_if_one_differs() -> None:
    equal = len(small_batch().rows)
    same = against(trace(), trace())
    assert {k: v for k, v in same.items() if k.startswith("equal")} == {
        "equal ids": equal,
        "equal places": 2,
        "equal answers": 2,
    }
    assert same["batch"] == {"verdict": "exact", "max_abs": 0.0, "differs": []}
    other = against(trace(), trace(second=(4,), place=2))
    assert (other["equal places"], other["equal answers"]) == (1, 1)
    assert other["positions"]["differs"] == ["row 1: time position of column 3 is 2, was 1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["old"], "no '='"),
        (["=/bin/sh"], "no name"),
        (["a=/nowhere/python"], "nothing that runs at '/nowhere/python'"),
        (["a=/bin/sh", "a=/bin/sh"], "a second interpreter of that name"),
    ],
)
def test_invalid_interpreters_are_refused(given: list[str], message: str, run_cli: Run) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        interpreters(given)
    code, stdout, stderr = run_cli("versions", "compare", *given)
    assert (code, stdout, message in stderr) == (2, "", True)


def test_an_interpreter_that_cannot_run_it_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho \"No module named 'torch'\" >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(ConfigError, match=r"odd=.*found No module named 'torch', wanted an env"):
        measure({"odd": broken}, "odd")
    with pytest.raises(ConfigError, match="default 'even': found no such name, wanted odd"):
        measure({"odd": broken}, "even")


@pytest.mark.slow
def test_the_installed_version_is_as_stored(tmp_path: Path, run_cli: Run) -> None:
    """Measured again, every fact of this transformers equals the one behind the docs' table."""
    document = tmp_path / "page.md"
    document.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    here = f"here={sys.executable}"
    data = tmp_path / "matrix.json"
    code, stdout, _ = run_cli(
        "versions", "compare", here, "--data", data, "--into", document, "--json"
    )
    printed = json.loads(stdout)
    assert (code, printed["holds"]) == (0, True)
    assert json.loads(data.read_text()) == {k: v for k, v in printed.items() if k != "holds"}
    table = markdown(printed)
    assert document.read_text() == f"before\n{BEGIN}\n{table}\n{END}\nafter\n"
    versions = STORED["qwen2.5"]["versions"].values()
    stored = {v["facts"]["header"]["transformers"]: v["facts"] for v in versions}
    if version("transformers") in stored:
        measured = printed["versions"]["here"]["facts"]
        # the patch version of Python may differ
        known = {**stored[version("transformers")], "header": measured["header"]}
        assert measured == known
