"""What a campaign runs, and how it counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from omni_grpo_core.faults import plan as catalogue
from omni_grpo_core.faults.campaign import Result, Row, run
from omni_grpo_core.faults.config import ROWS, LoopConfig
from omni_grpo_core.faults.plan import BY_ID, FAULTS, Task, clean_tasks, fault_tasks, pair_tasks
from omni_grpo_core.report.terminal.faults import print_result
from omni_grpo_core.types import STAGES

HIT = Row("fault", ("pos.no-mask",), ("positions",), ("positions",), ("pos.no-mask",), ("s",), None,
          "", 1.0)  # fmt: skip
OTHER_CAUSE = replace(HIT, causes=("pos.flag-scoring",))
OTHER_STAGE = replace(HIT, blamed=("batch", "positions"), causes=("", "pos.no-mask"))
UNSEEN = replace(HIT, blamed=(), causes=())
PAIR = replace(HIT, kind="pair", ids=("pos.no-mask", "loss.sign"), stages=("positions", "loss"),
               blamed=("positions", "logits", "loss"))  # fmt: skip
HALF = replace(PAIR, blamed=("positions",))
CLEAN = Row("clean", (), (), (), (), (), None, "c", 1.0)


def test_a_fault_is_right_when_its_stage_comes_first() -> None:
    judged = [(r.detected, r.stage_right, r.cause_right) for r in (HIT, OTHER_CAUSE, OTHER_STAGE)]
    assert judged == [(True, True, True), (True, True, False), (True, False, False)]
    assert (UNSEEN.detected, UNSEEN.stage_right) == (False, False)


def test_a_pair_is_right_when_both_stages_are_blamed() -> None:
    assert PAIR.stage_right
    assert not HALF.stage_right


def test_missed_targets_are_reported() -> None:
    assert Result((HIT, PAIR, CLEAN), True, 1.0).missed == ()
    alarm = replace(CLEAN, blamed=("loss",))
    rows = (HIT, OTHER_CAUSE, UNSEEN, HALF, CLEAN, alarm)
    assert Result(rows, True, 1.0).missed == (
        "detected 66.7%, wanted 100%",
        "stage_right 66.7%, wanted 98%",
        "cause_right 33.3%, wanted 90%",
        "pairs 0.0%, wanted 90%",
        "1 false alarms, wanted none",
    )


def test_a_clean_loop_that_raises_is_a_false_alarm() -> None:
    assert Result((replace(CLEAN, raised="ValueError"),), True, 1.0).false_alarms


def test_without_causes_no_cause_is_counted() -> None:
    result = Result((HIT, OTHER_CAUSE), False, 1.0)
    assert result.missed == ()
    assert result.to_json()["cause_right"] is None


def test_the_json_has_the_documented_keys() -> None:
    form = json.loads(json.dumps(Result((HIT, PAIR, CLEAN), True, 2.0).to_json()))
    counts = {key: form[key] for key in (
        "injected", "detected", "stage_right", "cause_right", "pairs", "clean_runs", "false_alarms",
    )}  # fmt: skip
    assert list(counts.values()) == [1, 1, 1, 1, 1, 1, 0]
    assert len(form["rows"]) == 3


def test_the_table_shows_what_went_wrong() -> None:
    console = Console(width=160, record=True, quiet=True)
    with console.capture() as shown:
        console.quiet = False
        print_result(console, Result((HIT, UNSEEN, HALF), True, 1.0))
    text = shown.get()
    assert "✓ pos.no-mask" in text
    assert "pos.no-mask + loss.sign: positions and loss; blamed positions" in text
    assert "missed: detected 50.0%, wanted 100%" in text


def test_pairs_are_of_different_stages_and_both_can_show() -> None:
    tasks = pair_tasks(FAULTS, 300, seed=1)
    assert len(tasks) == len({task.ids for task in tasks}) == 300
    for task in tasks:
        one, other = sorted((BY_ID[id] for id in task.ids), key=lambda f: STAGES.index(f.stage))
        assert one.stage != other.stage
        assert not one.stops
        for fault in (one, other):
            assert all(getattr(task.config, name) == v for name, v in fault.needs.items())


def test_the_same_seed_draws_the_same() -> None:
    assert pair_tasks(FAULTS, 20, 3) == pair_tasks(FAULTS, 20, 3) != pair_tasks(FAULTS, 20, 4)
    assert clean_tasks(20, 3) == clean_tasks(20, 3) != clean_tasks(20, 4)


def test_clean_configurations_cover_every_setting() -> None:
    configs = [task.config for task in clean_tasks(200, seed=0)]
    assert len(set(configs)) == 200
    for name in ("audio", "dtype", "group_size", "lora", "checkpointing", "beta", "iterations",
                 "accumulation", "partial", "freeze_towers", "loss_type"):  # fmt: skip
        assert len({getattr(config, name) for config in configs}) > 1, name
    for config in configs:
        allowed = {row for rows in ROWS[config.audio].values() for row in rows}
        assert set(config.rows) <= allowed
        assert len(set(config.rows)) == len(config.rows)


def test_a_fault_and_a_clean_loop_from_end_to_end() -> None:
    tasks = [*fault_tasks([BY_ID["step.detached"]]), Task("clean", (), LoopConfig())]
    seen: list[Row] = []
    result = run(tasks, jobs=1, on_row=seen.append)
    assert [row.stage_right for row in result.of("fault")] == [True]
    assert result.false_alarms == ()
    assert len(seen) == 2


ELSEWHERE = replace(BY_ID["loss.sign"], id="loss.elsewhere", versions="<4")


def test_a_fault_of_other_versions_is_skipped_and_reported(
    run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The incident's fault is one of transformers, and 5.24.0 no longer has it: injected there it
    does nothing, and the campaign counted it as not detected."""
    monkeypatch.setattr(catalogue, "FAULTS", (BY_ID["step.detached"], ELSEWHERE))
    code, out, _ = run_cli(
        "faults", "--json", "--pairs", "0", "--clean", "0", "--jobs", "1", "--no-causes"
    )
    form = json.loads(out)
    assert (code, form["injected"], form["missed"]) == (0, 1, [])
    assert list(form["skipped"]) == ["loss.elsewhere"]
    assert form["skipped"]["loss.elsewhere"].startswith("not injectable: transformers ")
    console = Console(width=160)
    with console.capture() as shown:
        print_result(console, Result((HIT,), True, 1.0, form["skipped"]))
    assert "– loss.elsewhere: not injectable: transformers " in shown.get()


def test_a_campaign_of_nothing_is_bad_usage(
    run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It met all targets without a single trial, with exit code 0."""
    monkeypatch.setattr(catalogue, "FAULTS", (ELSEWHERE,))
    code, _, error = run_cli("faults", "--pairs", "0", "--clean", "0")
    assert code == 2
    assert "loss.elsewhere: not injectable" in error


def test_the_command_lists_the_catalogue(run_cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run_cli("faults", "--list", "--json", "--only", "loss.")
    listed = json.loads(out)["faults"]
    assert code == 0
    assert {fault["stage"] for fault in listed} == {"loss"}


def test_an_unknown_fault_is_bad_usage(run_cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, error = run_cli("faults", "--only", "nothing.at-all")
    assert code == 2
    assert "no matching fault" in error


@pytest.mark.slow
def test_the_whole_campaign_meets_its_targets(
    run_cli: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, _ = run_cli("faults", "--json")
    form = json.loads(out)
    assert (code, form["missed"]) == (0, [])
    assert form["pairs"] >= 200
    assert form["clean_runs"] >= 200
