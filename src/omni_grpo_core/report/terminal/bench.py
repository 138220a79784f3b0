"""The measured ways side by side, as tables."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

WIDTH = 80
"""Of a terminal; tables of three ways are narrower."""
_PARTS = (
    *("towers", "prefill", "decode", "sampling", "scoring", "update", "update_without_towers"),
    *("step", "scored_step"),
)
_TITLES = {
    "update_without_towers": "… not back through frozen towers",
    "step": "**step** (sampling, update)",
    "scored_step": "step that scores apart",
}
_RATIOS = (
    ("step / floor", "times_the_floor", 2),
    ("usual step / step", "faster_than_usual", 2),
    ("usual step that scores apart / step", "faster_than_usual_scored", 2),
    ("tokens a second, sampling", "tokens_per_second", 0),
    ("tokens a second, step", "step_tokens_per_second", 0),
)
_MEMORY = {
    "sampling": "GiB, sampling",
    "scoring": "GiB, scoring",
    "update_without_towers": "GiB, update not through towers",
    "update": "GiB, update",
}


def report(result: Mapping[str, Any]) -> str:
    """Markdown, from :func:`~omni_grpo_core.bench.session.session`."""
    (point,) = result["points"]
    parts = [table(point)]
    parts += [_sweep(name, points) for name, points in result["sweeps"].items() if points]
    if result.get("offload_gradients"):
        parts.append("fast: gradients leave the device as they are made")
    if result["growth"]:
        parts.append(_growth(result["growth"]))
    if result["rounding"]:
        parts.append(_rounding(result["rounding"]))
    return "\n\n".join(parts)


def table(found: Mapping[str, Any]) -> str:
    """One point, from :meth:`~omni_grpo_core.bench.run.Measured.to_json`.

    >>> print(table({
    ...     "setting": {"group": 8, "groups": 1, "tokens": 2}, "prompt_tokens": [9],
    ...     "floor_seconds": {"update": 0.5, "step": 0.5}, "agreement": {}, "failed": {},
    ...     "ways": {"fast": {"seconds": {"update": 1.0, "step": 1.0}, "gib": {"update": 3.0},
    ...         "held_gib": 2.0, "times_the_floor": 2.0,
    ...         "tokens_per_second": None, "step_tokens_per_second": None,
    ...         "faster_than_usual": None, "faster_than_usual_scored": None}},
    ... }))
    prompts of 9 tokens, 8 completions each of 2 tokens
    <BLANKLINE>
    | seconds                     |  fast | floor |
    |-----------------------------|------:|------:|
    | update                      | 1.000 | 0.500 |
    | **step** (sampling, update) | 1.000 | 0.500 |
    | step / floor                |  2.00 |     1 |
    | GiB, update                 |   3.0 |       |
    | … of weights and gradients  |   2.0 |       |
    | … beyond them               |   1.0 |       |
    """
    setting, prompts = found["setting"], found["prompt_tokens"]
    lines = [
        f"prompts of {', '.join(map(str, prompts))} tokens, {setting['group']} completions each of "
        f"{setting['tokens']} tokens",
        "",
        *_markdown(rows(found)),
    ]
    if found["agreement"]:
        agreement = ", ".join(
            f"{name.replace('_', ' ')} {value:.3g}" for name, value in found["agreement"].items()
        )
        lines += ["", textwrap.fill(f"fast and plain: {agreement}", WIDTH)]
    lines += [textwrap.fill(f"{way} failed: {why}", WIDTH) for way, why in found["failed"].items()]
    return "\n".join(lines)


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The cells of :func:`table`, its head first."""
    ways, floor = list(found["ways"].values()), found["floor_seconds"]
    lines: list[list[str]] = [["seconds", *found["ways"], "floor"]]
    for part in _PARTS:
        values = [way["seconds"].get(part) for way in ways]
        if any(value is not None for value in values):
            cells = [_number(value, 3) for value in (*values, floor.get(part))]
            lines.append([_TITLES.get(part, part), *cells])
    for name, key, digits in _RATIOS:
        if any(way[key] is not None for way in ways):
            least = "1" if key == "times_the_floor" else ""
            lines.append([name, *(_number(way[key], digits) for way in ways), least])
    for part, title in _MEMORY.items():
        taken = [way["gib"].get(part) for way in ways]
        if any(taken):
            lines.append([title, *(_number(gib, 1) for gib in taken), ""])
    if any(taken):
        held = [way.get("held_gib") for way in ways]
        beyond = [gib and own and gib - own for gib, own in zip(taken, held, strict=True)]
        for title, sizes in (("… of weights and gradients", held), ("… beyond them", beyond)):
            lines.append([title, *(_number(gib, 1) for gib in sizes), ""])
    return lines


def of_way(point: Mapping[str, Any], way: str, what: str, part: str) -> float | None:
    """``what`` is ``"seconds"`` or ``"gib"``; ``None``: not measured, or not there."""
    found: float | None = point["ways"].get(way, {}).get(what, {}).get(part)
    return found or None


def ways_of(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of any point of a sweep, in order."""
    return [*dict.fromkeys(way for point in points for way in point["ways"])]


def _sweep(name: str, points: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of each way's parts, and memory in its update, by one size of the setting."""
    parts = ("sampling", "update", "step")
    on_device = any(
        of_way(point, way, "gib", "update") for point in points for way in point["ways"]
    )
    lines = [[name, "way", *parts, *(["GiB, update"] if on_device else [])]]
    for point in points:
        value = str(point["setting"][name])
        for way in ways_of([point]):
            cells = [_number(of_way(point, way, "seconds", part), 3) for part in parts]
            memory = [_number(of_way(point, way, "gib", "update"), 1)] if on_device else []
            lines.append([value, way, *cells, *memory])
        least = [_number(point["floor_seconds"].get(part), 3) for part in parts]
        lines.append([value, "floor", *least, *(["–"] if on_device else [])])
    return "\n".join(_markdown(lines))


def _growth(found: Mapping[str, Any]) -> str:
    lines = [["update", "line over", "s", "µs a token", "worst residual"]]
    for way, counts in found.items():
        for counted, line in counts.items():
            lines.append(
                [
                    way,
                    "P + G · C" if counted == "packed" else "G · (P + C)",
                    _number(line["fixed_seconds"], 3),
                    _number(1e6 * line["seconds_per_token"], 1),
                    f"{line['worst']:.0%}",
                ]
            )
    return "\n".join(_markdown(lines))


def _rounding(found: Mapping[str, Any]) -> str:
    lines = [["against plain in float32", *found["sides"]]]
    for name, outer, inner in (
        ("nats a token, mean", "nats", "mean"),
        ("… root mean square", "nats", "rms"),
        ("… worst", "nats", "max"),
        ("from plain, nats, mean", "apart", "mean"),
        ("… worst", "apart", "max"),
        ("gradients, relative, median", "gradient", "median"),
        ("… worst", "gradient", "max"),
    ):
        values = [side[outer][inner] for side in found["sides"].values()]
        lines.append([name, *(f"{value:.3g}" for value in values)])
    times = [side["times_plain"] for side in found["sides"].values()]
    lines.append(["error / plain's, nats", *(_number(one["nats"], 2) for one in times)])
    for key in ("median", "max"):
        cells = [_number(one["gradient"][key], 2) for one in times]
        lines.append([f"… a parameter's gradient, {key}", *cells])
    counted = f"{found['tokens']} tokens, gradients of {found['parameters']} parameters"
    return "\n".join([*_markdown(lines), "", counted])


def _markdown(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their cells, the first to the left: a table in a terminal too."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for index, (first, *cells) in enumerate(lines):
        padded = [first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]
        yield f"| {' | '.join(padded)} |"
        if index == 0:
            rest = "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
            yield f"|{'-' * (widths[0] + 2)}|{rest}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
