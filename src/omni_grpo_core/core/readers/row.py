"""What row formats share: the interface, files of media, golds, and options within a question."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from omni_grpo_core.core.conversation import marks
from omni_grpo_core.core.rows import DataRow, is_text, short
from omni_grpo_core.errors import DataError
from omni_grpo_core.io.atomic import write_file
from omni_grpo_core.io.bounded import is_url
from omni_grpo_core.rewards.accuracy import check_gold
from omni_grpo_core.rewards.choice import lettered
from omni_grpo_core.types import MODALITIES, PROBLEM_TYPES, MediaRef, Modality, ProblemType, Sample

WITH_OPTIONS: tuple[ProblemType, ...] = ("multiple choice", "emer_ov_mc")
_OPTION = re.compile(r"\s*[(\[]?([A-Z])[)\].:、]\s*\S.*")
_OPTIONS_FOLLOW = re.compile(r"\s*(?:options|choices)\s*[::]\s*", re.IGNORECASE)
_LEADING_MARKS = re.compile(r"\s*(?:<(?:image|video|audio)>\s*)+")


class UnreadableGold(DataError):
    """A row whose gold no reward can read."""


@dataclass(frozen=True, slots=True)
class Format:
    """A row format. ``name``: for ``--format``; ``title``: whose it is. ``needs``: the keys that
    every row has, or for each its alternatives. ``is_like``: whether a row has its shape, where
    keys alone do not tell. ``read``: a row, its sample id and the media root → sample; raises
    ``DataError``. ``ids``: the keys that may hold the id; ``repeats``: whether the published ids
    repeat for different questions."""

    name: str
    title: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[DataRow, str, Path | None], Sample]
    is_like: Callable[[Mapping[str, Any]], bool] = lambda values: True
    ids: tuple[str, ...] = ("id",)
    repeats: bool = False

    def missing(self, values: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """The needed keys, each with its alternatives, that a row lacks."""
        return [keys for keys in self.needs if all(values.get(key) is None for key in keys)]


# --------------------------------------------------------------------------- media


def media_ref(row: DataRow, modality: Modality, value: Any, root: Path | None) -> MediaRef:
    """A medium as rows give it: a path, a ``file:`` or ``data:`` URL, or a mapping with ``path`` or
    with ``bytes``, as ``datasets`` stores it. Bytes become a file under the cache folder."""
    stretch: dict[str, float | None] = {"start": None, "end": None}
    if isinstance(value, Mapping):
        for key, name in (("start", "video_start"), ("end", "video_end")):
            seconds = value.get(name)
            if seconds is not None and type(seconds) not in (int, float):
                row.fail(f"{name} {short(seconds)}", "seconds")
            stretch[key] = None if seconds is None else float(seconds)
        names = ("bytes", "path", modality, f"{modality}_url", "url")
        value = next((value[name] for name in names if value.get(name)), None)
        if isinstance(value, Mapping):  # {"image_url": {"url": …}}
            value = value.get("url") or value.get("path")
    if isinstance(value, bytes):
        return MediaRef(modality, str(_stored(value)), **stretch)
    if not is_text(value):
        row.fail(f"{modality} {short(value)}", "a path")
    if value.startswith("data:"):
        return MediaRef(modality, str(_stored(_decoded(row, value))), **stretch)
    if value.startswith("file://"):
        value = unquote(urlsplit(value).path)
    if is_url(value):
        row.fail(f"path {short(value)}, a URL", "a file: URLs are not read", "download it")
    return MediaRef(modality, str((root or row.folder) / value), **stretch)


def _decoded(row: DataRow, url: str) -> bytes:
    kind, _, content = url.partition(",")
    try:
        if not kind.endswith(";base64") or not content:
            raise ValueError
        return base64.b64decode(content, validate=True)
    except (ValueError, binascii.Error):
        row.fail(f"{short(url)}", "data:…;base64,… with content", "save it as a file")


def _stored(content: bytes) -> Path:
    """A file with this content, named by its hash."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    file = Path(cache) / "omni-grpo-core" / "media" / hashlib.sha256(content).hexdigest()
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, content)
    return file


def as_list(value: Any) -> list[Any]:
    """A column that holds one item, several or none."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def without_leading_marks(row: DataRow, text: str, media: Sequence[MediaRef]) -> str:
    """A question whose marks agree with its media; marks that only say that these come first, in
    their order, are left out."""
    marked = marks(text)
    for modality in MODALITIES:
        there = sum(ref.modality == modality for ref in media)
        if there and marked.count(modality) not in (0, there):  # without any, a mark is text
            row.fail(
                f"{marked.count(modality)} <{modality}> and {there} {modality} items",
                "a mark for each, or none",
            )
    bare = _LEADING_MARKS.sub("", text, count=1) if _LEADING_MARKS.match(text) else text
    if not marks(bare) and list(marked) == [ref.modality for ref in media]:
        return bare
    return text


# --------------------------------------------------------------------------- golds


def problem_type_of(row: DataRow) -> ProblemType | None:
    """The row's own, ``None`` if it has none."""
    kind = row.values.get("problem_type")
    if kind is not None and kind not in PROBLEM_TYPES:
        row.fail(f"problem_type {short(kind)}", f"one of {', '.join(PROBLEM_TYPES)}")
    return cast(ProblemType | None, kind)


def options_of(row: DataRow, kind: ProblemType | None) -> tuple[str, ...]:
    """The options that the row lists, with letters where its type needs them."""
    options = row.values.get("options") or row.values.get("choices") or []
    if isinstance(options, Mapping):  # arrow gives every row all letters
        options = [f"{label}. {text}" for label, text in options.items() if text is not None]
    if not isinstance(options, list) or not all(map(is_text, options)):
        row.fail(f"options {short(options)}", "a list of strings")
    if kind in WITH_OPTIONS and not options:
        row.fail("no options", f"options, since the problem_type is {kind!r}")
    return lettered(options) if kind in WITH_OPTIONS else tuple(options)


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    r"""A question and the options that end it, one a line, lettered from A.

    >>> split_options("Which colour?\nA. red\nB. blue")
    ('Which colour?', ('A. red', 'B. blue'))
    """
    lines = text.rstrip().split("\n")
    count = 0
    for line in reversed(lines):
        if not _OPTION.fullmatch(line):
            break
        count += 1
    options = tuple(line.strip() for line in lines[len(lines) - count :])
    letters = "".join(found[1] for line in options if (found := _OPTION.fullmatch(line)))
    question = lines[: len(lines) - count]
    if question and _OPTIONS_FOLLOW.fullmatch(question[-1]):
        question = question[:-1]
    asked = "\n".join(question).rstrip()
    if count < 2 or letters != "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count] or not asked:
        return text, ()
    return asked, options


def read_gold(row: DataRow, kind: ProblemType, options: Sequence[str], solution: str) -> None:
    """Refuses a gold that the accuracy reward could not read."""
    try:
        check_gold(kind, options, solution)
    except DataError as error:
        raise UnreadableGold(row.origin, got=error.got, want=error.want, fix=error.fix) from None


def gold_text(row: DataRow, key: str, value: Any) -> str:
    """A gold as the formats of other trainers have it, in ``<answer>`` tags: bare, or after
    ``</think>``."""
    if isinstance(value, (int, float)):
        value = str(value)
    if not is_text(value):
        row.fail(f"{key} {short(value)}", "the right answer as text or number")
    if "<answer>" in value:
        return cast(str, value)
    return f"<answer>{value.rpartition('</think>')[2].strip()}</answer>"


def inferred_type(options: Sequence[str], solution: str) -> ProblemType:
    """The first type whose measure reads the gold: of a question with options multiple choice, or
    several answers; else yes or no, a number, any text."""
    kinds: tuple[ProblemType, ...] = WITH_OPTIONS if options else ("judge", "numerical")
    for kind in kinds:
        try:
            check_gold(kind, options, solution)
        except DataError:
            continue
        return kind
    return "free-form"
