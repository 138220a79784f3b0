"""Many pytest workers update one suite at once: nothing is lost, half-written or left over.

``OMNI_GRPO_ROUNDS`` sets the number of rounds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from golden_project import KEY, REASON, contents, git, make_project

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.golden.pending import regen
from omni_grpo_core.golden.review import accept
from omni_grpo_core.golden.store import PENDING
from omni_grpo_core.golden.suite import load_suite

pytestmark = pytest.mark.slow

CASES = tuple(f"c{number:02}" for number in range(60))
ROUNDS = int(os.environ.get("OMNI_GRPO_ROUNDS", "3"))
WORKERS = (  # of the first rounds; later ones have the first
    ("-n", "4"),
    ("-n", "4", "--omni-stages", "-k", "sample or logits"),  # one case on two workers
    ("--dist", "each", "--tx", "4*popen"),  # every case on all workers
)
STATES = ("missing", "changed", "accepted")


@dataclass(frozen=True)
class Project:
    """``stored``: goldens of each state. ``pending``: what one process writes for each state of a
    case, by file."""

    golden: Path
    stored: Path
    pending: Mapping[str, Mapping[str, Mapping[str, bytes]]]

    def put(self, case: str, state: str) -> None:
        """Put a case's goldens into a state."""
        shutil.rmtree(self.golden / case, ignore_errors=True)
        if state != "missing":
            shutil.copytree(self.stored / state / case, self.golden / case)

    def waiting(self) -> dict[str, dict[str, bytes]]:
        return {case: contents(self.golden / PENDING / case) for case in CASES}

    def kept(self) -> dict[str, bytes]:
        """Every file that is not pending."""
        return {n: raw for n, raw in contents(self.golden).items() if not n.startswith(PENDING)}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, policy: Policy) -> Project:
    """60 cases, each with a header of its own. ``changed`` goldens are those of another row."""
    base = tmp_path_factory.mktemp("base")
    golden, stored = make_project(base / "project"), base / "stored"
    cases = {
        name: {"rows": [20 + number % 2], "settings": {"max_new_tokens": 4, "seed": number}}
        for number, name in enumerate(CASES)
    }
    (golden / "suite.yaml").write_text(yaml.safe_dump({"cases": cases}))
    (golden.parent / "pytest.ini").write_text("[pytest]\n")
    git(golden.parent, "add", ".")
    git(golden.parent, "commit", "-q", "-m", "60 cases")
    suite = load_suite(golden)
    made = Project(golden, stored, {})
    regen(policy, suite, golden, KEY)
    missing = made.waiting()
    accept(golden, CASES, REASON, suite)
    for at, case in enumerate(CASES):
        shutil.copytree(golden / case, stored / "accepted" / case)
        shutil.copytree(golden / CASES[at ^ 1], stored / "changed" / case)
    for case in CASES:
        made.put(case, "changed")
    regen(policy, suite, golden, KEY)
    changed = made.waiting()
    assert len({str(files) for files in missing.values()}) == len(CASES)
    assert all(changed.values())
    nothing: dict[str, dict[str, bytes]] = {case: {} for case in CASES}
    pending = {"missing": missing, "changed": changed, "accepted": nothing}
    return Project(golden, stored, pending)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_workers_write_what_one_process_writes(project: Project, number: int) -> None:
    """Each round finds what the round before left pending."""
    states = {case: STATES[(at + number) % 3] for at, case in enumerate(CASES)}
    for case, state in states.items():
        project.put(case, state)
    kept = project.kept()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", "pytest.ini", "-p", "no:cacheprovider",
         "--snapshot-update", *WORKERS[number if number < len(WORKERS) else 0], "golden"],
        cwd=project.golden.parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stdout + done.stderr) == (0, False), done.stdout
    assert "40 cases pending: omni-grpo golden review" in done.stdout
    assert project.waiting() == {
        case: project.pending[state][case] for case, state in states.items()
    }
    assert project.kept() == kept
    assert [path for path in project.golden.rglob(".*") if path.name != PENDING] == []
