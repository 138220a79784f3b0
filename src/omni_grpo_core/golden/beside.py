"""An environment beside the present one: the same packages, except those that an upgrade changes.

The present environment's own installer, pip or uv, decides what an upgrade would change, without
changing anything. What it names is installed into a new virtual environment that finds everything
else where it is now: nothing is installed twice, and nothing in the present environment changes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.environment import PACKAGES

Installer = Literal["pip", "uv"]
ENVIRON: Mapping[str, str] = {"PYTHONPATH": ""}
"""For processes of the new environment: the present PYTHONPATH would come before what is new, so
its entries are in the environment itself, after it."""
_OURS = "omni-grpo-core"
_UV_LINE = re.compile(r"^ \+ (\S+?)==(\S+)", re.MULTILINE)
_SITE = ("site-packages", "dist-packages")
_LINES, _LONGEST = 5, 240
"""Kept of what an installer says about its failure."""
_REPORT = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
def found(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
print(json.dumps({name: found(name) for name in sys.argv[1:]}))
"""


@dataclass(frozen=True, slots=True)
class PackageChange:
    """``was``: the installed version, ``None`` if the package is not installed."""

    name: str
    was: str | None
    now: str

    @property
    def pin(self) -> str:
        """A line of a constraints file."""
        return f"{self.name}=={self.now}"


def parse_requests(given: Sequence[str]) -> tuple[Requirement, ...]:
    """The packages to try, each with the versions asked for.

    Raises:
        ConfigError: no requirement, one with a URL or a marker, or a version that this package does
            not support.

    >>> parse_requests(["transformers=5"])
    Traceback (most recent call last):
    omni_grpo_core.errors.ConfigError: config: transformers=5: found no requirement, wanted a ...
    """
    found = []
    for text in given:
        try:
            request = Requirement(text)
        except InvalidRequirement:
            raise _bad_request(text, "no requirement") from None
        if request.url or request.marker:
            raise _bad_request(text, "a URL" if request.url else "a marker")
        _require_supported(request)
        found.append(request)
    return tuple(found)


def _bad_request(text: str, got: str) -> ConfigError:
    return ConfigError(
        text, got=got, want="a package and its version, like transformers==5.24.0",
        fix="correct it",
    )  # fmt: skip


def _require_supported(request: Requirement) -> None:
    """A version that is spelled out must be one that this package supports."""
    ours = _direct().get(canonicalize_name(request.name))
    for one in request.specifier:
        if ours is None or one.operator != "==" or one.version.endswith(".*"):
            continue
        if not ours.specifier.contains(one.version, prereleases=True):
            raise ConfigError(
                str(request),
                got="a version outside what this omni-grpo-core supports",
                want=f"{request.name}{ours.specifier}",
                fix="choose another version, or a newer omni-grpo-core that supports it",
            )


def _direct() -> dict[str, Requirement]:
    """This package's own requirements, by name; none if it runs from a source tree alone."""
    try:
        found = [Requirement(text) for text in requires(_OURS) or ()]
    except PackageNotFoundError:
        return {}
    return {
        canonicalize_name(one.name): one
        for one in found
        if one.marker is None or one.marker.evaluate({"extra": ""})
    }


def satisfied(requests: Iterable[Requirement]) -> bool:
    """Whether the present environment already has what is asked for."""
    for request in requests:
        installed = installed_version(request.name)
        try:
            fits = installed is not None and request.specifier.contains(
                Version(installed), prereleases=True
            )
        except InvalidVersion:  # a custom build: the installer knows
            fits = False
        if not fits or request.extras:
            return False
    return True


def installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def installer() -> Installer:
    """What installs into the present environment: its own pip, else uv.

    Raises:
        ConfigError: there is neither.
    """
    if importlib.util.find_spec("pip") is not None:
        return "pip"
    if shutil.which("uv") is not None:
        return "uv"
    raise ConfigError(
        f"environment of {sys.executable}",
        got="neither pip nor uv",
        want="one of them",
        fix="install pip there (python -m ensurepip), or uv",
    )


def planned(by: Installer, requests: Sequence[Requirement]) -> tuple[PackageChange, ...]:
    """What ``by`` would change in the present environment; it changes nothing and follows its own
    settings: indexes, constraints, environment variables.

    This package's direct requirements are named as well, so that they stay consistent with what is
    asked for.

    Raises:
        ConfigError: no such version, a conflict, an index that cannot be reached; quotes its last
            lines.
    """
    direct = _direct()
    asked = {canonicalize_name(request.name) for request in requests}
    words = [
        *map(str, requests),
        *(f"{name}{ours.specifier}" for name, ours in direct.items() if name in asked),
        *(name for name in direct if name not in asked and installed_version(name)),
    ]
    if by == "pip":
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-"]
        found = pip_plan(_run([*command, *words], {}, requests).stdout)
    else:
        command = ["uv", "pip", "install", "--dry-run", "--python", sys.executable]
        found = uv_plan(_run([*command, *words], {}, requests).stderr)
    changes = (PackageChange(name, installed_version(name), now) for name, now in found.items())
    return tuple(change for change in changes if change.was != change.now)


def pip_plan(report: str) -> dict[str, str]:
    """Version by name from ``pip install --report``.

    >>> pip_plan('{"install": [{"metadata": {"name": "Typer_X", "version": "1.0"}}]}')
    {'typer-x': '1.0'}
    """
    entries = [entry["metadata"] for entry in json.loads(report)["install"]]
    return {canonicalize_name(entry["name"]): entry["version"] for entry in entries}


def uv_plan(printed: str) -> dict[str, str]:
    """Version by name from what ``uv pip install --dry-run`` prints.

    >>> uv_plan("Would install 1 package\\n - av==17.0\\n + av==18.1.0\\n ~ torch==2.11.0\\n")
    {'av': '18.1.0'}
    """
    return {canonicalize_name(name): now for name, now in _UV_LINE.findall(printed)}


def build(folder: Path, by: Installer, changes: Sequence[PackageChange]) -> Path:
    """Make the environment in ``folder`` -> its Python.

    Raises:
        ConfigError: a package cannot be installed, or the new environment does not report the
            versions of the plan and, of everything else that changes values, the present ones.
    """
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    python = folder / "bin" / "python"
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    pins = [change.pin for change in changes]
    if by == "pip":
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        # what a PYTHONPATH shows is not this environment's; and a user's folder is not either
        command, environ = [*command, "--ignore-installed"], {"PIP_USER": "0"}
    else:
        command, environ = ["uv", "pip", "install", "--python", str(python)], {}
    _run([*command, "--no-deps", *pins], environ, pins)
    # only now, so that no installer takes the present packages for its own
    (own / "omni_grpo_beside.pth").write_text("\n".join(present_paths()), encoding="ascii")
    _verify(python, changes)
    return python


def present_paths() -> list[str]:
    """Lines of a ``.pth`` file that add this process's import path, without the standard library;
    a ``.pth`` file in a folder of packages takes effect there too (editable installs)."""
    standard = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    sites = [Path(entry) for entry in (*site.getsitepackages(), site.getusersitepackages())]
    entries = [Path(entry).absolute() for entry in sys.path if entry]
    lines = []
    for path in dict.fromkeys([*entries, Path(__file__).parents[2]]):
        if path in sites or path.name in _SITE:
            lines.append(f"import site; site.addsitedir({str(path)!a})")
        elif path not in standard and path.parent not in standard:
            lines.append(f"import sys; sys.path.append({str(path)!a})")
    return lines


def _verify(python: Path, changes: Sequence[PackageChange]) -> None:
    new = [change.name for change in changes]
    wanted = {name: installed_version(name) for name in PACKAGES}
    wanted.update((change.name, change.now) for change in changes)
    done = _run([str(python), "-c", _REPORT, *wanted], ENVIRON, new)
    found = json.loads(done.stdout)
    for name, want in wanted.items():
        if found[name] != want:
            raise ConfigError(
                f"the environment beside this one: {name}",
                got=f"version {found[name]}",
                want=f"version {want}",
                fix="install the upgrade into a virtual environment, and compare the two with "
                "omni-grpo golden bisect",
            )


def _run(
    command: Sequence[str], environ: Mapping[str, str], what: Sequence[object]
) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "NO_COLOR": "1", **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        code, said = done.returncode, done.stderr.strip() or done.stdout.strip()
    except OSError as error:
        code, said = 1, str(error)
    if code:
        lines = [line.strip()[:_LONGEST] for line in said.splitlines() if line.strip()]
        raise ConfigError(
            " ".join(map(str, what)),
            got=" / ".join(lines[-_LINES:]) or f"exit code {code} from {command[0]}",
            want="versions that the present environment's installer finds and can install",
            fix="check the versions, and the index and network settings of the installer",
        )
    return done
