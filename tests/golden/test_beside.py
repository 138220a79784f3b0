"""The environment beside the present one. Nothing here needs a network: the upgrade is a wheel that
the test packs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden import beside
from omni_grpo_core.golden.beside import PackageChange, parse_requests, satisfied

NAME = "audioread"
"""A small package of pure Python among our requirements."""
NEWER = "99.0"
OFFLINE = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_NO_INDEX": "1",
    "UV_NO_CONFIG": "1",
    "UV_NO_INDEX": "1",
    "UV_OFFLINE": "1",
}


def pack_wheel(folder: Path, code: str) -> Path:
    """A wheel of ``audioread 99.0``; ``code`` comes first in its ``__init__``."""
    wheel = folder / f"{NAME}-{NEWER}-py3-none-any.whl"
    info = f"{NAME}-{NEWER}.dist-info"
    texts = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {NEWER}\n"}
    texts[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    for file in distribution(NAME).files or ():
        if file.suffix == ".py":
            texts[str(file)] = file.read_text()
    texts[f"{NAME}/__init__.py"] = code + texts[f"{NAME}/__init__.py"]
    texts[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*texts, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as packed:
        for name, text in texts.items():
            packed.writestr(name, text)
    return wheel


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place packages come from."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    for name, text in OFFLINE.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("UV_FIND_LINKS", str(folder))
    try:
        beside.installer()
    except ConfigError:
        pytest.skip("neither pip nor uv")
    return folder


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("transformers=5.24.0", "no requirement"),
        ("../transformers", "no requirement"),
        ("transformers @ file:///tmp/x.whl", "a URL"),
        ("transformers==5.24.0; python_version > '3'", "a marker"),
        ("", "no requirement"),
        ("transformers==3.0", "a version outside what this omni-grpo-core supports"),
        ("transformers==99", "a version outside"),
    ],
)
def test_what_cannot_be_tried_is_refused(text: str, got: str) -> None:
    with pytest.raises(ConfigError, match=got):
        parse_requests([text])


def test_the_present_versions_satisfy_themselves() -> None:
    present = Version(version("transformers"))
    assert satisfied(parse_requests([f"transformers=={present}", "numpy"]))
    assert satisfied(())
    assert not satisfied(parse_requests([f"transformers>{present}"]))
    assert not satisfied(parse_requests(["no-such-package-here"]))


def test_the_plans_of_pip_and_uv_are_read() -> None:
    pip = {
        "version": "1",
        "install": [
            {"metadata": {"name": "transformers", "version": "4.57.6"}, "requested": True},
            {"metadata": {"name": "huggingface_hub", "version": "0.36.2"}, "requested": False},
        ],
    }
    uv = (
        "Using Python 3.11.7 environment at: /envs/dev\nResolved 67 packages in 269ms\n"
        "Would uninstall 2 packages\nWould install 3 packages\n"
        " - huggingface-hub==1.33.0\n + huggingface-hub==0.36.2\n - transformers==5.17.0\n"
        " + transformers==4.57.6 (from file:///srv/transformers.whl)\n ~ typer==1.0\n"
    )
    wanted = {"transformers": "4.57.6", "huggingface-hub": "0.36.2"}
    assert beside.pip_plan(json.dumps(pip)) == beside.uv_plan(uv) == wanted
    assert beside.pip_plan('{"install": []}') == beside.uv_plan("Would make no changes\n") == {}


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.iterdir())
    }


def test_only_what_changes_is_new_and_the_rest_is_seen(wheels: Path, tmp_path: Path) -> None:
    """The old package comes first on PYTHONPATH, as in a source tree's own environment: there it
    would hide the new one."""
    pack_wheel(wheels, "UPGRADED = True\n")
    site = Path(str(distribution(NAME).locate_file("")))
    before = listing(site)
    by = beside.installer()
    plan = beside.planned(by, parse_requests([f"{NAME}=={NEWER}"]))
    assert plan == (PackageChange(NAME, version(NAME), NEWER),)
    assert plan[0].pin == "audioread==99.0"
    python = beside.build(tmp_path / "environment", by, plan)
    code = (
        "import audioread, json; from importlib.metadata import version;"
        "from importlib.util import find_spec;"
        "found = [find_spec(n).origin for n in ('torch', 'transformers', 'omni_grpo_core')];"
        "print(json.dumps([audioread.UPGRADED, version('audioread'), *found]))"
    )
    old = {"PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)])}
    done = subprocess.run(
        [python, "-c", code],
        env={**os.environ, **old, **beside.ENVIRON}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    specs = [find_spec(name) for name in ("torch", "transformers", "omni_grpo_core")]
    assert json.loads(done.stdout) == [True, NEWER, *(s and s.origin for s in specs)]
    assert listing(site) == before
    assert version(NAME) != NEWER


def test_what_cannot_be_installed_is_told_in_the_installers_words(wheels: Path) -> None:
    with pytest.raises(ConfigError, match=r"audioread==98.*found .*audioread.*wanted versions"):
        beside.planned(beside.installer(), parse_requests(["audioread==98"]))


def test_an_environment_that_does_not_show_the_plan_is_refused(
    wheels: Path, tmp_path: Path
) -> None:
    """The plan says 99.1, and the environment would have been taken for it."""
    pack_wheel(wheels, "")
    with pytest.raises(ConfigError, match=r"audioread==99\.1"):
        beside.build(
            tmp_path / "environment", beside.installer(), [PackageChange(NAME, None, "99.1")]
        )
