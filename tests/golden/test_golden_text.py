"""Golden text is readable and parses back; cut or edited text is detected by line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from small_traces import (
    CLIP_IDS,
    VOCABULARY,
    decode,
    noise,
    patches,
    small_batch,
    small_trace,
)

from omni_grpo_core.errors import TraceError
from omni_grpo_core.golden.text import compare_goldens, format_golden, parse_golden
from omni_grpo_core.trace.compare import compare_leaves
from omni_grpo_core.trace.fingerprint import Fingerprint
from omni_grpo_core.trace.leaves import leaves
from omni_grpo_core.types import Completion, Logits, Row, Span


def changed(was: object, now: object) -> list[str]:
    a, b = (parse_golden(format_golden("batch", value, decode=decode)) for value in (was, now))
    return [d.sentence for d in compare_goldens(a, b).differences if d.verdict == "differs"]


def body(value: object) -> list[str]:
    lines = format_golden("batch", value, decode=decode).split("\n")
    return lines[lines.index("") + 1 : -4]


def test_ids_are_written_with_their_text() -> None:
    row = small_batch().rows[0]
    assert body({"input_ids": row.input_ids})[1:] == [
        '  1 5 6 "<|im_start|>user\\n"',
        '  3×8 "<|VIDEO|>"',
        '  4×4 "<|AUDIO|>"',
        '  7 8 9 "which colour?"',
        '  2 6 "<|im_end|>\\n"',
    ]


def test_masks_and_positions_are_written_as_runs() -> None:
    trace = small_trace()
    lines = body(trace["positions"].value)
    assert lines[1].startswith("position_ids: int64 [3, 2, 20] sha256 ")
    assert lines[2:4] == ["  [0, 0]: 0..19 step 1", "  [0, 1]: 0..19 step 1"]
    assert "  [1]: 0×12, 1×8" in body(trace["batch"].value)


def test_spans_generations_and_text_are_written_readably() -> None:
    assert [line for line in body(small_batch()) if " start " in line] == [
        "  video 0 start 3 length 8",
        "  audio 0 start 11 length 4",
    ]
    completion = body(small_trace()["completion"].value)
    assert [line for line in completion if line.startswith("completions[0]")][1:] == [
        'completions[0].group_id: "clip"',
        "completions[0].index: 0",
        *(line for line in completion if "token_ids" in line),
        'completions[0].text: "red"',
        'completions[0].finish_reason: "stop"',
        "completions[0].logprobs: float [2]",
    ]
    assert "  -0.25 -0.125" in completion
    assert body(small_trace()["text"].value)[2:5] == [
        "[0].text: lines 2",
        '  "which colour?\\n"',
        '  "red or blue"',
    ]


def test_logits_are_written_with_their_likeliest_tokens() -> None:
    lines = body(Logits(torch.tensor([[0.0, 4.0, *[-9.0] * 9]])))
    assert lines[4].startswith("top[0]: ranking logsumexp 4.018")
    assert lines[5].endswith(' "<|im_start|>"')


def test_writing_is_deterministic_and_ends_lines_in_lf() -> None:
    first, second = (format_golden("batch", small_batch(), {"a": "\r\n"}) for _ in range(2))
    assert first == second
    assert "\r" not in first
    assert first.endswith("\n")


@pytest.mark.parametrize("stage", [record.stage for record in small_trace().stages])
def test_every_stage_parses_back(stage: str) -> None:
    value = next(r.value for r in small_trace().stages if r.stage == stage)
    header = {"torch": "2.11", "media sha256": "0f: x", "stage": "own", "wörd": 'a "quoted" \n b'}
    golden = parse_golden(format_golden(stage, value, header, decode))
    assert golden.stage == stage
    assert golden.header == header
    # equal except for the ninth digit of fingerprints and rankings
    assert {d.verdict for d in compare_leaves(leaves(value), golden.leaves)} <= {"within"}
    assert list(golden.leaves) == list(leaves(value))
    again = parse_golden(format_golden(stage, value))
    assert compare_goldens(golden, again).differences == ()


def test_big_tensors_are_fingerprinted_and_small_ones_kept() -> None:
    value = {"small": noise(64), "big": noise(65), "picture": noise(3, 30, 30).mul(99).byte()}
    kept = parse_golden(format_golden("media", value)).leaves
    assert [type(leaf) is Fingerprint for leaf in kept.values()] == [False, True, True]
    blank = {**value, "picture": torch.zeros(3, 30, 30, dtype=torch.uint8)}
    assert [s.partition(":")[0] for s in changed(value, blank)] == ["picture"]


def one_element(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[20, 30] += 100
    return y


def swapped(x: torch.Tensor) -> torch.Tensor:
    order = torch.arange(len(x))
    order[[3, 7]] = order[[7, 3]]
    return x[order]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (one_element, r"max is 99.4544, was 4.1.*a single element of 2400 moved, by 100$"),
        (swapped, "range unchanged, but values moved"),
        (lambda x: x.reshape(40, 3, 20).flip(1).reshape(40, 60), "unchanged, but values moved"),
        (lambda x: x.double(), "dtype is float64, was float32"),
        (lambda x: x.reshape(60, 40), r"shape is \[60, 40\], was \[40, 60\]"),
        (lambda x: x.masked_fill(x > 3.5, math.nan), r"\d NaN and 0 Inf, was 0 and 0"),
    ],
)
def test_a_changed_tensor_is_named_from_its_fingerprint(
    change: Callable[[torch.Tensor], torch.Tensor], named: str
) -> None:
    lines = changed(small_batch(), small_batch(change(patches())))
    assert len(lines) == 2  # the row's and the batch's
    assert lines[0].startswith("row 0: tensors.pixel_values_videos: ")
    assert re.search(named, lines[0]), lines[0]


def test_tiny_noise_is_within_and_unchanged_is_exact() -> None:
    def verdict(pixels: torch.Tensor) -> str:
        was, now = (format_golden("batch", small_batch(p)) for p in (patches(), pixels))
        return compare_goldens(parse_golden(was), parse_golden(now)).verdict

    assert verdict(patches()) == "exact"
    assert verdict(patches() + 1e-7 * noise(40, 60)) == "within"
    assert verdict(patches() + 1e-2 * noise(40, 60)) == "differs"


def test_noise_at_the_edge_of_tolerance_is_within() -> None:
    # each element is off by nearly its tolerance, with random signs: tests the projections' 4 sigma
    for seed in range(50):
        x = noise(1000, seed=seed)
        sign = noise(1000, seed=seed + 1000).sign()
        y = x + sign * 0.99 * (1e-5 + 1e-4 * x.abs())
        assert changed({"x": x}, {"x": y}) == []


def test_changed_ids_and_spans_are_named_from_the_golden_alone() -> None:
    batch = small_batch()
    ids = torch.tensor(CLIP_IDS)
    ids[16] = 4
    row = replace(batch.rows[0], input_ids=ids, spans=(Span("video", 0, 5, 8),))
    assert changed(batch, replace(batch, rows=(row, batch.rows[1]))) == [
        'row 0: token 16 is 4 "<|AUDIO|>", was 8',
        "row 0: span video 0 starts at 5, was 3",
        "row 0: span audio 0 (start 11, length 4) is missing",
    ]
    ids = torch.tensor([*CLIP_IDS[:3], 3, *CLIP_IDS[3:]])
    assert changed(batch.rows[0], replace(batch.rows[0], input_ids=ids)) == [
        'token 11: 1 added: 3 "<|VIDEO|>" (length is 21, was 20)'
    ]


def test_other_text_is_not_a_golden() -> None:
    with pytest.raises(TraceError, match=r"^trace: notes.txt:1: found 'dear diary'"):
        parse_golden("dear diary\n", "notes.txt")
    newer = format_golden("loss", 1).replace("golden 1", "golden 2", 1)
    with pytest.raises(TraceError, match=r"x:1: found golden format 2.*upgrade"):
        parse_golden(newer, "x")


def test_every_edit_is_named_by_its_line() -> None:
    text = format_golden("batch", small_batch(), {"torch": "2.11"}, decode)
    lines = text.split("\n")
    end = next(i for i, line in enumerate(lines) if line.startswith("end: "))
    for number in range(1, end):
        edited = [*lines[:number], lines[number] + "0", *lines[number + 1 :]]
        with pytest.raises(TraceError, match=rf"^trace: x:{number + 1}: "):
            parse_golden("\n".join(edited), "x")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_cut_file_is_detected(share: float) -> None:
    text = format_golden("batch", small_batch())
    with pytest.raises(TraceError, match=r"^trace: x:\d+: "):
        parse_golden(text[: int(share * len(text))], "x")


def test_removed_lines_and_changed_line_endings_are_detected() -> None:
    text = format_golden("batch", small_batch())
    with pytest.raises(TraceError, match=r"x:5: found a line that does not match"):
        parse_golden(text.replace(text.split("\n")[4] + "\n", "", 1), "x")
    with pytest.raises(TraceError, match="x:"):
        parse_golden(text.replace("\n", "\r\n"), "x")


def test_a_checksummed_file_of_nonsense_is_refused_by_line() -> None:
    from omni_grpo_core.golden.text import _end

    for nonsense, named in [
        ("a: float32 [2]\n  1.0", "x:4: found 1 numbers for shape"),
        ("a: int64 [1] sha256 0000000000000000\n  1", "does not match the numbers'"),
        ("a: int64 [1] sha256 0000000000000000\n  one", "not a number or a run"),
        ("a: complex64 [1]\n  1.0", "'complex64' is not a dtype"),
        ("a: spans 1\n  smell 0 start 1 length 2", "does not have the expected form"),
        ("a: float32 [99] sketch\n  mean 1 std 1 min 1 max 1 nan 0 inf 0", "incomplete"),
        ("a: 1\n  2", "do not belong to"),
        ("a: [1, 2]", "is not a single value"),
        ("what is this", "path: value"),
    ]:
        lines = ["omni-grpo golden 1", 'stage: "x"', "", *nonsense.split("\n"), ""]
        with pytest.raises(TraceError) as caught:
            parse_golden("\n".join([*lines, *_end(lines), ""]), "x")
        assert named in str(caught.value)


def test_a_case_of_realistic_size_stays_under_40_kb() -> None:
    # a 4 s clip with Qwen2.5-Omni's real sizes, video and audio tokens interleaved
    spans, ids = [], [1, 5, 6]
    for _ in range(4):
        for modality, token, length in (("video", 3, 144), ("audio", 4, 50)):
            spans.append(Span(modality, 0, len(ids), length))  # type: ignore[arg-type]
            ids += [token] * length
    ids += [7, 8, 9, 10] * 50
    batch = small_batch(noise(1152, 1176))
    row = Row("clip", torch.tensor(ids), "interleaved", tuple(spans), batch.tensors)
    batch = replace(batch, rows=(row,), input_ids=torch.tensor([ids]))
    features = tuple(noise(span.length, 64) for span in spans)
    steps = tuple(-0.01 * i for i in range(256))
    values = {
        "media": {"frames": noise(16, 3, 56, 56), "samples": noise(64_000)},
        "batch": batch,
        "embeddings": {"inputs_embeds": noise(1, len(ids), 64), "features": (features,)},
        "positions": {"position_ids": torch.arange(len(ids)).expand(3, 1, len(ids))},
        "logits": Logits(noise(1, 2000)),
        "completion": tuple(
            Completion("clip", i, (*[7, 8, 9, 10] * 64,), "x" * 1000, "length", steps)
            for i in range(2)
        ),
    }
    words = {**VOCABULARY, **dict.fromkeys(range(11, 2000), "w")}
    size = sum(
        len(format_golden(s, v, {"k": "v" * 1000}, lambda i: "".join(words[t] for t in i)).encode())
        for s, v in values.items()
    )
    assert 10_000 < size < 40_000
