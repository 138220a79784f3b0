"""Numbers to golden text and back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from itertools import product

import torch

from omni_grpo_core.trace import DTYPES
from omni_grpo_core.trace.fingerprint import hash_integers
from omni_grpo_core.trace.integers import Decode, as_integers
from omni_grpo_core.trace.leaves import Numbers
from omni_grpo_core.trace.place import holds_ids
from omni_grpo_core.trace.runs import CONSTANT_FROM, parse_runs, runs, wrap

_WIDTH = 96
_IDS_A_LINE = 10
_FLOATS_A_LINE = 8
MOST_NUMBERS = 1 << 24
"""Most numbers in one golden: a short run can expand to any length."""
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"')
_INDEX = re.compile(r"^\[[\d, ]*\]: ")


def number(value: float) -> str:
    """Nine significant digits, which distinguish any two float32; always readable as a float.

    >>> number(0.1), number(2.0), number(math.inf)
    ('0.1', '2.0', 'inf')
    """
    text = f"{value:.9g}"
    return text if re.search(r"[.einf]", text) else f"{text}.0"


def integer_lines(path: str, leaf: Numbers, decode: Decode | None) -> Iterator[str]:
    """Token ids with their text, given a ``decode``; other integers as runs, one line or more per
    index of the leading axes."""
    tensor = as_integers(leaf.parts[0])
    if tensor.ndim <= 1:
        yield from _line(path, tensor.flatten().tolist(), decode)
        return
    if not tensor.numel():
        return
    indices = product(*map(range, tensor.shape[:-1]))
    lines = tensor.reshape(-1, tensor.shape[-1]).tolist()
    for index, line in zip(indices, lines, strict=True):
        parts = list(_line(path, line, decode))
        yield f"{list(index)}: {parts[0]}"
        yield from (f"  {part}" for part in parts[1:])


def _line(path: str, values: Sequence[int], decode: Decode | None) -> Iterator[str]:
    if decode is not None and holds_ids(path):
        yield from _id_lines(values, decode)
    else:
        yield from wrap(map(str, runs(values)), _WIDTH, ", ")


def _id_lines(ids: Sequence[int], decode: Decode) -> Iterator[str]:
    for line in _id_groups(ids, decode):
        constant = len(line) >= CONSTANT_FROM and len(set(line)) == 1
        numbers = f"{line[0]}×{len(line)}" if constant else " ".join(map(str, line))
        # the text of a repeated token is shown once
        text = decode(line[:1] if constant else line)
        yield f"{numbers} {json.dumps(text, ensure_ascii=False)}"


def _id_groups(ids: Sequence[int], decode: Decode) -> Iterator[list[int]]:
    """Lines begin at special tokens and end at newlines, so that a change to the text changes only
    the lines around it."""
    line: list[int] = []
    for run in _repeats(ids):
        if len(run) >= CONSTANT_FROM:
            if line:
                yield line
            yield run
            line = []
            continue
        for token in run:
            text = decode([token])
            if line and text.startswith("<|"):
                yield line
                line = []
            line.append(token)
            if text.endswith("\n") or len(line) == _IDS_A_LINE:
                yield line
                line = []
    if line:
        yield line


def _repeats(ids: Sequence[int]) -> Iterator[list[int]]:
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or ids[end] != ids[start]:
            yield list(ids[start:end])
            start = end


def float_lines(values: Sequence[float]) -> Iterator[str]:
    """Eight numbers per line."""
    for start in range(0, len(values), _FLOATS_A_LINE):
        yield " ".join(map(number, values[start : start + _FLOATS_A_LINE]))


def check_of(leaf: Numbers) -> str:
    """The first 16 digits of the sha256 of integers as int64."""
    return hash_integers(as_integers(leaf.parts[0]))[:16]


def parse_string(text: str) -> str:
    """Quoted text. Raises ``ValueError`` for anything else.

    >>> parse_string('"<|im_start|>user\\\\n"')
    '<|im_start|>user\\n'
    """
    if _STRING.fullmatch(text) is None:
        raise ValueError(f"{text[:40]!r} is not quoted text")
    return str(json.loads(text))


def parse_integers(
    dtype: str, shape: tuple[int, ...], lines: Sequence[tuple[int, str]], most: int = MOST_NUMBERS
) -> Numbers:
    """The inverse of :func:`integer_lines`. Raises ``ValueError``."""
    values: list[int] = []
    words: dict[int, str] = {}
    for _, line in lines:
        numbers, quote, rest = _INDEX.sub("", line.strip()).partition('"')
        numbers = numbers.rstrip()
        found = parse_runs(numbers, most - len(values))
        values += found
        text = parse_string(quote + rest) if quote else ""
        if quote and found and " " not in numbers:  # the text of one token, possibly repeated
            words[found[0]] = text
    low, high = min(values, default=0), max(values, default=0)
    if not -(2**63) <= low <= high < 2**63:
        raise ValueError("a number of more than 64 bits")
    wide = _shaped(torch.tensor(values, dtype=torch.int64), shape)
    return Numbers(dtype, (wide if dtype == "int" else wide.to(DTYPES[dtype]),), words)


def parse_floats(
    dtype: str, shapes: Sequence[tuple[int, ...]], lines: Sequence[tuple[int, str]]
) -> Numbers:
    """The inverse of :func:`float_lines`. Raises ``ValueError``."""
    values = [float(word) for _, line in lines for word in line.split()]
    size = sum(math.prod(shape) for shape in shapes)
    if len(values) != size:
        raise ValueError(f"{len(values)} numbers for shape {list(shapes)}")
    wide = torch.tensor(values, dtype=torch.float64)
    kind = torch.float64 if dtype == "float" else DTYPES[dtype]
    parts, start = [], 0
    for shape in shapes:
        end = start + math.prod(shape)
        parts.append(wide[start:end].reshape(shape).to(kind))
        start = end
    return Numbers(dtype, tuple(parts))


def _shaped(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if len(values) != math.prod(shape):
        raise ValueError(f"{len(values)} numbers for shape {list(shape)}")
    return values.reshape(shape)
