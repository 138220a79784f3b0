"""The page of trainers: what the doctor said of each, from results that its tests stored.

``python docs/trainers_table.py`` writes it anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markdown_parts import page, table

PAGE = Path(__file__).parent / "pages" / "trainers.md"
RESULTS = Path(__file__).parents[1] / "tests" / "trainers" / "results"
_INTRODUCTION = """\
Real trainers, recorded as a user records them, on tiny checkpoints. A sound run is healthy where
nothing is called broken; a planted mistake is found where its own stage is the headline. Each
result is stored by the tests that run the trainer (`tests/trainers/results`), which fail where the
doctor says something else today."""
_HEADS = (
    *("trainer", "versions", "modality", "sound runs", "faults found"),
    *("not judged (why: below)", "lines to write", "recording costs"),
)


def trainers() -> str:
    """The page, as Markdown."""
    lanes = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))
    ]
    overview = table(_HEADS, (row for lane in lanes for row in _rows(lane)))
    parts = [_INTRODUCTION, overview, *(part for lane in lanes for part in _details(lane))]
    return page("Trainers", parts)


def _rows(lane: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for modality, row in sorted(lane["rows"].items()):
        sound, faults = row.get("sound", {}), row.get("faults", {})
        yield (
            lane["trainer"],
            lane["versions"],
            modality,
            _share([run["verdict"].startswith("healthy") for run in sound.values()], "healthy"),
            _share([not said.startswith("not ") for said in faults.values()]),
            ", ".join(_never_judged(sound)) or "–",
            str(len(lane["lines"].strip().splitlines())),
            _cost(lane.get("cost")),
        )


def _share(held: list[bool], word: str = "") -> str:
    """
    >>> _share([True, True]), _share([True, False], "healthy"), _share([])
    ('2 of 2', '1 of 2 healthy', '–')
    """
    return f"{sum(held)} of {len(held)} {word}".strip() if held else "–"


def _never_judged(sound: Mapping[str, Any]) -> dict[str, str]:
    """Stages that no run of a row shows.

    >>> _never_judged({"one": {"unseen": {"media": "why", "loss": "why"}}, "two": {"unseen":
    ...     {"media": "why"}}})
    {'media': 'why'}
    """
    runs = [run["unseen"] for run in sound.values()]
    return {
        stage: why
        for stage, why in (runs[0].items() if runs else ())
        if all(stage in run for run in runs)
    }


def _cost(cost: Mapping[str, Any] | None) -> str:
    if cost is None:
        return "not measured"
    return f"× {cost['ratio']:.2f} a recorded step ({cost['machine']}, {cost['date']})"


def _details(lane: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {lane['trainer']}"
    yield f"{lane['versions']}. What a user writes:\n\n```text\n{lane['lines'].strip()}\n```"
    if lane.get("cost"):
        yield f"Cost measured with `{lane['cost']['command']}`."
    runs = [
        (name, modality, run["verdict"])
        for modality, row in sorted(lane["rows"].items())
        for name, run in sorted(row.get("sound", {}).items())
    ]
    faults = [
        (name, modality, said)
        for modality, row in sorted(lane["rows"].items())
        for name, said in sorted(row.get("faults", {}).items())
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for modality, row in sorted(lane["rows"].items()):
        for reason in _never_judged(row.get("sound", {})).items():
            reasons.setdefault(reason, []).append(modality)
    unseen = [(stage, why, "; ".join(kinds)) for (stage, why), kinds in reasons.items()]
    yield table(("sound run", "modality", "verdict"), runs) if runs else ""
    yield table(("planted", "modality", "found as"), faults) if faults else ""
    yield table(("not judged", "why", "modality"), unseen) if unseen else ""


if __name__ == "__main__":
    PAGE.write_text(trainers(), encoding="utf-8")
