"""Diagnosis: which stages are blamed, which passed an error on, and what rules may add."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import ModuleType

import pytest
from doctor_recordings import SYSTEM, case, processed, template, user

from omni_grpo_core.doctor.diagnose import diagnose, merge, require_judged, to_json
from omni_grpo_core.doctor.evidence import Case, Diagnosis, Evidence, Explanation, Look, Origin
from omni_grpo_core.doctor.registry import BLAMES, LOOKS
from omni_grpo_core.errors import TraceError
from omni_grpo_core.types import STAGES, Stage

STEP = case(template(SYSTEM, user()))


def seen(*found: tuple[Stage, Origin]) -> tuple[Look, ...]:
    def look(step: Case) -> Iterator[Evidence]:
        for stage, origin in found:
            yield Evidence(stage, "odd", f"{stage} is odd", origin)

    return (look,)


def blamed(diagnosis: Diagnosis) -> list[Stage]:
    return [finding.stage for finding in diagnosis.findings]


def test_only_stages_that_added_an_error_are_blamed() -> None:
    looks = seen(("logits", "inherited"), ("loss", "added"), ("batch", "added"))
    diagnosis = diagnose(STEP, looks=looks, rules=())
    assert blamed(diagnosis) == ["batch", "loss"]
    assert diagnosis.inherited == ("logits",)
    assert diagnosis.first is not None
    assert diagnosis.first.stage == "batch"


def test_unknown_is_blamed_unless_an_earlier_error_is_certain() -> None:
    alone = diagnose(STEP, looks=seen(("media", "unknown")), rules=())
    assert blamed(alone) == ["media"]
    after = diagnose(STEP, looks=seen(("media", "unknown"), ("text", "added")), rules=())
    assert blamed(after) == ["text"]
    assert after.inherited == ("media",)
    before = diagnose(STEP, looks=seen(("media", "unknown"), ("loss", "added")), rules=())
    assert blamed(before) == ["media", "loss"]


def explain(step: Case, evidence: Sequence[Evidence]) -> Iterator[Explanation]:
    for proof, name in (("", "guess"), ("made again", "proved"), ("", "proved")):
        yield Explanation(name, "loss", "seen", "harm", "fix", proof=proof)
    yield Explanation("elsewhere", "text", "seen", "harm", "fix")


def test_causes_are_ranked_and_listed_with_their_stage() -> None:
    diagnosis = diagnose(STEP, looks=seen(("loss", "added")), rules=(explain,))
    assert [cause.cause for cause in diagnosis.findings[0].causes] == ["proved", "guess"]
    assert [cause.proved for cause in diagnosis.findings[0].causes] == [True, False]
    assert blamed(diagnosis) == ["loss"], "a rule makes no finding"


def test_without_causes_the_stage_is_still_named() -> None:
    diagnosis = diagnose(STEP, causes=False, looks=seen(("loss", "added")), rules=(explain,))
    assert blamed(diagnosis) == ["loss"]
    assert diagnosis.findings[0].causes == ()


def test_a_look_that_fails_does_not_stop_the_others() -> None:
    def broken(step: Case) -> Iterator[Evidence]:
        raise IndexError("no row 7")

    diagnosis = diagnose(STEP, looks=(broken, *seen(("loss", "added"))), rules=())
    assert blamed(diagnosis) == ["loss"]
    assert any("broken failed on this recording" in note for note in diagnosis.missing)


def test_a_stage_on_which_a_look_failed_is_not_called_sound() -> None:
    """A recording on which every look raised was HEALTHY: a look that raises finds nothing, and no
    findings counted as healthy."""

    def healthy(step: Case) -> Iterator[Evidence]:
        yield from ()

    def broken(step: Case) -> Iterator[Evidence]:
        raise IndexError("no row 7")

    (of_text,) = (look for look in LOOKS if look.__name__ == "look_rendering")
    assert diagnose(STEP, looks=(healthy,), rules=()).seen == ("conversation", "text")
    unknown = diagnose(STEP, looks=(broken,), rules=())
    assert (unknown.seen, unknown.unjudged) == ((), ("conversation", "text"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLAMES, broken, BLAMES[of_text])
        known = diagnose(STEP, looks=(broken,), rules=())
    assert (known.seen, known.unjudged) == (("conversation",), ("text",))
    run = merge([known, diagnose(STEP, looks=(healthy,), rules=())])
    assert (run.seen, run.unjudged) == (("conversation",), ("text",))
    assert to_json(run)["unjudged"] == ("text",)
    require_judged(run, "run")
    with pytest.raises(TraceError, match=r"could be judged: broken failed.*no row 7"):
        require_judged(merge([unknown]), "run")
    with pytest.raises(TraceError, match="it has no trainer calls"):
        require_judged(diagnose(case(), looks=(healthy,), rules=()), "run")


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


def test_the_verdict_on_a_run_merges_its_steps() -> None:
    one = diagnose(STEP, looks=seen(("loss", "added")), rules=(explain,))
    other = diagnose(STEP, looks=seen(("text", "added"), ("loss", "inherited")), rules=())
    run = merge([one, other, one])
    assert blamed(run) == ["text", "loss"]
    assert run.inherited == ()
    assert len(run.findings[1].evidence) == 1, "the same evidence in two steps is listed once"


def test_a_run_misses_only_what_none_of_its_steps_has() -> None:
    no_processor = "no ProcessorCall was recorded: media and batch cannot be judged by it"
    without = diagnose(STEP, looks=(), rules=())
    assert no_processor in without.missing
    whole = diagnose(case(template(SYSTEM, user()), processed("")), looks=(), rules=())
    assert no_processor not in merge([without, whole]).missing
    assert no_processor in merge([without, without]).missing


def test_a_diagnosis_is_serialisable() -> None:
    plain = to_json(diagnose(STEP, looks=seen(("loss", "added")), rules=(explain,)))
    assert json.loads(json.dumps(plain))["first"] == "loss"
    assert plain["healthy"] is False
    assert plain["findings"][0]["causes"][0]["fix"] == "fix"
