"""The page of a diagnosis: of real recordings, a broken and a sound one, and of hostile text."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_check_page_for_real import browse

from omni_grpo_core.doctor.diagnose import diagnose
from omni_grpo_core.doctor.evidence import Case, Diagnosis, Evidence, Explanation, Finding
from omni_grpo_core.doctor.load import as_cases
from omni_grpo_core.faults.fault import Fault
from omni_grpo_core.faults.plan import BY_ID
from omni_grpo_core.faults.trial import config_for, recorded, reference
from omni_grpo_core.report.html import write_page
from omni_grpo_core.report.html.doctor_page import doctor_page
from omni_grpo_core.types import Trace

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def page_of(folder: Path, *faults: Fault) -> str:
    config = config_for(faults)
    assert config is not None
    good = reference(config.dtype)
    traces, _ = recorded(faults, config, folder / "trace")
    cases = as_cases(traces, good)
    return doctor_page(cases, [diagnose(case) for case in cases], good.policy.decode)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The example of the incident: a clip listed as video and as audio while interleaved."""
    return page_of(tmp_path_factory.mktemp("broken"), BY_ID["conv.media-twice"])


def rooms(page: str) -> dict[str, str]:
    found = re.findall(r'<li class="room is-(\w+)"[^>]*>(?:<a [^>]*>)?(\w+)', page)
    return {stage: state for state, stage in found}


def test_a_stranger_reads_the_stage_the_reason_and_the_change(broken: str) -> None:
    head = broken[: broken.index('id="house"')]
    assert "✗ BROKEN: stage conversation" in head
    assert "What to change" in head
    assert rooms(broken)["conversation"] == "broken"
    assert '<span class="code">conv.media-twice</span>' in broken


def test_it_shows_what_the_model_was_given_and_what_it_said(broken: str) -> None:
    assert '<ol class="ribbon">' in broken
    assert 'class="run video"' in broken
    assert 'class="run audio"' in broken
    assert '<div class="completion">' in broken


def test_a_sound_run_is_called_healthy(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "✓ HEALTHY" in page
    assert "broken" not in set(rooms(page).values())
    assert rooms(page)["loss"] == "sound"


def test_nothing_that_was_recorded_acts_on_the_page() -> None:
    hostile = "<script>alert(1)</script>\x1b[2J"
    evidence = Evidence("batch", "odd", hostile, row=0, values={hostile: hostile})
    cause = Explanation("batch.odd", "batch", hostile, hostile, hostile)
    diagnosis = Diagnosis((Finding("batch", (evidence,), (cause,)),), (), ("batch",), (hostile,))
    case = Case(Trace({"checkpoint": hostile}, ()), None)
    page = doctor_page([case], [diagnosis], None)
    assert "<script" not in page
    assert "\x1b" not in page
    unnamed = replace(diagnosis, findings=(Finding("batch", (evidence,), ()),))
    assert "fault without a name" in doctor_page([case], [unnamed], None)


@pytest.mark.slow
@pytest.mark.skipif(_CHROMIUM is None, reason="no chromium on the path")
def test_a_browser_shows_it(broken: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_page(file, broken)
    seen = browse(["--dump-dom"], file, tmp_path / "profile")
    assert '<h2 id="verdict">✗ BROKEN: stage conversation</h2>' in seen
    assert seen.count('class="room') == broken.count('class="room')
