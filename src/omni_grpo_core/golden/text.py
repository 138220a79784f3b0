"""A golden: one stage's value of one case as a text file for code review.

A first line with the format, a header with the environment, each leaf of the value, and finally
checksums of the whole and of every line, so that a file that was cut or edited by hand is detected,
down to the line. Floats have nine significant digits. Goldens are compared by
:func:`compare_goldens`, leaf by leaf and within tolerances, never as text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from omni_grpo_core.errors import TraceError
from omni_grpo_core.golden.leaf_text import Lines, leaf_lines, parse_leaf, summarise
from omni_grpo_core.golden.numbers import MOST_NUMBERS, parse_string
from omni_grpo_core.io.bounded import Unreadable, read_bytes
from omni_grpo_core.tolerances import Tolerances
from omni_grpo_core.trace.compare import compare_leaves
from omni_grpo_core.trace.divergence import StageComparison
from omni_grpo_core.trace.integers import Decode
from omni_grpo_core.trace.leaves import Leaf, Numbers, leaves

VERSION = 1
_FIRST = "omni-grpo golden"
_SUMS_A_LINE = 16
_STRING = r'"(?:[^"\\]|\\.)*"'
# possessive: no backtracking, or matching a long name would be exponential
_PATH = re.compile(rf"(?P<path>(?:\.?[A-Za-z_]\w*+|\[\d{{1,9}}\]|\[{_STRING}\])++): (?P<head>.*)")
_HEADER = re.compile(rf"(?P<key>{_STRING}|[^\s:\"][^:\n]*): (?P<value>{_STRING})")
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@/ -]*")
_MOST_BYTES = 1 << 26
"""A golden is text for code review."""
REGENERATE = "restore it from version control, or delete it and create it again"


@dataclass(frozen=True, slots=True)
class Golden:
    """A golden read back: its stage, its header and the leaves of its value."""

    stage: str
    header: Mapping[str, str]
    leaves: Mapping[str, Leaf]


def format_golden(
    stage: str,
    value: object,
    header: Mapping[str, str] | None = None,
    decode: Decode | None = None,
) -> str:
    """``value`` as golden text; equal arguments give equal text on every platform.

    ``header``: the environment, free text by key. ``decode`` turns token ids into text, special
    tokens included. Raises :class:`~omni_grpo_core.errors.TraceError` for anything that is not a
    value.

    >>> print(format_golden("loss", {"loss": 0.25, "tokens": 12}, {"torch": "2.11.0"}))
    ... # doctest: +ELLIPSIS
    omni-grpo golden 1
    stage: "loss"
    torch: "2.11.0"
    <BLANKLINE>
    loss: 0.25
    tokens: 12
    <BLANKLINE>
    end: 7 lines sha256 ...
    """
    lines = [f"{_FIRST} {VERSION}", f"stage: {json.dumps(stage)}"]
    for key, text in (header or {}).items():
        plain = key if _PLAIN_KEY.fullmatch(key) and key != "stage" else json.dumps(key)
        lines.append(f"{plain}: {json.dumps(text, ensure_ascii=False)}")
    lines.append("")
    found = leaves(value)
    for path, leaf in found.items():
        # a batch's padded ids would repeat the text of its rows
        repeated = path == "input_ids" and "rows[0].input_ids" in found
        lines += leaf_lines(path, summarise(path, leaf), None if repeated else decode)
    lines.append("")
    return "\n".join([*lines, *_end(lines), ""])


def with_header(text: str, entries: Mapping[str, str]) -> str:
    """Golden text with entries added to its header; those with the same key are replaced.

    >>> parse_golden(with_header(format_golden("loss", 0.25), {"why": "new loss"})).header
    {'why': 'new loss'}
    """
    parse_golden(text)
    body = text[: text.rindex("\nend: ")].split("\n")
    blank = body.index("")
    plain = {key if _PLAIN_KEY.fullmatch(key) else json.dumps(key): key for key in entries}
    old = [line for line in body[:blank] if line.partition(": ")[0] not in plain]
    new = [
        f"{shown}: {json.dumps(entries[key], ensure_ascii=False)}" for shown, key in plain.items()
    ]
    lines = [*old, *new, *body[blank:]]
    return "\n".join([*lines, *_end(lines), ""])


def _end(lines: list[str]) -> Iterator[str]:
    yield f"end: {len(lines)} lines sha256 {_hash(chr(10).join(lines))}"
    sums = [_hash(line)[:4] for line in lines]
    for start in range(0, len(sums), _SUMS_A_LINE):
        yield f"  {' '.join(sums[start : start + _SUMS_A_LINE])}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_text(path: Path) -> str:
    """The text of a golden file. File names in it may not be valid UTF-8.

    Raises:
        TraceError: it cannot be read, or is not text.
    """
    try:
        return read_bytes(path, _MOST_BYTES).decode("utf-8", "surrogatepass")
    except Unreadable as error:
        raise TraceError(str(path), got=error.got, want="a golden", fix="check the path") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise TraceError(
            f"{path}:{line}",
            got=f"a byte {error.object[error.start]:#04x} that is not UTF-8",
            want="golden text",
            fix=REGENERATE,
        ) from error


def parse_golden(text: str, name: str = "golden") -> Golden:
    """The inverse of :func:`format_golden`; ``name`` is the file's, for messages.

    Raises :class:`~omni_grpo_core.errors.TraceError` naming file and line for text that was cut or
    edited by hand, has a newer format or is not a golden.

    >>> parse_golden(format_golden("loss", {"loss": 0.25})).leaves
    {'loss': Scalar(value=0.25)}
    """
    numbered = list(enumerate(text.split("\n"), start=1))
    _check_format(numbered[0][1], name)
    body = _checked(numbered, name)
    blank = next((i for i, (_, line) in enumerate(body) if not line), len(body))
    stage, header = "", dict[str, str]()
    for number, line in body[1:blank]:
        key, value = _header_line(number, line, name)
        if key in header or (key is None and stage):
            raise _broken(name, number, f"{line[:40]!r} twice", "each header entry once")
        if key is None:
            stage = value
        else:
            header[key] = value
    found: dict[str, Leaf] = {}
    left = MOST_NUMBERS
    for number, path, head, rest in _blocks(body[blank + 1 :], name):
        if path in found:
            raise _broken(name, number, f"{path} twice", "each leaf once")
        try:
            found[path] = leaf = parse_leaf(head, rest, left)
        except (ValueError, RuntimeError) as error:  # torch's, for a shape that it cannot create
            raise _broken(name, number, str(error), "a leaf of a golden") from error
        left -= sum(part.numel() for part in leaf.parts) if isinstance(leaf, Numbers) else 0
    return Golden(stage, header, found)


def _check_format(first: str, name: str) -> None:
    match = re.fullmatch(rf"{_FIRST} (\d{{1,9}})", first)
    if match is None:
        raise _broken(name, 1, f"{first[:40]!r}", f"'{_FIRST} {VERSION}'")
    if int(match[1]) > VERSION:
        raise TraceError(
            f"{name}:1",
            got=f"golden format {match[1]}",
            want=f"format {VERSION} or older",
            fix="upgrade omni-grpo-core",
        )


def _checked(numbered: list[tuple[int, str]], name: str) -> Lines:
    """The lines before the checksums, which must match."""
    ends = [i for i, (_, line) in enumerate(numbered) if line.startswith("end: ")]
    if not ends:
        raise _broken(name, len(numbered), "the end of the file", "checksums")
    body = numbered[: ends[-1]]
    lines = [line for _, line in body]
    stated = [line for _, line in numbered[ends[-1] :]]
    if stated == [*_end(lines), ""]:
        return body
    sums = " ".join(stated[1:]).split()
    pairs = enumerate(zip(lines, sums, strict=False), start=1)
    wrong = (number for number, (line, total) in pairs if _hash(line)[:4] != total)
    at = next(wrong, min(len(lines), len(sums)) + 1)
    raise _broken(name, at, "a line that does not match its checksum", "the file as it was written")


def _header_line(number: int, line: str, name: str) -> tuple[str | None, str]:
    """Key and value; ``None`` is the key of the stage."""
    match = _HEADER.fullmatch(line)
    if match is None:
        raise _broken(name, number, repr(line[:40]), 'a header line, key: "text"')
    try:
        key, value = match["key"], parse_string(match["value"])
        if key == "stage":
            return None, value
        return parse_string(key) if key.startswith('"') else key, value
    except ValueError as error:  # an escape that is not JSON's
        raise _broken(name, number, str(error), 'a header line, key: "text"') from error


def _blocks(lines: Lines, name: str) -> Iterator[tuple[int, str, str, Lines]]:
    """Each leaf: its line number, path, first line and indented lines."""
    starts = [i for i, (_, line) in enumerate(lines) if line and not line.startswith(" ")]
    stray = [number for number, line in lines[: starts[0] if starts else None] if line]
    if stray or not starts:
        number = next(iter(stray), lines[0][0] if lines else 1)
        raise _broken(name, number, "no leaf", "path: value")
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        number, line = lines[start]
        match = _PATH.fullmatch(line)
        if match is None:
            raise _broken(name, number, repr(line[:40]), "path: value")
        yield number, match["path"], match["head"], [n for n in lines[start + 1 : end] if n[1]]


def _broken(name: str, number: int, got: str, want: str) -> TraceError:
    return TraceError(f"{name}:{number}", got=got, want=want, fix=REGENERATE)


def compare_goldens(
    was: Golden, now: Golden, tolerances: Tolerances | None = None, decode: Decode | None = None
) -> StageComparison:
    """The differences of ``now`` from ``was``; headers are not compared."""
    found = compare_leaves(was.leaves, now.leaves, tolerances, decode)
    return StageComparison(now.stage, tuple(found))
