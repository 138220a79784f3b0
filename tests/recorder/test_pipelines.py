from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toy_thinker

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.recorder.pipelines import load_pipeline, record_pipeline
from omni_grpo_core.trace.calls import SamplesSeen, calls_of
from omni_grpo_core.trace.store import load_trace

ROWS = [{"sample_id": "a", "problem": "abc"}, {"sample_id": "b", "problem": "bcd"}]


def generate(rows: Any, model: Any, processor: Any) -> str:
    ids = torch.tensor(processor(text=[row["problem"] for row in rows])["input_ids"])
    model.generate(input_ids=ids)
    return "is not looked at"


def run(pipeline: Any, folder: Path) -> tuple[str, ...]:
    return record_pipeline(
        pipeline,
        folder,
        batches=[ROWS, ROWS[:1]],
        model=toy_thinker.make(),
        processor=toy_thinker.ToyProcessor(),
    )


def test_each_batch_is_a_step(tmp_path: Path) -> None:
    assert run(generate, tmp_path) == ()
    steps = [load_trace(tmp_path / f"step-00000{number}") for number in range(2)]
    for trace, rows in zip(steps, (ROWS, ROWS[:1]), strict=True):
        assert [record.stage for record in trace.stages] == ["sample", "batch", "completion"]
        (seen,) = calls_of(trace, SamplesSeen)
        assert list(seen.rows) == rows
        assert seen.group_ids == tuple(row["sample_id"] for row in rows)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_pipeline_with_an_optimizer_ends_its_steps_itself(tmp_path: Path) -> None:
    def train(rows: Any, model: Any, processor: Any) -> None:
        toy_thinker.step(model, torch.optim.SGD(model.parameters(), lr=0.1))

    assert run(train, tmp_path) == ()
    for number in range(2):
        trace = load_trace(tmp_path / f"step-00000{number}")
        assert trace.stages[0].stage == "sample"
        assert trace.stages[-1].stage == "gradient"


def test_an_exception_is_reported_and_the_calls_before_it_are_kept(tmp_path: Path) -> None:
    def fails_on_one(rows: Any, model: Any, processor: Any) -> None:
        generate(rows, model, processor)
        if len(rows) == 1:
            raise ValueError("no group of one")

    assert run(fails_on_one, tmp_path) == ("ValueError: no group of one",)
    assert len(load_trace(tmp_path / "step-000001").stages) == 3


def test_a_pipeline_that_ignores_its_arguments_is_rejected(tmp_path: Path) -> None:
    def idle(rows: Any, model: Any, processor: Any) -> None:
        raise KeyError("video")

    with pytest.raises(ConfigError, match="KeyError: 'video'"):
        run(idle, tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("test_pipelines", "no module:name"),
        ("no_such_module:run", "ModuleNotFoundError while importing it"),
        ("test_pipelines:ROWS", "no callable named 'ROWS'"),
        ("test_pipelines:nothing.at.all", "no callable named 'nothing.at.all'"),
    ],
)
def test_a_path_that_names_no_pipeline(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_pipeline(path)


def test_a_path_that_names_a_pipeline() -> None:
    assert load_pipeline(f"{__name__}:generate") is generate
