"""Markdown pages as sessions: all commands and Python blocks of a page run, top to bottom, in one
empty folder, and a ``console`` block shows the real output.

    python tests/docs/sessions.py docs/pages/broken-run.md …     # update the output in the pages

In a page:

- ``sh``: commands. ``console``: commands after ``$``, and their output; ``…`` matches any text, and
  any lines if alone on a line. A time at the end of a line may differ.
- ``python``: runs in the page's one namespace.
- a block with ``title="FILE"``, in any language, is written to that file instead; a ``diff``
  patches it, hunk by hunk, with ``@@`` between them.
- ``# exit code N`` after a command is part of the page: without it the command must succeed.
- ``<!-- not run: REASON -->`` above a block leaves it out.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUN = ("sh", "console", "python")
_FENCE = re.compile(r"^(?P<indent> *)```(?:\{\.)?(?P<language>\w*)(?P<info>[^`]*)$")
_REASON = re.compile(r"<!-- not run: (.+?) -->")
_EXIT = re.compile(r"\s+# exit code (\d+)$")
_PLAIN = re.compile(r"(?:[\w./:=\"'{} -]|, )*")
_KEPT = ("HOME", "PATH", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES")
"""All that a page may know of the terminal it runs in: CI alone changes what pytest prints."""


def pages() -> list[Path]:
    """README and all pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs/pages").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """``line``: where ``text`` begins in the file, from 1. ``reason``: why it is not run."""

    file: Path
    line: int
    language: str
    title: str | None
    text: str
    reason: str | None

    @property
    def where(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Each command of a ``sh`` or ``console`` block with the output shown."""
        found: list[tuple[str, list[str]]] = []
        for line in self.text.replace("\\\n", "").splitlines():
            if self.language == "sh" and line.strip() and not line.startswith("#"):
                found.append((line, []))
            elif line.startswith("$ "):
                found.append((line[2:], []))
            elif found:
                found[-1][1].append(line)
        return [(command, "\n".join(output)) for command, output in found]


def blocks(file: Path) -> Iterator[Block]:
    lines = file.read_text(encoding="utf-8").splitlines()
    above, at = "", 0
    while at < len(lines):
        fence = _FENCE.match(lines[at])
        if fence is None:
            above = lines[at].strip() or above
            at += 1
            continue
        end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
        indent = len(fence["indent"])
        text = "".join(f"{line[indent:]}\n" for line in lines[at + 1 : end])
        title = re.search(r'title="([^"]+)"', fence["info"])
        reason = _REASON.fullmatch(above)
        yield Block(file, at + 2, fence["language"], title and title[1], text, reason and reason[1])
        above, at = "", end + 1


def runnable(file: Path) -> list[Block]:
    """The blocks of a page that a session runs or writes, in order."""
    return [
        block
        for block in blocks(file)
        if block.reason is None and (block.title is not None or block.language in RUN)
    ]


@dataclass
class Session:
    """One folder, one namespace, and a terminal of 88 columns. ``base``: an empty folder."""

    base: Path
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})

    @property
    def folder(self) -> Path:
        """Where the page's commands run."""
        return self.base / "page"

    @contextlib.contextmanager
    def open(self) -> Iterator[Session]:
        """Set up the session; what the page changes in the process is restored."""
        tools = self.base / "bin"
        tools.mkdir()
        self.folder.mkdir()
        for name, module in (("omni-grpo", " -m omni_grpo_core"), ("python", "")):
            tool = tools / name
            tool.write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n')
            tool.chmod(0o755)
        environment, path, bytecode = {**os.environ}, [*sys.path], sys.dont_write_bytecode
        sys.dont_write_bytecode = True
        os.environ.clear()
        os.environ |= {name: environment[name] for name in _KEPT if name in environment}
        os.environ |= {
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "LANG": "C.UTF-8",
            "COLUMNS": "88",
            "NO_COLOR": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path),
            **{f"GIT_{who}_NAME": "You" for who in ("AUTHOR", "COMMITTER")},
            **{f"GIT_{who}_EMAIL": "you@example.org" for who in ("AUTHOR", "COMMITTER")},
            "GIT_CONFIG_GLOBAL": os.devnull,
        }
        try:
            sys.path.insert(0, str(self.folder))
            with contextlib.chdir(self.folder):
                yield self
        finally:
            os.environ.clear()
            os.environ |= environment
            sys.path[:] = path
            sys.dont_write_bytecode = bytecode
            self._forget()

    def _forget(self) -> None:
        """Forget modules of the page's own files, so changed ones are imported again."""
        for name, module in [*sys.modules.items()]:
            file = Path(getattr(module, "__file__", None) or "/")
            if file.absolute().is_relative_to(self.folder):
                del sys.modules[name]

    def run(self, block: Block) -> list[str]:
        """What its commands printed. Raises ``AssertionError`` if one ends differently than the
        page says."""
        if block.title is not None:
            file = self.folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            text = block.text
            if block.language == "diff":
                text = patched(file.read_text(encoding="utf-8"), block)
            file.write_text(text, encoding="utf-8")
            self._forget()
            return []
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(block.file), "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, self.namespace)
            return []
        return [self._command(block, command) for command, _ in block.commands]

    def _command(self, block: Block, command: str) -> str:
        wanted = _EXIT.search(command)
        code, out, err = self._call(_EXIT.sub("", command))
        if code != int(wanted[1] if wanted else 0):
            raise AssertionError(f"{block.where}: exit code {code} from: {command}\n{out}\n{err}")
        shown = out if code in (0, 1) else out + err
        return "\n".join(line.rstrip() for line in shown.strip("\n").splitlines())

    def _call(self, command: str) -> tuple[int, str, str]:
        words = shlex.split(command) if _PLAIN.fullmatch(command) else []
        if words[:1] == ["omni-grpo"]:
            return _omni_grpo(words[1:])
        if words[:1] == ["python"] and words[1:2] != ["-m"]:
            return _script(words[1:])
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=600
        )
        return done.returncode, done.stdout, done.stderr


def _omni_grpo(words: list[str]) -> tuple[int, str, str]:
    """Run in this process: torch and transformers are loaded once for all pages."""
    from omni_grpo_core.cli.main import app
    from omni_grpo_core.io.exits import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(lambda: app, words)
    return code, out.getvalue(), err.getvalue()


def _script(words: list[str]) -> tuple[int, str, str]:
    out, err, arguments = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = words
    try:
        # a separate process would print warnings; in the suite they are errors
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(action="ignore"),
        ):
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.argv = arguments
    return 0, out.getvalue(), err.getvalue()


def patched(text: str, block: Block) -> str:
    """Each hunk's old lines occur in ``text`` exactly once and are replaced by its new ones."""
    for hunk in block.text.split("@@\n"):
        lines = hunk.splitlines()
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != left) for left in "+-")
        if text.count(old) != 1:
            raise AssertionError(f"{block.where}: not exactly once in {block.title}:\n{old}")
        text = text.replace(old, new)
    return text


def matches(shown: str, printed: str) -> bool:
    """Whether ``shown`` matches what was printed, up to ellipses.

    >>> matches("a\\n…\\nb in 1.0 s", "a\\nx\\ny\\nb in 12.3 s"), matches("a", "b")
    (True, False)
    """
    lines = [r"(?:.*\n)*?" if line.strip() == "…" else _line(line) + "\n"
             for line in shown.rstrip("\n").splitlines()]  # fmt: skip
    return re.fullmatch("".join(lines), printed.rstrip("\n") + "\n" if printed else "") is not None


def _line(line: str) -> str:
    """``…`` matches any text, and a time at the end of a line any other time."""
    line, tail = line.rstrip(), ""
    if clock := re.search(r" *\d+\.\d\d?( ?s)?$", line):
        line, tail = line[: clock.start()], rf" *\d+\.\d\d?{clock[1] or ''}"
    return ".*".join(map(re.escape, line.split("…"))) + tail


def main(names: list[str]) -> None:
    """Run pages and update the output that differs."""
    for name in names:
        page = Path(name).absolute()
        lines = page.read_text(encoding="utf-8").splitlines(keepends=True)
        shift = 0
        with tempfile.TemporaryDirectory() as folder, Session(Path(folder)).open() as session:
            for block in runnable(page):
                printed = session.run(block)
                if block.title is None and block.language == "console":
                    new = _refreshed(block, printed)
                    begin = block.line - 1 + shift
                    lines[begin : begin + block.text.count("\n")] = new
                    shift += len(new) - block.text.count("\n")
        page.write_text("".join(lines), encoding="utf-8")
        print(name)


def _refreshed(block: Block, printed: list[str]) -> list[str]:
    new: list[str] = []
    for (command, shown), output in zip(block.commands, printed, strict=True):
        kept = shown if matches(shown, output) else output
        new += [f"$ {command}\n", *(f"{line}\n" for line in kept.splitlines())]
    return new


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    main(sys.argv[1:])
