"""The page of a diagnosis: of real recordings, broken and sound, and of hostile text."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_check_page_for_real import browse

from omni_grpo_core.doctor.diagnose import conclude, diagnose
from omni_grpo_core.doctor.evidence import Case, Evidence, Explanation, Finding
from omni_grpo_core.doctor.load import as_cases
from omni_grpo_core.doctor.verdict import Diagnosis
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
    diagnoses = [diagnose(case) for case in cases]
    return doctor_page(cases, diagnoses, conclude(cases, diagnoses), good.policy.decode)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fault of the incident: a clip listed both as video and as audio while interleaved."""
    return page_of(tmp_path_factory.mktemp("broken"), BY_ID["conv.media-twice"])


def states(page: str) -> dict[str, str]:
    found = re.findall(r'<li class="stage is-(\w+)"[^>]*>(?:<a [^>]*>)?(\w+)', page)
    return {stage: state for state, stage in found}


def test_a_newcomer_sees_the_stage_the_reason_and_the_fix(broken: str) -> None:
    head = broken[: broken.index('id="pipeline"')]
    assert "✗ BROKEN: stage conversation" in head
    assert "What to change" in head
    assert states(broken)["conversation"] == "broken"
    assert '<span class="code">conv.media-twice</span>' in broken


def test_it_shows_what_the_model_was_given_and_its_answers(broken: str) -> None:
    assert '<ol class="ribbon">' in broken
    assert 'class="run video"' in broken
    assert 'class="run audio"' in broken
    assert '<div class="completion">' in broken


def test_a_sound_run_is_called_healthy(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "✓ HEALTHY" in page
    assert "broken" not in set(states(page).values())
    assert states(page)["loss"] == "sound"


def test_recorded_text_is_inert_on_the_page() -> None:
    hostile = "<script>alert(1)</script>\x1b[2J"
    evidence = Evidence("batch", "odd", hostile, row=0, values={hostile: hostile})
    cause = Explanation("batch.odd", "batch", hostile, hostile, hostile)
    diagnosis = Diagnosis((Finding("batch", (evidence,), (cause,)),), (), (hostile,))
    case = Case(Trace({"checkpoint": hostile}, ()), None)
    page = doctor_page([case], [diagnosis], diagnosis, None)
    assert "<script" not in page
    assert "\x1b" not in page
    unnamed = replace(diagnosis, findings=(Finding("batch", (evidence,), ()),))
    assert "No fault in the catalogue explains this." in doctor_page(
        [case], [unnamed], unnamed, None
    )


@pytest.mark.slow
@pytest.mark.skipif(_CHROMIUM is None, reason="no chromium on the path")
def test_a_browser_shows_it(broken: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_page(file, broken)
    seen = browse(["--dump-dom"], file, tmp_path / "profile")
    assert '<h2 id="verdict">✗ BROKEN: stage conversation</h2>' in seen
    assert seen.count('class="stage') == broken.count('class="stage')
