"""What a run is told beside checkpoint and data: read strictly, before anything heavy loads.

A checkpoint folder may carry an ``omni_grpo.json`` (the shipped tiny one does); a ``--config`` file
in JSON or YAML goes over it. A key that nobody reads is an error, never ignored.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from omni_grpo_core.conversation import AudioPreference
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.media import MediaConfig

CHECKPOINT_SETTINGS = "omni_grpo.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a pass.

    ``max_prompt_length``: tokens, media included; ``None`` is no limit. ``max_new_tokens``: cap of
    a completion. ``group_size``, ``temperature``, ``seed``: of the sampled rollout.
    ``min_format``, ``min_accuracy``: the share of greedy completions that must be well-formed,
    and right, for a passing verdict.
    """

    audio_in_video: AudioPreference = "auto"
    media: MediaConfig = field(default_factory=MediaConfig)
    max_prompt_length: int | None = None
    max_new_tokens: int = 256
    group_size: int = 4
    temperature: float = 1.0
    seed: int = 0
    min_format: float = 0.5
    min_accuracy: float = 0.0


def load_settings(checkpoint: Path, config: Path | None = None) -> Settings:
    """The checkpoint's own settings, with those of ``config`` over them.

    Raises:
        ConfigError: a file that is not JSON or YAML, an unknown key, a value of another type.
    """
    settings = Settings()
    own = checkpoint / CHECKPOINT_SETTINGS
    if own.is_file():
        settings = merge(settings, _read(own), str(own))
    if config is not None:
        settings = merge(settings, _read(config), str(config))
    return settings


def merge(settings: Any, values: Mapping[str, Any], item: str) -> Any:
    """``settings`` (any of the project's settings dataclasses) with ``values`` in their fields.

    Raises:
        ConfigError: as :func:`load_settings`.
    """
    hints = get_type_hints(type(settings))
    known = [entry.name for entry in fields(settings)]
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(
                item,
                got=f"unknown key {key!r}",
                want=", ".join(known),
                fix=f"did you mean {near[0]!r}?" if near else "remove it",
            )
        current = getattr(settings, key)
        if is_dataclass(current) and isinstance(value, Mapping):
            changes[key] = merge(current, value, f"{item}: {key}")
        elif _fits(value, hints[key]):
            changes[key] = value
        else:
            raise ConfigError(
                f"{item}: {key}",
                got=repr(value),
                want=_type_name(hints[key]),
                fix="correct the value",
            )
    return replace(settings, **changes)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            str(path),
            got="no such file"
            if isinstance(error, FileNotFoundError)
            else " ".join(str(error).split()),
            want="a JSON or YAML file",
            fix="correct the file",
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            str(path),
            got=type(content).__name__,
            want="a mapping of settings",
            fix="see the README",
        )
    return content


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_type_name, get_args(hint)))
    return "nothing" if hint is type(None) else hint.__name__
