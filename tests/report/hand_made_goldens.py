"""A report small enough to verify by hand: one unchanged case, one with benign drift, one whose
video grew and whose answer changed. No model has run."""

from __future__ import annotations

import math
from dataclasses import replace

from omni_grpo_core.golden.results import (
    CaseResult,
    Generation,
    GoldenReport,
    PromptTokens,
    StageResult,
    Tokens,
    Verdict,
)
from omni_grpo_core.trace.divergence import Difference
from omni_grpo_core.types import Span

HOSTILE = "</details></pre><script>alert(1)</script><img src=http://evil.example/x> \u202ex"
START, USER, VIDEO, WHAT, WHO, END = 0, 1, 7, 2, 3, 9
WORDS = {
    START: "<|im_start|>", USER: "user\n", VIDEO: "<|VIDEO|>", WHAT: "What", WHO: "Who",
    END: "<|im_end|>",
}  # fmt: skip


def tokens(*ids: int, spans: tuple[Span, ...] = ()) -> Tokens:
    return Tokens(ids, tuple(WORDS[token] for token in ids), spans)


WAS = tokens(START, USER, *[VIDEO] * 3, WHAT, END, spans=(Span("video", 0, 2, 3),))
NOW = tokens(START, USER, *[VIDEO] * 5, WHO, END, spans=(Span("video", 0, 2, 5),))


def answer(*words: str) -> Tokens:
    return Tokens(tuple(range(len(words))), words)


def diverged(**changes: object) -> Generation:
    """Token 1 of 3 differs; the golden's token now ranks second, the fresh one had no rank."""
    made = Generation(
        sample_id="rows.json:1",
        index=0,
        verdict="harmful",
        sentence="the answer differs",
        was=answer("The ", "red", " bar"),
        now=answer("The ", "blue", " door"),
        was_finish="stop",
        now_finish="length",
        first=1,
        was_rank=1,
        now_rank=None,
        margin=2.5,
        drift=0.75,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def stage(
    name: str, verdict: Verdict = "exact", origin: str = "none", *found: Difference
) -> StageResult:
    reason = found[0].sentence if found else ""
    return StageResult(name, verdict, reason, origin, found, f"case/{name}.txt")  # type: ignore[arg-type]


def drift(size: float, mean: float, verdict: str = "differs") -> Difference:
    return Difference("values", verdict, f"logits moved by {size:g}", 0, None, size, mean)  # type: ignore[arg-type]


def report(hostile: str = "") -> GoldenReport:
    calm = CaseResult(
        "calm", "exact", "", None, (stage("text"), stage("batch"), stage("logits")),
        (PromptTokens("rows.json:0", WAS, WAS),),
        (diverged(verdict="exact", first=None, sentence="the same", now=diverged().was, drift=None,
                was_rank=None, margin=None),),
    )  # fmt: skip
    moved = CaseResult(
        "moved", "benign-drift", "the output is unchanged", "logits",
        (stage("text"), stage("logits", "benign-drift", "added", drift(1e-3, 1e-4))),
    )  # fmt: skip
    grown = Difference("rows[0].input_ids", "differs", f"row 0: 2 more <|VIDEO|>{hostile}", 0)
    broken = CaseResult(
        "broken",
        "harmful",
        f"batch: the prompt differs{hostile}",
        "batch",
        (
            stage("text"),
            stage("batch", "harmful", "added", *[grown] * 11),
            stage("logits", "harmful", "inherited", drift(math.inf, math.inf)),
        ),
        (PromptTokens(f"rows.json:1{hostile}", WAS, NOW),),
        (
            diverged(
                sentence=f"the answer differs{hostile}",
                now=answer("The ", "blue", hostile or " door"),
            ),
        ),
        {"transformers": ("5.17.0", "5.23.0"), "torch": ("2.11.0", f"2.12.0{hostile}")},
    )
    return GoldenReport("golden", "cpu-fp32", (calm, moved, broken), 1.25)
