"""JUnit XML of both checks: the structure that CI servers read, and text that XML can't hold."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hand_made_check
import hand_made_goldens

from omni_grpo_core.report.junit import check_junit, golden_junit
from omni_grpo_core.types import Check, StageRecord

Run = Callable[..., tuple[int, str, str]]
BAD = hand_made_check.result(
    verdict="fail", failing={"text": Check("text as before", False, "row 1 differs")}, shift=0.0
)
# every Unicode character, including lone surrogates and noncharacters
EVERYTHING = "".join(map(chr, range(0x10000))) + "\U0010ffff"

# from Jenkins' junit-10.xsd: elements with their children in order, required attributes and
# optional attributes
SCHEMA: dict[str, tuple[list[str], set[str], set[str]]] = {
    "testsuites": (["testsuite"], set(), {"name", "time", "tests", "failures", "errors"}),
    "testsuite": (
        ["properties", "testcase"],
        {"name"},
        {"tests", "failures", "errors", "skipped"},
    ),
    "properties": (["property"], set(), set()),
    "property": ([], {"name", "value"}, set()),
    "testcase": (["failure", "skipped"], {"name", "classname"}, set()),
    "failure": ([], set(), {"message", "type"}),
    "skipped": ([], set(), {"message"}),
}


def parsed(data: bytes) -> ET.Element:
    """The root, after checking the schema and all counts."""
    root = ET.fromstring(data)
    assert root.tag == "testsuites"
    for element in root.iter():
        children, must, may = SCHEMA[element.tag]
        names = [child.tag for child in element]
        assert names == sorted(names, key=children.index)
        assert must <= set(element.keys()) <= must | may
    for suite in root:
        cases = suite.findall("testcase")
        for name, tag in (("failures", "failure"), ("skipped", "skipped")):
            assert int(suite.attrib[name]) == len(suite.findall(f"testcase/{tag}"))
        assert (int(suite.attrib["tests"]), suite.attrib["errors"]) == (len(cases), "0")
    for name in ("tests", "failures", "errors"):
        assert int(root.attrib[name]) == sum(int(suite.attrib[name]) for suite in root)
    return root


def failed(root: ET.Element) -> dict[tuple[str, str], ET.Element]:
    return {
        (case.attrib["classname"], case.attrib["name"]): failure
        for case in root.iter("testcase")
        for failure in case.iter("failure")
    }


def test_a_passing_check_has_no_failure() -> None:
    root = parsed(check_junit(hand_made_check.result()))
    (suite,) = root
    assert suite.attrib["name"] == "omni-grpo check"
    properties = {p.attrib["name"]: p.attrib["value"] for p in suite.iter("property")}
    assert properties["torch"] == "9.9"
    names = [(c.attrib["classname"], c.attrib["name"]) for c in suite.iter("testcase")]
    assert ("check.media", "media looked at") in names
    assert names[-2:] == [
        ("check.modality", "video reaches the model"),
        ("check.modality", "audio reaches the model"),
    ]
    assert failed(root) == {}


def test_a_failed_check_says_what_was_seen_and_what_to_do() -> None:
    found = failed(parsed(check_junit(BAD)))
    assert list(found) == [
        ("check.text", "text as before"),
        ("check.modality", "video reaches the model"),
    ]
    text = found["check.text", "text as before"]
    assert text.attrib == {"message": "row 1 differs", "type": "check"}
    assert text.text is not None
    assert "do: render the same text in training and in use" in text.text


def test_of_two_checks_with_one_name_the_right_one_fails() -> None:
    failing = {"text": Check("text looked at", False, "row 1 differs")}
    root = parsed(check_junit(hand_made_check.result(verdict="fail", failing=failing)))
    twins = [c for c in root.iter("testcase") if c.attrib["name"] == "text looked at"]
    assert [len(case) for case in twins] == [0, 1]


def test_a_modality_that_is_not_judged_is_skipped() -> None:
    """Its shift lies between that of two passes (0) and the threshold of 1e-3 nats."""
    root = parsed(check_junit(hand_made_check.result(shift=1e-4)))
    (skipped,) = root.iter("skipped")
    assert "video not judged" in skipped.attrib["message"]


def test_a_suite_for_every_case_and_a_test_for_every_stage() -> None:
    root = parsed(golden_junit(hand_made_goldens.report()))
    assert [(s.attrib["name"], s.attrib["tests"]) for s in root] == [
        ("calm", "3"),
        ("moved", "2"),
        ("broken", "3"),
    ]
    found = failed(root)
    assert {key: failure.attrib["type"] for key, failure in found.items()} == {
        ("golden.moved", "logits"): "benign-drift",
        ("golden.broken", "batch"): "harmful",
        ("golden.broken", "logits"): "harmful",
    }
    batch = found["golden.broken", "batch"]
    assert batch.attrib["message"] == "row 0: 2 more <|VIDEO|>"
    assert batch.text is not None
    assert batch.text.startswith("harmful, origin of the divergence: added\n")
    assert "omni-grpo golden accept broken --reason WHY" in batch.text
    properties = {p.attrib["name"]: p.attrib["value"] for p in root[2].iter("property")}
    assert properties["transformers"] == "5.17.0 → 5.23.0"


def test_a_degenerate_case_has_no_advice_to_accept_it() -> None:
    """``golden accept`` refuses it, so the advice must not name that command."""
    base = hand_made_goldens.report()
    case = replace(
        base.cases[1],
        verdict="degenerate",
        stages=(hand_made_goldens.stage("completion", "degenerate", "added"),),
    )
    (failure,) = failed(parsed(golden_junit(replace(base, cases=(case,))))).values()
    assert failure.text is not None
    assert "golden accept" not in failure.text


def test_what_xml_cannot_hold_is_escaped() -> None:
    """XML 1.0 allows no control characters, surrogates or U+FFFE: one of them makes a parser refuse
    the whole file."""
    texts = [EVERYTHING[start : start + 100] for start in range(0, len(EVERYTHING), 100)]
    checks = tuple(Check(text, False, text) for text in texts)
    extra = [StageRecord("text", None, checks, 0.0)]
    root = parsed(check_junit(hand_made_check.result(verdict="fail", extra=extra)))
    shown = "".join(c.attrib["name"] for c in root.iter("testcase"))
    assert all(character in shown for character in EVERYTHING if character.isprintable())
    for text in texts[:3]:
        parsed(golden_junit(hand_made_goldens.report(text)))


def test_hostile_text_stays_text() -> None:
    root = parsed(golden_junit(hand_made_goldens.report("]]></failure><testcase/>")))
    assert len(list(root.iter("testcase"))) == 8


def test_the_command_writes_it_whole_or_not_at_all(tmp_path: Path, run_cli: Run) -> None:
    """A file of an earlier run is replaced; an unwritable path is refused before the model is
    loaded."""
    file, comment = tmp_path / "junit.xml", tmp_path / "comment.md"
    file.write_text("<half")
    out = ("--junit", file, "--markdown", comment, "--html", tmp_path / "page.html")
    golden = Path(__file__).parents[2] / "golden"
    assert run_cli("golden", "check", "text", "--golden", golden, *out)[0] == 0
    assert [suite.attrib["name"] for suite in parsed(file.read_bytes())] == ["text"]
    assert "| `text` |" in comment.read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"junit.xml", "comment.md", "page.html"}
    code, _, stderr = run_cli("check", "--junit", tmp_path / "nowhere" / "junit.xml")
    assert (code, "junit.xml" in stderr) == (2, True)
