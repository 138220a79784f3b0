from __future__ import annotations

from pathlib import Path

import pytest

from omni_grpo_core.core.media import MediaConfig
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.pipeline.settings import Settings, load_settings


def test_the_config_overrides_the_checkpoint_s_own_settings(tmp_path: Path) -> None:
    (tmp_path / "omni_grpo.json").write_text('{"seed": 1, "media": {"fps": 4, "max_frames": 8}}')
    config = tmp_path / "run.yaml"
    config.write_text("seed: 2\nmedia:\n  fps: 1.5\naudio_in_video: separate\n")
    assert load_settings(tmp_path, config) == Settings(
        seed=2, media=MediaConfig(fps=1.5, max_frames=8), audio_in_video="separate"
    )


def test_without_files_the_settings_are_the_defaults(tmp_path: Path) -> None:
    assert load_settings(tmp_path) == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 1", "unknown key 'sed', wanted .*did you mean 'seed'"),
        ("media: {fsp: 2}", "media: found unknown key 'fsp'"),
        ("zebra: 1", "unknown key 'zebra'.*remove it"),
        ("seed: '1'", "seed: found '1', wanted int"),
        ("seed: true", "seed: found True, wanted int"),
        ("temperature: hot", "temperature: found 'hot', wanted a finite float"),
        ("max_prompt_length: 1.5", "found 1.5, wanted int or nothing"),
        ("temperature: .nan", "temperature: found nan, wanted a finite float"),
        ("temperature: 1e999", "temperature: found inf, wanted a finite float"),
        ("temperature: -1", "settings: temperature: found -1, wanted 0, or 0.01 or more"),
        ("min_format: 7", "run.yaml: settings: min_format: found 7, wanted a share, 0 to 1"),
        ("group_size: 0", "group_size: found 0, wanted 1 or more"),
        ("max_prompt_length: 0", "max_prompt_length: found 0, wanted 1 or more, or nothing"),
        ("media: {fps: 0}", "run.yaml: media fps: found 0, wanted above 0, at most 1000"),
        ("audio_in_video: both", "found 'both', wanted 'auto' or 'interleaved'"),
        ("media: 3", "media: found 3, wanted {} or settings of fps, "),
        ("audio_in_video: on", "audio_in_video: found True, wanted 'auto' or"),
        ("max_new_tokens: 010", "run.yaml:1: found '010', which is 8 or 10"),
        ("temperature: 1e-320", "temperature: found 1e-320, wanted 0, or 0.01 or more"),
        ("- 1", "found list, wanted a mapping"),
        ("a: [", "not YAML .*wanted a mapping of settings in a JSON or YAML file"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(tmp_path, config)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: found no such file"):
        load_settings(tmp_path, tmp_path / "run.yaml")


def test_off_without_quotes_is_a_string(tmp_path: Path) -> None:
    """YAML 1.1 reads it as False, so it was refused: "found False, wanted 'off'"."""
    config = tmp_path / "run.yaml"
    config.write_text("audio_in_video: off\n")
    assert load_settings(tmp_path, config).audio_in_video == "off"


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    """PyYAML follows YAML 1.1 and takes 1e-5, without a dot, for text."""
    config = tmp_path / "run.yaml"
    config.write_text("temperature: 5e-1\n")
    assert load_settings(tmp_path, config).temperature == 0.5


def test_frames_per_token_is_the_library_s() -> None:
    from qwen_omni_utils.v2_5 import vision_process

    from omni_grpo_core.core.media_config import FRAMES_PER_TOKEN

    assert vision_process.FRAME_FACTOR == FRAMES_PER_TOKEN
