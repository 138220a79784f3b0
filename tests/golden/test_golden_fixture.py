"""``omni_golden`` and the syrupy extension, as used in a project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import syrupy

# loaded before the inner runs, which forget what they import
import omni_grpo_core.golden.pytest_fixture
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.syrupy_ext import case_and_stage
from omni_grpo_core.golden.text import parse_golden

pytest_plugins = ["pytester"]
assert omni_grpo_core.golden.pytest_fixture


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An empty project; its runs in this process leave this session's syrupy unchanged."""
    monkeypatch.setattr(syrupy, "_syrupy", syrupy._syrupy)
    pytester.makeini("[pytest]\nfilterwarnings = error")
    return pytester


def write_test(project: pytest.Pytester, body: str, imports: str = "") -> None:
    indented = "\n    ".join(body.splitlines())
    project.makepyfile(
        test_it=f"import torch\n{imports}\ndef test_it(omni_golden, snapshot):\n    {indented}\n"
    )


def run(project: pytest.Pytester, *options: str) -> pytest.RunResult:
    return project.runpytest_inprocess(*options)


def golden_file(project: pytest.Pytester, name: str = "test_it/value") -> Path:
    return project.path / "golden" / f"{name}.txt"


def test_a_golden_is_created_compared_and_updated(project: pytest.Pytester) -> None:
    write_test(project, "omni_golden.check(torch.arange(2400.0).reshape(40, 60))")
    run(project).stdout.fnmatch_lines(
        ["*golden test_it/value: no golden yet; create it with --snapshot-update*"]
    )
    assert not golden_file(project).exists()
    run(project, "--snapshot-update").assert_outcomes(passed=1)
    first = golden_file(project).read_bytes()
    assert parse_golden(first.decode()).header.keys() >= {"torch", "transformers", "python"}
    run(project).assert_outcomes(passed=1)

    write_test(
        project,
        "x = torch.arange(2400.0).reshape(40, 60)\nx[20, 30] += 100\nomni_golden.check(x)",
    )
    result = run(project)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["golden test_it/value differs:", "  self: *a single element of 2400 moved, by 100"]
    )
    assert golden_file(project).read_bytes() == first
    run(project, "--snapshot-update").assert_outcomes(passed=1)
    assert golden_file(project).read_bytes() != first
    run(project).assert_outcomes(passed=1)


def test_noise_passes_and_an_update_leaves_the_file_alone(project: pytest.Pytester) -> None:
    write_test(project, "omni_golden.check({'x': torch.ones(100)})")
    run(project, "--snapshot-update").assert_outcomes(passed=1)
    first = golden_file(project).read_bytes()
    # 1e-7 relative: the last bit of a float32
    write_test(project, "omni_golden.check({'x': torch.ones(100) * (1 + 1e-7)})")
    run(project).assert_outcomes(passed=1)
    run(project, "--snapshot-update").assert_outcomes(passed=1)
    assert golden_file(project).read_bytes() == first


def test_a_snapshot_in_an_assertion_shows_the_same_difference(project: pytest.Pytester) -> None:
    imports = (
        "from omni_grpo_core.golden.syrupy_ext import GoldenExtension, Stored\n"
        "from omni_grpo_core.types import Span"
    )
    asserting = (
        "golden = snapshot.use_extension(GoldenExtension)\n"
        "assert Stored('batch', {{'spans': (Span('video', 0, {start}, 8),)}}, {{'torch': '2'}})"
        " == golden(name='clip/batch')\n"
        "assert {{'plain': {start}}} == golden"
    )
    write_test(project, asserting.format(start=12), imports)
    run(project, "--snapshot-update").assert_outcomes(passed=1)
    assert golden_file(project, "clip/batch").exists()
    # the second assertion of the test, by its number
    assert golden_file(project, "test_it/value.1").exists()
    run(project).assert_outcomes(passed=1)
    write_test(project, asserting.format(start=14), imports)
    result = run(project)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*span video 0 starts at 14, was 12"])


def test_a_snapshot_without_a_golden_says_how_to_make_it(project: pytest.Pytester) -> None:
    write_test(
        project,
        "assert 1 == snapshot.use_extension(GoldenExtension)",
        "from omni_grpo_core.golden.syrupy_ext import GoldenExtension",
    )
    run(project).stdout.fnmatch_lines(["*no golden yet; create it with --snapshot-update*"])


def test_every_stage_of_a_trace_has_its_file(project: pytest.Pytester) -> None:
    imports = "from omni_grpo_core.types import StageRecord, Trace"
    checking = (
        "stages = [StageRecord('text', 'a', (), 0.1), StageRecord('loss', {loss}, (), 0.1)]\n"
        "omni_golden.check_trace(Trace({{'device': 'cpu'}}, tuple(stages)), case='clip')"
    )
    write_test(project, checking.format(loss=0.5), imports)
    run(project, "--snapshot-update").assert_outcomes(passed=1)
    golden = parse_golden(golden_file(project, "clip/loss").read_text())
    assert (golden.stage, golden.header["device"]) == ("loss", "cpu")
    write_test(project, checking.format(loss=0.75), imports)
    run(project).stdout.fnmatch_lines(["golden clip/loss differs:", "  self is 0.75, was 0.5"])


def test_a_broken_golden_is_named_by_line_and_never_overwritten(
    project: pytest.Pytester,
) -> None:
    write_test(project, "omni_golden.check({'a': 1})")
    run(project, "--snapshot-update")
    path = golden_file(project)
    broken = path.read_bytes().replace(b"a: 1", b"a: 2")
    line = broken.split(b"\n").index(b"a: 2") + 1
    for damaged, want in ((broken, f":{line}: found a line that does not"), (b"\xff", "not UTF-8")):
        path.write_bytes(damaged)
        for options in ((), ("--snapshot-update",)):
            result = run(project, *options)
            result.assert_outcomes(failed=1)
            result.stdout.fnmatch_lines([f"*golden test_it/value: trace: {path}*{want}*"])
        assert path.read_bytes() == damaged


def test_goldens_that_no_test_uses_are_left_alone(project: pytest.Pytester) -> None:
    write_test(project, "omni_golden.check(1)")
    run(project, "--snapshot-update")
    golden_file(project).rename(golden_file(project, "test_it/value@cuda-sm90-bf16"))
    run(project, "--snapshot-update").assert_outcomes(passed=1)
    assert golden_file(project, "test_it/value@cuda-sm90-bf16").exists()
    run(project).assert_outcomes(passed=1)


def test_two_values_with_one_name_are_refused(project: pytest.Pytester) -> None:
    write_test(project, "omni_golden.check(1, 'loss')\nomni_golden.check(1, 'loss')")
    result = run(project, "--snapshot-update")
    result.stdout.fnmatch_lines(["*golden 'test_it/loss': found a second value with that name*"])


def test_anything_that_is_not_a_value_is_reported(project: pytest.Pytester) -> None:
    write_test(project, "omni_golden.check({'x': object()})")
    result = run(project, "--snapshot-update")
    result.stdout.fnmatch_lines(["*golden test_it/value: trace: x: found a builtins.object*"])
    assert not golden_file(project).exists()


@pytest.mark.parametrize("name", ["../escape/x", "a b/x", "/x", "x", "a/.hidden", "a/b/c"])
def test_invalid_file_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="wanted case/stage"):
        case_and_stage("test_it", name)


PARALLEL = """
import pytest, torch
@pytest.mark.parametrize("case", range({cases}))
def test_it(omni_golden, case):
    omni_golden.check(torch.arange(100.0) + case + {offset}, case=f"case{{case}}")
"""


def start(project: pytest.Pytester, *options: str) -> subprocess.Popen[str]:
    # several processes: they must not interfere with each other
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", *options],
        cwd=project.path,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def assert_succeeds(run: subprocess.Popen[str]) -> None:
    output, _ = run.communicate()
    assert run.returncode == 0, output


def assert_all_intact(project: pytest.Pytester, cases: int) -> None:
    files = sorted((project.path / "golden").rglob("*"))
    assert len([path for path in files if path.is_file()]) == cases
    for case in range(cases):
        parse_golden(golden_file(project, f"case{case}/value").read_text())


@pytest.mark.slow
def test_rounds_of_parallel_updates_lose_nothing(project: pytest.Pytester) -> None:
    for offset in range(20):
        project.makepyfile(test_it=PARALLEL.format(cases=60, offset=offset))
        # a new offset changes every golden; the second run races the first to each
        both = [
            start(project, "-n", "4", "--snapshot-update") for _ in range(1 if offset % 5 else 2)
        ]
        for one in both:
            assert_succeeds(one)
        assert_all_intact(project, 60)
        run(project).assert_outcomes(passed=60)


def test_two_tests_with_one_name_do_not_silently_share_a_golden(project: pytest.Pytester) -> None:
    test = "def test_it(omni_golden):\n    omni_golden.check({number}{case})\n"
    project.makepyfile(
        test_one=test.format(number=1, case=""), test_two=test.format(number=2, case="")
    )
    result = run(project, "--snapshot-update")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*golden 'test_it' of test_two.py::test_it: found test_one.py::test_it, whose golden*"]
    )
    project.makepyfile(test_two=test.format(number=2, case=", case='another'"))
    run(project, "--snapshot-update").assert_outcomes(passed=2)
    run(project).assert_outcomes(passed=2)


def test_a_processors_output_is_shown_as_text(project: pytest.Pytester) -> None:
    imports = (
        "import numpy as np\nfrom collections import UserDict\n"
        "WORDS = ['<|im_start|>', 'user', 'What', 'Who', '?']\n"
        "def decode(ids): return ' '.join(WORDS[i] for i in ids)"
    )
    giving = (
        "out = UserDict(input_ids=torch.tensor([[0, 1, {ids}]]), rate=np.float32(0.5),\n"
        "    pixels=np.full((2, 2), {pixel}, dtype='>f4'))\n"
        "omni_golden.check(out, decode=decode)"
    )
    write_test(project, giving.format(ids="2, 4", pixel=1), imports)
    run(project, "--snapshot-update").assert_outcomes(passed=1)
    text = golden_file(project).read_text()
    assert '[0]: 0 1 2 4 "<|im_start|> user What ?"' in text
    assert "pixels: float32 [2, 2]" in text
    run(project).assert_outcomes(passed=1)
    write_test(project, giving.format(ids="3, 4", pixel=2), imports)
    run(project).stdout.fnmatch_lines(
        ['  row 0: input_ids column 2 is 3 "Who", was 2 "What"', "  pixels*every element is now 2"]
    )


def test_a_non_numeric_array_is_reported(project: pytest.Pytester) -> None:
    write_test(project, "omni_golden.check({'x': np.array(['a'])})", "import numpy as np")
    run(project).stdout.fnmatch_lines(["*trace: x: found a numpy array of <U1*"])


def test_another_platform_has_a_golden_of_its_own(project: pytest.Pytester) -> None:
    checking = "omni_golden.check({value}, 'loss'{platform})"
    on_gpu = ", platform='cuda-sm90-bf16'"
    write_test(project, checking.format(value=0.5, platform=""))
    run(project, "--snapshot-update").assert_outcomes(passed=1)
    base = golden_file(project, "test_it/loss").read_bytes()
    # the CPU's golden does not apply: missing, not different
    write_test(project, checking.format(value=0.625, platform=on_gpu))
    run(project).stdout.fnmatch_lines(["golden test_it/loss@cuda-sm90-bf16: no golden*"])
    run(project, "--snapshot-update").assert_outcomes(passed=1)
    overlay = parse_golden(golden_file(project, "test_it/loss@cuda-sm90-bf16").read_text())
    assert (overlay.stage, overlay.header["platform"]) == ("loss", "cuda-sm90-bf16")
    assert golden_file(project, "test_it/loss").read_bytes() == base
    run(project).assert_outcomes(passed=1)


def test_only_stages_computed_on_a_device_have_a_golden_per_platform(
    project: pytest.Pytester,
) -> None:
    imports = "from omni_grpo_core.types import StageRecord, Trace"
    stages = "[StageRecord('text', 'a', (), 0.1), StageRecord('loss', 0.5, (), 0.1)]"
    write_test(
        project,
        f"trace = Trace({{}}, tuple({stages}))\n"
        "omni_golden.check_trace(trace, case='clip', platform='cuda-sm90-bf16')",
        imports,
    )
    run(project, "--snapshot-update").assert_outcomes(passed=1)
    names = sorted(path.name for path in (project.path / "golden" / "clip").iterdir())
    assert names == ["loss@cuda-sm90-bf16.txt", "text.txt"]
