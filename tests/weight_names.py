"""Names of a thinker's weights before 5.23, which put one more model around all but the head."""

from __future__ import annotations


def before_5_23(name: str) -> str:
    """The name that published checkpoints have; one that is so already is left alone."""
    for tower in ("visual.", "audio_tower."):
        name = name.replace(f"model.{tower}", tower)
    return name.replace("model.language_model.", "model.")
