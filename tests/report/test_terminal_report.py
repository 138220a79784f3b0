from __future__ import annotations

import io

import pytest
from hand_made_check import HOSTILE, many_rows, result
from rich.console import Console

from omni_grpo_core.pipeline.check import CheckResult
from omni_grpo_core.report.terminal.check import print_check
from omni_grpo_core.types import Check


def printed(shown: CheckResult, width: int = 120, colour: bool = False) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    print_check(console, shown)
    return stream.getvalue()


def test_a_pass_is_shown_from_stages_to_verdict() -> None:
    text = printed(result())
    media = next(line for line in text.splitlines() if line.startswith(" media "))
    assert media.split() == ["media", "✓", "media", "looked", "at", "0.25"]
    video = next(line for line in text.splitlines() if line.startswith(" video"))
    assert video.split() == ["video", "✓", "1", "100%", "0%", "50%", "100%", "0.5"]
    assert "rows.json:1  What happens?" in text
    assert "<context>a man waves</context>" in text
    assert "health  reward mean 0.5, reward std 0.5, zero variance groups 0.25" in text
    assert text.rstrip().splitlines()[-3].startswith("╭─ ✓ PASS ─")
    assert "8 checks of 8 stages passed; video, audio reach the model" in text


def test_a_failure_says_what_was_seen_and_what_to_do() -> None:
    check = Check("left padding", False, "padding on the right")
    text = printed(result(verdict="fail", failing={"batch": check}, shift=0.0))
    assert "✗ left padding: padding on the right" in text
    panel = text[text.index("✗ FAIL") :]
    assert "batch: left padding" in panel
    assert "seen: padding on the right" in panel
    assert "do:   rows are padded on the right" in panel
    assert "1 more failed after it" in panel


def test_a_malformed_completion_is_marked_where_it_breaks() -> None:
    assert "⚠ text outside the tags: 'B' (character 0) B" in printed(result())


@pytest.mark.parametrize("colour", [False, True])
def test_completions_are_text_not_markup_and_not_control_codes(colour: bool) -> None:
    check = Check("[bold]name[/bold]", False, "[/] \x1b]0;title\x07")
    hostile = result((HOSTILE, "\x1b[2J[/]\x00"), failing={"text": check}, question="[red]q")
    text = printed(hostile, width=300, colour=colour)
    assert "[red]x[/red]" in text
    assert "␛[2J[/]␀" in text
    assert "[red]q" in text
    assert "[bold]name[/bold]" in text
    assert "␛]0;title␇" in text
    assert "\x1b[2J" not in text
    assert "\x1b]0" not in text


def test_three_completions_are_shown_each_shortened() -> None:
    assert printed(many_rows(9)).count("<context>") == 3
    assert "(600 more characters)" in printed(result(("x" * 1000, "B")), width=80)


def test_narrow_terminals_do_not_cut_failures() -> None:
    seen = "a long story " * 8 + "with its end"
    text = printed(result(verdict="fail", failing={"text": Check("t", False, seen)}), width=60)
    assert "its end" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 60
