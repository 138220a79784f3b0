"""What speaks against the fast step before a model is loaded; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from omni_grpo_core.errors import ConfigError

SINCE = "4.57"
"""The first transformers whose omni models look an attention function up. 4.52 has the register,
but a class for each implementation."""


def in_library() -> str | None:
    """Whether the installed transformers is too old."""
    return too_old() if Version(version("transformers")) < Version(SINCE) else None


def too_old() -> str:
    return f"transformers {version('transformers')}, whose model takes no attention functions"


def in_config(text: Mapping[str, Any]) -> str | None:
    """What the text model's part of a ``config.json`` asks for.

    >>> in_config({"use_sliding_window": True}), in_config({"attention_dropout": 0.0})
    ('layers with a sliding window', None)
    """
    sliding = sorted({*(text.get("layer_types") or ())} - {"full_attention"})
    if sliding or text.get("use_sliding_window"):
        return f"layers with {(sliding or ['a sliding window'])[0]}"
    if text.get("attention_dropout"):
        return f"attention_dropout {text['attention_dropout']}"
    return None


def refused(reason: str) -> ConfigError:
    return ConfigError(
        "fast",
        got=f"'on' with {reason}",
        want="a model that the fast step can run",
        fix="set it to 'auto' or 'off': the plain step computes the same, slower",
    )
