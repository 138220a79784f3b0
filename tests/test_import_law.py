"""Who may import whom, read from the source.

A stage hands a value on; it does not know the stage before or after it. Heavy libraries have few
doors, so that an upgrade of one is felt in few files. And what a person waits for (``--help``, the
import of the package) loads no torch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import omni_grpo_core

PACKAGE = "omni_grpo_core"
ROOT = Path(omni_grpo_core.__file__).parent

NOUNS = frozenset({"types", "errors", "observed"})
STAGES = frozenset(
    {"sample", "conversation", "media", "batch", "policy", "rollout", "rewards", "grpo"}
)
MODEL = frozenset({"dialect", "family", "forward", "towers"})
# settings as plain values: reading a configuration loads no decoder and no torch
CONFIG = frozenset({"media_config", "strict", "bounded", "checkpoint_files", "machine"})
PIPELINE = NOUNS | STAGES | MODEL | CONFIG | {"settings", "stage_checks", "pipeline"}

# Every room of the package, and the rooms it may import from beside its own files.
ROOMS: Mapping[str, frozenset[str]] = {
    # lends its name to record and attach, which are imported when they are asked for
    "__init__": NOUNS | {"recorder"},
    "types": frozenset(),
    "errors": frozenset({"types"}),
    "observed": frozenset({"types"}),
    **dict.fromkeys(STAGES, NOUNS),
    **dict.fromkeys(CONFIG, NOUNS),
    "strict": NOUNS | {"bounded"},
    # a row whose gold no reward can read is refused with the others
    "sample": NOUNS | {"bounded", "rewards"},
    "checkpoint_files": NOUNS | {"bounded", "family"},
    "media": NOUNS | {"bounded", "media_config"},
    # what differs between model families: the two stages that meet a processor or a model ask it
    "family": NOUNS,
    # what transformers calls things, version by version
    "dialect": frozenset(),
    "batch": NOUNS | {"family"},
    "policy": NOUNS | {"family", "checkpoint_files"},
    # the model is the one thing no frozen value carries: what runs it is handed the policy
    "towers": NOUNS | {"policy"},
    "forward": NOUNS | {"dialect", "policy", "towers"},
    "machine": frozenset(),
    "rollout": NOUNS | {"policy", "forward", "machine"},
    # what puts the stages together
    "settings": NOUNS | STAGES | CONFIG,
    "stage_checks": NOUNS | STAGES | MODEL,
    "pipeline": (PIPELINE | {"trace"}) - {"pipeline"},
    "training": PIPELINE | {"check", "trace"},
    "check": PIPELINE | {"trace"},
    "report": PIPELINE | {"trace", "check", "doctor", "golden"},
    "trace": NOUNS | {"bounded"},
    "tiny": PIPELINE,
    # the true vocabulary in the tiny checkpoint's manners
    "realvocab": NOUNS | {"tiny", "trace"},
    "golden": PIPELINE | {"trace", "tiny", "training"},
    # watches foreign trainers: it knows calls, not what should have come out of them
    "recorder": NOUNS | {"dialect", "redaction", "rewards", "trace"},
    "doctor": PIPELINE | {"trace", "recorder"},
    # its trials run in worker processes, which are quieted as the command is
    "faults": PIPELINE | {"trace", "recorder", "doctor", "tiny", "console"},
    # runs by itself under another interpreter, with its libraries kept quiet there too
    "versions": PIPELINE | {"trace", "tiny", "console"},
    "pytest_plugin": NOUNS | {"golden"},
    "__main__": frozenset({"cli", "exits"}),
    "json_answer": frozenset(),
    "redaction": frozenset(),
    "tested": frozenset(),
    "console": NOUNS | {"bounded", "tested"},
    "exits": NOUNS | {"json_answer", "redaction", "__init__"},
    "cli": PIPELINE
    | {
        "console",
        "json_answer",
        "training",
        "check",
        "report",
        "trace",
        "tiny",
        "realvocab",
        "golden",
        "doctor",
        "recorder",
        "faults",
        "versions",
    },
}

# Private modules that stand beside a room because it is one file; only that room may use them.
ANNEXES: Mapping[str, str] = {
    "_decode": "media",
    "_framing": "media",
    "_qwen_utils": "media",
    **dict.fromkeys(("_agreement", "_template"), "policy"),
    "_rows": "sample",
}

# Modules in the house of a pure stage that run the whole pipeline: a room of their own, so that
# the stage's pure files cannot lean on them.
WINGS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "grpo.bundle",
            "grpo.checkpointing",
            "grpo.evaluation",
            "grpo.guard",
            "grpo.learners",
            "grpo.load_config",
            "grpo.memory",
            "grpo.partial",
            "grpo.preflight",
            "grpo.prompt_estimate",
            "grpo.lora",
            "grpo.progress",
            "grpo.records",
            "grpo.step",
            "grpo.team",
            "grpo.train",
            "grpo.train_config",
            "grpo.trainer_guard",
        ),
        "training",
    ),
    # a room's commands are part of the command line, wherever their file lies
    **dict.fromkeys(
        ("rewards.cli", "golden.cli", "doctor.cli", "faults.cli", "realvocab.cli", "versions.cli"),
        "cli",
    ),
}

# The doors of the heavy libraries: modules, or whole rooms, that may import them.
DOORS: Mapping[str, frozenset[str]] = {
    # trainer_guard is a transformers.TrainerCallback: there is no other way into its Trainer
    # and versions calls what is being measured
    "transformers": frozenset(
        {"batch", "policy", "media", "tiny", "realvocab", "versions", "grpo.trainer_guard"}
    ),
    "qwen_omni_utils": frozenset({"batch", "policy", "media", "tiny"}),
    "av": frozenset({"batch", "policy", "media", "tiny"}),
    "accelerate": frozenset({"grpo.team"}),
}

# What must stay quick to import, and what makes an import slow.
QUICK = (
    "omni_grpo_core",
    *(f"omni_grpo_core.{m}" for m in ("types", "errors", "cli", "pytest_plugin")),
    "omni_grpo_core.grpo.load_config",
)
SLOW = ("torch", "transformers", "numpy")


@dataclass(frozen=True)
class Import:
    """One import: ``module`` imports ``target``, both dotted; ours without the package's name."""

    module: str
    line: int
    target: str
    ours: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def room_of(module: str) -> str:
    if module in WINGS:
        return WINGS[module]
    top = module.partition(".")[0]
    return ANNEXES.get(top, top)


def _imported_names(node: ast.AST, module: str, path: Path) -> Iterator[str]:
    """Absolute dotted names that one syntax node imports; ``from a import b`` gives ``a.b``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            here = [PACKAGE, *module.split(".")] if module != "__init__" else [PACKAGE, "__init__"]
            is_package = path.name == "__init__.py" and module != "__init__"
            parents = here[: len(here) - node.level + is_package]
            base = ".".join([*parents, base] if base else parents)
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ):
        yield str(node.args[0].value)


def imports_of(module: str, path: Path, known: Mapping[str, Path]) -> Iterator[Import]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        for name in _imported_names(node, module, path):
            line = getattr(node, "lineno", 0)
            top, _, rest = name.partition(".")
            if top != PACKAGE:
                yield Import(module, line, name, ours=False)
                continue
            # the longest prefix that is a module; what follows is a name inside it
            parts = rest.split(".") if rest else []
            while parts and ".".join(parts) not in known:
                parts.pop()
            yield Import(module, line, ".".join(parts) or "__init__", ours=True)


def all_imports() -> list[Import]:
    return [
        found for module, path in SOURCES.items() for found in imports_of(module, path, SOURCES)
    ]


def room_breaches(found: Import) -> Iterator[str]:
    here, there = room_of(found.module), room_of(found.target)
    # the version stands in the package itself, and reading it ties nothing together
    if not found.ours or there in (here, "__init__"):
        return
    may = ROOMS.get(here, frozenset())
    if there not in may or found.target.partition(".")[0] in ANNEXES:
        yield f"{found}: {here} may import {sorted(may) or 'nothing of ours'}"


def door_breaches(found: Import) -> Iterator[str]:
    doors = DOORS.get(found.target.partition(".")[0])
    if not found.ours and doors is not None and not doors & {room_of(found.module), found.module}:
        yield f"{found}: only {sorted(doors)} may"


def test_every_module_has_a_room() -> None:
    strangers = sorted(m for m in SOURCES if room_of(m) not in ROOMS)
    assert not strangers, f"new modules: give each a row in ROOMS or ANNEXES: {strangers}"


def test_rooms_import_only_what_they_may() -> None:
    assert {breach for found in all_imports() for breach in room_breaches(found)} == set()


def test_heavy_libraries_come_in_by_their_doors() -> None:
    assert {breach for found in all_imports() for breach in door_breaches(found)} == set()


def test_no_cycles() -> None:
    graph: dict[str, set[str]] = {module: set() for module in SOURCES}
    for found in all_imports():
        if found.ours and found.target != found.module:
            graph[found.module].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("imports run in a circle: " + " → ".join(error.args[1]))


@pytest.mark.parametrize(
    "source",
    [
        "from omni_grpo_core.batch import collate",
        "from omni_grpo_core import batch",
        "import omni_grpo_core.batch",
        "from .batch import collate",
        "from . import batch",
        "def late():\n    from omni_grpo_core.batch import collate",
        "import importlib\nimportlib.import_module('omni_grpo_core.batch')",
    ],
)
def test_every_way_of_importing_a_neighbour_is_seen(source: str, tmp_path: Path) -> None:
    path = tmp_path / "media.py"
    path.write_text(source)
    known = {"media": path, "batch": path}
    breaches = [b for f in imports_of("media", path, known) for b in room_breaches(f)]
    assert len(breaches) == 1
    assert "imports batch" in breaches[0]


def test_siblings_are_no_breach_and_a_parent_package_is_resolved(tmp_path: Path) -> None:
    path = tmp_path / "judge.py"
    path.write_text("from .parse import parse\nfrom ..types import Parsed\nfrom ..media import x\n")
    known = {"rewards.judge": path, "rewards.parse": path, "types": path, "media": path}
    found = list(imports_of("rewards.judge", path, known))
    assert [f.target for f in found] == ["rewards.parse", "types", "media"]
    assert [b.split(":")[1] for f in found for b in room_breaches(f)] == ["3 imports media"]


@pytest.mark.parametrize(
    ("module", "library", "breaches"),
    [
        ("batch", "transformers.models", 0),
        ("rollout", "transformers", 1),
        ("tiny.clips", "av", 0),
        ("_decode", "av", 0),
        ("grpo.team", "accelerate", 0),
        ("grpo.train", "accelerate", 1),
    ],
)
def test_a_library_has_its_doors(module: str, library: str, breaches: int) -> None:
    assert len(list(door_breaches(Import(module, 1, library, ours=False)))) == breaches


def test_only_its_own_room_uses_an_annex() -> None:
    assert not list(room_breaches(Import("media", 1, "_decode", ours=True)))
    assert list(room_breaches(Import("cli", 1, "_decode", ours=True)))


@pytest.mark.parametrize("module", QUICK)
def test_what_people_wait_for_loads_no_torch(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({{*{SLOW}}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
