"""``completions.jsonl``, which ms-swift writes into its output folder with ``--log_completions``.

As of ms-swift 4.6.0, ``rlhf_trainers/grpo_trainer.py`` (``log``) and, for Megatron,
``megatron/trainers/rollout_mixin.py`` and ``megatron/trainers/grpo_trainer.py``
(``_build_log_table``). One object per logged step, each value a list with one item per completion::

    {"step": ["7", …], "prompt": […], "completion": […], "AnswerReward": […], "advantages": […], …}

Megatron's has ``gen_step`` for ``step``. Keys between ``completion`` and ``advantages`` are reward
functions (NaN where one could not score), those after it other columns such as ``solution``. A
prompt is the decoded input, runs of media tokens written as ``[151655 * 64]``. Ids and
log-probabilities are not in it.
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

_STEP = ("step", "gen_step")
_KEYS = ("prompt", "completion", "advantages")
_WANTED = "one JSON object a line with lists step, prompt, completion and advantages"
_FIX = (
    "pass the completions.jsonl of a GRPO run with --log_completions true, or its folder; delete "
    "a last line that a killed run cut off"
)


def read(path: Path) -> Iterator[Step]:
    """The logged steps of a file, or of the one in a folder."""
    for file in files_of(path, "completions.jsonl", Place(str(path), _WANTED, _FIX)):
        for place, held in json_lines(file, Place(str(file), _WANTED, _FIX)):
            yield _step(held, place)


def _step(held: Mapping[str, Any], place: Place) -> Step:
    numbered = next((name for name in _STEP if name in held), _STEP[0])
    required(held, (numbered, *_KEYS), place)
    names = list(held)
    rewards = names[names.index("completion") + 1 : names.index("advantages")]
    rewards = [name for name in rewards if name not in (*_STEP, "prompt")]
    known = (numbered, *_KEYS, *rewards)
    others = [name for name in names if name not in known and isinstance(held[name], list)]
    count = len(held["prompt"]) if isinstance(held["prompt"], list) else 0
    for name in known:
        if not isinstance(held[name], list) or len(held[name]) != count:
            found = len(held[name]) if isinstance(held[name], list) else type(held[name]).__name__
            raise place.inside(name).error(f"{found}", f"a list of {count}, as prompt is")
    if not count:
        raise place.error("no completion")
    rows = []
    for at in range(count):
        rows.append(
            Row(
                prompt=text_of(held["prompt"][at], place.inside(f"prompt {at}")),
                completion=text_of(held["completion"][at], place.inside(f"completion {at}")),
                rewards={
                    name: number_of(held[name][at], place.inside(f"{name} {at}"))
                    for name in rewards
                },
                advantage=number_of(held["advantages"][at], place.inside(f"advantages {at}")),
                columns={name: held[name][at] for name in others if len(held[name]) == count},
            )
        )
    number = str(held[numbered][0])
    return Step(place.name, int(number) if number.isdigit() else 0, tuple(rows))
