"""What a user allows: it is shown, with the reason, and does not count."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_grpo_core.doctor.allow import read_allowed, require_known, without_allowed
from omni_grpo_core.doctor.evidence import Evidence, Explanation, Finding
from omni_grpo_core.doctor.symptoms import Symptom
from omni_grpo_core.doctor.verdict import Allow, Coverage, Diagnosis, Felt
from omni_grpo_core.errors import ConfigError

TOPK = Evidence("completion", "truncated-sampling", "top_k=50", values={"top_k": 50.0})
EOS = Evidence("completion", "eos-left-out", "one eos of two")
CAUSES = (
    Explanation("gen.topk", "completion", "top_k=50", "harm", "fix", explains=(TOPK,)),
    Explanation("gen.single-eos", "completion", "one eos of two", "harm", "fix"),
)
ZERO = Symptom("rewards-zero", "all rewards are 0", ("reward", "completion"))
RUN = Diagnosis(
    (Finding("completion", (TOPK, EOS), CAUSES),),
    (Coverage("completion", "broken"), Coverage("reward", "sound")),
    (),
    symptoms=(Felt(ZERO, "completion"),),
)
WHY = "the published recipe"


def test_a_cause_is_allowed_with_the_evidence_that_it_explains() -> None:
    run = without_allowed(RUN, [Allow("gen.topk", WHY)])
    [finding] = run.findings
    assert finding.evidence == (EOS,)
    assert [cause.cause for cause in finding.causes] == ["gen.single-eos"]
    [allowed] = run.allowed
    assert (allowed.by.why, allowed.stage, allowed.evidence) == (WHY, "completion", (TOPK,))
    assert run.exit_code() == 1


def test_where_all_of_a_finding_is_allowed_the_run_is_healthy() -> None:
    """Evidence without a known cause is allowed by its own name."""
    run = without_allowed(RUN, [Allow("gen.topk", WHY), Allow("completion/eos-left-out", WHY)])
    assert (run.findings, run.exit_code()) == ((), 0)
    assert run.coverage[0] == Coverage("completion", "allowed", WHY)
    assert run.symptoms[0].allowed
    assert run.headline is None


def test_a_symptom_can_be_allowed() -> None:
    alone = Diagnosis((), (), (), symptoms=(Felt(ZERO, None),))
    assert alone.exit_code() == 1
    run = without_allowed(alone, [Allow("symptom/rewards-zero", "the policy is untrained")])
    assert (run.exit_code(), run.unused) == (0, ())


def test_what_matches_nothing_is_said_and_what_does_not_exist_is_an_error() -> None:
    unused = [Allow("gen.no-eos", WHY), Allow("loss/odd", WHY)]
    run = without_allowed(RUN, unused)
    assert run.unused == tuple(unused)
    known = ["gen.no-eos", "gen.topk", "gen.temperature"]
    require_known(run.unused, known)
    with pytest.raises(ConfigError, match=r"'gen.topkk'.*gen.topk"):
        require_known([Allow("gen.topkk", WHY)], known)
    with pytest.raises(ConfigError, match="no known cause"):
        require_known([Allow("nostage/odd", WHY)], known)


def write(folder: Path, text: str) -> Path:
    (folder / "pyproject.toml").write_text(text)
    return folder


def test_the_file_gives_a_reason_for_each(tmp_path: Path) -> None:
    entries = 'allow = [{ cause = "gen.topk", why = "the published recipe" }]'
    folder = write(tmp_path, f"[tool.omni-grpo.doctor]\n{entries}\n") / "scripts"
    folder.mkdir()
    assert read_allowed(folder) == (Allow("gen.topk", WHY),), "the nearest one above"
    write(folder, "[project]\nname = 'x'\n")
    assert read_allowed(folder) == ()


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ('allow = [{ cause = "gen.topk" }]', "why"),
        ('allow = [{ cause = "gen.topk", why = " " }]', "no reason"),
        ('allow = [{ cause = "gen.topk", why = "x", until = 3 }]', "until"),
        ('allow = ["gen.topk"]', "gen.topk"),
        ('allow = "gen.topk"', "gen.topk"),
        ("allowed = []", "allowed"),
        ("allow = [", "cannot be read"),
    ],
)
def test_a_section_that_is_not_as_documented_is_an_error(
    section: str, wanted: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, f"[tool.omni-grpo.doctor]\n{section}\n")
    with pytest.raises(ConfigError, match=wanted) as caught:
        read_allowed(folder)
    assert "pyproject.toml" in str(caught.value)


def test_a_section_that_is_no_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_allowed(write(tmp_path, "tool = 3\n"))
