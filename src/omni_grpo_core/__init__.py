"""A test-first GRPO core for Qwen-Omni models, with goldens that show what an upgrade changed.

The public names are those in ``__all__``; ``__init__.pyi`` lists them with their modules. Each is
imported on first use: the package itself loads neither torch nor transformers.

>>> from omni_grpo_core import group_advantages, load_policy, load_samples, rollout
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

_STUB = Path(__file__).with_suffix(".pyi")
_MODULES = {
    alias.name: statement.module
    for statement in ast.parse(_STUB.read_text(encoding="utf-8")).body
    if isinstance(statement, ast.ImportFrom) and statement.module
    for alias in statement.names
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_MODULES[name]), name)
    return found


def __dir__() -> list[str]:
    return __all__
