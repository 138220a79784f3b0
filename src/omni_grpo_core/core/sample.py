"""Rows of a data set -> samples, whatever row format they have.

A row that cannot be used is an error that names file and row. It is never skipped, repaired or
replaced: a data set that silently differs from its file corrupts groups and scores.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omni_grpo_core.core.readers import human_omni, llava, openai, social_iq, swift, trl, verl
from omni_grpo_core.core.readers.row import Format
from omni_grpo_core.core.rows import DataRow, is_file, is_text, read_rows, short
from omni_grpo_core.errors import ConfigError, DataError
from omni_grpo_core.types import Sample

FORMATS: tuple[Format, ...] = tuple(
    module.FORMAT for module in (human_omni, social_iq, verl, trl, openai, swift, llava)
)
"""A row is of the first that it fits."""


def load_samples(
    path: Path | str, *, root: Path | None = None, format: str | None = None
) -> tuple[Sample, ...]:
    """Read a data set: a JSON list of rows or JSONL, whatever its file name, a parquet or arrow
    file, a folder that ``datasets`` saved or loads, or ``hub:NAME`` for one on the Hub;
    ``:SPLIT`` after a folder or name chooses a split, by default ``train``.

    Media paths are relative to ``root``, by default the folder of the file. Each row's format is
    known from its keys; ``format`` names one for all, of :data:`FORMATS`:

    *humanomni* (``problem``, ``problem_type``, ``options``, ``solution``, ``data_type``,
    ``path``). ``path`` is one file or a list, of modality ``data_type``, or ``{image, video,
    audio}`` of these with ``data_type`` naming one; a row without ``path`` is text only.
    ``problem_id`` or ``id`` is the sample id, else ``file:row``. The gold answer is in ``<answer>``
    tags, after ``<context>`` and ``<think>`` if present, as in every public row; a bare one is
    refused, not wrapped, since a gold that lost its tags may have lost more.

    *social-iq* (``q``, ``a0`` to ``a3``, ``answer_idx``, ``vid_name``, ``ts``) becomes multiple
    choice with options ``"A. …"`` and gold ``<answer>A</answer>``. The video is
    ``video/<vid_name>.mp4`` or ``<vid_name>.mp4`` in ``root``; without ``root`` also in the folder
    above, as in the public layout (``siq2/qa``, ``siq2/video``). ``ts`` gives start and end in
    seconds; a range from 0 to beyond the minute to which the public videos are cut means the whole
    file. Public ``qid`` values repeat for different questions: the second becomes ``qid#2``.

    *trl* (``prompt``), *verl* (``prompt``, ``reward_model``), *swift* and *openai* (``messages``),
    *llava* (``conversations``): the last message of the user is the question, what comes before it
    the sample's history. Media lie in the messages or in the columns ``images``, ``videos``,
    ``audios``, from which ``<image>``, ``<video>`` and ``<audio>`` marks take them in order. The
    gold is in ``solution``, ``answer``, ``ground_truth``, ``completion`` or
    ``reward_model.ground_truth``, else the assistant's last message; without ``<answer>`` tags it
    is the whole text, or what follows ``</think>``. Lettered lines that end the question are its
    options. A row without ``problem_type`` gets the first that reads its gold: multiple choice,
    several options, yes or no, number, free text.

    A gold is read by :func:`~omni_grpo_core.rewards.accuracy.check_gold`, as the accuracy reward
    does. Rows (in JSONL, lines) count from 1.

    Raises:
        DataError: naming file and row, for a row that is incomplete, contradicts itself, or names a
            file that does not exist.
        ConfigError: no such ``format``.
    """
    read = list(read_samples(path, root=root, format=format))
    if not read:
        raise DataError(str(path), got="no rows", want="at least one", fix="check the file")
    for one in read:
        if isinstance(one.sample, DataError):
            raise one.sample
    samples = tuple(one.sample for one in read if isinstance(one.sample, Sample))
    _refuse_missing_files(samples)
    return samples


@dataclass(frozen=True, slots=True)
class ReadRow:
    """A row and what was read: its format and its sample, or the error that it is."""

    row: DataRow
    format: Format | None
    sample: Sample | DataError


def read_samples(
    path: Path | str, *, root: Path | None = None, format: str | None = None
) -> Iterator[ReadRow]:
    """Every row of a data set, those that cannot be used included; media files are not looked for.

    Raises:
        DataError: the file cannot be read.
        ConfigError: no such ``format``.
    """
    asked = None if format is None else format_named(format)
    seen: dict[str, tuple[DataRow, str]] = {}
    for row in read_rows(path):
        found = asked
        try:
            found = asked or format_of(row)
            yield ReadRow(row, found, _unique(row, found, _read(row, found, root), seen))
        except DataError as error:
            yield ReadRow(row, found, error)


def format_named(name: str) -> Format:
    """The format of this name. Raises ConfigError if there is none."""
    for one in FORMATS:
        if one.name == name:
            return one
    names = ", ".join(one.name for one in FORMATS)
    raise ConfigError("format", got=name, want=f"one of {names}", fix="correct it, or leave it out")


def format_of(row: DataRow) -> Format:
    """The format whose keys the row has, or most of them. Raises DataError for a row that has none
    of any format's."""
    likely = [one for one in FORMATS if one.is_like(row.values)]
    for one in likely:
        if not one.missing(row.values):
            return one
    nearest = max(likely, key=lambda one: (_nearness(one, row), -len(one.missing(row.values))))
    if len(nearest.missing(row.values)) < len(nearest.needs):
        return nearest
    keys = ", ".join(map(str, row.values)) or "no keys"
    if not _nearness(nearest, row):
        wanted = "; ".join(f"{one.title}'s: {_keys(one.needs)}" for one in FORMATS)
        row.fail(f"a row of no known format, with {keys[:100]}", wanted, "rename its keys")
    lacking = _keys(nearest.missing(row.values))
    row.fail(f"a row with {keys[:100]}", f"{lacking}, as in {nearest.title}'s, the nearest format")


def _nearness(one: Format, row: DataRow) -> float:
    """How many of a format's keys a row has; one that is merely similar counts half."""
    names = [str(key) for key in row.values]
    similar = sum(
        bool(difflib.get_close_matches(key, names, 1, 0.8)) for keys in one.missing(row.values)
        for key in keys
    )  # fmt: skip
    return len(one.needs) - len(one.missing(row.values)) + similar / 2


def _keys(groups: Sequence[tuple[str, ...]]) -> str:
    return ", ".join(" or ".join(map(repr, keys)) for keys in groups)


def _read(row: DataRow, found: Format, root: Path | None) -> Sample:
    key = next((key for key in found.ids if row.values.get(key) is not None), None)
    sample_id = f"{row.file.name}:{row.number}" if key is None else row.values[key]
    if type(sample_id) is not int and not is_text(sample_id):
        row.fail(f"{key} {short(sample_id)}", "a string or an integer")
    try:
        return found.read(row, str(sample_id), root)
    except DataError as error:
        if not found.missing(row.values):
            raise
        # with a key missing, the format itself is a guess
        raise type(error)(
            error.item, got=error.got, want=f"{error.want}, as in {found.title}'s rows",
            fix=error.fix,
        ) from None  # fmt: skip


def _unique(
    row: DataRow, found: Format, sample: Sample, seen: dict[str, tuple[DataRow, str]]
) -> Sample:
    sample_id, copies = sample.sample_id, 1
    while sample_id in seen:
        first, question = seen[sample_id]
        if not found.repeats or question == sample.question:
            key = next((key for key in found.ids if row.values.get(key) is not None), None)
            row.fail(
                f"{key} {sample.sample_id!r}, which row {first.number} has too",
                "a unique id per row",
                "rename or remove one; completions are grouped by this id",
            )
        copies += 1
        sample_id = f"{sample.sample_id}#{copies}"
    seen[sample_id] = (row, sample.question)
    return replace(sample, sample_id=sample_id)


def missing_files(sample: Sample) -> list[str]:
    """The media files of a sample that do not exist."""
    return [ref.path for ref in sample.media if not is_file(Path(ref.path))]


def _refuse_missing_files(samples: Sequence[Sample]) -> None:
    missing = {s.origin: paths[0] for s in samples if (paths := missing_files(s))}
    if missing:
        origin, path = next(iter(missing.items()))
        others = f" (and {len(missing) - 1} other rows lack theirs)" if len(missing) > 1 else ""
        raise DataError(
            origin,
            got=f"no file {path}{others}",
            want="the media file of the row",
            fix="get the file, set the media root, or remove the row",
        )
