"""Every row of a data set, read as a run would read it, without torch: what is in it, and which
rows a run could not use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from omni_grpo_core.core.family import qwen2_5_omni_audio_tokens
from omni_grpo_core.core.media_config import TOKEN_SIDE
from omni_grpo_core.core.readers.row import UnreadableGold
from omni_grpo_core.core.sample import missing_files, read_samples
from omni_grpo_core.errors import ConversationError, DataError, OmniGrpoError
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.training.positions import Positions, positions_of, too_long
from omni_grpo_core.training.prompt_estimate import TokenShape, prompt_sizes, token_shape
from omni_grpo_core.types import MODALITIES, Dialogue, Sample

_PUBLISHED = (TokenShape(TOKEN_SIDE, qwen2_5_omni_audio_tokens), Positions(32_768))
"""Of Qwen2.5-Omni, where no checkpoint is given."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A row that a run could not use, or should not. ``kind``: ``gold`` (no reward can read it),
    ``row``, ``file`` (missing), ``contradiction`` (the question of another row with another gold)
    or ``length``."""

    kind: str
    origin: str
    got: str
    want: str
    fix: str


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Prompt tokens of the usable rows: media from the files' headers, at least; text by the
    checkpoint's tokenizer, or else a token for four bytes of the prompt. ``longest``: origin and
    tokens of the largest."""

    least: int
    median: float
    most: int
    longest: tuple[tuple[str, int], ...]
    limit: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """A data set: its rows by format, problem type and media; findings; repeated rows, each with
    the one it repeats; token counts, ``None`` without a usable row."""

    source: str
    rows: int
    formats: Mapping[str, int]
    problem_types: Mapping[str, int]
    media: Mapping[str, int]
    dialogues: int
    findings: tuple[Finding, ...]
    repeated: tuple[tuple[str, str], ...]
    tokens: TokenCounts | None

    @property
    def ok(self) -> bool:
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def check_data(
    source: Path | str,
    *,
    root: Path | None = None,
    format: str | None = None,
    checkpoint: Path | None = None,
    settings: Settings | None = None,
    on_rows: Callable[[int], None] = lambda count: None,
) -> DataReport:
    """Read every row. ``on_rows`` is called with the number of rows read so far.

    Raises ``DataError`` for a file that cannot be read or has no rows, ``ConfigError`` for no such
    format, ``CheckpointError``.
    """
    shape, positions = _PUBLISHED
    if checkpoint is not None:
        shape, positions = token_shape(checkpoint), positions_of(checkpoint) or positions
    formats, samples, findings = Counter[str](), list[Sample](), list[Finding]()
    rows = 0
    for rows, one in enumerate(read_samples(source, root=root, format=format), 1):
        on_rows(rows)
        formats["none" if one.format is None else one.format.name] += 1
        if isinstance(one.sample, DataError):
            kind = "gold" if isinstance(one.sample, UnreadableGold) else "row"
            findings.append(_finding(kind, one.row.origin, one.sample))
            continue
        samples.append(one.sample)
        findings += [
            Finding("file", one.row.origin, f"no file {path}", "the media file of the row",
                    "get the file, set the media root, or remove the row")
            for path in missing_files(one.sample)
        ]  # fmt: skip
    if not rows:
        raise DataError(str(source), got="no rows", want="at least one", fix="check the file")
    repeated, contradictions = _repeated(samples)
    tokens, long = _tokens(samples, settings or Settings(), shape, positions)
    return DataReport(
        source=str(source),
        rows=rows,
        formats=_most_first(formats),
        problem_types=_most_first(Counter(sample.problem_type for sample in samples)),
        media=_most_first(Counter(map(_media, samples))),
        dialogues=sum(isinstance(sample, Dialogue) for sample in samples),
        findings=(*findings, *contradictions, *long),
        repeated=repeated,
        tokens=tokens,
    )


def _finding(kind: str, origin: str, error: OmniGrpoError) -> Finding:
    return Finding(kind, origin, error.got, error.want, error.fix)


def _most_first(counted: Counter[Any]) -> dict[str, int]:
    return dict(sorted(counted.items(), key=lambda pair: (-pair[1], pair[0])))


def _media(sample: Sample) -> str:
    """
    >>> from omni_grpo_core.types import MediaRef
    >>> refs = tuple(MediaRef("video", name) for name in "ab") + (MediaRef("audio", "c"),)
    >>> _media(Sample("s", "q", "OCR", (), "", refs, "o"))
    '2 videos + audio'
    """
    kinds = [ref.modality for ref in sample.media]
    counts = [(m, kinds.count(m)) for m in MODALITIES if m in kinds]
    return " + ".join(m if n == 1 else f"{n} {m}s" for m, n in counts) or "text only"


def _repeated(samples: Sequence[Sample]) -> tuple[tuple[tuple[str, str], ...], list[Finding]]:
    seen: dict[object, Sample] = {}
    repeated, contradictions = [], []
    for sample in samples:
        history = sample.history if isinstance(sample, Dialogue) else ()
        asked = (" ".join(sample.question.split()), sample.options, sample.media, history)
        first = seen.setdefault(asked, sample)
        if first is sample:
            continue
        if first.solution == sample.solution:
            repeated.append((sample.origin, first.origin))
        else:
            contradictions.append(
                Finding("contradiction", sample.origin,
                        f"the question and media of {first.origin} with another gold",
                        "one gold for one question", "remove the wrong row")
            )  # fmt: skip
    return tuple(repeated), contradictions


def _tokens(
    samples: Sequence[Sample], settings: Settings, shape: TokenShape, positions: Positions
) -> tuple[TokenCounts | None, list[Finding]]:
    counted: list[tuple[str, int]] = []
    findings = []
    for sample in samples:
        try:
            (size,) = prompt_sizes([sample], settings, shape)
        except ConversationError as error:
            findings.append(_finding("row", sample.origin, error))
            continue
        text = positions.text_tokens(sample) or size.text
        counted.append((sample.origin, text + size.media))
        over = too_long(sample, size, settings.max_new_tokens, positions)
        if over is not None:
            findings.append(_finding("length", sample.origin, over))
    if not counted:
        return None, findings
    counts = [tokens for _, tokens in counted]
    longest = sorted(counted, key=lambda pair: -pair[1])[:5]
    return (
        TokenCounts(min(counts), median(counts), max(counts), tuple(longest), positions.limit),
        findings,
    )
