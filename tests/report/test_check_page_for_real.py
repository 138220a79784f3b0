"""The page of a real check on the shipped clips, and how a real browser renders it."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.pipeline.check import CheckResult, check
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.report.html import write_page
from omni_grpo_core.report.html.check_page import check_page
from omni_grpo_core.types import Sample

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_BROWSER = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture(scope="module")
def real(policy: Policy, samples: tuple[Sample, ...], settings: Settings) -> CheckResult:
    """Every kind of row, the long clip among them; few tokens: the verdict is not the point."""
    some = [samples[i] for i in (0, 3, 12, 14, 16, 18, 20)]
    return check(policy, some, replace(settings, max_new_tokens=6, group_size=2))


@pytest.fixture(scope="module")
def page(real: CheckResult, policy: Policy) -> str:
    return check_page(real, policy.decode)


def test_the_shipped_clips_make_a_small_page_with_every_kind_of_input(page: str) -> None:
    assert len(page.encode()) < 1_500_000
    assert page.count('<ol class="ribbon">') == 7
    for kind in ("text", "special", "image", "video", "audio"):
        assert f'class="run {kind}"' in page
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", page)


def test_interleaved_chunks_of_the_long_clip_alternate(real: CheckResult, page: str) -> None:
    batch = real.values["batch"]
    index = max(range(len(batch.rows)), key=lambda i: len(batch.rows[i].spans))
    part = page[page.index(f'id="sample-{index + 1}"') :]
    part = part[: part.index("</ol>")]
    kinds = re.findall(r'class="run (video|audio)"', part)
    assert kinds == [span.modality for span in batch.rows[index].spans]
    assert kinds[:4] == ["video", "audio", "video", "audio"]


def browse(arguments: list[str], page: Path, profile: Path) -> str:
    assert _CHROMIUM is not None
    command = [_CHROMIUM, *_BROWSER, f"--user-data-dir={profile}", *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(_CHROMIUM is None, reason="no chromium on the path")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it(real: CheckResult, page: str, width: int, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_page(file, page)
    seen = browse(["--dump-dom"], file, tmp_path / "profile")
    assert f'<h2 id="verdict">{"✓ PASS" if real.verdict == "pass" else "✗ FAIL"}' in seen
    assert seen.count('<ol class="ribbon">') == 7
    question = html.escape(real.values["sample"][0].question)
    assert question in seen
    picture = tmp_path / "page.png"
    browse([f"--window-size={width},2400", f"--screenshot={picture}"], file, tmp_path / "profile")
    with Image.open(picture) as shot:
        assert shot.size == (width, 2400)
        # text, a verdict's background, a table: far more than a blank or unstyled page
        assert len(shot.convert("RGB").getcolors(maxcolors=1 << 24) or ()) > 100
