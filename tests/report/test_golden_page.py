"""The page of a golden check: its content, and that it is one safe file."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hand_made_goldens import HOSTILE, diverged, report
from test_check_page import Outline, words

from omni_grpo_core.golden.results import GoldenReport
from omni_grpo_core.report.html.golden_page import MOST_CASES, golden_page


def of_case(html: str, number: int) -> str:
    """The part of the page about one case, counted from 1."""
    parts = html[: html.index("</main>")].split('<details class="sample case"')
    return f"<details{parts[number]}".removesuffix("</section>\n")


def test_well_nested_and_nothing_is_loaded_or_executed() -> None:
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


def test_nothing_changed() -> None:
    calm = report().cases[:1]
    html = golden_page(GoldenReport("golden", "cpu-fp32", calm, 1.0))
    text = words(html)
    assert "✓ EXACT" in text
    assert "It began" not in text
    assert "golden accept" not in text
    assert "Prompt of rows.json:0: the same 7 tokens on both sides" in text
    assert '<svg class="drift-chart"' not in html
    assert "open>" not in html, "nothing is expanded"


def test_stages_show_verdict_origin_and_what_changed() -> None:
    part = of_case(golden_page(report()), 3)
    text = words(part)
    assert "batch ✗ harmful added 0 row 0: 2 more <|VIDEO|>" in text
    assert "… and 3 more" in text, "eight of eleven sentences, the rest collapsed"
    assert "logits ✗ harmful inherited inf" in text
    assert "omni-grpo golden accept broken --reason WHY omni-grpo golden reject broken" in text


def test_prompts_are_side_by_side_with_changes_marked() -> None:
    part = of_case(golden_page(report()), 3)
    was, now = part[part.index("<h5>Golden</h5>") :].split("<h5>Now</h5>")[:2]
    assert re.findall(r'class="run (\w+) removed"><span class="label">([^<]*)', was) == [
        ("text", "text · 5")
    ]
    assert re.findall(r'class="run (\w+) added"><span class="label">([^<]*)', now) == [
        ("video", "video 0 · 5–6"),
        ("text", "text · 7"),
    ]
    text = words(part)
    assert "7 tokens in the golden, 9 now" in text
    assert "video 0 2–4 (3 tokens) 2–6 (5 tokens)" in text


def test_generations_show_the_first_differing_token_on_both_sides() -> None:
    part = of_case(golden_page(report()), 3)
    assert (
        'The <span class="first-diff removed">red</span><span class="after-diff"> bar</span>'
        in part
    )
    assert 'The <span class="first-diff added">blue</span><span class="after-diff"> door' in part
    text = words(part)
    assert "Golden · 3 tokens, ended on its own" in text
    assert "Now · 3 tokens, cut off at the limit" in text
    assert "first differing token 1" in text
    assert "rank of the golden's token now 2" in text
    assert "rank of the fresh token in the golden not in the top" in text
    assert "golden preferred its token by 2.5 nats" in text


def with_generation(**changes: object) -> str:
    base = report()
    case = replace(base.cases[2], generations=(diverged(**changes),), verdict="degenerate")
    return golden_page(replace(base, cases=(case,)))


def test_a_side_that_ends_before_the_other() -> None:
    html = with_generation(first=3)
    assert 'The red bar<span class="first-diff removed">(nothing: it ended earlier)</span>' in html


def test_degenerate_output_is_named_and_cannot_be_accepted() -> None:
    text = words(with_generation(garbage="cycle of 2 tokens, 16 times", verdict="degenerate"))
    assert "cycle of 2 tokens, 16 times" in text
    assert "golden accept" not in text
    assert "Degenerate output cannot be accepted as a golden." in text
    assert "omni-grpo golden reject broken" in text


def test_no_case_at_all() -> None:
    empty = GoldenReport("golden", "cpu-fp32", (), 0.0)
    assert "no case was checked" in words(golden_page(empty))


def test_of_very_many_cases_the_divergent_ones_are_shown_in_full() -> None:
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
def test_one_of_each_kind_of_divergence_is_expanded(number: int) -> None:
    html = golden_page(report())
    assert re.search(rf'id="case-{number}" open>', html)
    assert not re.search(r'id="case-1" open>', html)
