"""A new suite takes a row of every kind that its data have, found from rows and headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_sets import MEDIA, PATHS, Row, human_omni, kinds_of, social_iq, write
from media_files import write_media

from omni_grpo_core import tiny
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.golden.choice import Choice, choose, length_classes
from omni_grpo_core.golden.new_suite import new_cases
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.report.terminal.started import choice_lines
from omni_grpo_core.training import prompt_estimate
from omni_grpo_core.types import AudioInVideo, Sample

TINY = tiny.checkpoint_dir()
ANY_SETTINGS = Settings()
DATA_SETS: dict[str, Callable[[int], list[Row]]] = {
    "every medium": lambda count: human_omni(count, PATHS),
    "Social-IQ": social_iq,
    "text only": lambda count: human_omni(count, PATHS[:1]),
    "pictures and sounds": lambda count: human_omni(count, [*PATHS[1:3], PATHS[2], PATHS[-1]]),
}
SIZES = [
    ("every medium", 198),
    ("pictures and sounds", 300),
    ("Social-IQ", 300),
    *(
        pytest.param(name, count, marks=pytest.mark.slow)
        for name, count in (("every medium", 4998), ("Social-IQ", 1998), ("text only", 4998))
    ),
]


def chosen(
    folder: Path, rows: list[Row], most: int = 1000, settings: Settings = ANY_SETTINGS
) -> Choice:
    samples = load_samples(write(folder, rows), root=MEDIA)
    return choose(samples, settings, TINY, most)


@pytest.mark.parametrize(("name", "count"), SIZES)
def test_each_kind_that_is_there_is_taken_once(name: str, count: int, tmp_path: Path) -> None:
    rows = DATA_SETS[name](count)
    kinds = kinds_of(rows)
    choice = chosen(tmp_path, rows)
    assert len({*kinds}) > 5
    assert {one.kind.name: one.row for one in choice.taken} == {
        kind: kinds.index(kind) for kind in kinds
    }
    assert {one.kind.name: one.alike for one in choice.taken} == Counter(kinds)
    assert choice.left_out == ()
    assert (choice.kinds, choice.rows) == (len({*kinds}), len(rows))


def test_the_audio_mode_is_the_one_that_the_settings_decide(tmp_path: Path) -> None:
    rows = human_omni(48, PATHS[3:4])
    modes: list[AudioInVideo] = ["interleaved", "separate", "off"]
    for mode in modes:
        choice = chosen(tmp_path, rows, settings=Settings(audio_in_video=mode))
        assert {one.kind.audio for one in choice.taken} == {mode}
    assert {one.kind.audio for one in chosen(tmp_path, rows).taken} == {"interleaved"}


def test_with_too_many_kinds_every_value_comes_first_then_every_pair(tmp_path: Path) -> None:
    rows = human_omni(600, PATHS)
    whole = chosen(tmp_path, rows)
    there = [one.kind for one in whole.taken]
    assert len(there) > 100
    values = {value for kind in there for value in kind.values}
    pairs = {pair for kind in there for pair in kind.pairs}
    # 7 sets of modalities, more than any other dimension has: as many kinds show every value
    few = [one.kind for one in chosen(tmp_path, rows, most=8).taken]
    assert len(few) == 8
    assert {value for kind in few for value in kind.values} == values
    many = chosen(tmp_path, rows, most=len(there) - 20)
    assert {pair for one in many.taken for pair in one.kind.pairs} == pairs
    assert {*many.left_out} | {one.kind for one in many.taken} == {*there}
    assert len(many.left_out) == 20


def test_what_is_left_out_is_told_with_how_to_take_it(tmp_path: Path) -> None:
    choice = chosen(tmp_path, human_omni(198, PATHS), most=20)
    counted, told = choice_lines(choice)
    assert counted.startswith(f"198 rows of {choice.kinds} kinds; estimated prompt tokens: short ")
    assert f"20 kinds taken, those that cover most; --cases {choice.kinds} takes each" in told
    assert choice.left_out[0].words in told
    assert told.endswith(f"and {choice.kinds - 32} more")
    assert len([*choice_lines(chosen(tmp_path, human_omni(198, PATHS)))]) == 1


def test_the_same_data_give_the_same_choice(tmp_path: Path) -> None:
    rows = human_omni(198, PATHS)
    assert chosen(tmp_path, rows, most=20) == chosen(tmp_path, rows, most=20)


def test_a_file_s_header_is_read_once_however_many_rows_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()

    def counting(original: Callable[..., object]) -> Callable[..., object]:
        def count(path: str) -> object:
            read[Path(path).name] += 1
            return original(path)

        return count

    for name in ("read_header", "image_size"):
        monkeypatch.setattr(prompt_estimate, name, counting(getattr(prompt_estimate, name)))
    chosen(tmp_path, human_omni(198, PATHS))
    assert {*read.values()} == {1}
    assert len(read) == 8


def test_a_clip_whose_header_is_in_another_format_is_read_by_the_decoder(tmp_path: Path) -> None:
    """Only MP4 and WAV headers are read in plain Python: the sound of a Matroska file went
    unnoticed, and the suite had no row with an interleaved track."""
    frames, sound = np.zeros((8, 56, 56, 3), np.uint8), np.zeros((1, 16_000), np.float32)
    clip = write_media(tmp_path / "clip.mkv", frames, fps=8, audio=sound, audio_rate=16_000)
    row = {**human_omni(3, PATHS[3:4])[0], "path": str(clip)}
    (one,) = chosen(tmp_path, [row]).taken
    assert one.kind.audio == "interleaved"


def test_lengths_are_classed_by_the_data_s_own_thirds() -> None:
    assert length_classes([1, 2, 3, 4, 5, 6]) == {
        1: "short", 2: "short", 3: "medium", 4: "medium", 5: "long", 6: "long"
    }  # fmt: skip
    # most rows alike: the odd ones are still told apart
    assert length_classes([70] * 9 + [400]) == {70: "medium", 400: "long"}
    assert length_classes([10] + [70] * 9) == {10: "short", 70: "medium"}
    assert length_classes([10, 70]) == {10: "short", 70: "long"}


def test_the_check_sees_each_modality_and_audio_mode_first(tmp_path: Path) -> None:
    choice = chosen(tmp_path, human_omni(198, PATHS))
    assert len(choice.checked) == 8
    seen = {(one.kind.modalities, one.kind.audio) for one in choice.checked}
    assert seen == {(one.kind.modalities, one.kind.audio) for one in choice.taken}


def test_the_padded_batch_has_the_shortest_and_the_longest_and_every_modality(
    tmp_path: Path,
) -> None:
    choice = chosen(tmp_path, human_omni(198, PATHS))
    padded = choice.padded
    tokens = [one.tokens for one in choice.taken]
    assert (padded[0].tokens, padded[-1].tokens) == (min(tokens), max(tokens))
    assert {m for one in padded for m in one.kind.modalities} == {"image", "video", "audio"}
    assert 2 <= len(padded) <= 4


def test_rows_that_are_all_alike_make_one_case_and_no_batch(tmp_path: Path) -> None:
    row = human_omni(3, PATHS[:1])[0]
    choice = chosen(tmp_path, [{**row, "problem_id": number} for number in range(5)])
    (case,) = new_cases(choice, steps=0)
    assert (case.rows, case.why) == ((0,), f"first of 5, ≈ {choice.taken[0].tokens} tokens")
    assert [case.name for case in new_cases(choice, steps=3)] == [case.name, "grpo"]


def test_the_cases_of_the_shipped_rows(samples: tuple[Sample, ...], settings: Settings) -> None:
    choice = choose(samples, settings, TINY)
    cases = {case.name: case.rows for case in new_cases(choice, steps=2)}
    assert cases == {
        "text-multiple-choice-short": (20,),
        "image-multiple-choice-short": (16,),
        "video-interleaved-multiple-choice-medium": (0,),
        "video-interleaved-multiple-choice-long": (9,),
        "video-off-multiple-choice-short": (14,),
        "audio-multiple-choice-short": (18,),
        "audio-multiple-choice-medium": (19,),
        "video+audio-separate-multiple-choice-medium": (6,),
        "video+audio-separate-multiple-choice-long": (3,),
        "padded": (16, 18, 9),
        "grpo": (16,),
    }
