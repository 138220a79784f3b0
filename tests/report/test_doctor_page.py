"""The page of a diagnosis: of real recordings, broken and sound, and of hostile text."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_recordings import advantaged, case, generated, rewarded
from test_check_page_for_real import browse

from omni_grpo_core.doctor.continuity import Edge
from omni_grpo_core.doctor.diagnose import conclude, diagnose
from omni_grpo_core.doctor.evidence import Case, Evidence, Explanation, Finding, Raised, Severity
from omni_grpo_core.doctor.load import as_cases
from omni_grpo_core.doctor.symptoms import Symptom
from omni_grpo_core.doctor.verdict import Allow, Allowed, Coverage, Diagnosis, Felt
from omni_grpo_core.faults.fault import Fault
from omni_grpo_core.faults.plan import BY_ID
from omni_grpo_core.faults.trial import config_for, recorded, reference
from omni_grpo_core.report.html import write_page
from omni_grpo_core.report.html.data_way import way
from omni_grpo_core.report.html.doctor_page import doctor_page
from omni_grpo_core.report.html.loss_ribbon import pushed_rows, rows_without_weight
from omni_grpo_core.trace.calls import ForwardCall, LossGradient
from omni_grpo_core.types import Trace

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<script>alert(1)</script>\x1b[2J"


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


def words(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_a_newcomer_sees_the_stage_the_reason_and_the_fix(broken: str) -> None:
    head = broken[: broken.index('class="pipeline"')]
    assert "✗ BROKEN: stage conversation" in head
    assert "What to change" in head
    assert '<span class="proved">proved</span>' in head
    assert states(broken)["conversation"] == "broken"
    assert '<span class="code">conv.media-twice</span>' in broken


def test_it_shows_what_the_model_was_given_and_its_answers(broken: str) -> None:
    assert '<ol class="ribbon">' in broken
    assert 'class="run video"' in broken
    assert 'class="run audio"' in broken
    assert '<div class="completion">' in broken


def test_it_draws_the_way_of_the_data(broken: str) -> None:
    drawing = broken[broken.index("<svg") : broken.index("</svg>")]
    boxes = re.findall(r'class="box( is-broken)?"><rect.*?<text[^>]*>([^<]+)', drawing)
    assert [label for _, label in boxes] == [
        *("rendered text", "processor", "generate", "the scoring forward", "rewards"),
        *("loss", "optimizer step"),
    ]
    assert [label for mark, label in boxes if mark] == ["rendered text"]
    assert "The way of the data" in broken


def test_it_shows_what_the_loss_pushed(broken: str) -> None:
    assert re.search(r'class="tok (up|down)[1-4]"', broken)
    assert "failed (" not in broken[broken.index('id="coverage"') :]


def test_a_sound_run_is_called_healthy(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "✓ HEALTHY" in page
    assert "broken" not in set(states(page).values())
    assert states(page)["loss"] == "sound"


def page(verdict: Diagnosis, *cases: Case) -> str:
    return doctor_page(cases, [verdict] * len(cases), verdict, None)


def finding(severity: Severity = "breaks", *causes: Explanation) -> Finding:
    return Finding("batch", (Evidence("batch", "odd", "32 rows", severity=severity),), causes)


def test_what_raised_is_said_first() -> None:
    run = Diagnosis((finding(),), (), (), raised=Raised("ValueError: no grids", "batch", True))
    text = words(page(run))
    assert "✗ RAISED in stage batch the run raised ValueError: no grids, in stage batch" in text
    assert text.index("RAISED") < text.index("32 rows")


def test_a_symptom_that_nothing_explains_is_the_headline() -> None:
    zero = Symptom("rewards-zero", "all 8 rewards are 0", ("reward",))
    text = words(page(Diagnosis((), (), (), symptoms=(Felt(zero, None),))))
    assert "✗ BROKEN: nothing seen explains it all 8 rewards are 0" in text
    assert "HEALTHY" not in text


def test_every_proved_cause_is_shown_and_none_is_invented() -> None:
    proofs = [
        Explanation(f"batch.{name}", "batch", "32 rows", "h", "f", proof=f"{name} is the reference",
                    versions="transformers>=4.53,<5.24", links=("https://example.org/1",))
        for name in ("reversed", "rolled")
    ]  # fmt: skip
    fits = Explanation("batch.guess", "batch", "32 rows", "h", "f", against="grids are right")
    shown = page(Diagnosis((finding("breaks", *proofs, fits),), (), ()))
    assert "reversed is the reference; or: rolled is the reference proved" in words(shown)
    assert "reversed is the reference" in words(shown)
    assert "rolled is the reference" in words(shown)
    assert "batch.guess" not in shown
    assert 'href="https://example.org/1"' in shown
    assert "transformers&gt;=4.53,&lt;5.24" in shown
    alone = words(page(Diagnosis((finding("breaks", fits),), (), ())))
    assert "fits, not proved" in alone
    assert "Against it grids are right" in alone
    assert "Cause unknown." in words(page(Diagnosis((finding(),), (), ())))


def test_causes_of_different_evidence_are_both_true() -> None:
    """They were shown as alternatives, or, where only one is proved, not at all."""
    odd, cut = (Evidence("batch", name, f"{name} rows") for name in ("odd", "cut"))
    causes = (
        Explanation("batch.odd", "batch", "odd rows", "h", "even", proof="odd", explains=(odd,)),
        Explanation("batch.guess", "batch", "odd rows", "h", "guess", explains=(odd,)),
        Explanation("batch.cut", "batch", "cut rows", "h", "paste", explains=(cut,)),
    )
    text = words(page(Diagnosis((Finding("batch", (odd, cut), causes),), (), ())))
    assert "And seen cut rows" in text
    late = replace(cut, origin="unknown")
    causes = (*causes[:2], replace(causes[2], explains=(late,)))
    assert "cut rows h" not in words(
        page(Diagnosis((Finding("batch", (odd, late), causes),), (), ()))
    )
    assert "batch.guess" not in text
    assert "What to change even Cause" in text


def test_what_differs_what_is_allowed_and_what_was_not_judged_have_places() -> None:
    evidence = Evidence("completion", "truncated-sampling", "top_k=50")
    run = Diagnosis(
        (finding("differs"),),
        (Coverage("batch", "differs"), Coverage("gradient", "unseen", "no optimizer step")),
        ("two files are gone",),
        allowed=(Allowed(Allow("gen.topk", "the recipe"), "completion", (evidence,)),),
        unused=(Allow("gen.no-eos", "once"),),
    )
    text = words(page(run))
    assert "✓ HEALTHY" in text
    assert "Recipe differs" in text
    assert "gen.topk completion the recipe top_k=50" in text
    assert "gen.no-eos once not found: it can be removed" in text
    assert "gradient no optimizer step" in text
    assert "in part two files are gone" in text


def test_each_answer_has_its_own_rewards() -> None:
    """A function that was called once a completion was listed twice, with the first one's score."""
    first, second = (
        replace(rewarded((value,)), prompts=("?",), completions=(text,))
        for value, text in ((0.25, "up"), (0.75, "down"))
    )
    call = replace(generated(), decoded={"kept": ("up", "down", "left", "right")})
    shown = words(page(Diagnosis((), (), ()), case(call, first, second)))
    assert "up length 0.25 down length 0.75" in shown
    unseen = words(page(Diagnosis((), (), ()), case(first)))
    assert "up length 0.25" in unseen


# --------------------------------------------------------------------------- drawings by hand

RIGHT = Edge("processor", "generate", 0, (0, 1), "each row twice", "ok")


def drawn(*edges: Edge, findings: Sequence[Finding] = ()) -> tuple[list[str], list[str]]:
    """The labels of all boxes, and all lines of text beside arrows."""
    made = way(case(), edges, (), findings)
    assert made is not None
    lines = [label.text for arrow in made.arrows for label in arrow.labels]
    return [("✗ " if box.broken else "") + box.label for box in made.boxes], lines


def test_the_broken_edge_is_drawn_rather_than_the_others_of_its_kind() -> None:
    wrong = replace(RIGHT, number=1, relation="", state="broken", why="row 1 is row 0")
    unjudged = replace(RIGHT, state="not judged", why="too large")
    right = ["processor", "generate"]
    assert drawn(RIGHT, wrong, RIGHT) == (right, ["✗ from processor: row 1 is row 0"])
    assert drawn(unjudged, RIGHT) == (right, ["✓ from processor: each row twice"])
    # what was handed on broke, and not the call that got it
    evidence = Evidence("completion", "edge-swap", "row 1", values={"edge": "a -> b"})
    assert drawn(wrong, findings=[Finding("completion", (evidence,), ())])[0] == right


def test_a_reward_s_edge_names_its_function() -> None:
    edge = Edge("generate", "reward format", 0, (0,), "", "broken", "other texts")
    boxes, lines = drawn(
        RIGHT, edge, findings=[Finding("reward", (Evidence("reward", "x", "x"),), ())]
    )
    assert boxes == ["processor", "generate", "✗ rewards"]
    assert lines[-1] == "✗ from generate: reward format: other texts"


def test_a_circle_of_calls_is_drawn_without_the_way_back() -> None:
    back = Edge("generate", "processor", 0, (), "", "ok")
    assert drawn(RIGHT, back)[0] == ["processor", "generate"]
    assert way(case(), (), (), ()) is None


def scored(weights: list[list[float]], tokens: list[list[int]] | None = None) -> Case:
    """Rows of prompt 7 and completion 5, 6, 9; the last position predicts nothing that is there."""
    ids = torch.tensor([[7, 5, 6, 9]] * len(weights))
    call = generated()
    forward = ForwardCall({"input_ids": ids}, {}, call.modes, None, None, None, "float32", (), None)
    seen = torch.tensor(weights)
    trained = torch.tensor(tokens) if tokens else torch.tensor([[5, 6, 9, -1]] * len(weights))
    one = torch.ones(seen.shape)
    return case(forward, LossGradient(0, "logits", trained, seen, one, 0 * one, 0 * one))


def test_tokens_are_coloured_by_the_sign_and_size_of_their_weight() -> None:
    """The loss falls where a token of negative weight gets likelier: it is pushed up."""
    step = scored([[-4.0, -1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 0.0], [0.0] * 4])
    up, down = pushed_rows(step, lambda ids: "abcdefghij"[ids[0]])
    assert [(token.text, token.kind) for token in up.tokens] == [
        ("f", "up4"), ("g", "up1"), ("j", "out"),
    ]  # fmt: skip
    assert {token.kind for token in down.tokens} == {"down2"}
    assert "row 0: 2 tokens in the loss, pushed up by 1 to 4 a token" in up.title
    assert "row 1: 3 tokens in the loss, pushed down by 2 a token" in down.title
    assert rows_without_weight(step) == 1


def test_a_token_trained_at_another_s_place_is_shown() -> None:
    """Log-probabilities one column early: each place is trained on the token after the next."""
    [row] = pushed_rows(scored([[-1.0, -1.0, -1.0, 0.0]], [[6, 9, 9, -1]]), None)
    assert [(token.text.strip(), token.aimed.strip()) for token in row.tokens] == [
        ("5", "6"), ("6", "9"), ("9", ""),
    ]  # fmt: skip


# --------------------------------------------------------------------------- hostile recordings


def test_recorded_text_is_inert_on_the_page() -> None:
    evidence = Evidence("batch", "odd", HOSTILE, row=0, values={HOSTILE: HOSTILE})
    cause = Explanation(
        "batch.odd", "batch", HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE,
        links=("javascript:alert(1)", HOSTILE), versions=HOSTILE,
    )  # fmt: skip
    zero = Felt(Symptom("rewards-zero", HOSTILE, ("reward",)), None)
    run = Diagnosis(
        (Finding("batch", (evidence,), (cause,)),),
        (Coverage("text", "unjudged", HOSTILE),),
        (HOSTILE,),
        raised=Raised(HOSTILE, "batch", False),
        symptoms=(zero,),
        allowed=(Allowed(Allow("x", HOSTILE), "batch", (evidence,)),),
    )
    texts = (HOSTILE,) * 4
    step = case(generated(), replace(rewarded(), completions=texts), advantaged())
    step = replace(step, trace=Trace({"checkpoint": HOSTILE}, step.trace.stages))
    shown = page(run, step)
    assert "<script" not in shown
    assert "\x1b" not in shown
    assert 'href="javascript' not in shown
    edge = Edge("processor", HOSTILE, 0, (), HOSTILE, "broken", HOSTILE)
    _, lines = drawn(edge)
    assert not any("\x1b" in line for line in lines)


def test_what_cannot_be_drawn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(case: Case) -> None:
        raise IndexError("no row 7")

    monkeypatch.setattr("omni_grpo_core.report.html.doctor_page.edges", failing)
    shown = page(Diagnosis((), (), ()), case())
    assert "the drawing of way failed (IndexError: no row 7)" in shown


@pytest.mark.slow
@pytest.mark.skipif(_CHROMIUM is None, reason="no chromium on the path")
def test_a_browser_shows_it(broken: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_page(file, broken)
    seen = browse(["--dump-dom"], file, tmp_path / "profile")
    assert '<h2 id="verdict">✗ BROKEN: stage conversation</h2>' in seen
    assert seen.count('class="stage') == broken.count('class="stage')
    assert seen.count('class="box') == broken.count('class="box')
