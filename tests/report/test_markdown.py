"""The Markdown of a golden check: what the reader of a pull request learns from it, and that text
from a model is inert in a comment."""

from __future__ import annotations

import re
from dataclasses import replace

import hand_made_goldens

from omni_grpo_core.golden.results import GoldenReport
from omni_grpo_core.report.markdown import code, golden_markdown

HOSTILE = "x | y\n@team `code` ![](//evil.example) <img src=x> [a](b)\n\n# title\n|---|"


def rows(text: str) -> list[list[str]]:
    """Cells of the table, head first."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_verdict_first_stage_table_and_what_to_do() -> None:
    text = golden_markdown(hand_made_goldens.report())
    assert text.startswith("### ❌ Goldens for `cpu-fp32`: harmful\n")
    assert "First divergent stage: `batch`. 1 of 3 cases match." in text
    assert rows(text)[2:] == [
        ["`moved`", "benign-drift", "`logits`", "`the output is unchanged`"],
        ["`broken`", "harmful", "`batch`", "`batch: the prompt differs`"],
        ["`calm`", "exact", "", ""],
    ]
    assert "- `transformers`: `5.17.0` → `5.23.0`" in text
    assert "`omni-grpo golden accept moved --reason WHY`" in text


def test_no_advice_if_nothing_differs() -> None:
    base = hand_made_goldens.report()
    text = golden_markdown(replace(base, cases=base.cases[:1]))
    assert text.startswith("### ✅ Goldens for `cpu-fp32`: exact\n")
    assert "What to do" not in text


def test_a_code_span_stays_whole() -> None:
    assert code("a``b") == "```a``b```"
    assert code("`") == "`` ` ``"
    assert code("a\n b") == "`a ⏎ b`"


def test_hostile_text_leaves_neither_its_span_nor_its_cell() -> None:
    text = golden_markdown(hand_made_goldens.report(HOSTILE))
    assert {len(row) for row in rows(text)} == {4}
    # without the spans, opened and closed by equal numbers of backticks, nothing of it is left
    bare = re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", text)
    assert not re.search(r"@team|evil|<img|\[a\]|# title", bare)


def test_many_cases_fit_into_a_comment() -> None:
    """GitHub refuses comments of more than 65,536 characters."""
    base = hand_made_goldens.report("x" * 5000)
    many = GoldenReport("golden", "cpu-fp32", base.cases * 300, 1.0)
    text = golden_markdown(many)
    assert len(text) < 65_536
    assert "840 more cases not shown." in text
    assert "`calm`" not in text, "divergent cases come first"
