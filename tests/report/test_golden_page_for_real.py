"""The page of a real check of the project's goldens, and how a real browser renders it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from test_check_page_for_real import browse

from omni_grpo_core import tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]
_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def page(tmp_path: Path, run_cli: Run) -> Path:
    """A changed chat template: the assistant's turn begins with another word."""
    planted = tmp_path / "planted"
    shutil.copytree(tiny.checkpoint_dir(), planted)
    template = planted / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text.replace("turn('assistant')", "turn('helper')"))
    assert template.read_text() != text
    file = tmp_path / "diff.html"
    golden = ROOT / "golden"
    code, _, stderr = run_cli(
        "golden", "diff", "interleaved", "text", "--golden", golden,
        "--checkpoint", planted, "--html", file,
    )  # fmt: skip
    assert code == 1, stderr
    return file


def test_a_changed_template_is_shown_where_it_changed_the_tokens(page: Path) -> None:
    html = page.read_text()
    assert len(html.encode()) < 300_000
    assert re.search(r'<h2 id="verdict">✗ \w+: text</h2>', html)
    assert html.count('<details class="sample case"') == 2
    for mark, word in (("removed", "assistant"), ("added", "helper")):
        notes = re.findall(rf'class="run text {mark}">.*?class="note">([^<]*)', html)
        assert notes == [word, word]
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", html)


@pytest.mark.skipif(_CHROMIUM is None, reason="no chromium on the path")
def test_a_browser_shows_it_wide_narrow_light_and_dark(page: Path, tmp_path: Path) -> None:
    seen = browse(["--dump-dom"], page, tmp_path / "profile")
    assert seen.count('<details class="sample case"') == 2
    assert seen.count('class="drift-chart"') >= 1
    corner: dict[tuple[int, int], float] = {}
    for width, scheme in ((1280, 1), (1280, 0), (500, 1)):
        picture = tmp_path / f"{width}-{scheme}.png"
        options = [f"--window-size={width},2400", f"--screenshot={picture}"]
        # 0 is dark, 1 is light
        options.append(f"--blink-settings=preferredColorScheme={scheme}")
        browse(options, page, tmp_path / "profile")
        with Image.open(picture) as shot:
            assert shot.size == (width, 2400)
            colours = shot.convert("RGB").getcolors(maxcolors=1 << 24) or []
            assert len(colours) > 100, "more than a blank or unstyled page"
            corner[width, scheme] = sum(shot.convert("RGB").crop((0, 0, 1, 1)).tobytes()) / 3
    assert corner[1280, 0] < 64 < 192 < corner[1280, 1], "dark in the dark scheme"
