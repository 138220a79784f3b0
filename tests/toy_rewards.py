"""Rewards that an untrained policy earns in part, so that a test can see them rise."""

from __future__ import annotations

from typing import Any


def early_letters(completions: list[str], **_: Any) -> list[float]:
    """Share of the characters that are letters from a to m."""
    return [sum("a" <= c <= "m" for c in text) / max(1, len(text)) for text in completions]


def spaces(completions: list[str], **_: Any) -> list[float]:
    """Share of the characters that are spaces."""
    return [text.count(" ") / max(1, len(text)) for text in completions]


def nothing(completions: list[str], **_: Any) -> list[float]:
    """As in the incident: the same default for any completion."""
    return [0.1] * len(completions)
