"""How a command ends, whatever happened in it: one line and an exit code, never a traceback.

===  ==========================================================================
0    fine
1    a finding: something is broken or differs
2    bad usage or input, or a machine that is too small for it
3    a fault of this project's: the traceback lies in a file, to be reported
130  Ctrl-C
===  ==========================================================================

With ``--json`` whatever is not 0 or 1 is one object with ``error`` on stdout.
"""

from __future__ import annotations

import codecs
import errno
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from omni_grpo_core.console import print_json
from omni_grpo_core.errors import ConfigError, OmniGrpoError

_FIELDS = ("stage", "item", "got", "want", "fix")
_PLAIN = str.maketrans({"✓": "+", "✗": "x", "◌": "o", "→": "->", "…": "...", "–": "-", "·": "."})
_MACHINE = frozenset(
    (
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
        *(errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EFBIG),
    )
)
"""What an operating system refuses for reasons of its own."""
_NO_MEMORY = ("out of memory", "allocate memory", "failed to map segment")


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run the command and return its exit code; every other ending is reported here."""
    as_json = "--json" in arguments
    _sturdy_streams()
    try:
        code = _invoke(app, arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _report(130, "interrupted", {"stage": "config", "got": "Ctrl-C"}, as_json)
    except BrokenPipeError:
        _abandon_stdout()
        return 2
    except Exception as error:
        known = _known(error)
        if known is None:
            return _own_fault(error, as_json)
        fields = {name: getattr(known, name) for name in _FIELDS}
        return _report(2, f"error: {known}", fields, as_json)


def _invoke(app: typer.Typer, arguments: Sequence[str]) -> int:
    """The command without typer's own endings, some of which exit 1."""
    try:
        Path.cwd()
    except OSError:
        raise ConfigError(
            "working directory", got="one that was removed", want="a folder",
            fix="change to another one",
        ) from None  # fmt: skip
    command: Any = typer.main.get_command(app)
    try:
        with command.make_context("omni-grpo", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return int(ended.exit_code)
    except typer.Abort:  # end of input at a prompt
        raise ConfigError(
            "answer", got="the end of the input", want="an answer", fix="run it in a terminal"
        ) from None
    return 0


def _known(error: Exception) -> OmniGrpoError | None:
    """The error, if it says something of the input or the machine rather than of this project."""
    if isinstance(error, OmniGrpoError):
        return error
    said = " ".join(str(error).split()) or type(error).__name__
    if callable(getattr(error, "format_message", None)):  # typer's, in any of its versions
        return _bad_usage(error)
    if isinstance(error, MemoryError) or any(words in said.lower() for words in _NO_MEMORY):
        return ConfigError(
            "memory", got=said, want="enough for the model and its input",
            fix="free some, use a smaller batch or a larger machine",
        )  # fmt: skip
    if isinstance(error, OSError) and error.errno in _MACHINE:
        return ConfigError(
            str(error.filename or "output"), got=error.strerror or said,
            want="a place that can be read and written",
            fix="check the path, its permissions and the free space",
        )  # fmt: skip
    if isinstance(error, ImportError) and not (error.name or "").startswith("omni_grpo_core"):
        return ConfigError(
            f"package {error.name or ''}".strip(), got=said, want="one that can be imported",
            fix="install it again, in the versions of constraints.txt",
        )  # fmt: skip
    return None


def _bad_usage(error: Any) -> ConfigError:
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", None) or "omni-grpo"
    return ConfigError(
        path, got=" ".join(error.format_message().split()) or "no command",
        want="its arguments and options",
        fix=f"see {path} --help",
    )  # fmt: skip


def _own_fault(error: Exception, as_json: bool) -> int:
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    file = _write_traceback(error)
    fields = {"stage": "internal", "got": said, "traceback": file}
    line = (
        f"internal error: {said}; this is a fault of omni-grpo: please report it with "
        f"{file or 'what you ran (no traceback could be written)'}"
    )
    return _report(3, line, fields, as_json)


def _write_traceback(error: Exception) -> str | None:
    from omni_grpo_core import __version__

    versions = [f"omni-grpo {__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "av"):
        if name in sys.modules:
            versions.append(f"{name} {getattr(sys.modules[name], '__version__', '?')}")
    body = "".join(traceback.format_exception(error))
    try:
        handle, file = tempfile.mkstemp(prefix="omni-grpo-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(f"{', '.join(versions)}, {platform.platform()}\n{sys.argv}\n\n{body}")
    except OSError:
        return None
    return file


def _report(code: int, line: str, fields: dict[str, Any], as_json: bool) -> int:
    try:
        if as_json:
            print_json({"error": fields})
            sys.stdout.flush()
    except OSError:
        _abandon_stdout()
    with suppress(OSError):  # where nobody can be reached, the exit code says it
        print(line, file=sys.stderr, flush=True)
    return code


def _abandon_stdout() -> None:
    """What is still buffered goes nowhere: Python would try once more on its way out."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return


def _sturdy_streams() -> None:
    """Output that no character can stop: what an encoding lacks is written out in ASCII."""
    codecs.register_error("omni-grpo", _written_out)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="omni-grpo")


def _written_out(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end
