"""The trial of an upgrade, as a page and on the terminal."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hand_made_goldens import HOSTILE, report
from rich.console import Console
from test_check_page import Outline, words

from omni_grpo_core.golden.behaviour import Behaviour, ModalityBehaviour
from omni_grpo_core.golden.beside import PackageChange
from omni_grpo_core.golden.bisect import Change, change_of
from omni_grpo_core.golden.results import GoldenReport
from omni_grpo_core.golden.suite import shipped_goldens
from omni_grpo_core.golden.upgrade_report import UpgradeReport
from omni_grpo_core.report.html.upgrade_page import upgrade_page
from omni_grpo_core.report.terminal.upgrade import print_upgrade
from omni_grpo_core.report.upgrade_words import stage_rows

SEEN = ModalityBehaviour(4, "reaches", 1.0, 0.25, 0.75)
GOOD = Behaviour(8, 1.0, 1.0, 0.0, 0.0, 30.0, {"video": SEEN})
BAD = replace(GOOD, accuracy=0.5, modalities={"video": replace(SEEN, judgement="lost")})


def data(hostile: str = "", *cases: str) -> dict[str, Any]:
    """A check's report as another process gives it."""
    whole = report(hostile)
    kept = tuple(one for one in whole.cases if not cases or one.case in cases)
    found: dict[str, Any] = json.loads(json.dumps(replace(whole, cases=kept).to_json()))
    return found


def upgraded(hostile: str = "", **changes: Any) -> UpgradeReport:
    found = UpgradeReport(
        requests=("transformers==5.23.0",),
        checkpoint=None,
        folder="golden",
        packages=(PackageChange("transformers", "5.17.0", f"5.23.0{hostile}"),),
        changes=(change_of("library", data(hostile)),),
        stored_before=data("", "calm"),
        stored_after=data(hostile),
        before=GOOD,
        after=BAD,
        steps=8,
        resumed=(),
    )
    return replace(found, **changes)


def shown(of: UpgradeReport) -> str:
    stream = io.StringIO()
    print_upgrade(Console(file=stream, width=100), of)
    return stream.getvalue()


def test_a_report_survives_the_way_from_another_process() -> None:
    """Infinities are text in JSON."""
    assert GoldenReport.from_json(data()) == report()


def test_the_page_is_one_safe_file() -> None:
    crossed = tuple(change_of(what, data(HOSTILE)) for what in ("library", "checkpoint", "both"))
    html = upgrade_page(upgraded(HOSTILE, changes=crossed, checkpoint=f"/new{HOSTILE}"))
    outline = Outline(html)
    assert outline.open == []
    for tag, attributes in outline.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "img"), tag
        assert not [name for name in attributes if name.startswith("on")]
    assert "<script" not in html
    assert "\u202e" not in html
    assert "default-src 'none'" in html
    assert not re.search(r"url\(|@import", html)
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_answers_first() -> None:
    text = words(upgrade_page(upgraded()))
    assert "✗ HARMFUL 1 of 3 cases beyond drift (harmful), first in" in text
    assert "right answers fell from 100.0% to 50.0%; video no longer reaches the model" in text
    assert "The pins would be transformers==5.23.0" in text
    assert "omni-grpo golden regen moved broken omni-grpo golden review" in text
    # nothing of a trial is pending: no golden can be accepted here
    assert "golden accept" not in text


@pytest.mark.parametrize("checkpoint", [None, "/models/new"])
def test_a_new_checkpoint_leads_with_its_behaviour(checkpoint: str | None) -> None:
    of = upgraded(checkpoint=checkpoint)
    for text in (words(upgrade_page(of)), shown(of)):
        stages, behaviour = text.index("The new libraries"), text.index("Behaviour")
        assert (behaviour < stages) == (checkpoint is not None)


def test_stages_are_in_the_order_of_the_pipeline_with_their_origin() -> None:
    rows = stage_rows(change_of("library", data()))
    assert [(row.stage, row.verdict, row.origin, row.cases) for row in rows] == [
        ("text", "exact", "none", 0),
        ("batch", "harmful", "added", 1),
        ("logits", "harmful", "added", 2),
    ]


def test_a_stage_that_the_old_state_did_not_have() -> None:
    whole = data("", "calm")
    whole["verdict"] = whole["cases"][0]["verdict"] = "new"
    whole["cases"][0]["stages"][1] |= {"verdict": "new", "golden": "", "reason": "no golden yet"}
    of = upgraded(changes=(change_of("library", whole),), after=GOOD)
    text = words(upgrade_page(of))
    assert "✗ HARMFUL 1 case beyond drift (new)" in text
    assert "+ batch" in text
    assert "  batch: new in 1 case\n    no golden yet\n" in shown(of)


def test_a_suite_that_does_not_run() -> None:
    failed = Change("library", "harmful", None, {}, {}, {}, {"cases": []}, "exit code 3: No x")
    of = upgraded(changes=(failed,), after=None, stored_after=None)
    text = shown(of)
    assert text.startswith("HARMFUL: the suite does not run: exit code 3: No x\n")
    assert re.search(r"right answers +│ 100.0% +│ – ", text)
    page = words(upgrade_page(of))
    assert "The suite does not run: exit code 3: No x" in page
    assert "None could be checked." in page


def test_nothing_moved() -> None:
    calm = data("", "calm")
    of = upgraded(
        changes=(change_of("library", calm),), stored_after=calm, after=GOOD,
    )  # fmt: skip
    assert shown(of).startswith("SAFE: 1 case, all exact")
    text = words(upgrade_page(of))
    assert "✓ SAFE" in text
    assert "Pins to write transformers==5.23.0" in text
    assert "None: every stored golden holds." in text
    none = upgraded(changes=of.changes, stored_before=None, stored_after=None, after=GOOD)
    assert "The suite has no goldens yet." in words(upgrade_page(none))


def test_goldens_that_differ_already_come_first() -> None:
    of = upgraded(stored_before=data())
    lines = shown(of).splitlines()
    assert lines[2] == "Before the upgrade, stored goldens differ already:"
    assert lines[3] == "  benign-drift, first stage logits: moved"
    assert "  benign-drift, first stage logits, as before the upgrade: moved" in lines
    assert "2 of the stored goldens differ: moved, broken" in words(upgrade_page(of))


def test_goldens_of_the_package_are_not_the_users_to_review() -> None:
    of = upgraded(folder=str(shipped_goldens()))
    for text in (words(upgrade_page(of)), shown(of)):
        assert "They come with omni-grpo-core: its releases bring new ones." in text
        assert "golden regen" not in text


def test_both_changes_are_told_apart() -> None:
    library = change_of("library", data("", "calm"))
    both = (library, change_of("checkpoint", data()), change_of("both", data()))
    of = upgraded(changes=both, checkpoint="/new")
    text = shown(of)
    assert "\nbatch: moved by checkpoint\n" in text
    assert text.count("  batch: harmful (added) in 1 case\n") == 1
    assert "\n  the same as by one of them alone\n" in text
    assert "Stage Moved by" in words(upgrade_page(of))
