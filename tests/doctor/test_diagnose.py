"""Diagnosis: which stages are blamed, which passed an error on, and which were judged at all."""

from __future__ import annotations

import ast
import inspect
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType

import pytest
from doctor_recordings import SYSTEM, case, processed, template, user
from small_recordings import generated, rewarded, stepped

from omni_grpo_core.doctor.coverage import merged
from omni_grpo_core.doctor.diagnose import (
    conclude,
    diagnose,
    diagnose_run,
    merge,
    require_judged,
    to_json,
)
from omni_grpo_core.doctor.evidence import (
    Case,
    Evidence,
    Explanation,
    Finding,
    Look,
    Origin,
    Raised,
    Severity,
    note_judged,
    note_missing,
    raised_by,
)
from omni_grpo_core.doctor.registry import BLAMES, LOOKS
from omni_grpo_core.doctor.symptoms import Symptom
from omni_grpo_core.doctor.verdict import Coverage, Diagnosis, Felt, without_causes
from omni_grpo_core.errors import TraceError
from omni_grpo_core.types import STAGES, Stage, Trace

STEP = case(template(SYSTEM, user()))


def seen(*found: tuple[Stage, Origin], severity: Severity = "breaks") -> tuple[Look, ...]:
    def look(step: Case) -> Iterator[Evidence]:
        for stage, origin in found:
            yield Evidence(stage, "odd", f"{stage} is odd", origin, severity=severity)

    return (look,)


def failing(step: Case) -> Iterator[Evidence]:
    raise IndexError("no row 7")


def blamed(diagnosis: Diagnosis) -> list[Stage]:
    return [finding.stage for finding in diagnosis.findings]


def why(diagnosis: Diagnosis, stage: Stage) -> str:
    return next(c.why for c in diagnosis.coverage if c.stage == stage)


def test_only_stages_that_added_an_error_are_blamed() -> None:
    looks = seen(("logits", "inherited"), ("loss", "added"), ("batch", "added"))
    diagnosis = diagnose(STEP, looks=looks, rules=())
    assert blamed(diagnosis) == ["batch", "loss"]
    assert diagnosis.state("logits") == "inherited"
    assert diagnosis.first is not None
    assert diagnosis.first.stage == "batch"


def test_unknown_is_blamed_unless_an_earlier_error_is_certain() -> None:
    alone = diagnose(STEP, looks=seen(("media", "unknown")), rules=())
    assert blamed(alone) == ["media"]
    after = diagnose(STEP, looks=seen(("media", "unknown"), ("text", "added")), rules=())
    assert blamed(after) == ["text"]
    assert after.state("media") == "inherited"
    before = diagnose(STEP, looks=seen(("media", "unknown"), ("loss", "added")), rules=())
    assert blamed(before) == ["media", "loss"]


def test_a_recipe_that_differs_explains_no_later_error() -> None:
    """One of two eos ids was left out, and everything after it counted as inherited."""
    looks = (
        *seen(("completion", "added"), severity="differs"),
        *seen(("reward", "unknown"), ("completion", "unknown")),
    )
    diagnosis = diagnose(STEP, looks=looks, rules=())
    assert [(f.stage, f.severity) for f in diagnosis.findings] == [
        ("completion", "breaks"),
        ("reward", "breaks"),
    ]
    certain = diagnose(STEP, looks=(*looks, *seen(("text", "added"))), rules=())
    assert [(f.stage, f.severity) for f in certain.findings] == [
        ("text", "breaks"),
        ("completion", "differs"),
    ]


def explain(step: Case, evidence: Sequence[Evidence]) -> Iterator[Explanation]:
    for proof, name in (("", "guess"), ("made again", "proved"), ("", "proved")):
        yield Explanation(name, "loss", "seen", "harm", "fix", proof=proof)
    yield Explanation("elsewhere", "text", "seen", "harm", "fix")


def test_causes_are_ranked_and_listed_with_their_stage() -> None:
    diagnosis = diagnose(STEP, looks=seen(("loss", "added")), rules=(explain,))
    assert [cause.cause for cause in diagnosis.findings[0].causes] == ["proved", "guess"]
    assert [cause.proved for cause in diagnosis.findings[0].causes] == [True, False]
    assert blamed(diagnosis) == ["loss"], "a rule makes no finding"


def test_what_breaks_the_run_is_explained_before_what_differs() -> None:
    mild = Evidence("loss", "mild", "mild", severity="differs")
    grave = Evidence("loss", "grave", "grave")

    def rule(step: Case, evidence: Sequence[Evidence]) -> Iterator[Explanation]:
        for item, proof in ((mild, "made again"), (grave, "")):
            yield Explanation(
                item.fact, "loss", item.sentence, "", "", proof=proof, explains=(item,)
            )

    [finding] = diagnose(STEP, looks=(lambda step: (mild, grave),), rules=(rule,)).findings
    assert finding.severity == "breaks"
    assert [cause.cause for cause in finding.causes] == ["grave", "mild"]
    assert [item.fact for item in finding.evidence] == ["grave", "mild"]


def test_without_causes_no_stage_is_lost() -> None:
    """For every kind of finding: with, without, and with those of a rule that failed."""

    def broken(step: Case, evidence: Sequence[Evidence]) -> Iterator[Explanation]:
        yield from explain(step, evidence)
        raise KeyError("values")

    looks = seen(("loss", "added"), ("text", "added"), ("batch", "unknown"), ("logits", "added"))
    stages = [
        blamed(diagnose(STEP, causes=causes, looks=looks, rules=rules))
        for causes, rules in ((True, (explain,)), (False, (explain,)), (True, (broken,)))
    ]
    assert stages == [["text", "logits", "loss"]] * 3
    bare = without_causes(diagnose(STEP, looks=looks, rules=(explain,)))
    assert blamed(bare) == stages[0]
    assert {finding.causes for finding in bare.findings} == {()}


# ---------------------------------------------------------------------------- coverage


def test_a_look_that_fails_does_not_stop_the_others() -> None:
    diagnosis = diagnose(STEP, looks=(failing, *seen(("loss", "added"))), rules=())
    assert blamed(diagnosis) == ["loss"]
    assert any("failing failed on this recording" in note for note in diagnosis.missing)


def test_a_stage_is_sound_only_where_a_value_of_it_was_compared() -> None:
    """A trace with any call of a kind was ✓ for its stages, although nothing in it was judged."""

    def idle(step: Case) -> Iterator[Evidence]:
        yield from ()

    def judging(step: Case) -> Iterator[Evidence]:
        note_judged(step, "text")
        note_missing(step, "its rows are unknown", "conversation")
        yield from ()

    step = case(template(SYSTEM, user()))
    diagnosis = diagnose(step, looks=(judging,), rules=())
    assert diagnosis.judged == ("text",)
    assert diagnosis.state("conversation") == "unjudged"
    assert why(diagnosis, "conversation") == "its rows are unknown"
    assert diagnosis.state("gradient") == "unseen"
    assert why(diagnosis, "gradient") == "no optimizer step was recorded"
    nothing = diagnose(case(processed("")), looks=(idle,), rules=())
    assert nothing.judged == ()
    assert why(nothing, "batch") == "no reference: pass --checkpoint"
    elsewhere = replace(case(processed("")), no_reference="qwen2_5_vl is no omni model")
    assert why(diagnose(elsewhere, looks=(), rules=()), "batch").endswith("is no omni model")


def test_a_stage_on_which_a_look_failed_is_not_called_sound() -> None:
    """A recording on which every look raised was HEALTHY: a look that raises finds nothing, and no
    findings counted as healthy."""

    def judging(step: Case) -> Iterator[Evidence]:
        note_judged(step, "conversation", "text")
        yield from ()

    (of_text,) = (look for look in LOOKS if look.__name__ == "look_rendering")
    fresh = case(template(SYSTEM, user()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLAMES, failing, BLAMES[of_text])
        known = diagnose(fresh, looks=(judging, failing), rules=())
    assert known.judged == ("conversation",)
    assert (known.state("text"), known.state("batch")) == ("failed", "unseen")
    assert why(known, "text") == "failing failed on this recording (IndexError: no row 7)"
    other = diagnose(case(template(SYSTEM, user())), looks=(judging,), rules=())
    assert merge([known, other]).judged == ("conversation",), "not sound in any step, then"


def test_nothing_judged_is_no_verdict() -> None:
    step = case(template(SYSTEM, user()))
    with pytest.raises(TraceError, match=r"could be judged: failing failed.*no row 7"):
        require_judged(diagnose(step, looks=(failing,), rules=()), "run")
    with pytest.raises(TraceError, match="it has no trainer calls"):
        require_judged(diagnose(case(), looks=(), rules=()), "run")
    require_judged(diagnose(step, looks=seen(("text", "added")), rules=()), "run")


def test_every_stage_that_a_look_blames_is_registered() -> None:
    """The stages named in an area's source are those that the registry lists for its looks."""
    modules: dict[ModuleType, set[Stage]] = defaultdict(set)
    for look in LOOKS:
        modules[sys.modules[look.__module__]] |= {*BLAMES[look]}
    for module, stages in modules.items():
        calls = [
            node
            for node in ast.walk(ast.parse(inspect.getsource(module)))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Evidence"
        ]
        named = {
            constant.value
            for call in calls
            for constant in ast.walk(call.args[0])
            if isinstance(constant, ast.Constant) and constant.value in STAGES
        }
        assert named <= stages, module.__name__


# ---------------------------------------------------------------------------- a run


def test_the_verdict_on_a_run_merges_its_steps() -> None:
    one = diagnose(STEP, looks=seen(("loss", "added")), rules=(explain,))
    other = diagnose(STEP, looks=seen(("text", "added"), ("loss", "inherited")), rules=())
    run = merge([one, other, one])
    assert blamed(run) == ["text", "loss"]
    assert (run.state("text"), run.state("loss")) == ("broken", "broken")
    assert len(run.findings[1].evidence) == 1, "the same evidence in two steps is listed once"


def test_a_run_misses_only_what_none_of_its_steps_has() -> None:
    steps = [
        (Coverage("batch", "unseen", "no processor"), Coverage("reward", "unjudged", "unprobed")),
        (Coverage("batch", "sound"), Coverage("reward", "unseen", "none")),
    ]
    assert merged(steps) == (Coverage("batch", "sound"), Coverage("reward", "unjudged", "unprobed"))


def raised(error: str, *values: object) -> Case:
    step = case(*values)
    return replace(step, trace=Trace({"raised": error}, step.trace.stages))


def test_a_run_that_raised_is_not_healthy() -> None:
    """It was: nothing was found in what was recorded until then."""
    dead = raised("ValueError: no grids", template(SYSTEM, user()))
    run = conclude([dead], [diagnose(dead, looks=(), rules=())])
    assert run.raised == Raised("ValueError: no grids", "text", inside=False)
    assert run.exit_code() == 1
    assert to_json(run)["raised"] == {
        "error": "ValueError: no grids",
        "stage": "text",
        "inside": False,
    }
    require_judged(run, "run")


def test_the_call_that_raised_gives_the_stage() -> None:
    """An error that the trainer caught before is not what ended it."""
    calls = processed("", error="KeyError: 'fps'"), processed("", error="ValueError: no grids")
    seen = raised_by(raised("ValueError: no grids", *calls, template(SYSTEM, user())))
    assert seen is not None
    assert seen.sentence == "the run raised ValueError: no grids, in stage batch"
    caught = raised_by(raised("OSError: disk full", *calls))
    assert caught is not None
    assert caught.sentence == "the run raised OSError: disk full, after stage batch"


@pytest.mark.parametrize("ending", ["KeyboardInterrupt: ", "SystemExit: 0", "SystemExit: "])
def test_a_run_that_was_ended_on_purpose_did_not_fail(ending: str) -> None:
    assert raised_by(raised(ending, template(SYSTEM, user()))) is None


def test_an_empty_trace_of_a_run_that_raised_is_not_healthy() -> None:
    run = conclude([raised("OSError: no GPU")], [diagnose(case(), looks=(), rules=())])
    assert run.broken
    assert run.raised is not None
    assert run.raised.sentence == "the run raised OSError: no GPU, before anything was called"
    assert {coverage.state for coverage in run.coverage} == {"unseen"}


def test_a_symptom_that_nothing_explains_is_the_verdict() -> None:
    """All rewards were 0 for a whole run, and the doctor found nothing: HEALTHY."""
    step = case(rewarded((0.0,) * 4))
    run = conclude([step], [diagnose(step, looks=(), rules=())])
    assert run.findings == ()
    assert isinstance(run.headline, Symptom)
    assert "0" in run.headline.sentence
    assert run.exit_code() == 1
    headline = to_json(run)["headline"]
    assert headline == {"stage": None, "sentence": run.headline.sentence}


def symptom(name: str, *stages: Stage, severity: Severity = "breaks") -> Symptom:
    return Symptom(name, f"{name} hurts", stages, severity)


def finding(stage: Stage, severity: Severity = "breaks") -> Finding:
    return Finding(stage, (Evidence(stage, "odd", "odd", severity=severity),), ())


def test_the_headline_explains_the_worst_symptom() -> None:
    """The earliest stage was the headline, though the run died of another: foreign.md."""
    findings = (finding("media"), finding("completion"), finding("reward", "differs"))
    worst = Felt(symptom("garbage", "completion", "media"), "completion")
    mild = Felt(symptom("capped", "media", severity="differs"), None)
    run = Diagnosis(findings, (), (), symptoms=(worst, mild))
    assert run.headline == findings[1]
    assert run.first == findings[0]
    assert Diagnosis((), (), (), symptoms=(mild,)).exit_code() == 0


def test_a_remark_on_the_recipe_is_no_headline_of_a_healthy_run() -> None:
    """Every run whose reward takes "d" for another answer than "D" began with that sentence, and a
    stranger read it as the verdict."""
    run = Diagnosis((finding("reward", "differs"),), (), ())
    assert run.headline is None
    said = {"stage": None, "sentence": "healthy: nothing is wrong in 0 stages; its recipe differs "
            "from the reference's in reward"}  # fmt: skip
    assert to_json(run)["headline"] == said
    assert to_json(run, strict=True)["headline"] == {"stage": "reward", "sentence": "odd"}


def test_a_loss_that_is_no_number_is_the_reason_of_what_cannot_be_sampled_after_it() -> None:
    """The headline was stage completion, "generate raised", and no loss was blamed."""
    first = case(stepped(losses=(math.nan,)))
    error = "RuntimeError: probability tensor contains either `inf`, `nan` or element < 0"
    second = replace(case(replace(generated(), sequences=None, error=error)), before=first)
    second = replace(second, trace=replace(second.trace, header={"raised": error}))
    run = diagnose_run((first, second))
    assert run.raised is not None
    assert isinstance(run.headline, Finding)
    assert run.headline.stage == "loss"
    assert run.finding("completion") is None


def test_a_recipe_that_differs_breaks_nothing_unless_strict() -> None:
    run = Diagnosis((finding("completion", "differs"),), (), ())
    assert (run.exit_code(), run.exit_code(strict=True)) == (0, 1)
    assert to_json(run)["healthy"] is True
    assert to_json(run, strict=True)["exit"] == 1


def test_a_diagnosis_is_serialisable() -> None:
    plain = to_json(diagnose(STEP, looks=seen(("loss", "added")), rules=(explain,)))
    assert json.loads(json.dumps(plain))["headline"] == {"stage": "loss", "sentence": "seen"}
    assert plain["healthy"] is False
    [found] = plain["findings"]
    assert (found["stage"], found["severity"]) == ("loss", "breaks")
    cause = found["causes"][0]
    assert (cause["cause"], cause["proved"], cause["proof"]) == ("proved", True, "made again")
    assert plain["coverage"]["loss"] == {"state": "broken"}
    assert plain["coverage"]["reward"]["why"]
