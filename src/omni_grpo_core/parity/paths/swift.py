"""ms-swift: its template's ``encode`` in training mode, which reads the files itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from omni_grpo_core.parity.given import Given, Setup
from omni_grpo_core.parity.paths import InputPath
from omni_grpo_core.parity.paths.vllm import full_layout
from omni_grpo_core.types import MediaPart


def open_path(setup: Setup) -> InputPath:
    """Settings go where ms-swift takes them, into environment variables, which hold for the whole
    run: one template with the tracks inside the clips, one without."""
    with patch.dict(os.environ, {"ENABLE_AUDIO_OUTPUT": "0", **_environment(setup)}):
        from swift.model import get_processor
        from swift.template import get_template

        folder = str(full_layout(setup))
        kind = setup.policy.family.model_types[0]
        templates = {}
        for interleaved in (False, True):
            with patch.dict(os.environ, {"USE_AUDIO_IN_VIDEO": str(interleaved)}):
                template = get_template(get_processor(folder, model_type=kind))
            template.set_mode("train")
            templates[interleaved] = template

    def swift(given: Given) -> Mapping[str, Any]:
        with patch.dict(os.environ, _environment(setup)):
            encoded: dict[str, Any] = templates[given.interleaved].encode(_request(given))
        return encoded

    return swift


def _environment(setup: Setup) -> dict[str, str]:
    media, side = setup.settings.media, setup.policy.patch_size * 2
    found: dict[str, float] = {
        "FPS": media.fps,
        "FPS_MIN_FRAMES": media.min_frames,
        "FPS_MAX_FRAMES": media.max_frames,
    }
    for name, pixels in (
        ("VIDEO_MIN_TOKEN_NUM", media.min_pixels),
        ("VIDEO_MAX_TOKEN_NUM", media.max_pixels),
        ("IMAGE_MIN_TOKEN_NUM", media.image_min_pixels),
        ("IMAGE_MAX_TOKEN_NUM", media.image_max_pixels),
    ):
        if pixels is not None:
            found[name] = pixels // (side * side)
    # its default reads no clips without an ffmpeg binary
    sound = os.environ.get("SWIFT_AUDIO_LOAD_BACKEND", "soundfile_pyav")
    numbers = {name: f"{value:g}" for name, value in found.items()}
    return {"SWIFT_AUDIO_LOAD_BACKEND": sound, **numbers}


def _request(given: Given) -> dict[str, Any]:
    """ms-swift's form of a row: a tag in the text for each medium, and lists of files. The last
    turn, which it is trained on, is empty: the prompt is all that precedes it."""
    files: dict[str, list[str]] = {"images": [], "videos": [], "audios": []}
    messages = []
    for message in given.conversation.messages:
        text = ""
        for part in message.parts:
            if isinstance(part, MediaPart):
                files[f"{part.ref.modality}s"].append(part.ref.path)
                text += f"<{part.ref.modality}>"
            else:
                text += part.text
        messages.append({"role": message.role, "content": text})
    return {"messages": messages, **{name: held for name, held in files.items() if held}}
