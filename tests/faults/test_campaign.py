"""What a campaign runs, and how it counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from omni_grpo_core.doctor.evidence import Severity
from omni_grpo_core.doctor.registry import CAUSES
from omni_grpo_core.faults import healthy
from omni_grpo_core.faults import plan as catalogue
from omni_grpo_core.faults.boundary import PLACES
from omni_grpo_core.faults.campaign import Result, Row, perform, run
from omni_grpo_core.faults.config import ROWS, LoopConfig
from omni_grpo_core.faults.healthy import HEALTHY, HealthyLoop
from omni_grpo_core.faults.healthy.world import Setting, World
from omni_grpo_core.faults.makes import MAKES
from omni_grpo_core.faults.plan import (
    BY_ID,
    FAULTS,
    Task,
    clean_tasks,
    fault_tasks,
    named_pairs,
    pair_tasks,
    sample,
    spare_pairs,
)
from omni_grpo_core.faults.trial import Blame
from omni_grpo_core.report.terminal.faults import print_result
from omni_grpo_core.types import STAGES, Stage


def _blame(stage: Stage, *proved: str, severity: Severity = "breaks") -> Blame:
    return Blame(stage, severity, proved[0] if proved else "", proved, f"{stage} is off")


HIT = Row(
    kind="fault",
    ids=("pos.no-mask",),
    loop="buffered",
    expected=(("positions",),),
    true=("pos.no-mask",),
    severity="breaks",
    findings=(_blame("positions", "pos.no-mask"),),
    raised=None,
    config="",
    seconds=1.0,
)
UNPROVED = replace(HIT, findings=(_blame("positions"),))
WRONG = replace(HIT, findings=(_blame("positions", "pos.flag-scoring"),))
OTHER_STAGE = replace(HIT, findings=(_blame("batch"), *HIT.findings))
UNSEEN = replace(HIT, findings=())
PAIR = replace(
    HIT,
    kind="pair",
    ids=("pos.no-mask", "loss.sign"),
    expected=(("positions",), ("loss",)),
    true=("pos.no-mask", "loss.sign"),
    findings=(_blame("positions"), _blame("logits"), _blame("loss")),
)
HALF = replace(PAIR, findings=(_blame("positions"),))
NO_EFFECT = replace(HALF, without_effect=("loss.sign",))
CLEAN = replace(HIT, kind="clean", ids=(), expected=(), true=(), findings=())


def test_a_fault_is_right_when_its_stage_is_the_headline() -> None:
    rows = (HIT, UNPROVED, WRONG, OTHER_STAGE, UNSEEN)
    assert [row.detected for row in rows] == [True, True, True, True, False]
    assert [row.stage_right for row in rows] == [True, True, True, False, False]
    assert [row.cause_right for row in rows] == [True, False, False, True, False]
    assert [row.wrong for row in rows] == [(), (), ("pos.flag-scoring",), (), ()]


def test_a_fault_may_accept_another_headline_and_another_cause() -> None:
    """A layer's gradient that is gone is also a layer that does not change: both are true."""
    batch = replace(OTHER_STAGE, expected=(("positions", "batch"),))
    assert batch.stage_right
    assert replace(WRONG, true=("pos.no-mask", "pos.flag-scoring")).wrong == ()


def test_a_cause_that_is_true_of_the_loop_is_not_wrong() -> None:
    """The doctor said top-k of a loop that really samples with top_k=50, and it was counted as a
    wrong cause: 357 trials. Nor is a fault found by what the loop does without it."""
    loop = replace(HIT, recipe=("gen.topk",), findings=(_blame("completion", "gen.topk"),))
    assert (loop.wrong, loop.detected, loop.cause_right) == ((), False, False)
    both = replace(loop, findings=(_blame("completion", "gen.topk", "gen.no-eos"),))
    assert (both.wrong, both.detected) == (("gen.no-eos",), True)
    same = replace(loop, true=("gen.topk",), expected=(("completion",),))
    assert (same.detected, same.cause_right) == (True, True)


def test_recipes_are_causes_that_the_doctor_can_name() -> None:
    named = {*CAUSES, *BY_ID}
    recipes = [*(loop.recipe for loop in HEALTHY), *(make.recipe for make in MAKES.values())]
    assert {cause for recipe in recipes for cause in recipe} <= named


def test_a_recipe_that_differs_is_found_when_it_is_shown_as_one() -> None:
    differs = replace(HIT, severity="differs")
    shown = replace(differs, findings=(_blame("positions", severity="differs"),))
    assert (differs.detected, shown.detected) == (False, True)


def test_what_contradicts_settings_may_be_a_recipe_where_there_are_none() -> None:
    """A mean per micro-batch is TRL's bnpo: the doctor was told to call it broken in loops of
    which it knows no loss type."""
    fault = BY_ID["loss.normaliser"]
    assert [fault.severity_in(noted) for noted in (True, False)] == ["breaks", "differs"]
    always = replace(fault, silent=None)
    assert [always.severity_in(noted) for noted in (True, False)] == ["breaks", "breaks"]


def test_a_pair_is_right_when_both_stages_are_blamed() -> None:
    assert PAIR.stage_right
    assert not HALF.stage_right


def test_a_pair_of_which_one_fault_has_no_effect_is_not_counted() -> None:
    """Advantages of the wrong sign beside rewards that are all 0 were counted as missed: nobody
    could have found them."""
    result = Result((PAIR, NO_EFFECT), True, 1.0)
    assert (result.pairs, result.without_effect, result.missed) == ((PAIR,), (NO_EFFECT,), ())
    form = result.to_json()
    assert (form["pairs"], form["pairs_right"], form["pairs_without_effect"]) == (1, 1, 1)
    assert form["rows"][1]["without_effect"] == ("loss.sign",)
    assert Result((replace(NO_EFFECT, findings=WRONG.findings),), True, 1.0).wrong


def test_missed_targets_are_reported() -> None:
    assert Result((HIT, PAIR, CLEAN), True, 1.0).missed == ()
    alarm = replace(CLEAN, findings=(_blame("loss"),))
    rows = (HIT, WRONG, UNSEEN, HALF, CLEAN, alarm)
    assert Result(rows, True, 1.0).missed == (
        "detected 66.7%, wanted 98%",
        "stage_right 66.7%, wanted 98%",
        "cause_right 33.3%, wanted 90%",
        "pairs 0.0%, wanted 95%",
        "1 trials with a wrong cause, wanted none",
        "1 false alarms, wanted none",
    )


def test_a_sound_loop_that_raises_is_a_false_alarm() -> None:
    assert Result((replace(CLEAN, raised="ValueError"),), True, 1.0).false_alarms


def test_a_sound_loop_whose_recipe_differs_is_none() -> None:
    differs = (_blame("completion", severity="differs"),)
    assert not Result((replace(CLEAN, findings=differs),), True, 1.0).false_alarms


def test_without_causes_no_cause_is_counted() -> None:
    result = Result((HIT, UNPROVED), False, 1.0)
    assert result.missed == ()
    assert result.to_json()["cause_right"] is None


def test_the_json_has_the_documented_keys() -> None:
    form = json.loads(json.dumps(Result((HIT, PAIR, CLEAN), True, 2.0, planned=9).to_json()))
    counts = {key: form[key] for key in (
        "planned", "run", "faults", "injected", "detected", "stage_right", "cause_right",
        "wrong_causes", "pairs", "clean_runs", "false_alarms",
    )}  # fmt: skip
    assert list(counts.values()) == [9, 3, 1, 1, 1, 1, 1, 0, 1, 1, 0]
    assert form["loops"] == {"buffered": 1}
    assert form["rows"][0]["blamed"] == ["positions"]


def test_the_table_shows_what_went_wrong() -> None:
    console = Console(width=160, record=True, quiet=True)
    with console.capture() as shown:
        console.quiet = False
        print_result(console, Result((HIT, UNSEEN, HALF), True, 1.0))
    text = shown.get()
    assert "✗ pos.no-mask  buffered, not buffered" in text
    assert "pos.no-mask in buffered: wanted positions, blamed nothing" in text
    assert "pos.no-mask + loss.sign in buffered: wanted positions and loss" in text
    assert "missed: detected 50.0%, wanted 98%" in text
    with console.capture() as shown:
        print_result(console, Result((NO_EFFECT,), True, 1.0))
    text = shown.get()
    assert "pos.no-mask + loss.sign in buffered: loss.sign changes nothing" in text
    assert "0 pairs: both stages named in 0, 1 more of which one fault has no effect" in text
    assert "wanted" not in text


def test_pairs_are_of_different_stages_and_both_can_show() -> None:
    tasks = pair_tasks(FAULTS, 300, seed=1)
    assert len(tasks) == len({task.ids for task in tasks}) == 300
    for task in tasks:
        one, other = sorted((BY_ID[id] for id in task.ids), key=lambda f: STAGES.index(f.stage))
        assert one.stage != other.stage
        assert not one.stops
        for fault in (one, other):
            assert all(getattr(task.config, name) == v for name, v in fault.needs.items())


def test_spare_pairs_are_others() -> None:
    drawn = pair_tasks(FAULTS, 200, 0)
    spare = spare_pairs(FAULTS, drawn, 0)
    assert len({task.ids for task in (*drawn, *spare)}) == 400
    assert spare == spare_pairs(FAULTS, drawn, 0)


def test_the_same_seed_draws_the_same() -> None:
    assert pair_tasks(FAULTS, 20, 3) == pair_tasks(FAULTS, 20, 3) != pair_tasks(FAULTS, 20, 4)
    assert clean_tasks(20, 3) == clean_tasks(20, 3) != clean_tasks(20, 4)
    tasks = [*fault_tasks(FAULTS), *pair_tasks(FAULTS, 20, 3), *clean_tasks(20, 3)]
    assert sample(tasks, 150, 3) == sample(tasks, 150, 3) != sample(tasks, 150, 4)


def test_a_sample_has_every_fault_and_something_of_each_kind() -> None:
    tasks = [*fault_tasks(FAULTS), *pair_tasks(FAULTS, 200, 0), *clean_tasks(440, 0)]
    drawn = sample(tasks, 400, seed=0)
    assert len(drawn) == 400
    assert {task.ids[0] for task in drawn if task.kind == "fault"} == set(BY_ID)
    assert {task.kind for task in drawn} == {"fault", "pair", "clean", "healthy"}
    assert len({task.loop for task in drawn if task.kind == "fault"}) >= 4
    assert sample(tasks[:3], 400, seed=0) == tasks[:3]


def test_clean_configurations_cover_every_setting() -> None:
    tasks = [task for task in clean_tasks(440, seed=0) if isinstance(task.config, LoopConfig)]
    assert {task.loop for task in tasks} == {*MAKES, *PLACES}
    assert len(set(tasks)) == len(tasks)
    configs = [
        task.config
        for task in tasks
        if isinstance(task.config, LoopConfig) and task.loop not in PLACES
    ]
    for name in ("audio", "dtype", "group_size", "lora", "checkpointing", "beta", "iterations",
                 "accumulation", "partial", "freeze_towers", "loss_type"):  # fmt: skip
        assert len({getattr(config, name) for config in configs}) > 1, name
    for config in configs:
        allowed = {row for rows in ROWS[config.audio].values() for row in rows}
        assert set(config.rows) <= allowed
        assert len(set(config.rows)) == len(config.rows)


@pytest.fixture(scope="module")
def ran() -> tuple[Result, list[Row]]:
    """A fault and a clean loop, and what was reported as each ended."""
    planted = fault_tasks([BY_ID["step.detached"]])[:1]
    seen: list[Row] = []
    tasks = [*planted, Task("clean", (), LoopConfig(), "buffered")]
    return run(tasks, jobs=1, on_row=seen.append), seen


def test_a_fault_and_a_clean_loop_from_end_to_end(ran: tuple[Result, list[Row]]) -> None:
    result, seen = ran
    assert [row.stage_right for row in result.of("fault")] == [True]
    assert [row.cause_right for row in result.of("fault")] == [True]
    assert result.false_alarms == ()
    assert len(seen) == 2


def test_a_pair_without_effect_is_found_by_its_run_and_replaced() -> None:
    """A prompt scored with its completion earns nothing, whatever was answered: with all advantages
    0 their sign changes no number."""
    pair = named_pairs(BY_ID["reward.prompt-inside"], BY_ID["adv.negated"])
    [planted] = [task for task in pair if task.loop == "per-prompt"]
    spares = [Task("clean", (), LoopConfig(), "buffered"), Task("clean", (), LoopConfig())]
    result = run([planted], jobs=1, spares=spares)
    assert [(row.kind, row.without_effect) for row in result.rows] == [
        ("pair", ("adv.negated",)), ("clean", ())
    ]  # fmt: skip
    assert result.pairs == ()


ELSEWHERE = replace(BY_ID["loss.sign"], id="loss.elsewhere", versions="<4")


def test_a_fault_of_other_versions_is_skipped_and_reported(
    run_cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    ran: tuple[Result, list[Row]],
) -> None:
    """The incident's fault is one of transformers, and 5.24.0 no longer has it: injected there it
    does nothing, and the campaign counted it as not detected. Without causes no stage is lost."""
    monkeypatch.setattr(catalogue, "FAULTS", (BY_ID["step.detached"], ELSEWHERE))
    code, out, _ = run_cli(
        "faults", "--json", "--pairs", "0", "--clean", "0", "--jobs", "1", "--no-causes",
        "--loop", "reference",
    )  # fmt: skip
    form = json.loads(out)
    assert (code, form["faults"], form["missed"]) == (0, 1, [])
    [with_causes], [bare] = ran[0].of("fault"), form["rows"]
    assert bare["blamed"] == list(with_causes.blamed) != []
    assert [one["severity"] for one in bare["findings"]] == [
        one.severity for one in with_causes.findings
    ]
    assert not any(one["proved"] for one in bare["findings"])
    assert list(form["skipped"]) == ["loss.elsewhere"]
    assert form["skipped"]["loss.elsewhere"].startswith("not injectable: transformers ")
    console = Console(width=160)
    with console.capture() as shown:
        print_result(console, Result((HIT,), True, 1.0, form["skipped"]))
    assert "– loss.elsewhere: not injectable: transformers " in shown.get()


def test_a_healthy_loop_without_its_package_is_skipped_and_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine without platformdirs, which librosa imports when it is first used, 22 runs of
    healthy loops were counted as false alarms."""

    def needs(package: str) -> Callable[[World], None]:
        def loop(world: World) -> None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)

        return loop

    away = HealthyLoop(needs("platformdirs"))
    broken = HealthyLoop(needs("omni_grpo_core.gone"))
    monkeypatch.setattr(healthy, "BY_NAME", {"away": away, "broken": broken})
    tasks = [Task("healthy", (), Setting("off"), name) for name in ("away", "broken")]
    result = run(tasks, jobs=1)
    assert result.skipped == {"away": "not runnable: no package platformdirs"}
    assert [row.loop for row in result.rows] == ["broken"]
    assert [row.loop for row in result.false_alarms] == ["broken"]


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


@pytest.mark.parametrize("name", ["nothing.at-all", "loss.sign+loss", "loss.sign+adv.clipped+loss"])
def test_an_unknown_fault_is_bad_usage(
    run_cli: Callable[..., tuple[int, str, str]], name: str
) -> None:
    code, _, error = run_cli("faults", "--only", name)
    assert code == 2
    assert "no matching fault" in error


def test_a_named_pair_is_planted_in_every_loop_that_can_have_both() -> None:
    tasks = named_pairs(BY_ID["loss.kl-sign"], BY_ID["conv.system-missing"])
    assert {(task.kind, task.ids) for task in tasks} == {
        ("pair", ("loss.kl-sign", "conv.system-missing"))
    }
    assert {task.loop for task in tasks} >= {"reference", "buffered"}
    # a KL of weight 0 has no sign
    beta = replace(BY_ID["conv.system-missing"], needs={"beta": 0.0})
    assert named_pairs(BY_ID["loss.kl-sign"], beta) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", sorted({fault.stage for fault in FAULTS}))
def test_no_stage_is_lost_without_causes(stage: Stage) -> None:
    """One fault of every stage; sound loops are judged alike."""
    fault = next(fault for fault in FAULTS if fault.stage == stage and not fault.absent)
    task = fault_tasks([fault])[0]
    whole, bare = (perform(task, causes) for causes in (True, False))
    assert bare.blamed == whole.blamed
    assert (bare.stage_right, bare.detected) == (whole.stage_right, whole.detected)
    assert bare.proved == ()


@pytest.mark.slow
def test_faults_between_trainer_and_engine_and_sound_engines(
    run_cli: Callable[..., tuple[int, str, str]],
) -> None:
    """Ten in a run, four of them before parity as well; of weights that are merely other ones
    nothing proves which."""
    asked = ("faults", "--only", "engine.", "--pairs", "0", "--clean", "3", "--jobs", "1")
    code, out, _ = run_cli(*asked, "--json")
    form = json.loads(out)
    assert (code, form["loops"]) == (0, {"engine": 10, "parity": 4})
    names = ("injected", "detected", "stage_right", "cause_right", "wrong_causes")
    assert [form[name] for name in names] == [14, 14, 14, 13, 0]
    assert (form["clean_runs"], form["false_alarms"]) == (3, 0)


@pytest.mark.slow
def test_the_whole_campaign_meets_its_targets(
    run_cli: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, _ = run_cli("faults", "--json", "--all")
    form = json.loads(out)
    assert (code, form["missed"]) == (0, [])
    assert form["pairs"] >= 200
    assert form["clean_runs"] >= 400


def test_an_unknown_loop_is_bad_usage(run_cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, error = run_cli("faults", "--loop", "elsewhere")
    assert code == 2
    assert "no such loop" in error
    assert "per-prompt-noted" in error
