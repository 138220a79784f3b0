"""The incident, replayed: one test for each of its rows, and the behaviour of each transformers.

Where the installed transformers keeps the cache while checkpointing (4.52.4, and from 5.24.0 on)
the same script does no harm, and the rows about garbage report that.
"""

from __future__ import annotations

import json

import pytest

from omni_grpo_core.faults import fault as installed
from omni_grpo_core.faults.fault import cache_is_dropped, cache_is_repaired
from omni_grpo_core.faults.incident import Replay, replay
from omni_grpo_core.faults.incident_rows import ROWS, RowFinding, findings, reported
from omni_grpo_core.report.terminal.faults import behaviour, to_json
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.types import Malformed


@pytest.fixture(scope="module")
def replayed() -> Replay:
    return replay()


@pytest.fixture(scope="module")
def rows(replayed: Replay) -> dict[int, RowFinding]:
    return {row.row: row for row in findings(replayed)}


def test_row_01_only_the_first_prompt_is_kept(rows: dict[int, RowFinding]) -> None:
    assert rows[1].answer == "caught"
    assert "text.first-only" in rows[1].found


def test_row_02_the_flag_differs_between_stages(rows: dict[int, RowFinding]) -> None:
    assert rows[2].answer == "caught"
    assert "batch.flag-forward" in rows[2].found


def test_row_03_only_images_are_passed_on(rows: dict[int, RowFinding]) -> None:
    assert rows[3].answer == "caught"
    assert "media.images-only" in rows[3].found


def test_row_04_two_audios_for_one_slot_is_a_verdict(
    replayed: Replay, rows: dict[int, RowFinding]
) -> None:
    call = replayed.cases[0].processed[0]
    assert (len(call.videos), len(call.audios)) == (2, 4)  # two rows: a group of two
    assert rows[4].answer == "broken"
    assert rows[4].found.startswith("1 video and 2 audios per row; conversation: ")
    assert replayed.named("conv.media-twice")


def test_row_05_placeholders_are_counted(rows: dict[int, RowFinding]) -> None:
    # 4 frames of 56 x 56 are 2 x 2 x 2 tokens; 1.04 s of audio are 26, and come twice
    assert rows[5].found == "prompt 0 holds 8 video, 26 audio, 26 audio tokens"


def test_row_06_the_conversation_is_data(rows: dict[int, RowFinding]) -> None:
    assert rows[6].found == "system: text; user: video + audio + text"


def test_row_07_one_word_over_and_over(replayed: Replay, rows: dict[int, RowFinding]) -> None:
    assert replayed.named("gen.checkpointing-train") == cache_is_dropped()
    if replayed.raised:
        assert rows[7].answer == "broken"
        assert "generate stops at the second token" in rows[7].found
    elif cache_is_dropped():
        assert rows[7].answer == "broken"
        # a completion that breaks out of its loop may pass the gate; most must not
        garbage = [bool(rules) for rules in replayed.degenerate]
        assert len(garbage) == len(replayed.texts)
        assert sum(garbage) > len(garbage) / 2
    else:
        assert rows[7].answer == "shown"


def test_row_08_salad_is_found_where_little_is_repeated(rows: dict[int, RowFinding]) -> None:
    assert rows[8].answer == "shown"
    salad, loop = rows[8].found.split(". One repeated word: ")
    assert salad.startswith("salad: zlib ratio")
    assert "tail cycle" in loop
    assert "tail cycle" not in salad


def test_row_09_the_parser_says_what_is_malformed_and_where(
    replayed: Replay, rows: dict[int, RowFinding]
) -> None:
    malformed = [isinstance(parse(text), Malformed) for text in replayed.texts]
    assert all(malformed) == cache_is_dropped()  # vacuously true where generate raises
    assert rows[9].answer == "shown"


def test_row_10_the_reward_is_stuck_at_its_floor(
    replayed: Replay, rows: dict[int, RowFinding]
) -> None:
    if replayed.raised:
        assert rows[10].answer == "shown"
        assert rows[10].found.startswith("no reward was paid")
        return
    assert (set(replayed.rewards) == {0.1}) == cache_is_dropped() == replayed.garbage
    assert rows[10].answer == "broken"
    assert replayed.named("reward.floor")


def test_row_11_embeddings_are_cleared_and_would_be_blamed(rows: dict[int, RowFinding]) -> None:
    assert rows[11].answer == "cleared"
    assert "embed.not-injected" in rows[11].found


def test_row_12_the_template_is_cleared_and_would_be_blamed(rows: dict[int, RowFinding]) -> None:
    assert rows[12].answer == "cleared"
    assert "text.media-dropped" in rows[12].found


def test_row_13_no_keyword_is_silently_ignored(
    replayed: Replay, rows: dict[int, RowFinding]
) -> None:
    assert not any(call.ignored for case in replayed.cases for call in case.processed)
    assert rows[13].answer == "caught"
    assert "batch.audios-kwarg" in rows[13].found


def test_row_14_the_working_script_compared_with_the_training(
    replayed: Replay, rows: dict[int, RowFinding]
) -> None:
    assert replayed.right == (True,)
    first = replayed.verdict.first
    assert first is not None
    assert first.stage == "conversation"
    assert rows[14].found.endswith("the first stage to break is conversation")


def test_row_15_the_system_prompt_warning_is_harmless(rows: dict[int, RowFinding]) -> None:
    assert rows[15].answer == "shown"
    assert "harmless: it concerns speech output" in rows[15].found


def test_row_16_requires_grad_means_checkpointing_while_generating(
    replayed: Replay, rows: dict[int, RowFinding]
) -> None:
    calls = [call for case in replayed.cases for call in case.generated]
    assert all(call.modes.checkpointing and call.modes.training for call in calls)
    assert rows[16].answer == "shown"
    if cache_is_repaired():  # nothing is checkpointed without gradients there
        assert rows[16].found.startswith("not issued by this version")
        assert rows[16].found.endswith("repaired in this version")
    else:
        assert "issued during generate: checkpointing was on while generating" in rows[16].found


def test_row_17_settings_that_cannot_work_are_named(rows: dict[int, RowFinding]) -> None:
    # of two values a and b, (a - mean) / std is (a - b) / 2 over |a - b| / sqrt 2
    assert "every advantage is ±0.7" in rows[17].found
    assert "wanted at most 24" in rows[17].found


def test_row_18_four_processes_have_the_same_loss_as_one(rows: dict[int, RowFinding]) -> None:
    assert rows[18].answer == "shown"


def test_row_19_both_data_sets_are_read(rows: dict[int, RowFinding]) -> None:
    assert rows[19].found == (
        "22 rows in HumanOmniV2's JSON, one in Social-IQ's: gold <answer>B</answer>"
    )


def test_row_20_the_reference_pipeline_passes(rows: dict[int, RowFinding]) -> None:
    assert rows[20].found == "11 of 11 stages pass on two shipped rows"


def test_row_21_weights_and_processor_in_separate_folders(
    rows: dict[int, RowFinding],
) -> None:
    assert rows[21].answer == "shown"


def test_every_row_has_its_text_and_its_answer(rows: dict[int, RowFinding]) -> None:
    assert list(rows) == list(reported()) == list(range(1, 22))
    assert not [row for row in rows.values() if row.answer == "missed"]


def test_the_installed_transformers_behaviour_is_reported(replayed: Replay) -> None:
    if cache_is_dropped():
        assert "drops the cache" in behaviour(replayed)
        assert replayed.well_formed == 0
    else:
        assert "keeps the cache" in behaviour(replayed)
        assert "is harmless here" in behaviour(replayed)
        assert ("repaired in this version" in behaviour(replayed)) == cache_is_repaired()
        assert replayed.well_formed > 0


def test_the_json_output_is_json(replayed: Replay, rows: dict[int, RowFinding]) -> None:
    form = json.loads(json.dumps(to_json(replayed, tuple(rows.values()))))
    assert form["cache_dropped"] == cache_is_dropped()
    assert form["garbage"] == (cache_is_dropped() and not replayed.raised)
    assert form["repaired"] == cache_is_repaired()
    assert [row["row"] for row in form["rows"]] == list(range(1, 22))


@pytest.mark.parametrize(
    ("version", "dropped", "repaired"),
    [
        ("4.52.4", False, False),
        ("4.53.0", True, False),
        ("5.17.0", True, False),
        ("5.23.1", True, False),
        ("5.24.0.dev0", False, True),
        ("5.24.0", False, True),
        ("6.0.0", False, True),
    ],
)
def test_the_incidents_versions_are_bounded(
    monkeypatch: pytest.MonkeyPatch, version: str, dropped: bool, repaired: bool
) -> None:
    """It was assumed for every version from 4.53 on; 5.24.0 fixed it, and the command crashed for
    lack of garbage."""
    monkeypatch.setattr(installed, "version", lambda _name: version)
    assert (cache_is_dropped(), cache_is_repaired()) == (dropped, repaired)


def test_a_row_without_evidence_is_missed(replayed: Replay) -> None:
    class Blind:
        """A doctor that sees nothing."""

        cases = replayed.cases
        rewards = replayed.rewards
        raised = None

        @staticmethod
        def finding(stage: str) -> None:
            return None

    blind: Replay = Blind()  # type: ignore[assignment]
    assert ROWS[4](blind)[0] == "missed"
    assert ROWS[10](blind)[0] == "missed"
