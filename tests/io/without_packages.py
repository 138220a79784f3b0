"""``omni-grpo`` without some packages.

A script: ``without_packages.py PACKAGE,PACKAGE ARGUMENTS...``; the packages are top-level modules
to hide from every finder.
"""

from __future__ import annotations

import sys
from typing import Any


class Without:
    """A finder that knows all but these. It returns ``None`` for them, as if they were not
    installed; raising would break libraries that only ask whether a package exists."""

    def __init__(self, finder: Any, missing: set[str]) -> None:
        self.finder, self.missing = finder, missing

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name.partition(".")[0] in self.missing:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


if __name__ == "__main__":
    missing = set(sys.argv.pop(1).split(","))
    sys.meta_path[:] = [Without(finder, missing) for finder in sys.meta_path]
    from omni_grpo_core.__main__ import main

    main()
