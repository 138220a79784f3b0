"""Goldens of the shipped clips, every stage, under whatever libraries are installed.

After a library or model upgrade these say which stage moved first. ``omni-grpo golden regen`` makes
new ones for review; a test never writes one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_grpo_core.golden.checking import check
from omni_grpo_core.golden.results import FINE
from omni_grpo_core.golden.suite import load_suite
from omni_grpo_core.policy import Policy

FOLDER = Path(__file__).parent.parent / "golden"
SUITE = load_suite(FOLDER)


@pytest.mark.parametrize("case", SUITE.cases)
def test_shipped_case(case: str, policy: Policy) -> None:
    (found,) = check(policy, SUITE, FOLDER, "cpu-fp32", names=[case]).cases
    assert found.verdict in FINE, found.reason


def test_a_case_takes_no_more_room_than_a_review_can_bear() -> None:
    for case in SUITE.cases:
        size = sum(path.stat().st_size for path in (FOLDER / case).glob("*.txt"))
        assert 0 < size <= 40_000, f"{case}: {size} bytes"


def test_the_cases_are_what_their_names_say() -> None:
    samples = SUITE.samples(tuple(SUITE.cases))
    kinds = {
        case: [[ref.modality for ref in sample.media] for sample in rows]
        for case, rows in samples.items()
    }
    assert kinds == {
        "interleaved": [["video"]],
        "interleaved-3s": [["video"]],
        "separate": [["video", "audio"]],
        "silent-film": [["video"]],
        "image": [["image"]],
        "audio": [["audio"]],
        "text": [[]],
        "padded": [[], ["image"]],
        "resized": [["video"]],
        "grpo": [["image"]],
    }
