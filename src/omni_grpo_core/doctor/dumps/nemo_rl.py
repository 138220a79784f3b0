"""``train_data_step{step}.jsonl`` and ``val_data_step{step}.jsonl``, which NeMo-RL writes into its
log folder.

As of NeMo-RL 0.6.0, ``algorithms/grpo.py``, ``grpo_sync.py``, ``ppo.py`` and
``utils/logger.py`` (``log_batched_dict_as_jsonl``). One object per completion, each value a list
of one::

    {"content": [["question", "answer"]], "rewards": [1.0], "input_lengths": [7],
     "token_ids": [[…]], "token_loss_mask": [[…]], "sample_loss_mask": [1.0], "advantages": [[…]],
     "generation_logprobs": [[…]], "prev_logprobs": [[…]], "idx": 0}

All but ``content``, ``rewards`` and ``sample_loss_mask`` are over prompt and completion, padded
right; ``content`` has a text for each message, without its role. With dynamic sampling the rewards
of the rows are ``filtered_rewards``. A validation's file has ``content`` (messages) and ``rewards``
alone. Nothing names a group: it is that of the prompt's ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
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
from omni_grpo_core.doctor.dumps.rows import Row, Step, Tokens

_OWN = ("token_ids", "token_loss_mask", "input_lengths")
_WANTED = "one JSON object a line with lists of one: content or token_ids, and rewards"
_FIX = (
    "pass a train_data_step*.jsonl or val_data_step*.jsonl of NeMo-RL, or its log folder; delete a "
    "last line that a killed run cut off"
)


def read(path: Path) -> Iterator[Step]:
    """The steps of a file, or the training steps of a folder."""
    for file in files_of(path, ".jsonl", Place(str(path), _WANTED, _FIX)):
        if path.is_dir() and not file.name.startswith("train_data_step"):
            continue
        lines = json_lines(file, Place(str(file), _WANTED, _FIX))
        rows = tuple(_row(held, place) for place, held in lines)
        digits = "".join(filter(str.isdigit, file.stem))[:18]
        yield Step(str(file), int(digits or 0), rows)


def _row(held: Mapping[str, Any], place: Place) -> Row:
    required(held, ("rewards",), place)
    named = "filtered_rewards" if "filtered_rewards" in held else "rewards"
    rewards = {"reward": number_of(_one(held, named, place), place.inside(named))}
    content = _one(held, "content", place) if "content" in held else None
    if "token_ids" not in held:
        return _validated(content, rewards, place)
    required(held, _OWN, place)
    tokens, turns, after = _tokens(held, place)
    prompt, completion = _texts(content, turns, after)
    return Row(
        prompt=str(tokens.prompt) if prompt is None else prompt,
        completion=completion,
        rewards=rewards,
        group=str(tokens.prompt),
        advantage=_advantage(held, tokens, place),
        tokens=tokens,
    )


def _validated(content: Any, rewards: Mapping[str, float | None], place: Place) -> Row:
    """Of a validation: the last message is the answer to those before it."""
    if not isinstance(content, list) or not content:
        raise place.inside("content").error(f"a {type(content).__name__}", "a list of messages")
    *before, last = content
    return Row(text_of(before, place), text_of([last], place), rewards)


def _tokens(held: Mapping[str, Any], place: Place) -> tuple[Tokens, int, bool]:
    """Also how many turns the policy had, and whether others' tokens come after its last."""
    ids = tuple(map(int, _numbers(held, "token_ids", place)))
    length = _one(held, "input_lengths", place)
    if not isinstance(length, int) or not 0 < length <= len(ids):
        raise place.inside("input_lengths").error(f"{length!r}", f"a number up to {len(ids)}")
    mask = tuple(map(bool, _numbers(held, "token_loss_mask", place)))[:length]
    first = mask.index(True) if True in mask else length
    kept = bool(_one(held, "sample_loss_mask", place)) if "sample_loss_mask" in held else True

    def part(name: str) -> tuple[float, ...] | None:
        return _numbers(held, name, place)[first:length] if name in held else None

    tokens = Tokens(
        prompt=ids[:first],
        ids=ids[first:length],
        counted=tuple(kept and own for own in mask[first:]),
        sampled=part("generation_logprobs"),
        scored=part("prev_logprobs"),
    )
    turns = sum(own for own, _ in groupby(mask))
    return tokens, turns, not mask[-1]


def _texts(content: Any, turns: int, after: bool) -> tuple[str | None, str | None]:
    """Prompt and completion; messages have no role, but the policy's turns and the environment's
    take turns after the prompt.

    >>> _texts(["You help.", "Why?", "So."], turns=1, after=False)
    ('You help.Why?', 'So.')
    >>> _texts(["Why?", "Tool?", "42", "So."], turns=2, after=False)
    ('Why?', 'Tool?42So.')
    """
    if not isinstance(content, list) or not all(isinstance(one, str) for one in content):
        return None, None
    first = len(content) - (2 * turns - 1) - after
    return ("".join(content[:first]), "".join(content[first:])) if first > 0 else (None, None)


def _advantage(held: Mapping[str, Any], tokens: Tokens, place: Place) -> float | None:
    """That of a completion; ``None`` where its tokens have several."""
    if "advantages" not in held:
        return None
    own = _numbers(held, "advantages", place)[len(tokens.prompt) :]
    kept = {value for value, counts in zip(own, tokens.counted or (), strict=False) if counts}
    return kept.pop() if len(kept) == 1 else None


def _one(held: Mapping[str, Any], name: str, place: Place) -> Any:
    value = held.get(name)
    if not isinstance(value, list) or len(value) != 1:
        found = f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
        raise place.inside(name).error(found, "a list of one")
    return value[0]


def _numbers(held: Mapping[str, Any], name: str, place: Place) -> tuple[float, ...]:
    """Those of a row, as long as its ids."""
    value, ids = (_one(held, each, place) for each in (name, "token_ids"))
    if not isinstance(value, list) or not isinstance(ids, list) or len(value) != len(ids):
        raise place.inside(name).error(f"a {type(value).__name__}", "a number per token id")
    return tuple(number_of(one, place.inside(name)) or 0.0 for one in value)
