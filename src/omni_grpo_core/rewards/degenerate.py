"""Is this generation degenerate? A gate on raw token ids and text.

Every threshold was measured on real garbage and on real answers. Repetition alone does not find
everything: a salad of foreign fragments has a 4-gram repetition of only .01, but few distinct
tokens. Ids are checked raw, because ``skip_special_tokens=True`` hides a stray ``<|im_start|>``.
Rules on text read every digit as ``0``: a loop with a rising percentage is a loop.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Hashable, Iterable, Sequence

from omni_grpo_core.types import Completion, FinishReason

CYCLE_PERIOD, CYCLE_REPEATS, CYCLE_TOKENS = 128, 3, 48
SEQ_REP_4, SEQ_REP_TOKENS = 0.35, 64
ZLIB_RATIO, ZLIB_WINDOW, _ZLIB_STRIDE = 2.4, 500, 125
DISTINCT_1, DISTINCT_TOKENS = 0.15, 200
LEAST_LOGPROB, LOGPROB_TOKENS = -5.0, 16
"""Nats per token. Text sampled from a language model averages minus its entropy, -1 to -3; random
weights of Qwen2.5-Omni-7B's shape give -7 greedy and -12 sampled (vocabulary 152,064: ln 11.9)."""

_DIGITS = re.compile(r"\d")
_WORDS = re.compile(r"\w+|[^\w\s]")


def degenerate(
    token_ids: Sequence[int],
    text: str,
    *,
    finish_reason: FinishReason,
    eos_ids: Collection[int],
    golden_ended: bool | None = None,
    nonfinite: bool = False,
    special_ids: Collection[int] = (),
    logprobs: Sequence[float] = (),
) -> tuple[str, ...]:
    """The rules that a completion fails, each with its figures; empty if it is sound.

    ``token_ids``: raw, the final eos included. ``text``: decoded with special tokens kept.
    ``golden_ended``: whether the golden of this prompt ended in an eos; ``None``: there is none.
    ``nonfinite``: whether a logit was NaN or infinite. ``special_ids``: every special token of
    the tokenizer; only eos belongs in a completion. ``logprobs``: of each token under the policy
    that sampled it, if recorded.

    >>> degenerate([5, 6, 7, 2], "a b c", finish_reason="stop", eos_ids={2})
    ()
    >>> degenerate([2], "", finish_reason="stop", eos_ids={2})
    ('empty: eos is the first token',)
    """
    ids = list(token_ids)
    while ids and ids[-1] in eos_ids:
        ids.pop()
    failed = [
        _empty(ids, token_ids, text),
        _tail_cycle(ids, "tokens"),
        _seq_rep_4(ids),
        _distinct_1(ids, "tokens"),
        _special(ids, set(special_ids) - set(eos_ids)),
        _unlikely(logprobs),
        "non-finite logits" if nonfinite else None,
        f"cap hit after {len(token_ids)} tokens, the golden ended in eos"
        if finish_reason == "length" and golden_ended
        else None,
    ]
    return tuple(reason for reason in failed if reason) + degenerate_text(text)


def degenerate_completion(
    completion: Completion, eos_ids: Collection[int], special_ids: Collection[int]
) -> tuple[str, ...]:
    """The same for our own completion type, whose logprobs are known."""
    return degenerate(
        completion.token_ids,
        completion.text,
        finish_reason=completion.finish_reason,
        eos_ids=eos_ids,
        special_ids=special_ids,
        logprobs=completion.logprobs,
    )


def degenerates(
    completions: Iterable[Completion], *, eos_ids: Collection[int], special_ids: Collection[int]
) -> list[tuple[Completion, str]]:
    """The degenerate completions, each with the first rule it fails."""
    failed = ((one, degenerate_completion(one, eos_ids, special_ids)) for one in completions)
    return [(completion, reasons[0]) for completion, reasons in failed if reasons]


def degenerate_text(text: str) -> tuple[str, ...]:
    """The rules that need no ids: cycles of words, few distinct words, compressibility.

    >>> degenerate_text("loading 1% loading 2% loading 3% " * 20)[0]
    'tail cycle: 3 words repeated 60 times'
    """
    flat = _DIGITS.sub("0", text)
    words = _WORDS.findall(flat)
    failed = (_tail_cycle(words, "words"), _distinct_1(words, "words"), _zlib_window(flat))
    return tuple(reason for reason in failed if reason)


def _empty(ids: Sequence[int], token_ids: Sequence[int], text: str) -> str | None:
    if not ids:
        return "empty: eos is the first token" if token_ids else "empty: no tokens"
    return None if text.strip() else f"empty: {len(ids)} tokens of white space"


def _tail_cycle(items: Sequence[Hashable], unit: str) -> str | None:
    for period in range(1, min(CYCLE_PERIOD, len(items) // CYCLE_REPEATS) + 1):
        tail = max(CYCLE_TOKENS, CYCLE_REPEATS * period)
        if tail > len(items) or items[-tail:-period] != items[period - tail :]:
            continue
        start = len(items) - tail
        while start > 0 and items[start - 1] == items[start - 1 + period]:
            start -= 1
        return f"tail cycle: {period} {unit} repeated {(len(items) - start) // period} times"
    return None


def _seq_rep_4(ids: Sequence[int]) -> str | None:
    if len(ids) < SEQ_REP_TOKENS:
        return None
    grams = list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
    repeated = 1 - len(set(grams)) / len(grams)
    return f"seq-rep-4 {repeated:.2f} > {SEQ_REP_4}" if repeated > SEQ_REP_4 else None


def _distinct_1(items: Sequence[Hashable], unit: str) -> str | None:
    if len(items) < DISTINCT_TOKENS:
        return None
    distinct = len(set(items)) / len(items)
    if distinct >= DISTINCT_1:
        return None
    return f"distinct-1 {distinct:.2f} < {DISTINCT_1} over {len(items)} {unit}"


def _unlikely(logprobs: Sequence[float]) -> str | None:
    """A policy without confidence: it gives its own tokens almost no probability."""
    if len(logprobs) < LOGPROB_TOKENS:
        return None
    mean = sum(logprobs) / len(logprobs)
    if mean >= LEAST_LOGPROB:
        return None
    return f"unlikely: mean logprob {mean:.1f} < {LEAST_LOGPROB:g} over {len(logprobs)} tokens"


def _special(ids: Sequence[int], special: Collection[int]) -> str | None:
    found = [(i, token) for i, token in enumerate(ids) if token in special]
    if not found:
        return None
    place, token = found[0]
    return f"special tokens: {len(found)}, the first is id {token} at token {place}"


def _zlib_window(text: str) -> str | None:
    if len(text) < ZLIB_WINDOW:
        return None
    starts = [*range(0, len(text) - ZLIB_WINDOW, _ZLIB_STRIDE), len(text) - ZLIB_WINDOW]
    for start in starts:
        ratio = _compressibility(text[start : start + ZLIB_WINDOW])
        if ratio > ZLIB_RATIO:
            return f"zlib ratio {ratio:.2f} > {ZLIB_RATIO} at characters {start}–{start + 500}"
    return None


def _compressibility(window: str) -> float:
    """Bytes over compressed bytes. The three UTF-8 bytes of a Chinese character compress by
    themselves, as do the two UTF-16 bytes of an ASCII letter, so the denser encoding counts."""
    sizes = [window.encode(code, "surrogatepass") for code in ("utf-8", "utf-16-le")]
    return min(len(data) / len(zlib.compress(data)) for data in sizes)
