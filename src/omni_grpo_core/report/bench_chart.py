"""A run of the benchmark as one picture: the table, and a curve for each sweep."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from omni_grpo_core.io.extras import extra
from omni_grpo_core.report.terminal.bench import of_way, rows, ways_of

_SWEPT = {
    "group": "completions of a prompt (G)",
    "groups": "prompts in a step",
    "prompt": "tokens of a prompt (P)",
}


def picture(result: Mapping[str, Any]) -> bytes:
    """PNG, from :func:`~omni_grpo_core.bench.session.session`.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with extra("bench"):
        from matplotlib.figure import Figure
    sweeps = {name: points for name, points in result["sweeps"].items() if points}
    (point,) = result["points"]
    cells = rows(point)
    figure = Figure(figsize=(10, 0.28 * len(cells) + 0.6 + (3.6 if sweeps else 0)))
    figure.set_layout_engine("constrained")
    above, *below = figure.subfigures(
        2 if sweeps else 1, 1, height_ratios=[0.28 * len(cells) + 0.6, *([3.6] if sweeps else [])],
        squeeze=False,
    )[:, 0]  # fmt: skip
    above.suptitle(_title(result, point), fontsize="medium")
    axes = above.subplots()
    axes.set_axis_off()
    plain = [[cell.replace("**", "") for cell in line] for line in cells]
    drawn = axes.table(
        plain[1:], colLabels=plain[0], loc="center", cellLoc="right", edges="horizontal",
        colWidths=[0.4, *[0.6 / (len(cells[0]) - 1)] * (len(cells[0]) - 1)], bbox=[0, 0, 1, 1],
    )  # fmt: skip
    for line in range(len(cells)):
        drawn[line, 0].set_text_props(ha="left")
    for part in below:
        for one, (name, points) in zip(
            part.subplots(1, len(sweeps), squeeze=False)[0], sweeps.items(), strict=True
        ):
            _curves(one, name, points)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=110)
    return written.getvalue()


def _title(result: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    setting = point["setting"]
    return (
        f"{result['device']}, {result['dtype']}: {setting['size']}, prompts of "
        f"{', '.join(map(str, point['prompt_tokens']))} tokens, {setting['group']} completions of "
        f"{setting['tokens']}"
    )


def _curves(axes: Any, name: str, points: Sequence[Mapping[str, Any]]) -> None:
    for index, way in enumerate(ways_of(points)):
        for part, style in (("update", "o-"), ("sampling", "o:")):
            measured = [
                (point["setting"][name], seconds)
                for point in points
                if (seconds := of_way(point, way, "seconds", part)) is not None
            ]
            if measured:
                axes.plot(
                    *zip(*measured, strict=True), style, color=f"C{index}", label=f"{way}, {part}"
                )
    floor = [(point["setting"][name], point["floor_seconds"]["update"]) for point in points]
    axes.plot(*zip(*floor, strict=True), "-", color="grey", label="floor, update")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([point["setting"][name] for point in points])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel=_SWEPT[name], ylabel="seconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
