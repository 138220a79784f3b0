from __future__ import annotations

import math

import pytest
from hand_made_goldens import drift, stage

from omni_grpo_core.golden.results import CaseResult, Verdict
from omni_grpo_core.report.html.drift_chart import drift_chart


def case(name: str, **stages: tuple[Verdict, float, float]) -> CaseResult:
    """``stages``: verdict, largest and mean |Δ| of each."""
    found = [
        stage(at, verdict, "none", drift(largest, mean))
        for at, (verdict, largest, mean) in stages.items()
    ]
    return CaseResult(name, "exact", "", None, tuple(found))


def test_decades_are_evenly_spaced() -> None:
    chart = drift_chart(
        [
            case(
                "a",
                batch=("within", 0.0, 0.0),
                logits=("within", 1e-6, 1e-7),
                completion=("harmful", 1e-1, 1e-3),
            )
        ]
    )
    assert chart is not None
    assert [tick.label for tick in chart.ticks] == ["1e-7", "1e-6", "1e-5", "1e-4", "1e-3",
                                                    "1e-2", "1e-1"]  # fmt: skip
    assert (chart.ticks[0].at, chart.ticks[-1].at) == (chart.left, chart.right)
    logits, completion = chart.marks
    # exact powers of ten lie on their ticks; a tenth of a pixel is what is drawn
    assert logits.x == pytest.approx(chart.ticks[1].at, abs=0.1)
    assert logits.mean_x == pytest.approx(chart.ticks[0].at, abs=0.1)
    assert completion.mean_x == pytest.approx(chart.ticks[4].at, abs=0.1)
    assert [row.label for row in chart.rows] == ["logits", "completion"]
    assert (chart.still, chart.infinite) == (("batch",), None)
    assert [mark.value for mark in chart.marks] == ["1.0e-06", "1.0e-01"]
    assert "1.0e-01 in completion of a" in chart.title


def test_non_finite_values_have_their_own_place() -> None:
    chart = drift_chart(
        [
            case("a", loss=("harmful", math.inf, math.inf)),
            case("b", loss=("benign-drift", 1.0, 0.5)),
        ]
    )
    assert chart is not None
    assert chart.infinite is not None
    assert chart.infinite > chart.right
    first, harm = chart.marks
    assert (first.harm, harm.harm) == ("drift", "harm"), "harm is drawn on top"
    assert harm.x == chart.infinite
    assert harm.title == "a, loss: max |Δ| non-finite, mean |Δ| non-finite"
    assert [mark.value for mark in chart.marks] == ["", ""], "several cases: no values"


def test_only_infinite_and_only_one_size() -> None:
    assert drift_chart([case("a", loss=("harmful", math.inf, math.inf))]) is not None
    chart = drift_chart([case("a", loss=("within", 1e-3, 1e-3))])
    assert chart is not None
    assert chart.left <= chart.marks[0].x <= chart.right


def test_nothing_to_draw() -> None:
    assert drift_chart([]) is None
    assert drift_chart([case("a", loss=("within", 0.0, 0.0))]) is None


def test_many_decades_have_few_ticks() -> None:
    chart = drift_chart([case("a", loss=("within", 1e8, 1e-12))])
    assert chart is not None
    assert len(chart.ticks) <= 11
