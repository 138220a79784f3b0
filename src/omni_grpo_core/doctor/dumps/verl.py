"""JSON lines that verl and verl-omni write under ``trainer.rollout_data_dir`` and
``trainer.validation_data_dir``, one file ``{global_steps}.jsonl`` per step.

As of verl 0.9.1, ``trainer/ppo/ray_trainer.py`` and ``trainer/ppo/v1/trainer_base.py``
(``_write_generations``), and verl-omni 0.2.0rc1, whose text trainer is verl's and whose diffusion
trainer (``trainer/diffusion/ray_diffusion_trainer.py``) puts the path of a generated image or clip
into ``output``. One object per completion::

    {"input": "…", "output": "…", "gts": "…", "score": 1.0, "step": 7, "uid": "…", …}

``input`` and ``output`` are decoded without special tokens; ``score`` is the sum of the token
rewards; further keys are the reward function's extra values, ``request_id`` or ``uid``
(``{prompt}_{rollout}_{output}``). Ids, log-probabilities and advantages are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omni_grpo_core.doctor.dumps.places import (
    Place,
    files_of,
    json_lines,
    number_of,
    required,
    text_of,
)
from omni_grpo_core.doctor.dumps.rows import Row, Step

_KEYS = ("input", "output", "gts", "score", "step")
_WANTED = "one JSON object a line with input, output, gts, score and step"
_FIX = (
    "pass the folder of trainer.rollout_data_dir or trainer.validation_data_dir, or one file of "
    "it; delete a last line that a killed run cut off"
)
_FILES = (".jpg", ".mp4")


def read(path: Path) -> Iterator[Step]:
    """The steps of a file or folder, in order of their numbers."""
    for file in files_of(path, ".jsonl", Place(str(path), _WANTED, _FIX)):
        steps: dict[int, list[Row]] = {}
        for place, held in json_lines(file, Place(str(file), _WANTED, _FIX)):
            required(held, _KEYS, place)
            number = number_of(held["step"], place.inside("step"))
            steps.setdefault(int(number or 0), []).append(_row(held, place))
        for at, rows in steps.items():
            files = all((row.completion or "").endswith(_FILES) for row in rows)
            yield Step(str(file), at, tuple(rows), files)


def _row(held: Mapping[str, Any], place: Place) -> Row:
    return Row(
        prompt=text_of(held["input"], place.inside("input")),
        completion=text_of(held["output"], place.inside("output")),
        rewards={"score": number_of(held["score"], place.inside("score"))},
        group=_group(held.get("uid")),
        columns={name: value for name, value in held.items() if name not in _KEYS or name == "gts"},
    )


def _group(uid: Any) -> str | None:
    """
    >>> _group("8c1f_0_2"), _group("8c1f"), _group(None)
    ('8c1f', '8c1f', None)
    """
    if not isinstance(uid, str):
        return None
    prompt, *rest = uid.rsplit("_", 2)
    return prompt if len(rest) == 2 and all(map(str.isdigit, rest)) else uid
