"""Rows of a data set -> samples. Reads HumanOmniV2's JSON and Social-IQ 2.0's QA files.

A row that cannot be used is an error that names file and row. It is never skipped, repaired or
replaced: a data set that silently differs from its file corrupts groups and scores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from omni_grpo_core.core.rows import DataRow, is_text, read_rows, short
from omni_grpo_core.errors import DataError
from omni_grpo_core.io.bounded import is_url
from omni_grpo_core.rewards.accuracy import check_gold
from omni_grpo_core.rewards.choice import lettered
from omni_grpo_core.types import MODALITIES, PROBLEM_TYPES, MediaRef, ProblemType, Sample

_STRETCH = re.compile(r"\s*(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)\s*")
_WITH_OPTIONS = ("multiple choice", "emer_ov_mc")
_CHOICES = ("a0", "a1", "a2", "a3")
_PUBLIC_CUT = 60.5
"""Seconds. The public downloader cuts every Social-IQ video to one minute, within a few frames."""


def load_samples(path: Path | str, *, root: Path | None = None) -> tuple[Sample, ...]:
    """Read a data set: a JSON list of rows or JSONL, whatever its file name.

    Media paths are relative to ``root``, by default the folder of the file.

    *HumanOmniV2 rows* (``problem``, ``problem_type``, ``options``, ``solution``, ``data_type``,
    ``path``). ``path`` is a string, of modality ``data_type``, or ``{image|video, audio}`` with
    ``data_type`` naming one of these; a row without ``path`` is text only. ``problem_id`` or
    ``id`` is the sample id, else ``file:row``. The gold answer is in ``<answer>`` tags, after
    ``<context>`` and ``<think>`` if present, as in every public row; a bare one is refused, not
    wrapped, since a gold that lost its tags may have lost more. So is an answer that does not fit
    its ``problem_type``, by :func:`~omni_grpo_core.rewards.accuracy.check_gold`, which reads it as
    the accuracy reward does. Options without labels get letters.

    *Social-IQ 2.0 rows* (``q``, ``a0`` to ``a3``, ``answer_idx``, ``vid_name``, ``ts``) become
    multiple choice with options ``"A. …"`` and gold ``<answer>A</answer>``. The video is
    ``video/<vid_name>.mp4`` or ``<vid_name>.mp4`` in ``root``; without ``root`` also in the folder
    above, as in the public layout (``siq2/qa``, ``siq2/video``). ``ts`` gives start and end in
    seconds; a range from 0 to beyond the minute to which the public videos are cut means the whole
    file. Public ``qid`` values repeat for different questions: the second becomes ``qid#2``.

    Rows (in JSONL, lines) count from 1. Raises DataError, naming file and row, for a row that is
    incomplete, contradicts itself, or names a file that does not exist.
    """
    file = Path(path)
    rows = tuple(read_rows(file))
    if not rows:
        raise DataError(str(file), got="no rows", want="at least one", fix="check the file")
    samples = tuple(_read(row, root) for row in rows)
    _refuse_missing_files(samples)
    return _with_unique_ids(rows, samples)


def _refuse_missing_files(samples: Sequence[Sample]) -> None:
    missing = {
        sample.origin: ref.path
        for sample in samples
        for ref in sample.media
        if not _is_file(Path(ref.path))
    }
    if missing:
        origin, path = next(iter(missing.items()))
        others = f" (and {len(missing) - 1} other rows lack theirs)" if len(missing) > 1 else ""
        raise DataError(
            origin,
            got=f"no file {path}{others}",
            want="the media file of the row",
            fix="get the file, set the media root, or remove the row",
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL in it
        return False


def _with_unique_ids(rows: tuple[DataRow, ...], samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    seen: dict[str, tuple[DataRow, str]] = {}
    unique = []
    for row, sample in zip(rows, samples, strict=True):
        sample_id, copies = sample.sample_id, 1
        while sample_id in seen:
            first, question = seen[sample_id]
            if not _is_social_iq(row) or question == sample.question:
                row.fail(
                    f"{_id_key(row)} {sample.sample_id!r}, which row {first.number} has too",
                    "a unique id per row",
                    "rename or remove one; completions are grouped by this id",
                )
            copies += 1
            sample_id = f"{sample.sample_id}#{copies}"
        seen[sample_id] = (row, sample.question)
        unique.append(replace(sample, sample_id=sample_id))
    return tuple(unique)


# --------------------------------------------------------------------------- the row


def _is_social_iq(row: DataRow) -> bool:
    return "vid_name" in row.values or "q" in row.values


def _id_key(row: DataRow) -> str | None:
    keys = ("qid",) if _is_social_iq(row) else ("problem_id", "id")
    return next((key for key in keys if row.values.get(key) is not None), None)


def _read(row: DataRow, root: Path | None) -> Sample:
    key = _id_key(row)
    sample_id = f"{row.file.name}:{row.number}" if key is None else row.values[key]
    if type(sample_id) is not int and not is_text(sample_id):
        row.fail(f"{key} {short(sample_id)}", "a string or an integer")
    return (_social_iq if _is_social_iq(row) else _human_omni)(row, str(sample_id), root)


def _human_omni(row: DataRow, sample_id: str, root: Path | None) -> Sample:
    question = row.text("problem")
    kind = row.values.get("problem_type")
    if kind not in PROBLEM_TYPES:
        row.fail(f"problem_type {short(kind)}", f"one of {', '.join(PROBLEM_TYPES)}")
    options = _options(row, kind)
    solution = row.text("solution")
    try:
        check_gold(cast(ProblemType, kind), options, solution)
    except DataError as error:
        row.fail(error.got, error.want, error.fix)
    return Sample(
        sample_id=sample_id,
        question=question,
        problem_type=cast(ProblemType, kind),
        options=options,
        solution=solution,
        media=_media(row, root),
        origin=row.origin,
    )


def _options(row: DataRow, kind: str) -> tuple[str, ...]:
    options = row.values.get("options") or []
    if not isinstance(options, list) or not all(map(is_text, options)):
        row.fail(f"options {short(options)}", "a list of strings")
    if kind in _WITH_OPTIONS:
        if not options:
            row.fail("no options", f"options, since the problem_type is {kind!r}")
        return lettered(options)
    return tuple(options)


def _media(row: DataRow, root: Path | None) -> tuple[MediaRef, ...]:
    values = row.values
    # evaluation files of HumanOmniV2 have the path under the modality alone
    path = values.get("path", {k: values[k] for k in MODALITIES if values.get(k) is not None})
    data_type = values.get("data_type", None if path else "text")
    if not isinstance(data_type, str):
        row.fail(f"data_type {short(data_type)}", f"one of {', '.join(MODALITIES)}")
    named = set(re.split(r"[^a-z]+", data_type)) - {"", "and"}
    if not named or not named <= {*MODALITIES, "text"}:
        row.fail(f"data_type {data_type!r}", f"one of {', '.join(MODALITIES)}, text")
    if isinstance(path, str) and path.strip():
        if len(named - {"text"}) != 1:
            row.fail(f"data_type {data_type!r} and one path", f"one of {', '.join(MODALITIES)}")
        path = {(named - {"text"}).pop(): path}
    if not path:
        if named != {"text"}:
            row.fail(
                f"data_type {data_type!r} and no path", "a path", "add it, or use data_type 'text'"
            )
        return ()
    if not isinstance(path, dict) or not all(map(is_text, path.values())):
        row.fail(f"path {short(path)}", "a file, or {image|video, audio} of files")
    url = next(filter(is_url, path.values()), None)
    if url is not None:
        row.fail(f"path {short(url)}, a URL", "a file: URLs are not read", "download it")
    kinds = set(path)
    if not kinds <= set(MODALITIES) or {"image", "video"} <= kinds:
        row.fail(f"path for {', '.join(sorted(path))}", "image or video, audio, or both")
    if not named - {"text"} or not named - {"text"} <= kinds:
        row.fail(
            f"data_type {data_type!r} and a path for {', '.join(sorted(kinds))}",
            "a data_type that agrees with the path",
        )
    base = root or row.file.parent
    return tuple(MediaRef(kind, str(base / path[kind])) for kind in MODALITIES if kind in path)


# --------------------------------------------------------------------------- Social-IQ 2.0


def _social_iq(row: DataRow, sample_id: str, root: Path | None) -> Sample:
    question = row.text("q")
    options = tuple(
        f"{letter}. {row.text(key)}" for letter, key in zip("ABCD", _CHOICES, strict=True)
    )
    gold = row.values.get("answer_idx")
    if type(gold) is not int or gold not in range(len(_CHOICES)):
        row.fail(
            f"answer_idx {short(gold)}",
            "0, 1, 2 or 3",
            "use a labelled file (the public test split has no answers)",
        )
    name, stretch = row.text("vid_name"), row.text("ts")
    match = _STRETCH.fullmatch(stretch)
    start, end = (float(t) for t in match.groups()) if match else (math.nan, math.nan)
    if not start < end:
        row.fail(f"ts {stretch!r}", 'start and end in seconds, such as "0.00-60.00"')
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
                str(next(filter(_is_file, candidates), candidates[0])),
                start=start,
                end=None if start == 0 and end > _PUBLIC_CUT else end,
            ),
        ),
        origin=row.origin,
    )
