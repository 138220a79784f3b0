"""Goldens, suites and tolerances, truncated, altered or made by hand, with correct checksums."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from runner import Case, check_case
from stored_files import GOLDEN, goldens, leaf, sealed

from omni_grpo_core.golden.suite import shipped_goldens

Arguments = Callable[[Path], Sequence[object]]


def named(case: str, arguments: Arguments, *words: str, code: int = 2) -> Case:
    return Case(case, arguments, code, words)


def review(pending: str | bytes, accepted: str | bytes = GOLDEN) -> Arguments:
    """``golden review`` reads everything and needs no model."""
    return lambda folder: ["golden", "review", "--golden", goldens(folder / "g", pending, accepted)]


def with_files(files: Mapping[str, str], *command: str) -> Arguments:
    words = command or ("review",)
    return lambda folder: ["golden", *words, "--golden", goldens(folder / "g", files=files)]


def no_folder(where: str, spoil: Callable[[Path], object], *command: str) -> Arguments:
    """Something other than a folder in place of pending goldens, or of those of a case."""

    def arguments(folder: Path) -> Sequence[object]:
        made = goldens(folder / "g", GOLDEN)
        (made / where).rename((made / where).with_name("elsewhere"))
        spoil(made / where)
        return ["golden", *command, "--golden", made]

    return arguments


LEAVES: dict[str, tuple[str, ...]] = {
    "brackets": ("a: " + "[" * 100_000,),
    "a list": ("a: [1, 2]",),
    "an object": ('a: {"b": 1}',),
    "an integer of 5000 digits": ("a: " + "7" * 5000,),
    "a float of 5000 digits": ("a: 1." + "7" * 5000 + "e",),
    "an unknown word": ("a: undefined",),
    "no value": ("",),
    "a line that no leaf begins": ("  1", "a: 1"),
    "a bad escape": ('a: "\\x41"',),
    "half an escape": ('a: "\\u00"',),
    "text that does not end": ('a: "b',),
    "two texts": ('a: "b" "c"',),
    "a leaf twice": ("a: 1", "a: 2"),
    "a leaf twice, between others": ("a: 1", "b: 1", "a: 1"),
    "an index of 5000 digits": (f"a[{'7' * 5000}]: 1",),
    "a path of brackets": ("[" * 5000 + ": 1",),
    "a path that tries every way": ("a" * 5000 + "!: 1",),
    "a dtype of nothing": ("a: int7 [1]", "  1"),
    "a complex dtype": ("a: complex64 [1]", "  1.0"),
    "a size too few": ("a: float32 [3]", "  1.0 2.0"),
    "a negative size": ("a: float32 [-1]", "  1.0"),
    "a size of 5000 digits": (f"a: float32 [{'9' * 5000}]", "  1.0"),
    "sizes whose product overflows": ("a: float32 [9999999999999, 9999999999999]", "  1.0"),
    "nothing times too much": ("a: float32 [0, 9999999999999999999999]",),
    "nineteen axes": (f"a: float32 [{', '.join(['1'] * 19)}]", "  1.0"),
    "words for numbers": ("a: float32 [1]", "  one"),
    "a sum that is not the numbers'": ("a: int64 [1] sha256 0000000000000000", "  1"),
    "integers without a sum": ("a: int64 [1]", "  1"),
    "integers beyond 64 bits": ("a: int64 [1] sha256 0000000000000000", f"  {2**63}"),
    "integers of 5000 digits": ("a: int64 [1] sha256 0000000000000000", f"  {'7' * 5000}"),
    "a run of a billion": ("a: int64 [1000000000] sha256 0000000000000000", "  7×1000000000"),
    "a count of 10^4000": ("a: int64 [1] sha256 0000000000000000", f"  0..{'9' * 4000} step 1"),
    "a run that does not arrive": ("a: int64 [2] sha256 0000000000000000", "  0..3 step 2"),
    "blanks between numbers and text": (
        "a: int64 [1] sha256 0000000000000000",
        f"  1{' ' * 200_000}x",
    ),
    "text between unexpected quotes": ("a: int64 [1] sha256 0000000000000000", '  1 "a" b'),
    "a ranking of nothing": ("a: ranking logsumexp 1 entropy 1 margin 0",),
    "a ranking of one token twice": (
        *("a: ranking logsumexp 1.0 entropy 1.0 margin 0.0",),
        *("  7 -1.0", "  7 -2.0"),
    ),
    "a ranking of words": ("a: ranking logsumexp x entropy y margin z", "  7 -1.0"),
    "a fingerprint of nothing": ("a: float32 [99] sketch",),
    "a fingerprint that is not whole": (
        *("a: float32 [99] sketch", "  mean 1.0 std 1.0 min 1.0 max 1.0 nan 0 inf 0"),
    ),
    "a fingerprint of another thing": ("a: float32 [99] sketch", "  smell 7"),
    "spans that are fewer": ("a: spans 2", "  video 0 start 1 length 2"),
    "spans that smell": ("a: spans 1", "  smell 0 start 1 length 2"),
    "lines without quotes": ("a: lines 2", '  "b"', "  c"),
    "lines of nothing": ("a: 1", "  2"),
    "no leaf": ("what is this",),
    "a null character": ("a: \x00",),
}
HEADERS: dict[str, tuple[str, ...]] = {
    "an entry twice": ('torch: "1"', 'torch: "2"'),
    "an entry twice, in quotes": ('torch: "1"', '"torch": "2"'),
    "the stage twice": ('stage: "text"',),
    "a bad escape": ('torch: "\\x"',),
    "a bad escape in a key": ('"\\x": "1"',),
    "a number": ("torch: 2",),
    "no value": ("torch",),
}
WHOLE: dict[str, str | bytes] = {
    "empty": "",
    "no text": b"\xff\xfe\x00",
    "a version of 5000 digits": sealed(f"omni-grpo golden {'1' * 5000}", 'stage: "text"', "", ""),
    "a newer version": sealed("omni-grpo golden 2", 'stage: "text"', "", ""),
    "no checksums": GOLDEN[: GOLDEN.index("end: ")],
    "edited": GOLDEN.replace("colour", "color"),
    "cut": GOLDEN[:-20],
    "something else": "{}",
    "of another stage": GOLDEN.replace('stage: "text"', 'stage: "loss"'),
    "sealed of another stage": sealed("omni-grpo golden 1", 'stage: "loss"', "", "a: 1", ""),
    "sealed of no stage": sealed("omni-grpo golden 1", "", "a: 1", ""),
}
READ = (
    *(named(f"leaf: {name}", review(leaf(*lines)), "text.txt:") for name, lines in LEAVES.items()),
    *(
        named(f"header: {name}", review(leaf("a: 1", header=lines)), "text.txt")
        for name, lines in HEADERS.items()
    ),
    *(named(f"file: {name}", review(text), "text.txt") for name, text in WHOLE.items()),
    *(
        named(f"{where}: {name}, {command[0]}", no_folder(where, spoil, *command), where, word)
        for where in (".pending", ".pending/words")
        for name, word, spoil in (
            ("a file", "an ordinary file", lambda path: path.write_text("x")),
            ("a pipe", "a pipe", os.mkfifo),
            ("a link", "a link", lambda path: path.symlink_to("elsewhere")),
            ("a link to nothing", "a link", lambda path: path.symlink_to("nowhere")),
        )
        for command in (("review", "--json"), ("reject", "words"))
    ),
    named("the accepted one is broken", review(GOLDEN, leaf("a: [")), "words/text.txt:4"),
    named("a golden and its equal", review(GOLDEN), "words: new", code=1),
    named(
        "a file name that is not UTF-8",
        lambda folder: [
            *("golden", "review", "--json", "--golden"),
            goldens(folder / "g", leaf("a: 1", header=('verdict: "\udc80"',))),
        ],
        code=1,
    ),
)

NAMES = (
    "../../x",
    "/tmp/x",
    "a/b",
    "..",
    ".",
    "",
    ".pending",
    "suite.yaml",
    "tolerances.yaml",
    "x" * 300,
)
SUITES: dict[str, str] = {
    **{f"a case {name[:20]!r}": f"cases: {{'{name}': {{rows: [20]}}}}" for name in NAMES},
    "a case with a line end": 'cases: {"a\\nb": {rows: [20]}}',
    "a case with a null": 'cases: {"a\\0b": {rows: [20]}}',
    "no cases": "cases: {}",
    "cases that are nothing": "cases:",
    "no word of cases": "data: shipped",
    "cases in a list": "cases: [words]",
    "a case twice": "cases: {words: {rows: [20]}, words: {rows: [0]}}",
    "steps below zero": "cases: {words: {rows: [20], steps: -1}}",
    "steps without end": "cases: {words: {rows: [20], steps: 1000000000}}",
    "rows of text": "cases: {words: {rows: [a]}}",
    "an empty file": "",
    "a list": "[1, 2]",
    "nested 3000 deep": "cases: " + "[" * 3000,
    "a billion laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "python": "cases: !!python/object/apply:os.system ['true']",
    "a tab": "cases:\n\t words: 1",
}
TOLERANCES: dict[str, str] = {
    "below zero": "cpu-fp32: {float: {atol: -1.0, rtol: 0.0}}",
    "of another platform, below zero": "cuda-sm90-bf16: {float: {atol: 1.0, rtol: -0.1}}",
    "NaN": "cpu-fp32: {float: {atol: .nan, rtol: 0.0}}",
    "endless": "cpu-fp32: {float: {atol: .inf, rtol: 0.0}}",
    "as wide as the number": "cpu-fp32: {float: {atol: 0.0, rtol: 1.0}}",
    "text": "cpu-fp32: {float: {atol: wide, rtol: 0.0}}",
    "half": "cpu-fp32: {float: {atol: 1.0}}",
    "twice": "cpu-fp32: {}\ncpu-fp32: {float: {atol: 1.0, rtol: 0.5}}",
    "of no stage": "cpu-fp32: {smell: {atol: 1.0, rtol: 0.5}}",
    "a number": "3",
}


def _suite_is_a_pipe(folder: Path) -> Sequence[object]:
    golden = goldens(folder / "g")
    (golden / "suite.yaml").unlink()
    os.mkfifo(golden / "suite.yaml")
    return ["golden", "review", "--golden", golden]


def _golden_is_a_pipe(folder: Path) -> Sequence[object]:
    golden = goldens(folder / "g")
    (golden / "words/text.txt").unlink()
    os.mkfifo(golden / "words/text.txt")
    return ["golden", "review", "--golden", golden]


def elsewhere(command: str, *more: str) -> Arguments:
    return lambda folder: ["golden", *command.split(), "--golden", folder / "nowhere", *more]


FOLDERS = (
    *(
        named(f"{command} of a folder that is not there", elsewhere(command), "no such folder")
        for command in (
            "check",
            "check text --json",
            "diff",
            "regen",
            "review",
            "prune",
            "reject a",
        )
    ),
    named("calibrate of nothing", elsewhere("calibrate -n 2"), "no such folder"),
    named("bisect of nothing", lambda f: ["golden", "bisect", "x", "y", "--golden", f / "nowhere"]),
    named(
        "accept of nothing", elsewhere("accept a", "--reason", "a good reason"), "no such folder"
    ),
    named("a file for a folder", lambda f: ["golden", "review", "--golden", __file__], "no folder"),
    named("a device", lambda f: ["golden", "check", "--golden", "/dev/null"], "no folder"),
    named("the suite is a pipe", _suite_is_a_pipe, "a pipe"),
    named("a golden is a pipe", _golden_is_a_pipe, "a pipe"),
    named("review with nothing here", lambda f: ["golden", "review"], "no such folder"),
    named("a case of another name", with_files({}, "check", "../../x"), "no case of that name"),
    named(
        "a pending case of another name", with_files({}, "reject", "../words"), "nothing pending"
    ),
)


def altered(stage: str, *lines: str, header: tuple[str, ...] = ()) -> Arguments:
    """The shipped goldens of the text case, with one stage altered and sealed."""

    def make(folder: Path) -> Sequence[object]:
        golden = folder / "g"
        shutil.copytree(shipped_goldens() / "text", golden / "text")
        head = ("omni-grpo golden 1", f'stage: "{stage}"', *header, "")
        (golden / "text" / f"{stage}.txt").write_text(sealed(*head, *lines, ""))
        (golden / "suite.yaml").write_text("cases: {text: {rows: [20]}}")
        return ["golden", "diff", "--golden", golden, "--json"]

    return make


def edited(stage: str, old: str, new: str) -> Arguments:
    """The same with one entry of a stage replaced."""

    def make(folder: Path) -> Sequence[object]:
        lines = (shipped_goldens() / "text" / f"{stage}.txt").read_text().split("\n")
        body = lines[: next(at for at, line in enumerate(lines) if line.startswith("end: "))]
        assert old in body
        words = altered(stage)(folder)
        text = sealed(*(new if line == old else line for line in body))
        (folder / "g" / "text" / f"{stage}.txt").write_text(text)
        return words

    return make


_ROLLED = (
    "self: Rollout",
    "group_size: 1",
    "temperature: 0.0",
    "seed: 0",
    "completions[0]: Completion",
    *('completions[0].group_id: "a"', "completions[0].index: 0", 'completions[0].text: "a"'),
    *('completions[0].finish_reason: "stop"', "completions[0].logprobs: float [1]", "  -0.5"),
)


def _ids(*ids: int) -> tuple[str, str]:
    from omni_grpo_core.golden.leaf_text import leaf_lines
    from omni_grpo_core.trace.leaves import leaves

    head, body = leaf_lines("completions[0].token_ids", leaves(ids)["self"], None)
    return head, body


AGAINST_A_PASS = (
    named("nothing altered in an empty place", lambda f: ["golden", "check", "text"], code=0),
    # equal tokens once made the whole stage exact
    named(
        "another temperature",
        edited("completion", "temperature: 0.0", "temperature: 0.5"),
        "temperature is 0, was 0.5",
        code=1,
    ),
    named("no leaf", altered("completion"), "no leaf"),
    named("another class", altered("completion", "self: Batch", "rows: ()"), code=1),
    named("a class of other fields", altered("completion", "self: Rollout", "seed: 0"), code=1),
    named("an unknown class", altered("completion", "self: Popen", "seed: 0"), code=1),
    named("ids of no vocabulary", altered("completion", *_ROLLED, *_ids(-1)), code=1),
    named("ids beyond 32 bits", altered("completion", *_ROLLED, *_ids(2**40)), code=1),
    named(
        "more logprobs than ids",
        altered("completion", *_ROLLED, *_ids(5, 6)),
        code=1,
    ),
    named("scores of nothing", altered("scoring", "self: ()"), code=1),
    named("scores that are a text", altered("scoring", 'self: "x"'), code=1),
    named("a batch of words", altered("batch", "self: Batch", 'rows: "x"'), code=1),
    named("a surrogate", altered("text", "a: 1", header=('torch: "\\ud800"',)), code=1),
)
CASES = (
    *READ,
    *(named(f"suite: {n}", with_files({"suite.yaml": t}), "suite.yaml") for n, t in SUITES.items()),
    *(
        named(f"tolerances: {n}", with_files({"tolerances.yaml": t}), "tolerances.yaml")
        for n, t in TOLERANCES.items()
    ),
    *FOLDERS,
    *AGAINST_A_PASS,
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_golden_is_compared_or_refused(
    case: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check_case(case, tmp_path, record_property)
