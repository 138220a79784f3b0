"""Goldens of the shipped clips, every stage, both families, under the installed libraries.

After a library or model upgrade these show which stage changed first. ``omni-grpo golden regen``
makes new ones for review; a test never writes one.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.golden.checking import check
from omni_grpo_core.golden.results import FINE
from omni_grpo_core.golden.store import split_name
from omni_grpo_core.golden.suite import load_suite

FOLDER = Path(__file__).parent.parent / "golden"
SUITE = load_suite(FOLDER)
QWEN3 = FOLDER / "qwen3"
QWEN3_SUITE = load_suite(QWEN3)
SEVERAL = FOLDER / "several"
"""Rows of several media, with a suite for each family."""


@pytest.mark.parametrize("case", SUITE.cases)
def test_shipped_case(case: str, policy: Policy) -> None:
    (found,) = check(policy, SUITE, FOLDER, "cpu-fp32", names=[case]).cases
    assert found.verdict in FINE, found.reason


@pytest.mark.parametrize("case", QWEN3_SUITE.cases)
def test_shipped_case_of_the_second_family(case: str, qwen3_policy: Policy) -> None:
    (found,) = check(qwen3_policy, QWEN3_SUITE, QWEN3, "cpu-fp32", names=[case]).cases
    assert found.verdict in FINE, found.reason


@pytest.mark.parametrize("case", ["two-videos", "two-turns"])
@pytest.mark.parametrize(("folder", "fixture"), [("", "policy"), ("qwen3", "qwen3_policy")])
def test_case_of_several_media(
    case: str, folder: str, fixture: str, request: pytest.FixtureRequest
) -> None:
    made: Policy = request.getfixturevalue(fixture)
    where = SEVERAL / folder
    (found,) = check(made, load_suite(where), where, "cpu-fp32", names=[case]).cases
    assert found.verdict in FINE, found.reason


@pytest.mark.parametrize(
    "folder", [FOLDER, QWEN3, SEVERAL, SEVERAL / "qwen3"], ids=lambda folder: folder.name
)
def test_a_case_is_small_enough_to_review(folder: Path) -> None:
    suite = load_suite(folder)
    sizes: Counter[tuple[str, str]] = Counter()
    for case in suite.cases:
        for path in (folder / case).glob("*.txt"):
            sizes[case, split_name(path.name, suite.base)[1]] += path.stat().st_size
    assert {case for case, _ in sizes} == set(suite.cases)
    assert {pair: size for pair, size in sizes.items() if size > 40_000} == {}


def test_the_cases_match_their_names() -> None:
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
