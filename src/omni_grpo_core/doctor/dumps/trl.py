"""Tables ``completions/completions_{step:05d}.parquet``, which TRL writes into its output folder
with ``log_completions=True``.

As of TRL 1.16.0, ``trainer/grpo_trainer.py`` (``log``). One row per completion, with the columns
``step``, ``prompt``, ``completion``, one per reward function, one per ``log_extra``, and
``advantage``. Prompts and completions are texts or lists of messages, images removed. What is
numeric between ``completion`` and ``advantage`` counts as a reward: nothing tells a logged number
from one. Ids and log-probabilities are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_grpo_core.doctor.dumps.places import Place, files_of, number_of, required, text_of
from omni_grpo_core.doctor.dumps.rows import Row, Step
from omni_grpo_core.errors import ConfigError

_KEYS = ("step", "prompt", "completion", "advantage")
_WANTED = "a parquet table with step, prompt, completion and advantage"
_FIX = "pass the completions folder of a run with log_completions=True, or one table of it"


def read(path: Path) -> Iterator[Step]:
    """One step per table."""
    for file in files_of(path, ".parquet", Place(str(path), _WANTED, _FIX), "completions"):
        place = Place(str(file), _WANTED, _FIX)
        rows = _table(file, place)
        if not rows:
            raise place.error("a table without rows")
        required(rows[0], _KEYS, place)
        names = [name for name in rows[0] if name not in _KEYS]
        rewards = [name for name in names if all(_numeric(row[name]) for row in rows)]
        number = number_of(rows[0]["step"], place.inside("step"))
        made = (_row(row, rewards, place.inside(f"row {at}")) for at, row in enumerate(rows))
        yield Step(str(file), int(number or 0), tuple(made))


def _table(file: Path, place: Place) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise ConfigError(
            "--dump trl",
            got="no package pyarrow",
            want="it, to read parquet",
            fix="pip install pyarrow",
        ) from None
    try:
        with ParquetFile(file) as table:
            rows: list[dict[str, Any]] = table.read().to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise place.error(f"no parquet file ({str(error).splitlines()[0]})") from None
    return rows


def _row(held: Mapping[str, Any], rewards: Sequence[str], place: Place) -> Row:
    return Row(
        prompt=text_of(held["prompt"], place.inside("prompt")),
        completion=text_of(held["completion"], place.inside("completion")),
        rewards={name: number_of(held[name], place.inside(name)) for name in rewards},
        advantage=number_of(held["advantage"], place.inside("advantage")),
        columns={n: v for n, v in held.items() if n not in (*_KEYS, *rewards)},
    )


def _numeric(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
