"""Which package may import which, as a table, checked against the source.

Few modules import each heavy library, so that an upgrade of one affects few files. And what a user
waits for (``--help``, the import of the package) does not load torch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import omni_grpo_core

PACKAGE = "omni_grpo_core"
ROOT = Path(omni_grpo_core.__file__).parent

# Every package and top-level module, and what it may import from outside itself.
PACKAGES: Mapping[str, frozenset[str]] = {
    package: frozenset(may.split())
    for package, may in {
        "_version": "",
        "types": "",
        "errors": "types",
        "tolerances": "",
        "io": "_version errors",
        "rewards": "errors io tolerances types",
        "losses": "errors tolerances types",
        "trace": "errors io tolerances types",
        # a row whose gold no reward can read is refused like other bad rows
        "core": "errors io rewards types",
        "pipeline": "_version core errors io losses rewards tolerances types",
        "fast": "core errors losses types",
        "engines": "core errors io pipeline tolerances types",
        "training": "core engines errors fast io losses pipeline rewards trace tolerances types",
        "tiny": "core errors io rewards types",
        "bench": "core errors fast io tiny training types",
        # watches third-party trainers: it knows calls, not their correct results
        "recorder": "core errors io rewards trace types",
        "doctor": "core errors io losses pipeline recorder rewards trace tolerances types",
        "parity": "_version core doctor engines errors golden io pipeline tiny tolerances trace "
        "types",
        "golden": "core errors io losses pipeline rewards tiny trace training tolerances types",
        "faults": "core doctor engines errors io losses parity pipeline recorder rewards tiny "
        "trace training types",
        "versions": "core errors io pipeline rewards tiny trace types",
        "report": "doctor errors faults golden io parity pipeline rewards trace training "
        "tolerances types",
        "cli": "_version bench core doctor errors faults golden io parity pipeline recorder report "
        "rewards tiny trace training types versions",
        # a suite's tests read, check and report as the command does
        "pytest_suite": "core errors golden io report",
        "pytest_plugin": "golden parity pytest_suite",
        "__init__": "_version core doctor errors losses pipeline recorder rewards training types",
        "__main__": "cli io",
    }.items()
}

# The modules, or whole packages, that may import each heavy library.
IMPORTERS: Mapping[str, frozenset[str]] = {
    # trainer_callback is a transformers.TrainerCallback, the only way into its Trainer,
    # fast.attention registers attention functions, bench.shapes makes a model of another size, and
    # versions and parity call what they measure; healthy loops are written as people write them
    "transformers": frozenset(
        {
            "core.policy",
            "fast.attention",
            "bench.shapes",
            "tiny",
            "versions",
            "training.trainer_callback",
            # the reference positions inside a worker of another engine
            "engines.vllm_worker",
            "parity.paths.transformers",
            "faults.healthy.r1v",
        }
    ),
    "qwen_omni_utils": frozenset(
        {"core.frame_sampling", *(f"faults.healthy.{m}" for m in ("clips", "pictures", "sounds"))}
    ),
    # parity.read_again reads files as other people's code does
    "av": frozenset(
        {
            "core.decode",
            "parity.read_again",
            "tiny",
            *(f"faults.healthy.{m}" for m in ("clips", "r1v", "sounds")),
        }
    ),
    "vllm": frozenset({"engines.vllm_backend", "parity.paths.vllm"}),
    "accelerate": frozenset({"training.distributed", "faults.healthy.adapters"}),
}

# What must stay quick to import, and what makes an import slow.
QUICK = (
    "omni_grpo_core",
    *(f"omni_grpo_core.{m}" for m in ("types", "errors", "cli", "pytest_plugin")),
    "omni_grpo_core.training.load_config",
)
SLOW = ("torch", "transformers", "numpy")


@dataclass(frozen=True)
class Import:
    """One import: ``module`` imports ``target``, both dotted; ours without ``omni_grpo_core``."""

    module: str
    line: int
    target: str
    ours: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


# for __init__, its lazy imports: the stub that it reads
SOURCES = {
    module_name(path): path for kind in ("py", "pyi") for path in sorted(ROOT.rglob(f"*.{kind}"))
}


def package_of(module: str) -> str:
    return module.partition(".")[0]


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
        and isinstance(node.func, ast.Attribute | ast.Name)
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


@cache
def all_imports() -> list[Import]:
    return [
        found for module, path in SOURCES.items() for found in imports_of(module, path, SOURCES)
    ]


def package_breaches(found: Import) -> Iterator[str]:
    here, there = package_of(found.module), package_of(found.target)
    if found.ours and there != here and there not in (may := PACKAGES.get(here, frozenset())):
        yield f"{found}: {here} may import {sorted(may) or 'no other package'}"


def library_breaches(found: Import) -> Iterator[str]:
    importers = IMPORTERS.get(found.target.partition(".")[0])
    here = {package_of(found.module), found.module}
    if not found.ours and importers is not None and not importers & here:
        yield f"{found}: only {sorted(importers)} may"


def test_packages_are_the_folders_and_import_only_what_they_may() -> None:
    assert {package_of(module) for module in SOURCES} == PACKAGES.keys()
    assert {breach for found in all_imports() for breach in package_breaches(found)} == set()


def test_no_permission_is_stale() -> None:
    """What a package may import, one of its files does: an unused permission hides the next
    cycle."""
    used = {(package_of(f.module), package_of(f.target)) for f in all_imports() if f.ours}
    assert {(package, may) for package, row in PACKAGES.items() for may in row} <= used
    importers = {
        (library, importer)
        for found in all_imports()
        for library in [found.target.partition(".")[0]]
        for importer in (package_of(found.module), found.module)
    }
    assert {(library, may) for library, row in IMPORTERS.items() for may in row} <= importers


def test_no_cycle_between_packages() -> None:
    try:
        TopologicalSorter(PACKAGES).prepare()
    except CycleError as error:
        pytest.fail("packages import each other in a cycle: " + " → ".join(error.args[1]))


def test_heavy_libraries_are_imported_only_where_they_may() -> None:
    assert {breach for found in all_imports() for breach in library_breaches(found)} == set()


def test_no_cycle_between_files() -> None:
    graph: dict[str, set[str]] = {module: set() for module in SOURCES}
    for found in all_imports():
        if found.ours and found.target != found.module:
            graph[found.module].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("files import each other in a cycle: " + " → ".join(error.args[1]))


@pytest.mark.parametrize(
    "source",
    [
        "from omni_grpo_core.training.loop import train",
        "from omni_grpo_core.training import loop",
        "import omni_grpo_core.training.loop",
        "from ..training.loop import train",
        "from ..training import loop",
        "def late():\n    from omni_grpo_core.training.loop import train",
        "import importlib\nimportlib.import_module('omni_grpo_core.training.loop')",
    ],
)
def test_every_way_of_importing_another_package_is_found(source: str, tmp_path: Path) -> None:
    path = tmp_path / "media.py"
    path.write_text(source)
    known = {"core.media": path, "training.loop": path}
    breaches = [b for f in imports_of("core.media", path, known) for b in package_breaches(f)]
    assert len(breaches) == 1
    assert "imports training.loop" in breaches[0]


def test_siblings_may_be_imported_and_a_parent_package_is_resolved(tmp_path: Path) -> None:
    path = tmp_path / "judge.py"
    path.write_text("from .parse import parse\nfrom ..types import Parsed\nfrom ..core import x\n")
    known = {"rewards.judge": path, "rewards.parse": path, "types": path, "core": path}
    found = list(imports_of("rewards.judge", path, known))
    assert [f.target for f in found] == ["rewards.parse", "types", "core"]
    assert [b.split(":")[1] for f in found for b in package_breaches(f)] == ["3 imports core"]


@pytest.mark.parametrize(
    ("module", "library", "breaches"),
    [
        ("core.policy", "transformers.models", 0),
        ("core.rollout", "transformers", 1),
        ("tiny.clips", "av", 0),
        ("core.decode", "av", 0),
        ("training.distributed", "accelerate", 0),
        ("training.loop", "accelerate", 1),
    ],
)
def test_a_library_may_be_imported_only_by_its_importers(
    module: str, library: str, breaches: int
) -> None:
    assert len(list(library_breaches(Import(module, 1, library, ours=False)))) == breaches


@pytest.mark.parametrize("module", QUICK)
def test_what_users_wait_for_does_not_load_torch(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({{*{SLOW}}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
