"""How every command ends, whatever happens: one line and an exit code, never a traceback.

===  ==========================================================================
0    fine
1    a finding: something is broken or differs
2    bad usage or input, or a machine that is too small for it
3    a bug in this project: the traceback is written to a file, for a report
130  Ctrl-C
===  ==========================================================================

With ``--json`` every ending other than 0 or 1 prints one object with ``error`` on stdout. If the
reader of stdout is gone, as under ``| head``, the command ends silently with 2; output to a stdout
that was closed from the start (``>&-``) is dropped.
"""

from __future__ import annotations

import codecs
import errno
import os
import platform
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_grpo_core.errors import ConfigError, OmniGrpoError, one_line, printable
from omni_grpo_core.io.redaction import Redactor

if TYPE_CHECKING:
    import typer
import json
import math
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

_PLAIN = str.maketrans({"✓": "+", "✗": "x", "◌": "o", "→": "->", "…": "...", "–": "-", "·": "."})
_MACHINE = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EBADF", "EAGAIN", "ESTALE"),
        *("EMFILE", "ENFILE", "ENAMETOOLONG", "ENOTDIR", "EFBIG", "ELOOP", "EBUSY", "ENOEXEC"),
        "ECONNRESET",
    )
)
"""What the operating system refuses for reasons of its own."""
_BY_MESSAGE = (
    (
        ("out of memory", "allocate memory", "failed to map segment", "bad_alloc"),
        ("memory", "enough for the model and its input"),
        "free some, use a smaller batch or a larger machine",
    ),
    (
        ("can't start new thread",),
        ("processes", "permission to start threads"),
        "raise the limit (ulimit -u) or lower OMP_NUM_THREADS",
    ),
    (
        ("no space left on device",),
        ("output", "free disk space"),
        "free some, or choose another path",
    ),
    (
        ("no usable temporary directory",),
        ("temporary folder", "a writable one"),
        "point TMPDIR at one",
    ),
)
"""The same, recognised by its words: libraries raise errors of their own for it."""


@dataclass(frozen=True, slots=True)
class _Ending:
    code: int
    line: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def run(load: Callable[[], typer.Typer], arguments: Sequence[str]) -> int:
    """Run the command that ``load`` imports and return its exit code; every other ending is
    reported here. Call in the main thread; a SIGINT that was blocked until now is handled."""
    as_json = "--json" in arguments
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        _sturdy_streams()
        _usable_widths()
        with json_alone() if as_json else nullcontext():
            code = _invoke(load(), arguments)
        sys.stdout.flush()
        return code
    except BaseException as error:  # a custom reward may raise anything
        return _report(_ending(error), as_json)


@cache
def _command(app: typer.Typer) -> Any:
    """Typer builds every command with its options anew, which takes longer than most refusals."""
    import typer

    return typer.main.get_command(app)


def _invoke(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run the command without typer's own endings, some of which exit 1."""
    import typer

    if sys.flags.optimize > 1:
        raise ConfigError(
            "Python", got="docstrings stripped (PYTHONOPTIMIZE=2 or -OO)",
            want="all of them: transformers builds its classes from them",
            fix="unset PYTHONOPTIMIZE, or run python without -OO",
        )  # fmt: skip
    try:
        Path.cwd()
    except OSError:
        raise ConfigError(
            "working directory", got="one that was deleted", want="an existing folder",
            fix="change to another folder",
        ) from None  # fmt: skip
    for argument in arguments:
        if "\0" in argument:  # some versions of typer raise ValueError
            raise ConfigError(
                "argument", got=repr(argument), want="text without NUL", fix="correct the command"
            )
    command = _command(app)
    try:
        with command.make_context("omni-grpo", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return int(ended.exit_code)
    except typer.Abort:  # end of input at a prompt
        raise ConfigError(
            "answer",
            got="the end of the input",
            want="an answer",
            fix="run the command in a terminal",
        ) from None
    return 0


def _ending(error: BaseException) -> _Ending:
    causes = tuple(_causes(error))
    if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
        return _Ending(130, "interrupted", {"stage": "config", "got": "Ctrl-C"})
    # rich turns it into sys.exit(1)
    broken = any(isinstance(cause, BrokenPipeError) for cause in causes)
    if broken and isinstance(error, (BrokenPipeError, SystemExit)):
        return _Ending(2)
    known = _known(error, causes)
    if known is None:
        return _internal_error(error)
    fields = {name: getattr(known, name) for name in ("item", "got", "want", "fix")}
    return _Ending(2, f"error: {known}", {"stage": known.where, **fields})


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its chain of causes and contexts, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _known(error: BaseException, causes: Sequence[BaseException]) -> OmniGrpoError | None:
    """The error, if it is about the input or the machine rather than a bug in this project."""
    if isinstance(error, OmniGrpoError):
        return error
    if callable(getattr(error, "format_message", None)):  # typer's, in any of its versions
        return _bad_usage(error)
    for cause in causes:
        for words, (item, want), fix in _BY_MESSAGE:
            if any(each in _message(cause).lower() for each in words):
                return ConfigError(item, got=_message(cause), want=want, fix=fix)
        if isinstance(cause, MemoryError):
            (item, want), fix = _BY_MESSAGE[0][1:]
            return ConfigError(item, got="none left", want=want, fix=fix)
    if isinstance(error, OSError) and error.errno in _MACHINE:
        return ConfigError(
            str(error.filename or "output"), got=error.strerror or _message(error),
            want="a readable and writable path",
            fix="check the path, its permissions and the free space",
        )  # fmt: skip
    package = _broken_package(error)
    variable = None if package is None else _named_variable(error)
    if variable is not None:
        return ConfigError(
            f"environment variable {variable}", got=_message(error),
            want=f"a value that {package} accepts",
            fix=f"correct or unset {variable}",
        )  # fmt: skip
    if package is not None:
        return ConfigError(
            f"package {package}".strip(), got=_message(error), want="an importable package",
            fix="reinstall it, in the version of constraints.txt",
        )  # fmt: skip
    if isinstance(error, SystemExit):
        return ConfigError(
            "imported code", got=f"sys.exit({error.code!r})", want="code that returns",
            fix="remove the call from the imported module",
        )  # fmt: skip
    return None


def _broken_package(error: BaseException) -> str | None:
    """The third-party package that failed to import, whatever it raised."""
    ours = "omni_grpo_core"
    if isinstance(error, SyntaxError) and error.filename and ours not in error.filename:
        return Path(error.filename).stem
    if isinstance(error, ImportError) and (error.name or "").startswith(ours):
        return None
    if isinstance(error, ImportError) and error.name:
        return error.name.partition(".")[0]
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] == ours:
            break
        if frame.f_code.co_name == "<module>" and module != "__main__":
            return module.partition(".")[0]
    return "" if isinstance(error, ImportError) else None


def _named_variable(error: BaseException) -> str | None:
    """The environment variable that an error names: then the package itself is not broken."""
    words = re.findall(r"\b[A-Z]+_[A-Z_]+\b", _message(error))
    return next((word for word in words if word in os.environ), None)


def _message(error: BaseException) -> str:
    """The message of a third-party error, on one short line."""
    try:
        message = one_line(error)
    except Exception:  # an error that cannot be printed is still an error
        message = ""
    return message or type(error).__name__


def _bad_usage(error: Any) -> ConfigError:
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", None) or "omni-grpo"
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help text
        print(message, file=sys.stderr)
        message = "no command"
    return ConfigError(
        path, got=" ".join(message.split()),
        want="its arguments and options",
        fix=f"see {path} --help",
    )  # fmt: skip


def _internal_error(error: BaseException) -> _Ending:
    message = f"{type(error).__name__}: {_message(error)}"
    file = _write_traceback(error)
    where = file or "the command you ran (no traceback could be written: no temporary folder)"
    line = f"internal error: {message}; this is a bug in omni-grpo: please report it with {where}"
    return _Ending(3, printable(line), {"stage": "internal", "got": message, "traceback": file})


def _write_traceback(error: BaseException) -> str | None:
    from omni_grpo_core._version import __version__

    versions = [f"omni-grpo {__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "av"):
        if name in sys.modules:
            versions.append(f"{name} {getattr(sys.modules[name], '__version__', '?')}")
    redact = Redactor().text
    body = redact("".join(traceback.format_exception(error)))
    arguments = [redact(argument) for argument in sys.argv]
    try:
        handle, file = tempfile.mkstemp(prefix="omni-grpo-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(f"{', '.join(versions)}, {platform.platform()}\n{arguments}\n\n{body}")
    except OSError:
        return None
    return file


def _report(ending: _Ending, as_json: bool) -> int:
    redact = Redactor().text
    with suppress(OSError):
        if as_json and ending.line is not None:
            fields = ending.fields.items()
            print_json({"error": {k: redact(v) if isinstance(v, str) else v for k, v in fields}})
    try:
        sys.stdout.flush()
    except OSError:
        _abandon_stdout()
    with suppress(OSError):  # if nothing can be printed, the exit code remains
        if ending.line is not None:
            print(redact(ending.line), file=sys.stderr, flush=True)
    return ending.code


def _abandon_stdout() -> None:
    """Discard what is still buffered: Python would try to write it again on exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return


def _sturdy_streams() -> None:
    """Make output safe for every character: what an encoding lacks is escaped in ASCII."""
    codecs.register_error("omni-grpo", _written_out)
    # streams closed by the shell (>&-): the next file opened would become stdout
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        if mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="omni-grpo")


def _usable_widths() -> None:
    """Ignore absurd terminal widths, such as 1 or 10¹⁰ columns."""
    for name in ("COLUMNS", "TERMINAL_WIDTH"):
        width = os.environ.get(name, "")
        if not (width.isdecimal() and 20 <= int(width[:9]) <= 10_000):
            os.environ.pop(name, None)


def _written_out(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


_stdout: TextIO | None = None


@contextmanager
def json_alone() -> Iterator[None]:
    """Meanwhile, everything else printed, by a library or a custom reward, goes to stderr."""
    global _stdout
    _stdout = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout = None


def print_json(data: Any) -> None:
    """Print one JSON object to stdout, in its encoding; non-finite numbers become null."""
    stdout = _stdout or sys.stdout
    plain = (getattr(stdout, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8"
    try:
        text = json.dumps(data, ensure_ascii=plain, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(data), ensure_ascii=plain)
    print(text, file=stdout)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
