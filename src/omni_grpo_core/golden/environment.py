"""What a golden was made under, for its header."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "omni-grpo-core",
    "torch",
    "torchvision",
    "transformers",
    "qwen-omni-utils",
    "av",
    "numpy",
)


def environment() -> dict[str, str]:
    """Versions of Python and of every library that can change a value, and the machine's kind.

    >>> environment()["python"] == platform.python_version()
    True
    """
    found = {"python": platform.python_version(), "machine": f"{sys.platform} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
