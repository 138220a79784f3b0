"""A test-first GRPO core for Qwen-Omni models, with goldens that say what an upgrade changed.

:func:`record` and :func:`attach` watch somebody's trainer for ``omni-grpo doctor``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omni_grpo_core._version import __version__ as __version__

if TYPE_CHECKING:
    from omni_grpo_core.recorder.attach import attach as attach
    from omni_grpo_core.recorder.record import record as record

_LATE = {
    "attach": "omni_grpo_core.recorder.attach",
    "record": "omni_grpo_core.recorder.record",
}
"""What is imported when it is asked for: it needs torch, which takes seconds."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATE[name]), name)
