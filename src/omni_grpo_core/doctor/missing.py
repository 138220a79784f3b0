"""What a look could not judge, and why: said once, in the diagnosis."""

from __future__ import annotations

from omni_grpo_core.doctor.evidence import Case

_KEY = "missing"


def say_missing(case: Case, sentence: str) -> None:
    """Note that something could not be judged on this step."""
    said: list[str] = case.memo.setdefault(_KEY, [])
    if sentence not in said:
        said.append(sentence)


def said_missing(case: Case) -> tuple[str, ...]:
    """All that was noted so far."""
    return tuple(case.memo.get(_KEY, ()))
