"""The documentation site: built strictly, read without a network, generated pages up to date."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import omni_grpo_core

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOWHERE = "http://127.0.0.1:9"
"""The discard port, where nothing listens."""
_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_BROWSER = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000",
)  # fmt: skip
_LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""What a browser fetches without a click, by tag; links that only name a page are exempt."""
_NAMING = {"canonical", "next", "prev", "edit", "alternate"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is not installed: the docs extra")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: the docs extra")
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*build, "-f", str(DOCS / "mkdocs.yml"), "-d", str(out)],
        # anything fetched during the build is refused
        env={**os.environ, "HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def built(site: Path) -> list[Path]:
    return sorted(page for page in site.glob("*.html") if page.name != "404.html")


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    wanted = {path.stem for path in (DOCS / "pages").glob("*.md")}
    assert {page.stem for page in built(site)} == wanted
    home = (site / "index.html").read_text(encoding="utf-8")
    assert {name for name in wanted if f'href="{name}.html"' not in home} == set()


def test_every_public_name_is_documented(site: Path) -> None:
    api = (site / "api.html").read_text(encoding="utf-8")
    headings = {*re.findall(r'id="omni_grpo_core\.[\w.]*?(\w+)"', api)}
    public = {name: getattr(omni_grpo_core, name) for name in dir(omni_grpo_core)}
    assert {name for name, value in public.items() if callable(value)} <= headings


class Fetched(HTMLParser):
    """The addresses that a browser fetches for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if not _NAMING & set((given.get("rel") or "").split()):
            self.addresses += [given.get(_LOADS.get(tag, "")) or ""]
        self.addresses += re.findall(r"url\(([^)]+)\)", given.get("style") or "")


def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        parser = Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        outside = [one for one in parser.addresses if re.match(r"(\w+:)?//", one)]
        assert outside == [], page.name
    for sheet in site.rglob("*.css"):
        fetched = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", sheet.read_text())
        assert [one for one in fetched if re.match(r"(\w+:)?//", one)] == [], sheet.name


def test_the_fetch_finder_finds_fetches() -> None:
    parser = Fetched()
    parser.feed(
        '<script src="https://a/b.js"></script><link rel="stylesheet" href="//c/d.css">'
        '<link rel="canonical" href="https://e"><a href="https://f">x</a><img src="g.png">'
    )
    assert [one for one in parser.addresses if one] == ["https://a/b.js", "//c/d.css", "g.png"]


def test_search_finds_a_word_without_a_server(site: Path) -> None:
    """The index is a script beside the pages: a page opened from disk may not fetch JSON."""
    index = (site / "search/search_index.js").read_text(encoding="utf-8")
    assert "omni_golden" in index


def shown(address: str, profile: Path) -> str:
    """The page's DOM after its scripts have run; host names resolve to nothing."""
    command = [str(_CHROMIUM), *_BROWSER, f"--user-data-dir={profile}", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(_CHROMIUM is None, reason="no chromium on the path")
def test_a_browser_shows_every_page(site: Path, tmp_path: Path) -> None:
    for page in built(site):
        seen = shown(page.as_uri(), tmp_path)
        assert re.search(r"<h1[^>]*>[^<]*\w", seen), page.name
        # the site's own script ran
        assert re.search(r'<html[^>]*class="js', seen), page.name


@pytest.mark.slow
@pytest.mark.skipif(_CHROMIUM is None, reason="no chromium on the path")
def test_a_browser_searches_pages_on_disk(site: Path, tmp_path: Path) -> None:
    """Chromium allows no workers there: docs/pages/iframe-worker.js replaces them."""
    seen = shown(f"{(site / 'index.html').as_uri()}?q=omni_golden", tmp_path)
    assert "md-search-result__item" in seen
    assert "My own pytest project" in seen[seen.index("md-search-result__item") :]
