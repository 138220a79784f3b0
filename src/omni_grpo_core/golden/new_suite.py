"""A new suite as text: its cases, and ``suite.yaml`` with a comment on each key and case."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.choice import Choice
from omni_grpo_core.io.strict import read_mapping

PADDED, STEPS = "padded", "grpo"
_HEAD = """\
# A golden suite, begun by omni-grpo golden init. Add or remove cases, change rows or settings: then
# omni-grpo golden regen, review and accept. Paths are relative to this file.

# rows: HumanOmniV2's JSON or Social-IQ 2.0
{data}
# the folder that media paths in the rows are relative to; default: the data file's
{root}
# the model; and its processor, if that is in another folder
{checkpoint}
{processor}
# settings override the checkpoint's omni_grpo.json, for all cases or for one
{settings}

# where it runs, unless --device and --dtype say otherwise; default: float32 on the CPU
{device}
{dtype}
# the platform of goldens that name none in their file name
{base}
# pytest markers of the cases as tests, for all cases or for one
# marks: [slow]

# Each case is a folder of goldens. Rows count from 0; several are one batch. A case with steps also
# has goldens of that many GRPO steps.
cases:
"""
_EXAMPLES = {
    "root": "../media",
    "processor": "../processor",
    "settings": "{max_new_tokens: 64, audio_in_video: separate}",
    "device": "cuda",
    "dtype": "bfloat16",
}
"""Keys that are written as comments unless they are given."""


@dataclass(frozen=True, slots=True)
class NewCase:
    """``rows`` of the data file, from 0, as one batch; GRPO ``steps``. ``kind``: the kind of its
    row in words, empty for a batch; ``why`` these rows were chosen."""

    name: str
    rows: tuple[int, ...]
    kind: str
    why: str
    steps: int = 0


def new_cases(choice: Choice, steps: int) -> tuple[NewCase, ...]:
    """A case for each row, a padded batch of several, and with ``steps`` those on a short row."""
    cases = [NewCase(one.kind.name, (one.row,), one.kind.words, one.why) for one in choice.taken]
    padded, shortest = choice.padded, choice.shortest
    if padded:
        lengths = ", ".join(str(one.tokens) for one in padded)
        why = f"one padded batch of ≈ {lengths} tokens"
        cases.append(NewCase(PADDED, tuple(one.row for one in padded), "", why))
    if steps:
        why = f"{steps} GRPO {'step' if steps == 1 else 'steps'} on a short row"
        cases.append(NewCase(STEPS, (shortest.row,), shortest.kind.words, why, steps))
    return tuple(cases)


@dataclass(frozen=True, slots=True)
class Sources:
    """What a suite is made from; relative paths are of the working directory. ``device``,
    ``dtype``: ``None`` for the default. ``config``: settings that override the checkpoint's; they
    are copied into the suite.

    Raises ConfigError for a path that no YAML file can hold.
    """

    data: Path
    checkpoint: Path
    root: Path | None = None
    processor: Path | None = None
    config: Path | None = None
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for path in (self.data, self.checkpoint, self.root, self.processor):
            try:
                str(path).encode()
            except UnicodeEncodeError:
                raise ConfigError(
                    str(path),
                    got="a path that is not UTF-8",
                    want="one that suite.yaml can hold",
                    fix="rename it, or name a link to it",
                ) from None


def suite_text(folder: Path, sources: Sources, base: str, cases: Sequence[NewCase]) -> str:
    """``suite.yaml`` of the golden folder ``folder``, which need not exist."""
    paths = {
        key: path_from(folder, path)
        for key in ("data", "root", "checkpoint", "processor")
        if (path := getattr(sources, key)) is not None
    }
    placed = {key: text for key in ("device", "dtype") if (text := getattr(sources, key))}
    settings = read_mapping(sources.config) if sources.config else {}
    written = {**paths, **placed, "base": base} | ({"settings": dict(settings)} if settings else {})
    entries = {key: f"# {key}: {example}" for key, example in _EXAMPLES.items()}
    entries |= {key: f"{key}: {_one_line(value)}" for key, value in written.items()}
    return _HEAD.format(**entries) + "".join(_case_lines(cases))


def path_from(folder: Path, path: Path) -> str:
    """``path`` as seen from ``folder``; a link keeps its own name.

    >>> path_from(Path("/mine/golden"), Path("/mine/rows/a.json"))
    '../rows/a.json'
    """
    found = Path(os.path.realpath(path.parent)) / path.name
    return os.path.relpath(found if path.name != ".." else path.resolve(), os.path.realpath(folder))


def _one_line(value: object) -> str:
    """YAML on one line, quoted as needed."""
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    dumped = yaml.safe_dump(
        value, width=math.inf, allow_unicode=True, default_style=style, default_flow_style=True
    )
    # what follows a plain scalar marks the end of the document
    return str(dumped).partition("\n")[0]


def _case_lines(cases: Sequence[NewCase]) -> Iterator[str]:
    for case in cases:
        steps = f", steps: {case.steps}" if case.steps else ""
        comment = f"{case.kind}: {case.why}" if case.kind else case.why
        yield f"  # {comment}\n  {case.name}: {{rows: {[*case.rows]}{steps}}}\n"
