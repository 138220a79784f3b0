"""A golden suite as plain data: each case's rows of a data file, on a checkpoint.

``suite.yaml`` in a golden folder defines it::

    data: rows.json           # HumanOmniV2's JSON or Social-IQ 2.0, next to the file
    checkpoint: ../my-model
    settings: {max_new_tokens: 32}
    device: cuda              # and dtype: on which it runs unless told otherwise
    marks: [slow]             # of the cases as tests, see omni_grpo_core.pytest_plugin
    fallbacks: {cuda-sm90-bf16: [cuda-sm80-bf16]}
    cases:
      clip: {rows: [0]}
      steps: {rows: [0, 4], steps: 2}

``omni-grpo golden init`` writes one. Without one the suite is that of the shipped tiny checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import yaml

from omni_grpo_core import tiny
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.environment import DTYPES
from omni_grpo_core.io.strict import merge, read_mapping
from omni_grpo_core.pipeline.settings import Settings, load_settings
from omni_grpo_core.types import Sample

SUITE = "suite.yaml"
_SHIPPED = "shipped"
_CHECKPOINTS: Mapping[str, tiny.FamilyName] = {_SHIPPED: "qwen2.5", "shipped-qwen3": "qwen3"}
_TOLERANCES = ("tolerances.yaml", "lanes.yaml")
_NAME = re.compile(r"[\w@=+-][\w@=+.-]{0,99}")
_MARK = re.compile(r"[A-Za-z][\w-]*")
_MOST_STEPS = 100
_PATHS = ("data", "root", "checkpoint", "processor")


@dataclass(frozen=True, slots=True)
class Case:
    """``rows`` of the data file, as one batch; with ``steps``, that many GRPO steps on them.
    ``settings`` override the suite's; ``marks`` are added to the suite's."""

    rows: tuple[int, ...] = ()
    steps: int = 0
    settings: Mapping[str, object] = field(default_factory=dict)
    marks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Suite:
    """``data``, ``root`` and ``checkpoint`` are paths relative to the suite's file, or ``shipped``;
    a checkpoint may also be ``shipped-qwen3``.

    ``settings`` override the checkpoint's own. ``device``, ``dtype``: where it runs unless told
    otherwise. ``marks``: pytest markers of its cases as tests. ``base``: the platform of goldens
    without a key in their name. ``fallbacks``: the platforms whose goldens a platform uses if it
    has none of its own, in order.
    """

    data: str = _SHIPPED
    root: str | None = None
    checkpoint: str = _SHIPPED
    processor: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] | None = None
    marks: tuple[str, ...] = ()
    base: str = "cpu-fp32"
    fallbacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cases: Mapping[str, Case] = field(default_factory=dict)
    file: str = ""

    def path(self, value: str) -> Path:
        return Path(value) if Path(value).is_absolute() else Path(self.file).parent / value

    def placed(self, device: str | None, dtype: str | None) -> tuple[str, str]:
        """Device and dtype of a run: the requested ones, else the suite's own, else float32 on a
        CPU and bfloat16 on a CUDA device.

        >>> Suite(device="cuda").placed(None, None), Suite().placed(None, "bfloat16")
        (('cuda', 'bfloat16'), ('cpu', 'bfloat16'))
        """
        on = device or self.device
        own = self.dtype if on == self.device else None
        return on, dtype or own or ("bfloat16" if on == "cuda" else "float32")

    def options(self, key: str) -> tuple[str, ...]:
        """Options of a command that runs on the platform ``key``, none if the suite does.

        >>> Suite().options("cuda-sm90-fp32"), Suite().options("cpu-fp32")
        (('--device', 'cuda', '--dtype', 'float32'), ())
        """
        device, short = key.partition("-")[0], key.rpartition("-")[2]
        own, _ = self.placed(None, None)
        dtype = DTYPES.get(short, short)
        found = () if device == own else ("--device", device)
        return found if dtype == self.placed(device, None)[1] else (*found, "--dtype", dtype)

    def checkpoint_dir(self) -> Path:
        family = _CHECKPOINTS.get(self.checkpoint)
        return self.path(self.checkpoint) if family is None else tiny.checkpoint_dir(family)

    @property
    def has_shipped_checkpoint(self) -> bool:
        return self.checkpoint in _CHECKPOINTS

    def processor_dir(self) -> Path | None:
        return None if self.processor is None else self.path(self.processor)

    def samples(self, names: Sequence[str]) -> dict[str, tuple[Sample, ...]]:
        """The samples of each case.

        Raises:
            ConfigError: a row that is not in the data file.
        """
        if self.data == _SHIPPED:
            rows = load_samples(tiny.data_file())
        else:
            root = None if self.root is None else self.path(self.root)
            rows = load_samples(self.path(self.data), root=root)
        found = {}
        for name in names:
            wrong = [row for row in self.cases[name].rows if not 0 <= row < len(rows)]
            if wrong or not self.cases[name].rows:
                raise ConfigError(
                    f"{self.file}: case {name}",
                    got=f"row {wrong[0]}" if wrong else "no rows",
                    want=f"rows from 0 to {len(rows) - 1}",
                    fix="correct the case's rows",
                )
            found[name] = tuple(rows[row] for row in self.cases[name].rows)
        return found

    def run_settings(self, case: str) -> Settings:
        """The checkpoint's own settings, overridden by the suite's, then by the case's."""
        settings: Settings = load_settings(self.checkpoint_dir())
        for values in (self.settings, self.cases[case].settings):
            settings = merge(settings, values, f"{self.file}: settings of {case}")
        return settings

    def chosen(self, names: Sequence[str]) -> tuple[str, ...]:
        """The cases with these names, by default all.

        Raises:
            ConfigError: an unknown name.
        """
        for name in names:
            if name not in self.cases:
                raise ConfigError(
                    f"case {name}",
                    got="no case of that name",
                    want=f"one of {', '.join(self.cases)}",
                    fix=f"add it to {SUITE}, or correct the name",
                )
        return tuple(dict.fromkeys(names)) or tuple(self.cases)


def shipped_goldens() -> Path:
    """The shipped suite's goldens: in an installed package, or next to the source in a checkout."""
    inside = Path(__file__).with_name("shipped")
    return inside if inside.is_dir() else Path(__file__).parents[3] / "golden"


def load_suite(folder: Path, *, checkpoint: Path | None = None) -> Suite:
    """The suite of a golden folder: its own ``suite.yaml``, or the shipped one.

    ``checkpoint`` replaces the suite's own. Raises ``ConfigError`` for a missing folder, a
    ``checkpoint`` where the suite is the shipped one but the goldens are not, a file that is not
    YAML, an unknown key, a value of the wrong type, no cases, or a case that cannot be run or whose
    name cannot be a folder's.

    >>> load_suite(shipped_goldens()).cases["interleaved"].rows
    (0,)
    """
    if not folder.is_dir():
        raise ConfigError(
            str(folder),
            got="no folder of goldens" if os.path.lexists(folder) else "no such folder",
            want=f"a folder of goldens, with {SUITE} unless they are of the shipped suite",
            fix="correct the path, or create the folder first",
        )
    file = _suite_file(folder)
    if checkpoint is not None and file.parent != folder and not _is_shipped(folder):
        raise ConfigError(
            str(folder),
            got=f"--checkpoint and no {SUITE}",
            want=f"a {SUITE}: without one the cases are those of the shipped model",
            fix=f"start a suite of your own: omni-grpo golden init FOLDER --checkpoint "
            f"{checkpoint} --data FILE",
        )
    suite: Suite = merge(Suite(), read_mapping(file), str(file))
    if not suite.cases:
        raise ConfigError(str(file), got="no cases", want="at least one", fix="add a case")
    _check_marks(str(file), suite.marks)
    for name, case in suite.cases.items():
        _check_case(f"{file}: cases: {name!r}", name, case)
    suite = replace(suite, file=str(file.absolute()))
    return suite if checkpoint is None else replace(suite, checkpoint=str(checkpoint.absolute()))


def _suite_file(folder: Path) -> Path:
    """The folder's own suite, else the shipped one."""
    own = folder / SUITE
    return own if os.path.lexists(own) else Path(__file__).with_name(SUITE)


def _is_shipped(folder: Path) -> bool:
    shipped = shipped_goldens()
    return shipped.is_dir() and folder.samefile(shipped)


def _check_case(item: str, name: str, case: Case) -> None:
    # it becomes a folder name: it must not lead out of the goldens or to another of their files
    if not _NAME.fullmatch(name) or name in (SUITE, *_TOLERANCES):
        raise ConfigError(
            item,
            got="a name that cannot be a folder's",
            want="at most 100 letters, digits and _@=+.-, not beginning with a dot",
            fix="rename the case",
        )
    if not 0 <= case.steps <= _MOST_STEPS:
        raise ConfigError(
            item,
            got=f"steps: {case.steps}",
            want=f"0 to {_MOST_STEPS}",
            fix="correct the case",
        )
    _check_marks(item, case.marks)


def _check_marks(item: str, marks: Sequence[str]) -> None:
    for mark in marks:
        if not _MARK.fullmatch(mark):
            raise ConfigError(
                f"{item}: marks", got=repr(mark), want="the name of a marker", fix="correct it"
            )


def copy_suite(folder: Path, target: Path) -> None:
    """Copy the suite to where goldens are recorded, with absolute paths. Raises as
    :func:`load_suite`."""
    load_suite(folder)
    target.mkdir(parents=True)
    file = _suite_file(folder)
    suite = dict(read_mapping(file))
    for key in _PATHS:
        value = suite.get(key)
        if isinstance(value, str) and value not in _CHECKPOINTS:
            suite[key] = str((file.parent / value).absolute())
    (target / SUITE).write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf-8")
