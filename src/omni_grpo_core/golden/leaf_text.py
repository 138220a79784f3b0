"""One leaf of a value as a few lines of golden text, and back.

The first line gives its type, the others, indented by two, its content::

    rows[0].input_ids: int64 [12] sha256 0c730b69905c5ef7
      151644 872 198 "<|im_start|>user\\n"
      151652 "<|vision_bos|>"
      151656×8 "<|VIDEO|>"
    rows[0].spans: spans 1
      video 0 start 4 length 8
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import PurePath
from typing import get_args

from omni_grpo_core.golden.numbers import (
    MOST_NUMBERS,
    check_of,
    float_lines,
    integer_lines,
    number,
    parse_floats,
    parse_integers,
    parse_string,
)
from omni_grpo_core.trace import DTYPES, INTEGERS
from omni_grpo_core.trace.fingerprint import PROJECTIONS, SAMPLES, Fingerprint, fingerprint
from omni_grpo_core.trace.integers import Decode, as_integers
from omni_grpo_core.trace.leaves import Kind, Leaf, Numbers, Ranking, Scalar, Spans
from omni_grpo_core.trace.place import holds_ids
from omni_grpo_core.trace.runs import runs
from omni_grpo_core.types import Modality, Span

_FILE = re.compile(r"(?:^|\.)(?:path|origin)$")
_MOST_RUNS = 512
"""Runs of integers written out; a tensor with more (pixels) is stored as a fingerprint."""

Lines = Sequence[tuple[int, str]]
"""Line numbers and lines."""


def summarise(path: str, leaf: Leaf) -> Leaf:
    """What a golden stores of ``leaf``: all of it, except a fingerprint of tensors too large to
    read, and only the name of a file, since its folders are specific to one machine."""
    if isinstance(leaf, Scalar) and isinstance(leaf.value, str) and _FILE.search(path):
        return Scalar(PurePath(leaf.value).name or leaf.value)
    if not isinstance(leaf, Numbers) or leaf.dtype in ("int", "float"):
        return leaf
    if leaf.integral:
        big = not holds_ids(path) and _many_runs(leaf)
    else:
        big = sum(part.numel() for part in leaf.parts) > SAMPLES
    return fingerprint(*leaf.parts) if big else leaf


def _many_runs(leaf: Numbers) -> bool:
    values = as_integers(leaf.parts[0]).flatten().tolist()
    return len(list(islice(runs(values), _MOST_RUNS + 1))) > _MOST_RUNS


def leaf_lines(path: str, leaf: Leaf, decode: Decode | None) -> Iterator[str]:
    """The lines of one leaf, without line endings."""
    head, body = _parts(path, leaf, decode)
    yield f"{path}: {head}"
    yield from (f"  {line}" for line in body)


def _parts(path: str, leaf: Leaf, decode: Decode | None) -> tuple[str, list[str]]:
    match leaf:
        case Kind(name=name):
            return name, []
        case Scalar(value=value):
            return _scalar(value)
        case Spans(spans=spans):
            return f"spans {len(spans)}", [
                f"{span.modality} {span.item} start {span.start} length {span.length}"
                for span in spans
            ]
        case Ranking():
            return _ranking(leaf, decode)
        case Fingerprint():
            return f"{leaf.dtype} {_shapes(leaf.shapes)} sketch", list(_fingerprint(leaf))
        case Numbers():
            shapes = _shapes([tuple(part.shape) for part in leaf.parts])
            if leaf.integral:
                head = f"{leaf.dtype} {shapes} sha256 {check_of(leaf)}"
                return head, list(integer_lines(path, leaf, decode))
            values = [x for part in leaf.parts for x in part.double().flatten().tolist()]
            return f"{leaf.dtype} {shapes}", list(float_lines(values))


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return " ".join(str(list(shape)) for shape in shapes)


def _scalar(value: bool | int | float | str | None) -> tuple[str, list[str]]:
    if isinstance(value, float):
        return number(value), []
    if not isinstance(value, str) or "\n" not in value[:-1]:
        return json.dumps(value, ensure_ascii=False), []
    pieces = re.findall(r"[^\n]*\n|[^\n]+", value)
    return f"lines {len(pieces)}", [json.dumps(piece, ensure_ascii=False) for piece in pieces]


def _ranking(leaf: Ranking, decode: Decode | None) -> tuple[str, list[str]]:
    head = (
        f"ranking logsumexp {number(leaf.logsumexp)} entropy {number(leaf.entropy)} "
        f"margin {number(leaf.margin)}"
    )
    lines = []
    for token, logprob in zip(leaf.ids, leaf.logprobs, strict=True):
        text = decode([token]) if decode else leaf.words.get(token)
        word = "" if text is None else f" {json.dumps(text, ensure_ascii=False)}"
        lines.append(f"{token} {number(logprob)}{word}")
    return head, lines


def _fingerprint(leaf: Fingerprint) -> Iterator[str]:
    yield (
        f"mean {number(leaf.mean)} std {number(leaf.std)} min {number(leaf.low)} "
        f"max {number(leaf.high)} nan {leaf.nan} inf {leaf.inf}"
    )
    if leaf.sha256 is not None:
        yield f"sha256 {leaf.sha256}"
    for label, values in (("projections", leaf.projections), ("samples", leaf.samples)):
        for line in float_lines(values):
            yield f"{label} {line}"


_NUMBERS = re.compile(
    r"(?P<dtype>[a-z][a-z0-9_]*) (?P<shapes>\[[\d, ]*\](?: \[[\d, ]*\])*)"
    # ``sketch`` is the stored word for a fingerprint
    r"(?: (?P<sketch>sketch)| sha256 (?P<sha>[0-9a-f]{16}))?"
)
_STATISTICS = re.compile(r"mean (\S+) std (\S+) min (\S+) max (\S+) nan (\d+) inf (\d+)")
_RANKING = re.compile(r"ranking logsumexp (\S+) entropy (\S+) margin \S+")
_RANKED = re.compile(r'(\d+) (\S+)(?: ("(?:[^"\\]|\\.)*"))?')
_SPAN = re.compile(rf"({'|'.join(get_args(Modality))}) (-?\d+) start (-?\d+) length (-?\d+)")
_KIND = re.compile(r"[A-Z]\w*|\(\)|\{\}")
_FLOAT = re.compile(r"-?(?:inf|nan|\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
_INTEGER = re.compile(r"-?\d{1,40}")
_WORDS = {"null": None, "true": True, "false": False}
_MOST_AXES = 16
_LONGEST_AXIS = 1 << 40


def parse_leaf(head: str, body: Lines, most: int = MOST_NUMBERS) -> Leaf:
    """The inverse of :func:`leaf_lines`, with at most ``most`` integers. Raises ``ValueError`` for
    text that it never writes."""
    if match := _NUMBERS.fullmatch(head):
        return _parse_numbers(match, body, most)
    if match := _RANKING.fullmatch(head):
        return _parse_ranking(match, body)
    if head == f"spans {len(body)}":
        found = (_matched(_SPAN, line) for _, line in body)
        return Spans(tuple(_span(match) for match in found))
    if head == f"lines {len(body)}":
        return Scalar("".join(parse_string(line.strip()) for _, line in body))
    if body:
        raise ValueError(f"{len(body)} lines do not belong to {head!r}")
    if _KIND.fullmatch(head):
        return Kind(head)
    if _FLOAT.fullmatch(head) and re.search(r"[.einf]", head):
        return Scalar(float(head))
    if _INTEGER.fullmatch(head):
        return Scalar(int(head))
    if head in _WORDS:
        return Scalar(_WORDS[head])
    if not head.startswith('"'):
        raise ValueError(f"{head[:40]!r} is not a single value")
    return Scalar(parse_string(head))


def _parse_ranking(match: re.Match[str], body: Lines) -> Ranking:
    ranked = [_matched(_RANKED, line) for _, line in body]
    ids = tuple(int(found[1]) for found in ranked)
    if not 0 < len(set(ids)) == len(ids):
        raise ValueError("a ranking that is empty or has a token twice")
    return Ranking(
        ids=ids,
        logprobs=tuple(float(found[2]) for found in ranked),
        logsumexp=float(match[1]),
        entropy=float(match[2]),
        words={int(found[1]): parse_string(found[3]) for found in ranked if found[3]},
    )


def _matched(pattern: re.Pattern[str], line: str) -> re.Match[str]:
    match = pattern.fullmatch(line.strip())
    if match is None:
        raise ValueError(f"{line.strip()[:80]!r} does not have the expected form")
    return match


def _span(match: re.Match[str]) -> Span:
    modality = next(known for known in get_args(Modality) if known == match[1])
    return Span(modality, int(match[2]), int(match[3]), int(match[4]))


def _parse_numbers(match: re.Match[str], body: Lines, most: int) -> Numbers | Fingerprint:
    dtype = match["dtype"]
    if dtype not in DTYPES and dtype not in ("int", "float"):
        raise ValueError(f"{dtype!r} is not a dtype")
    shapes = [
        tuple(int(size) for size in shape.split(",") if size.strip())
        for shape in re.findall(r"\[([\d, ]*)\]", match["shapes"])
    ]
    if any(len(shape) > _MOST_AXES or max(shape, default=0) > _LONGEST_AXIS for shape in shapes):
        raise ValueError("a shape that is too large")
    if match["sketch"]:
        return _parse_fingerprint(dtype, tuple(shapes), body)
    if dtype != "int" and dtype not in INTEGERS:
        return parse_floats(dtype, shapes, body)
    if len(shapes) > 1:
        raise ValueError("integers of several tensors")
    leaf = parse_integers(dtype, shapes[0], body, most)
    if check_of(leaf) != match["sha"]:
        raise ValueError(f"sha256 {match['sha']} does not match the numbers', {check_of(leaf)}")
    return leaf


def _parse_fingerprint(dtype: str, shapes: tuple[tuple[int, ...], ...], body: Lines) -> Fingerprint:
    statistics = _matched(_STATISTICS, body[0][1] if body else "")
    rows: dict[str, list[float]] = {"projections": [], "samples": []}
    sha256 = None
    for _, line in body[1:]:
        label, _, rest = line.strip().partition(" ")
        if label == "sha256":
            sha256 = rest
        elif label in rows:
            rows[label] += map(float, rest.split())
        else:
            raise ValueError(f"{label!r} is not part of a fingerprint")
    size = sum(math.prod(shape) for shape in shapes)
    if (sha256 is not None) != (dtype in INTEGERS) or dtype in ("int", "float"):
        raise ValueError(f"a fingerprint that does not fit {dtype}")
    if (len(rows["projections"]), len(rows["samples"])) != (PROJECTIONS, min(size, SAMPLES)):
        raise ValueError("an incomplete fingerprint")
    mean, std, low, high = map(float, statistics.groups()[:4])
    nan, inf = map(int, statistics.groups()[4:])
    return Fingerprint(
        dtype, shapes, mean, std, low, high, nan, inf,
        tuple(rows["projections"]), tuple(rows["samples"]), sha256,
    )  # fmt: skip
