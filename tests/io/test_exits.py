"""How a command ends: every ending, with a tiny app that raises the error in question."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import typer

from omni_grpo_core.errors import MediaError
from omni_grpo_core.io.exits import print_json, run


def raising(error: BaseException | type[BaseException]) -> Callable[[], typer.Typer]:
    app = typer.Typer()

    @app.command()
    def command(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
        raise error

    return lambda: app


def chained(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError


BROKEN_PIPE = BrokenPipeError(errno.EPIPE, "Broken pipe")
MACHINE = (
    (OSError(errno.ENOSPC, "No space left on device", "page.html"), "page.html"),
    (OSError(errno.EBADF, "Bad file descriptor"), "output"),
    (MemoryError(), "memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory"),
    (RuntimeError("can't start new thread"), "processes"),
    (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "TMPDIR"),
    (ValueError("I/O error: No space left on device (os error 28)"), "free disk space"),
    (chained(RuntimeError("see above"), ImportError("failed to map segment")), "memory"),
    (ImportError("numpy " * 500, name="numpy"), "package numpy"),
    (SystemExit(0), "sys.exit(0)"),
    (MediaError("a.mp4", got="\x1b[2J", want="a clip", fix="copy it"), r"found \x1b[2J"),
)


@pytest.mark.parametrize(("error", "word"), MACHINE, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["", "json"])
def test_input_and_machine_end_with_2_and_one_message(
    error: BaseException, word: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error), flags) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert word in err
    assert len(err) < 1000
    assert bool(out) == bool(flags)
    if flags:
        assert set(json.loads(out)["error"]) == {"stage", "item", "got", "want", "fix"}


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        FileNotFoundError(2, "No such file", "weights"),
        ImportError("no such name", name="omni_grpo_core.types"),
        Unprintable(),
        BaseException("neither an Exception nor Ctrl-C"),
        chained(RuntimeError("a pipe between processes"), BROKEN_PIPE),
    ],
    ids=lambda error: type(error).__name__,
)
def test_unforeseen_errors_end_with_3_and_a_file(
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run(raising(error), ["--json"]) == 3
    out, err = capsys.readouterr()
    (file,) = tmp_path.iterdir()
    assert type(error).__name__ in file.read_text()
    assert err.count("\n") == 1
    assert str(file) in err
    assert json.loads(out)["error"]["traceback"] == str(file)


def test_if_no_file_can_be_written_the_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert run(raising(KeyError("x")), ["--json"]) == 3
    out, err = capsys.readouterr()
    assert "no traceback could be written" in err
    assert json.loads(out)["error"]["traceback"] is None


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), chained(OSError("while cleaning up"), KeyboardInterrupt())]
)
def test_ctrl_c_ends_with_130_and_one_line(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error), ["--json"]) == 130
    out, err = capsys.readouterr()
    assert err == "interrupted\n"
    assert json.loads(out)["error"]["got"] == "Ctrl-C"


@pytest.mark.parametrize("error", [BROKEN_PIPE, chained(SystemExit(1), BROKEN_PIPE)])
def test_a_broken_pipe_is_no_finding(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    """``omni-grpo rewards test format | head -c0`` exited 1, the code of a finding: rich turns
    a broken pipe into ``sys.exit(1)``."""
    assert run(raising(error), []) == 2
    assert capsys.readouterr() == ("", "")


def test_no_secret_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The traceback file, meant to be sent to somebody, contained the endpoint's key."""
    monkeypatch.setenv("OMNI_JUDGE_KEY", "quite-a-secret")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["omni-grpo", "--header=quite-a-secret"])
    for error in (
        KeyError("Bearer quite-a-secret"),
        OSError(errno.EACCES, "denied", "quite-a-secret"),
    ):
        assert run(raising(error), ["--json"]) in (2, 3)
    out, err = capsys.readouterr()
    (file,) = tmp_path.iterdir()
    for text in (out, err, file.read_text()):
        assert "quite-a-secret" not in text
        assert "<redacted>" in text


def test_other_output_goes_to_stderr_under_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A pipeline given to ``doctor --import --json`` printed, and stdout was not JSON."""
    app = typer.Typer()

    @app.command()
    def command(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
        print("somebody's reward says hello")
        print_json({"ok": True, "loss": float("nan")})

    assert run(lambda: app, ["--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"ok": True, "loss": None}
    assert err == "somebody's reward says hello\n"


def test_an_app_that_cannot_be_imported_is_a_broken_package(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load() -> typer.Typer:
        raise ImportError("no module named typer", name="typer")

    assert run(load, []) == 2
    assert "package typer" in capsys.readouterr().err


def test_a_removed_working_directory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert run(raising(KeyError("never reached")), []) == 2
    assert "working directory" in capsys.readouterr().err


@pytest.mark.parametrize("width", ["0", "1", "x", "-5", "99999999999", ""])
def test_an_absurd_width_is_ignored(
    width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """COLUMNS=0 printed nothing, COLUMNS=99999999999 ran out of memory, and typer's own
    TERMINAL_WIDTH=x raised a ValueError."""
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERMINAL_WIDTH", width)
    assert run(raising(KeyError("never reached")), ["--help"]) == 0
    assert "--json" in capsys.readouterr().out
    assert "COLUMNS" not in os.environ


def test_the_suite_passes_where_ci_forces_a_terminal() -> None:
    """FORCE_COLOR=1 made 174 tests fail, and GITHUB_ACTIONS, to which typer listens, six."""
    forced = {"FORCE_COLOR": "1", "GITHUB_ACTIONS": "true", "NO_COLOR": ""}
    test = f"{__file__}::{test_an_absurd_width_is_ignored.__name__}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        env={**os.environ, **forced}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "\x1b[32m" in done.stdout  # pytest's own colours stay
