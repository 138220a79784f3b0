"""A golden suite as plain data: which rows of which data file, on which checkpoint, as what case.

``suite.yaml`` in a golden folder holds it::

    data: rows.json           # HumanOmniV2's JSON or Social-IQ 2.0, beside the file
    checkpoint: ../my-model
    settings: {max_new_tokens: 32}
    fallbacks: {cuda-sm90-bf16: [cuda-sm80-bf16]}
    cases:
      clip: {rows: [0]}
      steps: {rows: [0, 4], steps: 2}

Without one it is that of the shipped tiny checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from omni_grpo_core import tiny
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.strict import merge, read_mapping
from omni_grpo_core.pipeline.settings import Settings, load_settings
from omni_grpo_core.types import Sample

SUITE = "suite.yaml"
_SHIPPED = "shipped"
_CHECKPOINTS: Mapping[str, tiny.FamilyName] = {_SHIPPED: "qwen2.5", "shipped-qwen3": "qwen3"}
_TOLERANCES = ("tolerances.yaml", "lanes.yaml")
_NAME = re.compile(r"[\w@=+-][\w@=+.-]{0,99}")
_MOST_STEPS = 100
_PATHS = ("data", "root", "checkpoint", "processor")


@dataclass(frozen=True, slots=True)
class Case:
    """``rows`` of the data file, as one batch; with ``steps``, that many GRPO steps on them.
    ``settings`` go over the suite's."""

    rows: tuple[int, ...] = ()
    steps: int = 0
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Suite:
    """``data``, ``root`` and ``checkpoint`` are paths, from the suite's file, or ``shipped``; a
    checkpoint may be ``shipped-qwen3`` too.

    ``settings`` go over the checkpoint's own. ``base``: the platform of goldens without a key in
    their name. ``fallbacks``: whose goldens a platform may use where it has none of its own, in
    order.
    """

    data: str = _SHIPPED
    root: str | None = None
    checkpoint: str = _SHIPPED
    processor: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    base: str = "cpu-fp32"
    fallbacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cases: Mapping[str, Case] = field(default_factory=dict)
    file: str = ""

    def path(self, value: str) -> Path:
        return Path(value) if Path(value).is_absolute() else Path(self.file).parent / value

    def checkpoint_dir(self) -> Path:
        family = _CHECKPOINTS.get(self.checkpoint)
        return self.path(self.checkpoint) if family is None else tiny.checkpoint_dir(family)

    def processor_dir(self) -> Path | None:
        return None if self.processor is None else self.path(self.processor)

    def samples(self, names: Sequence[str]) -> dict[str, tuple[Sample, ...]]:
        """The samples of each case.

        Raises:
            ConfigError: a row that the data file does not have.
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
                    fix="correct the rows of the case",
                )
            found[name] = tuple(rows[row] for row in self.cases[name].rows)
        return found

    def run_settings(self, case: str) -> Settings:
        """The checkpoint's own settings with the suite's, then the case's, over them."""
        settings: Settings = load_settings(self.checkpoint_dir())
        for values in (self.settings, self.cases[case].settings):
            settings = merge(settings, values, f"{self.file}: settings of {case}")
        return settings

    def chosen(self, names: Sequence[str]) -> tuple[str, ...]:
        """The cases of these names, all if there are none.

        Raises:
            ConfigError: a name that is no case's.
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
    """Those of the shipped suite: inside an installed package, beside the source in a checkout."""
    inside = Path(__file__).with_name("shipped")
    return inside if inside.is_dir() else Path(__file__).parents[3] / "golden"


def load_suite(folder: Path, *, checkpoint: Path | None = None) -> Suite:
    """The suite of a golden folder: its own ``suite.yaml``, or the shipped one.

    ``checkpoint`` takes the place of the suite's own. Raises ``ConfigError`` for a folder that is
    not there, a file that is not YAML, an unknown key, a value of another type, no case at all, or
    one that cannot be run or whose name cannot be that of a folder.

    >>> load_suite(shipped_goldens()).cases["interleaved"].rows
    (0,)
    """
    if not folder.is_dir():
        raise ConfigError(
            str(folder),
            got="no folder of goldens" if os.path.lexists(folder) else "no such folder",
            want=f"one with goldens, and with {SUITE} where they are not of the shipped suite",
            fix="correct the path, or make the folder first",
        )
    own = folder / SUITE
    file = own if os.path.lexists(own) else Path(__file__).with_name(SUITE)
    suite: Suite = merge(Suite(), read_mapping(file), str(file))
    if not suite.cases:
        raise ConfigError(str(file), got="no cases", want="at least one", fix="add a case")
    for name, case in suite.cases.items():
        _check_case(f"{file}: cases: {name!r}", name, case)
    suite = replace(suite, file=str(file.absolute()))
    return suite if checkpoint is None else replace(suite, checkpoint=str(checkpoint.absolute()))


def _check_case(item: str, name: str, case: Case) -> None:
    # the name becomes a folder's: it must not lead out of the goldens, or to another file of theirs
    if not _NAME.fullmatch(name) or name in (SUITE, *_TOLERANCES):
        raise ConfigError(
            item,
            got="a name that cannot be that of a folder",
            want="letters, digits and _@=+.-, a dot not first, 100 at most",
            fix="rename the case",
        )
    if not 0 <= case.steps <= _MOST_STEPS:
        raise ConfigError(
            item,
            got=f"steps: {case.steps}",
            want=f"0 to {_MOST_STEPS}",
            fix="correct the case",
        )


def copy_suite(folder: Path, target: Path) -> None:
    """The suite, if there is one, beside goldens recorded elsewhere: its paths no longer from
    where its file lay. Raises as :func:`load_suite`."""
    load_suite(folder)
    target.mkdir(parents=True)
    own = folder / SUITE
    if not os.path.lexists(own):
        return
    suite = dict(read_mapping(own))
    for key in _PATHS:
        value = suite.get(key)
        if isinstance(value, str) and value not in _CHECKPOINTS:
            suite[key] = str((own.parent / value).absolute())
    (target / SUITE).write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf-8")
