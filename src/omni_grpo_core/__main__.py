"""``python -m omni_grpo_core`` is ``omni-grpo``.

Everything is imported under :func:`~omni_grpo_core.io.exits.run`, so a Ctrl-C or a broken package
during the seconds of imports is handled as at any later time.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Entry point of the ``omni-grpo`` command."""
    # blocked until run() is there to handle it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    from omni_grpo_core.io.exits import run

    try:
        code = run(_app, sys.argv[1:])
    except KeyboardInterrupt:  # a second one, while the first was being reported
        code = 130
    # everything is reported: from here on a Ctrl-C ends the process silently
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # threads of collectives outlive a run: one of gloo's that frees a tensor while the
        # interpreter ends aborts a process that has finished
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _app() -> typer.Typer:
    from omni_grpo_core.cli.main import app

    return app


if __name__ == "__main__":
    main()
