from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hand_made_check import HOSTILE, decode, long_clips, many_rows, result

from omni_grpo_core.errors import TraceError
from omni_grpo_core.report.html import write_page
from omni_grpo_core.report.html.check_page import MOST_SAMPLES, check_page
from omni_grpo_core.types import Check, StageRecord

VOID = {"meta", "img", "br"}


class Outline(HTMLParser):
    """Elements in order, their attributes, and whether they nest correctly."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def having(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of the elements with a class."""
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]


def words(html: str) -> str:
    return " ".join(Outline(html).text.split())


def test_well_nested_with_headings_in_order_and_every_picture_described() -> None:
    outline = Outline(check_page(result(), decode))
    assert outline.open == []
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    pictures = [attributes for tag, attributes in outline.elements if tag == "img"]
    # three frames, a waveform, a spectrogram
    assert len(pictures) == 5
    assert all(len(picture["alt"] or "") > 10 for picture in pictures)
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_no_external_resources_are_loaded() -> None:
    html = check_page(result((HOSTILE, HOSTILE)), decode)
    outline = Outline(html)
    for tag, attributes in outline.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base"), tag
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "poster"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"url\(|@import|https?:", style)
    assert "default-src 'none'" in html


def test_the_verdict_of_a_pass() -> None:
    text = words(check_page(result(), decode))
    assert "✓ PASS All 8 checks of 8 stages passed" in text
    assert "(video, audio) shifts the model's output" in text


def test_the_verdict_of_a_failure_says_what_failed_first_and_what_to_do() -> None:
    check = Check("left padding", False, "padding on the right")
    text = words(check_page(result(verdict="fail", failing={"batch": check}), decode))
    assert "✗ FAIL: batch Failed first left padding Seen padding on the right What to do" in text
    assert "pad prompts on the left: padding_side='left' in the processor call" in text
    assert text.count("✗ left padding") == 1


def test_header_stages_proof_and_health_are_shown() -> None:
    text = words(check_page(result(), decode))
    assert "torch 9.9" in text
    assert "checkpoint /some/where" in text
    assert "✓ media looked at seen media 0.25" in text
    assert "video ✓ yes 1 100% 0% 50% 100% 0.5" in text
    assert "the log-probabilities must shift" in text
    assert "mean length 42.5 mean completion length in tokens" in text


def test_an_unknown_stage_is_shown() -> None:
    record = StageRecord("gradient", object(), (Check("finite", False, "nan"),), 1.5)
    unknown = StageRecord("novel", None, (Check("new check", True, "new"),), 2.5)  # type: ignore[arg-type]
    text = words(check_page(result(verdict="fail", extra=(record, unknown)), decode))
    assert "✗ FAIL: gradient" in text
    assert "novel ✓ passed ✓ new check new 2.50" in text


def test_a_sample_shows_what_the_model_was_given() -> None:
    html = check_page(result(), decode)
    text, outline = words(html), Outline(html)
    assert "Options A. yes · B. no" in text
    assert "Gold answer B" in text
    assert "interleaved: the track is cut into time chunks between those of its video" in text
    assert "3 frames of 6×4 px, sampled at 2 per second out of 25, from a clip of 1.5 s" in text
    assert "step 1 · 2 tokens" in text
    assert "audio 0, the track inside video 0 0.16 s at 16 kHz, peak 0.50 of 1 → 4 tokens" in text
    # 16 of the 20 feature frames belong to the sound
    assert "4 mel bands × 16 frames" in text
    assert "video 0 · 2–3" in text
    assert len(outline.having("ribbon")) == 2
    cells = [a["title"] or "" for tag, a in outline.elements if tag == "i"]
    assert len(cells) == 12 + 6
    assert cells[2] == "token 2 · '<|VIDEO|>' · id 3 · video 0 · position t 2 h 2 w 2"
    # the text row is padded by six: its positions start with its own first token
    assert cells[12].endswith("position t 0 h 0 w 0")


def test_a_sample_shows_what_the_model_answered() -> None:
    html = check_page(result(), decode)
    text, outline = words(html), Outline(html)
    assert "Answered B ✓ right" in text
    assert [len(outline.having(name)) for name in ("context", "think", "answer")] == [1, 1, 1]
    assert "⚠ malformed here: text outside the tags: 'B' (character 0)B" in text
    assert "format 1.00 well formed accuracy 1.00 B is B" in text
    assert "accuracy not scored judge unreachable" in text
    assert "2 sampled completions (temperature 1, seed 7)" in text
    assert "sampled rows.json:2 1" in text
    assert "<|im_start|>user rows.json:2" in text


def test_hostile_text_is_shown_but_inert() -> None:
    check = Check("<b>bold</b>", False, HOSTILE)
    hostile = result((HOSTILE, "\x1b[2J\x00\ud800"), failing={"text": check}, question=HOSTILE)
    html = check_page(hostile, lambda ids: HOSTILE)
    outline = Outline(html)
    assert outline.open == []
    assert "<script" not in html
    assert len([tag for tag, _ in outline.elements if tag == "img"]) == 5
    assert outline.text.count(HOSTILE) >= 5
    assert "␛[2J␀\\ud800" in outline.text
    html.encode("utf-8")


def test_of_many_rows_some_of_every_kind_are_shown() -> None:
    html = check_page(many_rows(40), decode)
    outline = Outline(html)
    shown = outline.having("sample")
    assert len(shown) == MOST_SAMPLES
    assert shown[-1]["id"] == "sample-40"
    assert "open" in shown[-1]
    text = words(html)
    assert "12 of 40 rows are shown, covering every kind of input; 28 are left out." in text
    assert "rows.json:12, rows.json:13" in text


def test_a_page_of_long_clips_stays_small() -> None:
    """A dozen clips of 30 s at 448 × 252 with a smooth picture, and 2,400 tokens each."""
    page = check_page(long_clips(14), decode)
    assert len(page.encode()) < 3_500_000
    text = words(page)
    assert "60 frames of 448×252 px" in text
    assert "8 of the 30 steps are shown; shown as a compressed copy" in text
    assert text.count("up to 4 tokens per cell") == MOST_SAMPLES
    assert text.count("step 29 · 60 tokens") == MOST_SAMPLES


def test_a_trace_that_ends_early_has_a_page() -> None:
    whole = result(verdict="fail")
    early = whole.trace.stages[:1]
    trace = type(whole.trace)(whole.trace.header, early)
    html = check_page(type(whole)("fail", trace, {}, (), whole.health), decode)
    assert "0 of 0 rows are shown" in words(html)
    assert "there was nothing to prove" in words(html)


def test_the_page_replaces_the_old_one_or_leaves_it(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(page, "<p>ä</p>")
    write_page(page, "<p>ö</p>")
    assert page.read_bytes() == "<p>ö</p>".encode()
    assert list(tmp_path.iterdir()) == [page]
    with pytest.raises(TraceError, match="a writable path"):
        write_page(page / "below-a-file.html", "x")
    assert page.read_text(encoding="utf-8") == "<p>ö</p>"
