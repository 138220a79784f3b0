"""Rows of a data set -> samples. Reads HumanOmniV2's JSON and Social-IQ 2.0's QA files.

A row that cannot be used is an error that names file and row. It is never skipped, mended or
replaced by another: a data set that is silently not what it says poisons groups and scores.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast

from omni_grpo_core.errors import DataError
from omni_grpo_core.types import MODALITIES, PROBLEM_TYPES, MediaRef, ProblemType, Sample

_LABEL = re.compile(r"\(?([A-Z])(?:[.:)、]|\s|$)")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_STRETCH = re.compile(r"\s*(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)\s*")
_CHOICES = ("a0", "a1", "a2", "a3")
_PUBLIC_CUT = 60.5
"""Seconds. The public downloader cuts every Social-IQ video to one minute, give or take frames."""


def load_samples(path: Path | str, *, root: Path | None = None) -> tuple[Sample, ...]:
    """Read a data set: a JSON list of rows or JSONL, whatever its file name says.

    Media paths are relative to ``root``, by default the folder of the file.

    *HumanOmniV2 rows* (``problem``, ``problem_type``, ``options``, ``solution``, ``data_type``,
    ``path``). ``path`` is a string, of modality ``data_type``, or ``{image|video, audio}`` with
    ``data_type`` naming one of these; a row without ``path`` is text only. ``problem_id`` or
    ``id`` is the sample id, else ``file:row``. The gold must stand in ``<answer>`` tags, as it
    does in every public row: a bare one is refused, not wrapped, since a gold that lost its tags
    may have lost more.

    *Social-IQ 2.0 rows* (``q``, ``a0`` to ``a3``, ``answer_idx``, ``vid_name``, ``ts``) become
    multiple choice with options ``"A. …"`` and gold ``<answer>A</answer>``. The video is
    ``video/<vid_name>.mp4`` or ``<vid_name>.mp4`` in ``root``; without ``root`` also in the folder
    above, as in the public layout (``siq2/qa``, ``siq2/video``). ``ts`` gives start and end in
    seconds; one that runs from 0 to beyond the minute to which the public videos are cut means
    the whole file. Public ``qid`` values repeat for different questions: the second is told apart
    as ``qid#2``.

    Rows count from 1 (lines, in JSONL). Raises DataError, naming file and row, for anything a row
    lacks, contradicts itself in, or names that is not there.
    """
    file = Path(path)
    rows = tuple(_rows(file))
    if not rows:
        raise DataError(str(file), got="no rows", want="at least one", fix="check the file")
    samples = tuple(_read(row, root) for row in rows)
    return _with_unique_ids(rows, samples)


@dataclass(frozen=True, slots=True)
class _Row:
    file: Path
    number: int
    values: Mapping[str, Any]

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.number}"

    @property
    def is_social_iq(self) -> bool:
        return "vid_name" in self.values or "q" in self.values

    @property
    def id_key(self) -> str | None:
        keys = ("qid",) if self.is_social_iq else ("problem_id", "id")
        return next((key for key in keys if self.values.get(key) is not None), None)

    def bad(self, got: str, want: str, fix: str = "mend the row") -> NoReturn:
        raise DataError(self.origin, got=got, want=want, fix=fix)

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if key not in self.values:
            self.bad(f"no {key!r}", f"a text under {key!r}")
        if not isinstance(value, str) or not value.strip():
            self.bad(f"{key} {_short(value)}", f"a text under {key!r}")
        return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --------------------------------------------------------------------------- the file


def _rows(file: Path) -> Iterator[_Row]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no text in UTF-8" if isinstance(error, ValueError) else str(error.strerror)
        raise DataError(
            str(file), got=reason, want="a JSON or JSONL file", fix="check the path"
        ) from error
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        yield from _lines(file, text)
        return
    if isinstance(whole, dict) and not any(isinstance(v, (list, dict)) for v in whole.values()):
        whole = [whole]  # JSONL of one line
    if not isinstance(whole, list):
        raise DataError(
            str(file),
            got=f"JSON that is a {type(whole).__name__}",
            want="a list of rows, or JSONL",
            fix="save the rows themselves",
        )
    for number, values in enumerate(whole, 1):
        yield _row(file, number, values)


def _lines(file: Path, text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}:{number}",
                got=f"no JSON ({error.msg} at column {error.colno})",
                want="a JSON list in the file, or one JSON object per line",
                fix="mend the file",
            ) from error
        yield _row(file, number, values)


def _row(file: Path, number: int, values: Any) -> _Row:
    if not isinstance(values, dict):
        raise DataError(
            f"{file}:{number}",
            got=f"{_short(values)}",
            want="a JSON object",
            fix="mend the row",
        )
    return _Row(file, number, values)


def _with_unique_ids(rows: tuple[_Row, ...], samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    seen: dict[str, tuple[_Row, str]] = {}
    unique = []
    for row, sample in zip(rows, samples, strict=True):
        sample_id, copies = sample.sample_id, 1
        while sample_id in seen:
            first, question = seen[sample_id]
            if not row.is_social_iq or question == sample.question:
                row.bad(
                    f"{row.id_key} {sample.sample_id!r}, which row {first.number} has too",
                    "one id per row",
                    "rename or remove one; completions are grouped by this id",
                )
            copies += 1
            sample_id = f"{sample.sample_id}#{copies}"
        seen[sample_id] = (row, sample.question)
        unique.append(replace(sample, sample_id=sample_id))
    return tuple(unique)


# --------------------------------------------------------------------------- the row


def _read(row: _Row, root: Path | None) -> Sample:
    key = row.id_key
    sample_id = f"{row.file.name}:{row.number}" if key is None else row.values[key]
    if isinstance(sample_id, bool) or not isinstance(sample_id, (str, int)) or sample_id == "":
        row.bad(f"{key} {_short(sample_id)}", "a text or a number")
    return (_social_iq if row.is_social_iq else _human_omni)(row, str(sample_id), root)


def _human_omni(row: _Row, sample_id: str, root: Path | None) -> Sample:
    question = row.text("problem")
    kind = row.values.get("problem_type")
    if kind not in PROBLEM_TYPES:
        row.bad(f"problem_type {_short(kind)}", f"one of {', '.join(PROBLEM_TYPES)}")
    options = _options(row, kind)
    solution = row.text("solution")
    answers = _ANSWER.findall(solution)
    if len(answers) != 1 or not answers[0].strip():
        row.bad(
            f"solution {_short(solution)}",
            "one <answer>...</answer> with something in it",
            "write the gold as <answer>B</answer>",
        )
    if options and kind in ("multiple choice", "emer_ov_mc"):
        _check_gold_letters(row, kind, options, answers[0].strip())
    return Sample(
        sample_id=sample_id,
        question=question,
        problem_type=cast(ProblemType, kind),
        options=options,
        solution=solution,
        media=_media(row, root),
        origin=row.origin,
    )


def _options(row: _Row, kind: str) -> tuple[str, ...]:
    options = row.values.get("options") or []
    if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
        row.bad(f"options {_short(options)}", "a list of texts")
    if kind in ("multiple choice", "emer_ov_mc"):
        if not options:
            row.bad("no options", f"options, since the problem_type is {kind!r}")
        labels = [match.group(1) for o in options if (match := _LABEL.match(o.strip()))]
        if len(set(labels)) != len(options):
            row.bad(
                f"options {_short(options)}",
                "options that each begin with a letter of their own",
                'write them as "A. red", "B. blue"',
            )
    return tuple(options)


def _check_gold_letters(row: _Row, kind: str, options: tuple[str, ...], gold: str) -> None:
    labels = {o.strip().lstrip("(")[0] for o in options}
    pieces = re.split(r"[,;\s]+", gold) if kind == "emer_ov_mc" else [gold]
    for piece in pieces:
        match = _LABEL.match(piece)
        if piece and (not match or match.group(1) not in labels):
            row.bad(f"gold {_short(gold)}", f"letters of the options ({', '.join(sorted(labels))})")


def _media(row: _Row, root: Path | None) -> tuple[MediaRef, ...]:
    values = row.values
    # evaluation files of HumanOmniV2 name the file by its kind alone
    path = values.get("path", {k: values[k] for k in MODALITIES if values.get(k) is not None})
    data_type = values.get("data_type", None if path else "text")
    if not isinstance(data_type, str):
        row.bad(f"data_type {_short(data_type)}", f"one of {', '.join(MODALITIES)}")
    named = set(re.split(r"[^a-z]+", data_type)) - {"", "and"}
    if not named or not named <= {*MODALITIES, "text"}:
        row.bad(f"data_type {data_type!r}", f"one of {', '.join(MODALITIES)}, text")
    if isinstance(path, str) and path.strip():
        if len(named - {"text"}) != 1:
            row.bad(f"data_type {data_type!r} and a single path", f"one of {', '.join(MODALITIES)}")
        path = {(named - {"text"}).pop(): path}
    if not path:
        if named != {"text"}:
            row.bad(f"data_type {data_type!r} and no path", "a path", "add it, or say 'text'")
        return ()
    if not isinstance(path, dict) or not all(
        isinstance(p, str) and p.strip() for p in path.values()
    ):
        row.bad(f"path {_short(path)}", "a file, or {image|video, audio} of files")
    kinds = set(path)
    if not kinds <= set(MODALITIES) or {"image", "video"} <= kinds:
        row.bad(f"path for {', '.join(sorted(path))}", "image or video, and audio, or one of them")
    if not named - {"text"} or not named - {"text"} <= kinds:
        row.bad(
            f"data_type {data_type!r} and a path for {', '.join(sorted(kinds))}",
            "a data_type that the path agrees with",
        )
    base = root or row.file.parent
    return tuple(
        MediaRef(kind, _existing(row, [base / path[kind]])) for kind in MODALITIES if kind in path
    )


def _existing(row: _Row, candidates: list[Path]) -> str:
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    row.bad(
        f"no file {' or '.join(str(c) for c in candidates)}",
        "the media file of the row",
        "get the file, say where media lie (root), or remove the row",
    )


# --------------------------------------------------------------------------- Social-IQ 2.0


def _social_iq(row: _Row, sample_id: str, root: Path | None) -> Sample:
    question = row.text("q")
    options = tuple(
        f"{letter}. {row.text(key)}" for letter, key in zip("ABCD", _CHOICES, strict=True)
    )
    gold = row.values.get("answer_idx")
    if type(gold) is not int or gold not in range(len(_CHOICES)):
        row.bad(
            f"answer_idx {_short(gold)}",
            "0, 1, 2 or 3",
            "use a labelled file (the public test split has no answers)",
        )
    name, stretch = row.text("vid_name"), row.text("ts")
    match = _STRETCH.fullmatch(stretch)
    start, end = (float(t) for t in match.groups()) if match else (math.nan, math.nan)
    if not start < end:
        row.bad(f"ts {stretch!r}", 'start and end in seconds, such as "0.00-60.00"')
    folders = [root] if root else [row.file.parent, row.file.parent.parent]
    candidates = [f / sub / f"{name}.mp4" for f in folders for sub in ("video", ".")]
    return Sample(
        sample_id=sample_id,
        question=question,
        problem_type="multiple choice",
        options=options,
        solution=f"<answer>{options[gold][0]}</answer>",
        media=(
            MediaRef(
                "video",
                _existing(row, candidates),
                start=start,
                end=None if start == 0 and end > _PUBLIC_CUT else end,
            ),
        ),
        origin=row.origin,
    )
