"""Every error that a user can cause, in one tree.

::

    OmniGrpoError          exit code 2
    ├── ConfigError        a setting
    │   └── MissingExtra   a package that only an extra installs; an ImportError too
    ├── DataError          a row of a data set
    ├── MediaError         a file
    ├── ConversationError  the messages of a sample
    ├── BatchError         a batch
    ├── CheckpointError    a checkpoint folder
    ├── RewardError        a reward function
    ├── TrainError         a training run
    └── TraceError         a stored trace or golden

Each names stage, item, what was found, what was wanted and what to do. A stage that *runs* but
gives a wrong result is a failed :class:`~omni_grpo_core.types.Check` instead: exit code 1.
"""

from __future__ import annotations

from typing import ClassVar

from omni_grpo_core.types import Stage

_LONGEST = 4000


class OmniGrpoError(Exception):
    """Bad input, reported on one printable line with how to fix it; exit code 2.

    >>> print(MediaError("clip.mp4", got="an empty file", want="an mp4", fix="copy it again"))
    media: clip.mp4: found an empty file, wanted an mp4; copy it again
    """

    stage: ClassVar[Stage] = "config"

    def __init_subclass__(cls, *, stage: Stage | None = None) -> None:
        cls.stage = stage or cls.stage

    def __init__(self, item: str, *, got: str, want: str, fix: str) -> None:
        super().__init__(item, got, want, fix)
        self.item = item
        self.got = got
        self.want = want
        self.fix = fix

    @property
    def where(self) -> Stage:
        """The stage in the message: the class's own, unless an error overrides it."""
        return self.stage

    def __str__(self) -> str:
        line = f"{self.where}: {self.item}: found {self.got}, wanted {self.want}; {self.fix}"
        return printable(_cut(line))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        # keyword-only arguments do not survive the default: pytest-xdist and worker pools pickle
        return (_rebuild, (type(self), self.item, self.got, self.want, self.fix))


def printable(text: str) -> str:
    """``text`` made safe for a terminal: a file name may hold escape codes or half a surrogate
    pair.

    >>> printable("\x1b[2Jclip.mp4")
    '\\\\x1b[2Jclip.mp4'
    """
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def one_line(message: object, longest: int = 300) -> str:
    """The message of a third-party error, for ``got``; numpy's fills a screen.

    >>> one_line(ValueError("no such   file"))
    'no such file'
    """
    return " ".join(str(message).split())[:longest]


def _cut(line: str) -> str:
    """Keeps the two ends of a long line: a value may be a megabyte."""
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _rebuild(kind: type[OmniGrpoError], item: str, got: str, want: str, fix: str) -> OmniGrpoError:
    return kind(item, got=got, want=want, fix=fix)


class ConfigError(OmniGrpoError, stage="config"):
    """A setting that is unknown, has the wrong type or cannot work."""


class MissingExtra(ConfigError, ImportError):
    """A package that only an extra installs."""


class DataError(OmniGrpoError, stage="sample"):
    """A row of a data set."""


class ConversationError(OmniGrpoError, stage="conversation"):
    """The messages of a sample contradict each other."""


class MediaError(OmniGrpoError, stage="media"):
    """A file that cannot be read or decoded."""


class BatchError(OmniGrpoError, stage="batch"):
    """Placeholders, grids and audio lengths disagree; a prompt is too long."""


class CheckpointError(OmniGrpoError, stage="policy"):
    """A checkpoint folder that cannot be used."""


class RewardError(OmniGrpoError, stage="reward"):
    """A reward function that breaks its contract."""


class TrainError(OmniGrpoError, stage="loss"):
    """A training run that cannot go on."""


class TraceError(OmniGrpoError, stage="trace"):
    """A stored trace or golden that cannot be read."""
