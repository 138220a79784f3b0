"""README and pages are true: commands end and print as shown, Python runs, generated pages are up
to date."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from sessions import ROOT, RUN, Session, blocks, matches, pages, runnable

from omni_grpo_core.io import DEFAULT

DOCS = ROOT / "docs"
PAGES = {page.stem: page for page in pages()}
KEPT = ("yaml", "json", "toml", "diff", "text", "pycon")
"""Languages of blocks that are read, not run."""
LEFT_OUT = {
    "README: runs in .ci/run, on a fresh clone": 2,
    "README: a part of docs/pages/broken-run.md, where it runs": 1,
    "README: the trainer is yours; docs/pages/broken-run.md runs one": 1,
    "README: with your model and rows; docs/pages/your-own-goldens.md and docs/pages/upgrade.md": 1,
    "gpu-runner: it needs a CUDA device": 1,
    "gpu-runner: the pending goldens come from a CUDA device": 1,
    "in-ci: lines of a project's CI": 2,
    "parity: tests/parity/test_parity_cli.py runs it": 1,
    "parity: with environments of your own": 1,
    "pytest: an install": 1,
    "quickstart: an install; .ci/run runs it on a fresh clone": 1,
    "quickstart: an install and the whole suite; .ci/run runs it on a fresh clone": 1,
    "quickstart: the file itself is run by the suite": 1,
    "training: a launcher of several processes; tests/training runs it": 1,
    "upgrade: it installs from a package index": 2,
    "upgrade: it runs the suite six times, a minute": 1,
    "upgrade-review: it needs two environments, minutes of installing": 1,
    "your-own-goldens: it needs a CUDA device": 1,
}
"""Blocks that no session runs, by reason."""
SLOW = {"pytest", "your-own-goldens"}
"""One starts pytest, and with it torch, five times; one goes through its goldens four times."""


@pytest.fixture
def seeds_restored() -> Iterator[None]:
    """Scripts seed torch."""
    state = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(state)


@pytest.mark.usefixtures("seeds_restored")
@pytest.mark.skipif(
    version("transformers") != DEFAULT, reason="pages show the output of the default transformers"
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, page in PAGES.items()
        if runnable(page)
    ],
)
def test_a_page_is_true(name: str, tmp_path: Path) -> None:
    """To update a page: python tests/docs/sessions.py docs/pages/NAME.md"""
    wrong = []
    with Session(tmp_path).open() as session:
        for block in runnable(PAGES[name]):
            for (command, shown), printed in zip(block.commands, session.run(block), strict=False):
                if block.language == "console" and not matches(shown, printed):
                    wrong.append(f"{block.where}: $ {command}\n{printed}")
    page = PAGES[name].relative_to(ROOT)
    fix = f"update the page: python tests/docs/sessions.py {page}"
    assert not wrong, "\n\n".join([fix, *wrong])


def test_a_page_prints_the_same_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page passed on every desk and failed in CI: where CI is set, pytest's summary is not cut
    to the width of the terminal."""
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("FORCE_COLOR", "1")
    page = tmp_path / "page.md"
    page.write_text("```console\n$ printenv CI FORCE_COLOR LANG COLUMNS  # exit code 1\n```\n")
    with Session(tmp_path).open() as session:
        printed = session.run(runnable(page)[0])
    assert printed == ["C.UTF-8\n88"]


def test_only_these_blocks_are_not_run() -> None:
    found: dict[str, int] = {}
    for name, page in PAGES.items():
        for block in blocks(page):
            if block.reason is not None:
                key = f"{name}: {block.reason}"
                found[key] = found.get(key, 0) + 1
    assert found == LEFT_OUT


@pytest.mark.parametrize("name", PAGES)
def test_every_block_has_a_known_language(name: str) -> None:
    """A block without one would silently not be run."""
    for block in blocks(PAGES[name]):
        assert block.language in {*RUN, *KEPT}, block.where
        if block.language == "toml":
            assert tomllib.loads(block.text), block.where
        if block.title is None and block.language == "yaml":
            assert yaml.safe_load(block.text), block.where
        if block.title is None and block.language == "json":
            assert json.loads(block.text), block.where


@pytest.mark.parametrize("name", PAGES)
def test_every_python_file_of_a_page_is_used(name: str) -> None:
    """A block that only becomes a file has not been run."""
    page = runnable(PAGES[name])
    for at, block in enumerate(page):
        if block.title is not None and block.title.endswith(".py"):
            later = "".join(other.text for other in page[at + 1 :])
            assert Path(block.title).stem in later, block.where


def test_the_readme_shows_what_the_page_shows() -> None:
    whole = {line for block in blocks(PAGES["broken-run"]) for line in block.text.splitlines()} | {
        "…",
        "",
    }
    for block in blocks(PAGES["README"]):
        if block.language == "console":
            assert [line for line in block.text.splitlines() if line not in whole] == []


def test_the_readme_is_short() -> None:
    assert len(PAGES["README"].read_text(encoding="utf-8").splitlines()) <= 150


def test_docstrings_become_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("griffe", reason="mkdocstrings is not installed: the docs extra")
    monkeypatch.syspath_prepend(str(DOCS))
    as_markdown = import_module("docstrings").as_markdown
    assert as_markdown("see :func:`~a.b.run` and ``x``::\n\n    y") == "see `run` and `x`:\n\n    y"
    assert as_markdown("First.\n\n>>> 1 + 1\n2\n\nLast.") == (
        "First.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nLast."
    )


@pytest.mark.skipif(
    version("transformers") != DEFAULT, reason="pages are generated under the default transformers"
)
def test_generated_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("griffe", reason="mkdocstrings is not installed: the docs extra")
    monkeypatch.syspath_prepend(str(DOCS))
    generate = import_module("generate")
    old = [
        name
        for name, make in generate.MADE.items()
        if (DOCS / "pages" / name).read_text(encoding="utf-8") != make()
    ]
    assert not old, f"{', '.join(old)}: regenerate with `python docs/generate.py`"
