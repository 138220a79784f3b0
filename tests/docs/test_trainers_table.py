"""The page of trainers is what the stored results make, and their tests compare with these."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import conformance
import pytest

DOCS = Path(__file__).parents[2] / "docs"
LANE = conformance.Lane("mine", "My trainer", packages=("torch",), lines="attach(trainer)\n")


def report(exit_code: int, stage: str | None = None) -> dict[str, Any]:
    cause = {"cause": "media.zero", "proved": False}
    finding = {"stage": stage, "severity": "breaks", "causes": [cause]}
    return {
        "exit": exit_code,
        "healthy": not exit_code,
        "headline": {"stage": stage},
        "findings": [finding] if stage else [],
        "coverage": {
            "media": {"state": "unjudged", "why": "no picture"},
            "loss": {"state": "sound"},
        },
    }


def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    made = import_module("trainers_table")
    assert made.PAGE.read_text(encoding="utf-8") == made.trainers(), "python docs/trainers_table.py"


def test_a_result_is_stored_compared_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conformance, "RESULTS", tmp_path)
    monkeypatch.setenv(conformance.WRITE, "write")
    LANE.sound("image", "plain", report(0))
    LANE.fault("image", "blank", report(1, "media"), stage="media")
    LANE.fault("image", "late", report(0), stage="reward")
    LANE.cost(1.234, "bench", "2 cores", "2026-11-30")
    monkeypatch.delenv(conformance.WRITE)
    LANE.fault("image", "blank", report(1, "media"), stage="media")
    with pytest.raises(AssertionError, match=r"mine\.json has media: media\.zero \(fits\)"):
        LANE.fault("image", "blank", report(0), stage="media")
    assert json.loads(LANE.file.read_text())["rows"]["image"]["faults"]["late"] == "not found"
    monkeypatch.syspath_prepend(str(DOCS))
    made = import_module("trainers_table")
    monkeypatch.setattr(made, "RESULTS", tmp_path)
    row = next(line for line in made.trainers().splitlines() if line.startswith("| My trainer"))
    assert "| image | 1 of 1 healthy | 1 of 2 | media | 1 | × 1.23 " in row
    assert "| media | no picture | image |" in made.trainers()
