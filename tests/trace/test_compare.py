"""Every planted change is found and named at its stage; nothing else is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_traces import CLIP_IDS, decode, noise, patches, small_batch, small_trace, with_value

from omni_grpo_core.tolerances import Tolerance, Tolerances
from omni_grpo_core.trace.compare import compare, compare_leaves
from omni_grpo_core.trace.divergence import Divergence
from omni_grpo_core.trace.fingerprint import fingerprint
from omni_grpo_core.trace.leaves import leaves
from omni_grpo_core.trace.store import value_at
from omni_grpo_core.types import (
    Batch,
    Check,
    Logits,
    Positions,
    Rollout,
    Row,
    Span,
    Trace,
    Video,
)


def sentences(a: object, b: object, **options: Any) -> list[str]:
    found = compare_leaves(leaves(a), leaves(b), **options)
    return [d.sentence for d in found if d.verdict == "differs"]


def with_batch(batch: Batch) -> Trace:
    return with_value(small_trace(), "batch", batch)


def with_clip(**changes: object) -> Batch:
    batch = small_batch()
    row: Row = replace(batch.rows[0], **changes)  # type: ignore[arg-type]
    return replace(batch, rows=(row, batch.rows[1]))


def one_element(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[20, 30] += 100
    return y


def swapped_patches(x: torch.Tensor) -> torch.Tensor:
    order = torch.arange(len(x))
    order[[3, 7]] = order[[7, 3]]
    return x[order]


def bgr(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(x), 3, -1).flip(1).reshape(x.shape)


def test_an_unchanged_trace_is_exact() -> None:
    found = compare(small_trace(), small_trace())
    assert found.verdict == "exact"
    assert found.first is None
    assert not any(stage.differences for stage in found.stages)


def test_tiny_noise_is_within() -> None:
    # 1e-7 on values of about 1: a hundredth of the tolerance, and the cost of another summing order
    found = compare(small_trace(), with_batch(small_batch(patches() + 1e-7 * noise(40, 60))))
    assert found.verdict == "within"
    batch = found.stages[1]
    assert (batch.stage, batch.verdict) == ("batch", "within")
    assert 0 < batch.mean_abs < batch.max_abs < 1e-6
    assert found.lines()[1].startswith("batch         within  max |Δ| ")
    assert found.first is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            one_element,
            r"row 0: tensors.pixel_values_videos\[20, 30\] is 99.*1 of 2400 beyond .*max \|Δ\| 100",
        ),
        (swapped_patches, "rows are reordered: row 3 was row 7, row 7 was row 3"),
        (bgr, r"colour channels are reversed \(RGB ↔ BGR\)"),
        (lambda x: x.to(torch.bfloat16), "dtype is bfloat16, was float32"),
        (lambda x: x[:-1], r"shape is \[39, 60\], was \[40, 60\]"),
        (lambda x: x * 0.5, "every element ×0.5"),
        (torch.zeros_like, "every element is now 0"),
        (lambda x: x.masked_fill(x > 2, math.nan), "are now non-finite"),
    ],
)
def test_a_changed_float_tensor_is_named(
    change: Callable[[torch.Tensor], torch.Tensor], named: str
) -> None:
    found = compare(small_trace(), with_batch(small_batch(change(patches()))))
    assert_first(found, "batch", named)


def assert_first(found: Divergence, stage: str, named: str) -> None:
    assert found.verdict == "differs"
    assert found.first is not None
    assert found.first.stage == stage
    assert [s.stage for s in found.stages if s.verdict != "exact"] == [stage]
    differences = [d.sentence for d in found.first.differences]
    assert any(re.search(named, sentence) for sentence in differences), differences


def test_a_moved_span_is_named() -> None:
    batch = with_clip(spans=(Span("video", 0, 5, 8), Span("audio", 0, 11, 4)))
    assert sentences(small_batch(), batch) == ["row 0: span video 0 starts at 5, was 3"]


def test_added_and_removed_spans_are_named() -> None:
    a = (Span("video", 0, 2, 4), Span("audio", 0, 6, 3), Span("video", 0, 9, 4))
    b = (Span("video", 0, 2, 4), Span("audio", 0, 6, 2), Span("image", 0, 8, 1))
    assert sentences(with_clip(spans=a), with_clip(spans=b)) == [
        "row 0: span audio 0 has length 2, was 3",
        "row 0: span video 0, part 1 (start 9, length 4) is missing",
        "row 0: span image 0 (start 8, length 1) is new",
    ]
    assert sentences(with_clip(spans=a[:2]), with_clip(spans=a[1::-1])) == [
        "row 0: spans are reordered"
    ]


def test_a_changed_id_is_named_with_its_text() -> None:
    ids = torch.tensor(CLIP_IDS)
    ids[16] = 10
    assert sentences(small_batch(), with_clip(input_ids=ids), decode=decode) == [
        'row 0: token 16 is 10 "red", was 8 " colour"'
    ]


def test_added_and_removed_tokens_are_named() -> None:
    more = torch.tensor([*CLIP_IDS[:3], 3, 3, *CLIP_IDS[3:]])
    fewer = torch.tensor(CLIP_IDS[:-2])
    other = torch.tensor([*CLIP_IDS[:15], 10, *CLIP_IDS[17:]])
    assert sentences(small_batch(), with_clip(input_ids=more), decode=decode) == [
        'row 0: token 11: 2 added: 3 3 "<|VIDEO|><|VIDEO|>" (length is 22, was 20)'
    ]
    assert sentences(small_batch(), with_clip(input_ids=fewer)) == [
        "row 0: token 18: 2 removed: 2 6 (length is 18, was 20)"
    ]
    assert sentences(small_batch(), with_clip(input_ids=other), decode=decode) == [
        'row 0: token 15: 10 "red" instead of 7 8 "which colour" (length is 19, was 20)'
    ]


def test_adjacent_ids_are_quoted_as_one_text() -> None:
    ids = torch.tensor(CLIP_IDS)
    ids[15:17], ids[19] = torch.tensor([10, 7]), 10
    assert sentences(small_batch(), with_clip(input_ids=ids), decode=decode) == [
        'row 0: token 15 is 10 7 "redwhich", was 7 8 "which colour", '
        "the first of 3 differences in 20"
    ]


def test_a_batch_of_one_row_of_ids_is_reported_like_the_row_itself() -> None:
    was, now = (torch.tensor([[7, 8, *end]]) for end in ([6], [10, 6]))
    assert sentences({"input_ids": was}, {"input_ids": now}, decode=decode) == [
        'token 2: 1 added: 10 "red" (length is 4, was 3)'
    ]


def test_a_batch_row_is_named() -> None:
    mask = small_batch().attention_mask.clone()
    mask[1, :3] = 1
    assert sentences(small_batch(), replace(small_batch(), attention_mask=mask)) == [
        "row 1: attention_mask column 0 is 1, was 0, the first of 3 differences in 40"
    ]


def test_positions_are_named_by_row_and_axis() -> None:
    ids = torch.arange(12).expand(3, 2, 12).contiguous()
    moved = ids.clone()
    moved[0, 1, 5:] = 5
    was, now = (Positions(p, torch.tensor([0, 0])) for p in (ids, moved))
    assert sentences(was, now) == [
        "row 1: time position of column 6 is 5, was 6, the first of 6 differences in 72"
    ]
    assert sentences(was, Positions(ids, torch.tensor([0, 2]))) == ["row 1: deltas is 2, was 0"]


def test_pixels_are_summarised_in_one_sentence() -> None:
    a = torch.zeros(3, 40, 40, dtype=torch.uint8)
    b = torch.full_like(a, 2)
    assert sentences({"pixels": a}, {"pixels": b}) == [
        "pixels[0, 0, 0] is 2, was 0, the first of 4800 differences in 4800"
    ]


def test_reversed_channels_are_found_despite_normalising() -> None:
    frames = noise(2, 3, 8, 8).abs() * 50
    mean, std = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])

    def normalised(x: torch.Tensor) -> torch.Tensor:
        return (x / 255 - mean[:, None, None]) / std[:, None, None]

    a, b = (Video(normalised(x), 4.0, 8.0, 1.0) for x in (frames, frames.flip(1)))
    assert "colour channels are reversed" in sentences(a, b)[0]
    grey = noise(2, 1, 8, 8).expand(2, 3, 8, 8)
    a, b = (Video(x, 4.0, 8.0, 1.0) for x in (grey, grey + 1))
    assert "reversed" not in sentences(a, b)[0]


def test_a_row_of_features_is_found_among_its_spans() -> None:
    a = {"features": (noise(2, 4), noise(3, 4, seed=1))}
    b = {"features": (noise(2, 4), noise(3, 4, seed=1) + 1)}
    assert sentences(a, b)[0].startswith("features[1][")


def test_nan_and_infinity_are_equal_to_themselves_only() -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert not compare_leaves(leaves(odd), leaves(odd.clone()))
    assert len(sentences(odd, torch.tensor([math.nan, -math.inf, -math.inf, 1.0]))) == 1
    assert len(sentences(odd, torch.tensor([1.0, math.inf, -math.inf, 1.0]))) == 1
    assert not compare_leaves(leaves(math.nan), leaves(math.nan))
    assert sentences({"x": 1.0}, {"x": math.nan}) == ["x is nan, was 1"]


def test_a_nan_on_both_sides_does_not_differ_because_another_element_moved() -> None:
    """``logprobs=(1000000001.0, nan)``: a golden stores nine digits, so the first number came back
    within tolerance as 1e+09, and the NaN next to it was reported as changed: NaN is never within
    ``atol + rtol * NaN``."""
    was = {"logprobs": (1000000001.0, math.nan)}
    for now in (1e9, 1000000001.0):
        assert sentences(was, {"logprobs": (now, math.nan)}) == []
    [sentence] = sentences(was, {"logprobs": (2e9, math.nan)})
    assert "1 of 2 beyond" in sentence
    assert "finite" not in sentence, "it was already non-finite"
    [sentence] = sentences(was, {"logprobs": (1e9, 0.0)})
    assert "1 of 2 beyond" in sentence
    odd = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    assert sentences(odd, odd + torch.tensor([1e-6, 0, 0, 0])) == []


def test_tolerances_are_by_dtype_and_can_be_set() -> None:
    x = noise(100)
    wide = Tolerances({"float32": Tolerance(atol=1.0, rtol=0.0)})
    assert sentences(x, x + 0.5)
    assert not sentences(x, x + 0.5, tolerances=wide)
    # bfloat16 keeps 8 bits: neighbours near 1 are 2**-7 apart, well within its tolerance
    b = torch.ones(4).bfloat16()
    assert not sentences(b, b + 2**-7)
    assert sentences(b, b + 0.25)
    # a dtype without a tolerance must agree exactly
    half = torch.ones(2).to(torch.float8_e5m2)
    assert sentences(half, (half.float() * 2).to(torch.float8_e5m2))


def test_plain_values_are_named() -> None:
    long = "x" * 100
    assert sentences({"a": 1, "b": "red", "c": None}, {"a": 2, "b": "blue", "c": 0.5}) == [
        "a is 2, was 1",
        'b is "blue", was "red"',
        "c is 0.5, was null",
    ]
    assert sentences({"t": long + "a" + long}, {"t": long + "b" + long}) == [
        f't from character 100 is "{"x" * 24}b{"x" * 23}", was "{"x" * 24}a{"x" * 23}"'
    ]
    assert sentences({"logprobs": (-0.5, -1.0)}, {"logprobs": (-0.5, -2.0)})[0].startswith(
        "logprobs[1] is -2, was -1; 1 of 2 beyond"
    )


def test_added_and_removed_values_are_named_once() -> None:
    batch = small_batch()
    assert sentences(batch, replace(batch, rows=batch.rows[:1])) == ["row 1 is missing"]
    assert sentences({"a": ()}, {"a": (batch,)}) == ["a[0] is new"]
    assert sentences((), (batch,)) == ["[0] is new"]
    assert sentences({"a": {}, "b": ()}, {"a": (), "b": 1})[0] == "a is empty, was empty"


def test_another_kind_of_value_is_named() -> None:
    parsed = value_at(small_trace(), "parsed", tuple)
    assert sentences(parsed, parsed[::-1]) == [
        "[0] is a Malformed, was a Parsed",
        "[1] is a Parsed, was a Malformed",
    ]
    assert sentences(small_batch(), parsed[1]) == ["self is a Malformed, was a Batch"]


def test_values_of_different_types_are_described() -> None:
    was = {"a": 1, "b": (Span("video", 0, 1, 2),), "c": torch.zeros(2), "d": (), "e": "x"}
    now = {"a": torch.zeros(2), "b": 1, "c": (Span("video", 0, 1, 2),), "d": "x", "e": "x"}
    assert sentences(was, now) == [
        "a is float32 [2], was 1",
        "b is 1, was 1 span",
        "c is 1 span, was float32 [2]",
        'd is "x", was empty',
    ]
    assert sentences(torch.tensor([[1, 2]]), torch.tensor([[1], [2]])) == [
        "self: shape is [2, 1], was [1, 2]"
    ]


def test_another_likeliest_token_is_named() -> None:
    scores = noise(2, 11, seed=3)
    other = scores.clone()
    other[1, 10] += 10
    lines = sentences(Logits(scores), Logits(other), decode=decode)
    assert lines[0].startswith("row 1: values[10] is ")
    assert lines[1].startswith('row 1: the likeliest token is 10 "red", was ')
    less = scores.clone()
    less[0, int(scores[0].argmin())] -= 1
    assert "logprob of" in sentences(Logits(scores), Logits(less))[1]
    found = compare_leaves(leaves(Logits(scores)), leaves(Logits(scores + 1e-6)))
    assert {d.verdict for d in found} == {"within"}


def test_a_changed_completion_is_named() -> None:
    rollout = value_at(small_trace(), "completion", Rollout)
    longer = replace(
        rollout.completions[0], token_ids=(10, 10, 2), text="redred", logprobs=(-0.25, -1.0, -0.5)
    )
    assert sentences(rollout, replace(rollout, completions=(longer,)), decode=decode) == [
        'completion 0: token 1: 1 added: 10 "red" (length is 3, was 2)',
        'completion 0: text is "redred", was "red"',
        "completion 0: logprobs: shape is [3], was [2]",
    ]


def test_a_check_that_now_fails_and_a_missing_stage_are_named() -> None:
    trace = small_trace()
    failing = replace(trace.stages[1], checks=(Check("spans", False, "spans overlap"),))
    found = compare(trace, replace(trace, stages=(*trace.stages[:1], failing, *trace.stages[2:])))
    assert_first(found, "batch", "check spans now fails: spans overlap")
    assert compare(trace, replace(trace, stages=trace.stages[:-1])).lines()[-1] == (
        "  the stage reward is missing"
    )
    assert compare(replace(trace, stages=()), trace).stages[0].differences[0].sentence == (
        "the stage text is new"
    )


def test_a_stage_with_many_differences_is_truncated_for_the_terminal() -> None:
    a, b = ({f"x{i}": value for i in range(20)} for value in (1, 2))
    found = compare(with_value(small_trace(), "reward", a), with_value(small_trace(), "reward", b))
    assert found.lines(most=3)[-4:] == [
        "  x0 is 2, was 1",
        "  x1 is 2, was 1",
        "  x2 is 2, was 1",
        "  … and 17 more",
    ]


def test_seconds_and_header_are_not_compared() -> None:
    trace = small_trace()
    other = Trace({"torch": "9"}, tuple(replace(r, seconds=9.0) for r in trace.stages))
    assert compare(trace, other).verdict == "exact"


def test_a_sampled_elements_tolerance_scales_with_its_tensor() -> None:
    """Where large terms cancel, a small element has their rounding error: 2e-4 in a tensor of
    scale 10 is noise (1e-4 relative), 1e-2 is not."""
    was = 10 * noise(30, 30)
    place = tuple((was == fingerprint(was).samples[0]).nonzero()[0].tolist())
    was[place] = 0.0
    near, far = was.clone(), was.clone()
    near[place], far[place] = 2e-4, 1e-2
    verdicts = [
        [d.verdict for d in compare_leaves({"x": fingerprint(was)}, {"x": fingerprint(now)})]
        for now in (near, far)
    ]
    assert verdicts == [["within"], ["differs"]]
