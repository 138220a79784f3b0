from __future__ import annotations

import pytest
from hand_made_goldens import NOW, WAS, tokens

from omni_grpo_core.report.html.token_diff import changed_tokens, diff_ribbon, span_changes
from omni_grpo_core.types import Span


@pytest.mark.parametrize(
    ("was", "now", "removed", "added"),
    [
        ([1, 2, 3], [1, 2, 3], set(), set()),
        ([1, 2, 3], [1, 9, 3], {1}, {1}),
        ([1, 2, 3], [1, 3], {1}, set()),
        ([1, 3], [1, 2, 3], set(), {1}),
        ([], [1], set(), {0}),
        # a placeholder repeated more often: only the extra ones
        ([1, 7, 7, 7, 2], [1, 7, 7, 7, 7, 7, 2], set(), {4, 5}),
        ([1, 7, 7, 2], [1, 7, 3], {2, 3}, {2}),
        ([7, 7, 2, 7], [7, 2, 7, 7, 7], {1}, {3, 4}),
        # an inserted token shifts the rest without marking it
        ([1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5, 8], set(), {0, 6}),
    ],
)
def test_only_one_sided_tokens_are_marked(
    was: list[int], now: list[int], removed: set[int], added: set[int]
) -> None:
    assert changed_tokens(was, now) == (removed, added)
    assert changed_tokens(now, was) == (added, removed)


def test_long_sequences_that_share_nothing_are_marked_whole() -> None:
    was, now = list(range(5000)), list(range(5000, 10_000))
    removed, added = changed_tokens(was, now)
    assert len(removed) == len(added) == 5000


def test_runs_break_where_the_kind_or_the_mark_changes() -> None:
    _, added = changed_tokens(WAS.ids, NOW.ids)
    runs = diff_ribbon(NOW, added)
    assert [(run.kind, run.label, run.note, run.changed) for run in runs] == [
        ("special", "<|im_start|> · 0", "", False),
        ("text", "text · 1", "user ↵", False),
        ("video", "video 0 · 2–4", "", False),
        ("video", "video 0 · 5–6", "", True),
        ("text", "text · 7", "Who", True),
        ("special", "<|im_end|> · 8", "", False),
    ]
    assert runs[3].cells[0].title == "token 5 · '<|VIDEO|>' · id 7 · video 0"


def test_spans_are_compared_by_item_and_part() -> None:
    assert list(span_changes(WAS, NOW)) == [
        ("video", "video 0", "2–4 (3 tokens)", "2–6 (5 tokens)")
    ]
    chunks = tokens(*[7] * 4, spans=(Span("video", 0, 0, 1), Span("video", 0, 2, 1)))
    assert list(span_changes(chunks, None)) == [
        ("video", "video 0", "0 (1 tokens)", ""),
        ("video", "video 0, part 1", "2 (1 tokens)", ""),
    ]
    assert span_changes(WAS, WAS) == ()
