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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from omni_grpo_core import tiny
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.sample import load_samples
from omni_grpo_core.settings import Settings, load_settings
from omni_grpo_core.strict import merge, read_mapping
from omni_grpo_core.types import Sample

SUITE = "suite.yaml"
_SHIPPED = "shipped"
_CHECKPOINTS: Mapping[str, tiny.FamilyName] = {_SHIPPED: "qwen2.5", "shipped-qwen3": "qwen3"}
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


def load_suite(folder: Path, *, checkpoint: Path | None = None) -> Suite:
    """The suite of a golden folder: its own ``suite.yaml``, or the shipped one.

    ``checkpoint`` takes the place of the suite's own. Raises ``ConfigError`` for a file that is not
    YAML, an unknown key, a value of another type.

    >>> load_suite(Path("no-such-folder")).cases["interleaved"].rows
    (0,)
    """
    own = folder / SUITE
    file = own if own.is_file() else Path(__file__).with_name(SUITE)
    suite: Suite = merge(Suite(), read_mapping(file), str(file))
    suite = replace(suite, file=str(file.absolute()))
    return suite if checkpoint is None else replace(suite, checkpoint=str(checkpoint.absolute()))


def copy_suite(folder: Path, target: Path) -> None:
    """The suite, if there is one, beside goldens recorded elsewhere: its paths no longer from
    where its file lay."""
    target.mkdir(parents=True)
    own = folder / SUITE
    if not own.is_file():
        return
    suite = dict(read_mapping(own))
    for key in _PATHS:
        value = suite.get(key)
        if isinstance(value, str) and value not in _CHECKPOINTS:
            suite[key] = str((own.parent / value).absolute())
    (target / SUITE).write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf-8")
