"""How near is an answer's text to the gold's? OCR by error rate, free-form by ROUGE.

Both work on scripts without spaces: there a character is the unit, not a word.
"""

from __future__ import annotations

from omni_grpo_core.rewards.base import Row
from omni_grpo_core.rewards.gold import Gold
from omni_grpo_core.rewards.words import tidy, tokens, unspaced
from omni_grpo_core.types import Score

TIMES_TOO_LONG = 10
"""A free-form answer of more than this many times the gold's tokens earns nothing."""


def ocr(row: Row, truth: Gold, answer: str) -> Score:
    """``max(0, 1 - error rate)``: word error rate, or character error rate for scripts without
    spaces. Case and punctuation count, width of characters and amount of white space do not."""
    import jiwer

    want, got = tidy(truth.answer), tidy(answer)
    by_character = unspaced(want)
    if by_character:
        want, got = want.replace(" ", ""), got.replace(" ", "")
    unit = "character" if by_character else "word"
    size, given = (len(text) if by_character else len(text.split()) for text in (want, got))
    if given >= 2 * size:
        # at least as many insertions as the gold has units: no need to align megabytes
        return Score(0.0, f"{unit} error rate at least 1: {given} {unit}s for {size}")
    rate = jiwer.cer(want, got) if by_character else jiwer.wer(want, got)
    return Score(max(0.0, 1.0 - float(rate)), f"{unit} error rate {rate:.3f}")


def free_form(row: Row, truth: Gold, answer: str) -> Score:
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004); a gold of one token has no ROUGE-2."""
    from rouge_score.rouge_scorer import RougeScorer

    want, got = _units(truth.answer), _units(answer)
    if len(got) > TIMES_TOO_LONG * len(want):
        return Score(0.0, f"{len(got)} tokens for the gold's {len(want)}")
    kinds = ["rouge1", "rouge2", "rougeL"] if len(want) > 1 else ["rouge1", "rougeL"]
    scores = RougeScorer(kinds, tokenizer=_Joined()).score("\0".join(want), "\0".join(got))
    values = [scores[kind].fmeasure for kind in kinds]
    reason = ", ".join(f"{kind} {value:.2f}" for kind, value in zip(kinds, values, strict=True))
    return Score(float(sum(values) / len(values)), reason)


def _units(text: str) -> list[str]:
    """Tokens; of a text without any (signs, emoji) its characters."""
    return tokens(text) or list(tidy(text).replace(" ", ""))


class _Joined:
    """The tokens that were joined by NUL: rouge-score's own tokenizer drops all but ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return text.split("\0") if text else []
