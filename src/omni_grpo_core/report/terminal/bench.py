"""The measured ways side by side, as one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PARTS = ("towers", "prefill", "decode", "sampling", "scoring", "update", "step")


def table(found: Mapping[str, Any]) -> str:
    """Markdown, from :meth:`~omni_grpo_core.bench.run.Measured.to_json`.

    >>> print(table({
    ...     "setting": {"group": 8, "groups": 1, "tokens": 2}, "prompt_tokens": [9],
    ...     "floor_seconds": {"update": 0.5, "step": 0.5}, "agreement": {}, "failed": {},
    ...     "ways": {"fast": {"seconds": {"update": 1.0, "step": 1.0}, "gib": {"update": 3.0},
    ...         "tokens_per_second": None, "times_the_floor": 2.0, "faster_than_usual": None}},
    ... }))
    prompts of 9 tokens, 8 completions each of 2 tokens
    <BLANKLINE>
    | seconds | fast | floor |
    |---|---|---|
    | update | 1.000 | 0.500 |
    | **step** | 1.000 | 0.500 |
    | step / floor | 2.00 | 1 |
    | usual / step | – |  |
    | tokens a second | – |  |
    | GiB in the update | 3.0 |  |
    """
    ways, floor = found["ways"], found["floor_seconds"]
    setting, prompts = found["setting"], found["prompt_tokens"]
    lines = [
        f"prompts of {', '.join(map(str, prompts))} tokens, {setting['group']} completions each of "
        f"{setting['tokens']} tokens",
        "",
        f"| seconds | {' | '.join(ways)} | floor |",
        f"|{'---|' * (len(ways) + 2)}",
    ]
    for part in _PARTS:
        values = [way["seconds"].get(part) for way in ways.values()]
        if any(value is not None for value in (*values, floor.get(part))):
            name = f"**{part}**" if part == "step" else part
            lines.append(_row(name, [_number(v, 3) for v in (*values, floor.get(part))]))
    for name, key, digits, least in (
        ("step / floor", "times_the_floor", 2, "1"),
        ("usual / step", "faster_than_usual", 2, ""),
        ("tokens a second", "tokens_per_second", 0, ""),
    ):
        lines.append(_row(name, [*(_number(way[key], digits) for way in ways.values()), least]))
    memory = [_number(way["gib"].get("update"), 1) for way in ways.values()]
    lines.append(_row("GiB in the update", [*memory, ""]))
    if found["agreement"]:
        lines += ["", "fast and plain: " + ", ".join(
            f"{name.replace('_', ' ')} {value:.3g}" for name, value in found["agreement"].items()
        )]  # fmt: skip
    lines += [f"{way} failed: {text}" for way, text in found["failed"].items()]
    return "\n".join(lines)


def _row(name: str, values: list[str]) -> str:
    return f"| {name} | {' | '.join(values)} |"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
