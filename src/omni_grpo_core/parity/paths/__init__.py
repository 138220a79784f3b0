"""The input paths, by name.

A path is opened once, with a :class:`~omni_grpo_core.parity.given.Setup`, and then called with each
:class:`~omni_grpo_core.parity.given.Given`. It returns what it gives the model for that row alone,
by the processor's names: ``input_ids`` with placeholders expanded, and where there are media
``pixel_values``, ``image_grid_thw``, ``pixel_values_videos``, ``video_grid_thw``,
``video_second_per_grid``, ``input_features``, ``feature_attention_mask``; perhaps ``position_ids``.
A path that only knows its ids returns only these, and adds ``ids_only``.

Foreign libraries are imported when a path is opened, and a missing one is named then.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omni_grpo_core.errors import ConfigError, OmniGrpoError
from omni_grpo_core.parity.given import Given, Setup

InputPath = Callable[[Given], Mapping[str, Any]]
UsersPath = Callable[[list[dict[str, Any]], Any], Mapping[str, Any]]
"""``function(messages, processor)``: a chat with each medium as its path, and the checkpoint's
processor; it returns what that processor would, for this one row."""

PATHS: Mapping[str, str] = {
    "ours": "our own batch",
    "transformers": "apply_chat_template(tokenize=True), which reads the files itself",
    "trl": "how TRL's GRPO trainer tokenizes prompts",
    "swift": "ms-swift's template, in training mode",
    "vllm": "vLLM's input processing alone, on our text and decoded media",
    "vllm-engine": "the prompt ids that a running vLLM engine reports for the same requests",
}
"""Each in the module of its name."""


def open_path(name: str, setup: Setup) -> InputPath:
    """The path called ``name``, or a user's ``module:function``, a :data:`UsersPath`.

    Raises :class:`~omni_grpo_core.errors.ConfigError` for a name that is neither, and for a library
    that is not installed.
    """
    if ":" in name:
        return _users(name, setup)
    if name not in PATHS:
        raise ConfigError(
            f"input path {name}",
            got="no path of that name and no folder of traces",
            want=f"{', '.join(PATHS)}, module:function, or a folder of traces",
            fix="correct the name",
        )
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    try:
        path: InputPath = module.open_path(setup)
    except OmniGrpoError:
        raise
    except ImportError as error:
        raise ConfigError(
            f"input path {name}",
            got=f"no {error.name or error} in {sys.executable}",
            want="the library whose path it is",
            fix="install it, or name the Python of an environment that has it: --python-a, "
            "--python-b",
        ) from error
    return path


def _users(name: str, setup: Setup) -> InputPath:
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"input path {name}",
            got=str(error),
            want="module:function, importable from here",
            fix="correct the name, or set PYTHONPATH",
        ) from error
    return users_path(found, setup)


def users_path(function: UsersPath, setup: Setup) -> InputPath:
    """A user's function as a path.

    Raises :class:`~omni_grpo_core.errors.ConfigError` for what cannot be called.
    """
    if not callable(function):
        raise ConfigError(
            "input path",
            got=f"a {type(function).__name__}",
            want="a function of (messages, processor)",
            fix="name the function",
        )
    return lambda given: function(given.messages(), setup.processor)
