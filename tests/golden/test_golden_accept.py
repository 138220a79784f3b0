"""Many decisions at once: which cases are meant, what is refused, what goes on record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from golden_project import KEY, REASON, contents, doubled, git, with_goldens

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.git_tree import require_git
from omni_grpo_core.golden.pending import pending_changes, regen
from omni_grpo_core.golden.review import Accepted, accept, reject, unsound
from omni_grpo_core.golden.store import read_golden
from omni_grpo_core.golden.suite import load_suite
from omni_grpo_core.golden.text import with_header

Cli = Callable[..., tuple[int, str, str]]
CUDA = "cuda-sm90-bf16"


@pytest.fixture(scope="module")
def template(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pending") / "one"
    golden, suite = with_goldens(folder, policy)
    regen(doubled(policy), suite, golden, KEY)
    return folder


@pytest.fixture
def golden(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The goldens of a project in which a doubled head is pending: ``words``, ``other``, and
    copies of ``other`` that stand for a new case and for one with garbage."""
    # pytest's folder may itself be inside a git tree, as under tox
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    shutil.copytree(template, tmp_path / "project")
    golden = tmp_path / "project" / "golden"
    waiting = golden / ".pending"
    shutil.copytree(waiting / "other", waiting / "other-new")
    shutil.copytree(waiting / "other", waiting / "garbage")
    rewrite(golden, "other-new", verdict="new")
    rewrite(golden, "garbage", verdict="degenerate")
    return golden


def rewrite(golden: Path, case: str = "*", **entries: str) -> None:
    """Pending files as regen would have written them in another situation."""
    for path in (golden / ".pending").glob(f"{case}/*.txt"):
        path.write_text(with_header(path.read_text(), entries))


def add_cuda(golden: Path, case: str) -> None:
    """The case's pending files once more, as if made on a GPU."""
    for path in list((golden / ".pending" / case).glob("*.txt")):
        text = with_header(path.read_text(), {"platform": CUDA, "verdict": "new"})
        path.with_name(f"{path.stem}@{CUDA}.txt").write_text(text)


def left(golden: Path) -> list[str]:
    return list(pending_changes(golden, load_suite(golden)))


def files(done: tuple[Accepted, ...]) -> dict[str, int]:
    return {case: sum(one.case == case for one in done) for case in {one.case for one in done}}


def taken(golden: Path, *cases: str, **options: object) -> dict[str, int]:
    """Accept, and how many goldens of each case that were."""
    return files(accept(golden, cases, REASON, load_suite(golden), **options))  # type: ignore[arg-type]


def refusal(golden: Path, *cases: str, **options: object) -> str:
    """Why accept refuses; it changes nothing."""
    before = contents(golden)
    with pytest.raises(ConfigError) as caught:
        taken(golden, *cases, **options)
    assert contents(golden) == before
    return str(caught.value)


def test_a_pattern_takes_every_case_that_it_matches(golden: Path) -> None:
    assert taken(golden, "other*", "words") == {"other": 3, "other-new": 3, "words": 3}
    assert left(golden) == ["garbage"]


def test_a_name_is_not_a_prefix_and_one_given_twice_counts_once(golden: Path) -> None:
    assert taken(golden, "other", "other", "oth?r") == {"other": 3}
    assert left(golden) == ["garbage", "other-new", "words"]


def test_by_verdict(golden: Path) -> None:
    assert taken(golden, verdicts=["new", "within"]) == {"other-new": 3}
    assert taken(golden, "w*", verdicts=["benign-drift"]) == {"words": 3}
    assert left(golden) == ["garbage", "other"]


def test_by_platform(golden: Path) -> None:
    add_cuda(golden, "words")
    done = accept(golden, (), REASON, load_suite(golden), platform=CUDA)
    assert {(one.case, one.platform, one.verdict) for one in done} == {("words", CUDA, "new")}
    assert taken(golden, "words", verdicts=["benign-drift"]) == {"words": 3}
    assert "pending goldens of cpu-fp32 only" in refusal(golden, "other", platform=CUDA)


def test_a_case_is_taken_by_verdict_only_if_all_its_files_have_it(golden: Path) -> None:
    """An interrupted regen leaves files of two runs, of which one may have been harmful."""
    path = golden / ".pending" / "words" / "logits.txt"
    path.write_text(with_header(path.read_text(), {"verdict": "harmful"}))
    assert "no such case pending" in refusal(golden, "words", verdicts=["benign-drift"])
    assert taken(golden, "words", verdicts=["benign-drift", "harmful"]) == {"words": 3}


def test_reject_selects_the_same_way(golden: Path) -> None:
    add_cuda(golden, "words")
    suite = load_suite(golden)
    assert {p.parent.name for p in reject(golden, (), suite, verdicts=["degenerate"])} == {
        "garbage"
    }
    assert {p.name.partition("@")[2] for p in reject(golden, ["w*"], suite, platform=CUDA)} == {
        f"{CUDA}.txt"
    }
    assert len(reject(golden, (), suite)) == 9
    assert left(golden) == []


@pytest.mark.parametrize(
    ("cases", "options", "words"),
    [
        (["nope*"], {}, ("case nope*", "wanted one of garbage, other, other-new, words")),
        (["other", "nope"], {}, ("case nope:",)),
        ([], {"verdicts": ["exact"]}, ("found no such case pending", "words: benign-drift")),
        ([], {"verdicts": ["fine"]}, ("'fine'", "exact, within, new, benign-drift, harmful")),
    ],
)
def test_what_nothing_pending_matches_is_an_error(
    golden: Path, cases: list[str], options: dict[str, object], words: tuple[str, ...]
) -> None:
    message = refusal(golden, *cases, **options)
    assert all(word in message for word in words), message


def test_one_bad_case_is_named_and_how_to_accept_the_rest(golden: Path) -> None:
    message = refusal(golden)
    assert ".pending/garbage/" in message
    assert "found a degenerate completion" in message
    rest = f"omni-grpo golden accept other other-new words --reason WHY --golden {golden}"
    assert message.endswith(f"accept the rest by {rest}")


def test_of_many_cases_the_rest_is_accepted_by_its_verdicts(golden: Path) -> None:
    for number in range(6):
        shutil.copytree(golden / ".pending" / "other-new", golden / ".pending" / f"n{number}")
    assert "by omni-grpo golden accept --verdict benign-drift,new --reason" in refusal(golden)
    message = refusal(golden, "n*", "g*", verdicts=["new", "degenerate"])
    assert "by omni-grpo golden accept 'n*' 'g*' --verdict new --reason" in message


def test_several_bad_cases_are_all_named(golden: Path) -> None:
    rewrite(golden, "other*", tree="dirty")
    message = refusal(golden, "other*", "words")
    assert "cases other, other-new, first" in message
    assert "made in a tree that is dirty" in message
    assert "accept the rest by omni-grpo golden accept words --reason" in message


def test_no_git_is_put_on_record(golden: Path) -> None:
    shutil.rmtree(golden.parent / ".git")
    rewrite(golden, tree="not under git", commit="unknown")
    message = refusal(golden, "words")
    assert "git init" in message
    assert "--no-git" in message
    assert taken(golden, "words", no_git=True) == {"words": 3}
    header = read_golden(golden / "words" / "logits.txt").header
    assert header["git"] == "not required (--no-git)"
    assert header["tree"] == "not under git"
    assert not [line for line in unsound(golden) if "words" in line]


def test_no_git_accepts_in_a_dirty_tree_and_what_was_made_in_one(golden: Path) -> None:
    (golden.parent / "code.py").write_text("x = 2\n")
    rewrite(golden, "other", tree="dirty")
    assert "--no-git" in refusal(golden, "words")
    assert taken(golden, "words", "other", no_git=True) == {"words": 3, "other": 3}


def without_commit(golden: Path) -> None:
    shutil.rmtree(golden.parent / ".git")
    git(golden.parent, "init", "-q")
    rewrite(golden, tree="under git without a commit", commit="unknown")


def test_before_the_first_commit_new_goldens_are_accepted(golden: Path) -> None:
    """They go into that commit: none misleads."""
    without_commit(golden)
    assert taken(golden, "other-new") == {"other-new": 3}
    header = read_golden(golden / "other-new" / "logits.txt").header
    assert (header["tree"], header["commit"]) == ("under git without a commit", "unknown")
    assert "git" not in header


def test_before_the_first_commit_nothing_is_replaced(golden: Path) -> None:
    without_commit(golden)
    message = refusal(golden, "words", "other-new")
    assert "found a golden to replace, in a tree that is under git without a commit" in message
    assert "; commit the files" in message
    assert "accept the rest by omni-grpo golden accept other-new" in message
    assert taken(golden, "words", no_git=True) == {"words": 3}


def test_what_is_asked_of_git_can_be_asked_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "project" / "not" / "there"
    (tmp_path / "project").mkdir()
    with pytest.raises(ConfigError, match=r"not under git.*git init.*--no-git"):
        require_git(folder)
    assert require_git(folder, no_git=True) == "not under git"
    git(tmp_path / "project", "init", "-q")
    assert require_git(folder) == "under git without a commit"
    git(tmp_path / "project", "commit", "-q", "--allow-empty", "-m", "start")
    assert require_git(folder) == "clean"
    (tmp_path / "project" / "code.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"dirty.*commit or undo the changes, or pass --no-git"):
        require_git(folder)


def test_an_interrupted_acceptance_is_completed_to_the_same_bytes(
    golden: Path, tmp_path: Path
) -> None:
    """Killed between writing a golden and removing its pending file, the second run took the new
    golden for the old one and recorded that it superseded itself."""
    untouched = tmp_path / "untouched" / "golden"
    shutil.copytree(golden.parent, untouched.parent)
    taken(untouched, "words")
    path = golden / ".pending" / "words" / "logits.txt"
    pending = path.read_bytes()
    taken(golden, "words")
    path.parent.mkdir()
    path.write_bytes(pending)
    (golden / "words" / ".logits.txt.0123456789ab.partial").write_text("half of it")
    assert [line for line in unsound(golden) if "words: found 1 pending" in line]
    assert taken(golden, "words") == {"words": 1}
    assert contents(golden) == contents(untouched)


def test_before_the_first_commit_too(golden: Path) -> None:
    without_commit(golden)
    path = golden / ".pending" / "other-new" / "logits.txt"
    pending = path.read_bytes()
    taken(golden, "other-new")
    path.parent.mkdir()
    path.write_bytes(pending)
    assert taken(golden, "other-new") == {"other-new": 1}
    assert read_golden(golden / "other-new" / "logits.txt").header["supersedes"] == "nothing"


def test_of_two_acceptances_at_once_one_finds_nothing_left(golden: Path) -> None:
    shutil.rmtree(golden / ".pending" / "garbage")

    def decide(_: int) -> str:
        try:
            return str(sorted(taken(golden).items()))
        except ConfigError as error:
            return error.got

    with ThreadPoolExecutor(2) as pool:
        outcomes = sorted(pool.map(decide, range(2)))
    assert outcomes == ["[('other', 3), ('other-new', 3), ('words', 3)]", "nothing pending"]
    header = read_golden(golden / "words" / "logits.txt").header
    old = git(golden, "show", "HEAD:golden/words/logits.txt")
    assert header["supersedes"] != "nothing"
    assert 'supersedes: "nothing"' in old


def test_everything_is_decided_on_only_if_asked_for(golden: Path, run_cli: Cli) -> None:
    before = contents(golden)
    for verb in ("accept", "reject"):
        code, _, err = run_cli("golden", verb, "--golden", golden)
        assert code == 2
        assert "pending: garbage, other, other-new, words" in err
        assert f"omni-grpo golden {verb} --all" in err
        code, _, err = run_cli("golden", verb, "words", "--all", "--golden", golden)
        assert (code, "found cases and --all" in err) == (2, True)
    assert contents(golden) == before


def test_the_summary_of_an_acceptance(golden: Path, run_cli: Cli) -> None:
    where = ("--golden", golden, "--reason", "first")
    verdicts = ("--verdict", "new, benign-drift")
    code, out, _ = run_cli("golden", "accept", *verdicts, "--by", "Ann", *where)
    assert code == 0
    assert len(out.splitlines()) == 8, "a line per case, not per file"
    last = "accepted 9 goldens, replacing 6, by Ann: first"
    assert out.splitlines()[-1] == last


def test_everything_is_in_the_json(golden: Path, run_cli: Cli) -> None:
    where = ("--golden", golden, "--json")
    reason = ("--reason", "first", "--no-git", "--by", "Ann")
    code, out, _ = run_cli("golden", "accept", "other-new", *reason, *where)
    done = json.loads(out)
    assert code == 0
    assert done.pop("accepted")[0] == {
        "file": str(golden / "other-new" / "completion.txt"),
        "supersedes": "nothing",
        "case": "other-new",
        "platform": KEY,
        "verdict": "new",
    }
    case = {"case": "other-new", "platform": KEY, "verdict": "new", "goldens": 3, "replaced": 0}
    assert done == {"cases": [case], "by": "Ann", "reason": "first", "no_git": True}
    code, out, _ = run_cli("golden", "reject", "--all", *where)
    assert (code, json.loads(out)["cases"]) == (0, {"garbage": 3, "other": 3, "words": 3})
    code, _, err = run_cli("golden", "reject", "--all", "--golden", golden)
    assert (code, "nothing pending" in err) == (2, True)


def test_a_review_without_git(golden: Path, run_cli: Cli) -> None:
    code, out, _ = run_cli("golden", "review", "--no-git", "--golden", golden)
    assert code == 1
    assert out.splitlines()[0] == "new: other-new: 3 goldens"
    assert f"  omni-grpo golden accept --verdict new --reason WHY --golden {golden}" in out
