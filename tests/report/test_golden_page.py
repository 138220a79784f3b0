"""The page of a golden check: what it says, and that it is one safe file."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hand_made_goldens import HOSTILE, report, turned
from test_check_page import Outline, words

from omni_grpo_core.golden.results import GoldenReport
from omni_grpo_core.report.html.golden_page import MOST_CASES, golden_page


def of_case(html: str, number: int) -> str:
    """The part of the page about one case, counted from 1."""
    parts = html[: html.index("</main>")].split('<details class="sample case"')
    return f"<details{parts[number]}".removesuffix("</section>\n")


def test_well_nested_and_nothing_is_loaded_or_run() -> None:
    html = golden_page(report(HOSTILE))
    outline = Outline(html)
    assert outline.open == []
    for tag, attributes in outline.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "img"), tag
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"url\(|@import|https?:", style)
    assert "default-src 'none'" in html
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = [a for tag, a in outline.elements if tag == "svg" and a.get("role") == "img"]
    assert pictures
    assert all("largest" in (picture["aria-label"] or "") for picture in pictures)


def test_hostile_text_is_shown_as_text() -> None:
    html = golden_page(report(HOSTILE))
    assert "<script" not in html
    assert html.count("<details") == html.count("</details>")
    # reasons, sentences, ids of samples, versions, completions
    assert html.count("&lt;script&gt;") >= 6
    assert "\u202e" not in html
    assert "\\u202ex" in html


def test_the_verdict_says_what_how_many_and_where_it_began() -> None:
    text = words(golden_page(report()))
    # the first case that diverges, and its stage
    assert "✗ HARMFUL: logits" in text
    assert "First seen in case moved" in text
    assert "✓ exact 1 case" in text
    assert "~ benign-drift 1 case" in text
    assert "✗ harmful 1 case" in text
    assert "platform cpu-fp32" in text
    assert "transformers 5.17.0 → 5.23.0" in text


def test_all_as_they_were() -> None:
    calm = report().cases[:1]
    html = golden_page(GoldenReport("golden", "cpu-fp32", calm, 1.0))
    text = words(html)
    assert "✓ EXACT" in text
    assert "It began" not in text
    assert "golden accept" not in text
    assert "Prompt of rows.json:0: the same 7 tokens on both sides" in text
    assert '<svg class="drift-chart"' not in html
    assert "open>" not in html, "nothing to look at is open"


def test_stages_tell_verdict_origin_and_what_is_not_as_it_was() -> None:
    part = of_case(golden_page(report()), 3)
    text = words(part)
    assert "batch ✗ harmful added 0 row 0: 2 more <|VIDEO|>" in text
    assert "… and 3 more" in text, "eight of eleven sentences, the rest folded away"
    assert "logits ✗ harmful inherited inf" in text
    assert "omni-grpo golden accept broken --reason WHY omni-grpo golden reject broken" in text


def test_prompts_stand_side_by_side_with_what_changed_marked() -> None:
    part = of_case(golden_page(report()), 3)
    was, now = part[part.index("<h5>Golden</h5>") :].split("<h5>Now</h5>")[:2]
    assert re.findall(r'class="run (\w+) gone"><span class="label">([^<]*)', was) == [
        ("text", "text · 5")
    ]
    assert re.findall(r'class="run (\w+) come"><span class="label">([^<]*)', now) == [
        ("video", "video 0 · 5–6"),
        ("text", "text · 7"),
    ]
    text = words(part)
    assert "7 tokens in the golden, 9 now" in text
    assert "video 0 2–4 (3 tokens) 2–6 (5 tokens)" in text


def test_generations_show_the_first_differing_token_on_both_sides() -> None:
    part = of_case(golden_page(report()), 3)
    assert 'The <span class="turned gone">red</span><span class="after-turn"> bar</span>' in part
    assert 'The <span class="turned come">blue</span><span class="after-turn"> door' in part
    text = words(part)
    assert "Golden · 3 tokens, ended by itself" in text
    assert "Now · 3 tokens, cut off at the limit" in text
    assert "first differing token 1" in text
    assert "golden's token, place in the fresh top 2" in text
    assert "fresh token, place in the golden's top not in it" in text
    assert "golden preferred its token by 2.5 nats" in text


def with_generation(**changes: object) -> str:
    base = report()
    case = replace(base.cases[2], generations=(turned(**changes),), verdict="degenerate")
    return golden_page(replace(base, cases=(case,)))


def test_a_side_that_ends_before_the_other() -> None:
    html = with_generation(first=3)
    assert 'The red bar<span class="turned gone">(nothing: it ends before)</span>' in html


def test_degenerate_output_is_named_and_never_to_be_accepted() -> None:
    text = words(with_generation(garbage="cycle of 2 tokens, 16 times", verdict="degenerate"))
    assert "cycle of 2 tokens, 16 times" in text
    assert "golden accept" not in text
    assert "Degenerate output is never accepted as a golden." in text
    assert "omni-grpo golden reject broken" in text


def test_no_case_at_all() -> None:
    empty = GoldenReport("golden", "cpu-fp32", (), 0.0)
    assert "no case was looked at" in words(golden_page(empty))


def test_of_very_many_cases_those_that_diverge_are_shown_in_full() -> None:
    base = report()
    calm, _, broken = base.cases
    many = [replace(calm, case=f"calm-{i}") for i in range(MOST_CASES)]
    html = golden_page(replace(base, cases=(*many, broken)))
    assert html.count('<details class="sample case"') == MOST_CASES
    assert f'<a href="#case-{MOST_CASES + 1}">broken</a>' in html
    assert f"{MOST_CASES} of {MOST_CASES + 1} cases are shown in full" in words(html)
    assert ">calm-0</a>" in html
    assert f">calm-{MOST_CASES - 1}</th>" in html, "in the table, without a link"


@pytest.mark.parametrize("number", [2, 3])
def test_one_of_each_kind_of_divergence_is_open(number: int) -> None:
    html = golden_page(report())
    assert re.search(rf'id="case-{number}" open>', html)
    assert not re.search(r'id="case-1" open>', html)
