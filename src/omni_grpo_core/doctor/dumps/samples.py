""".pt files that slime and miles write with ``--save-debug-rollout-data``,
``--save-debug-train-data`` or, both, ``--dump-details FOLDER``.

As of slime 0.3.1 (``observability/rollout_data_utils.py``, ``observability/train_data_utils.py``,
``utils/types.py``) and miles 0.1.0 (``ray/rollout/debug_data.py``, ``utils/train_dump_utils.py``,
``utils/types.py``)::

    rollout_data/{id}.pt, rollout_data/eval_{id}.pt
        {"rollout_id": 7, "samples": [{"prompt", "tokens", "response", "response_length", "reward",
        "rollout_log_probs", "loss_mask", "status", "group_index", "index", …}, …]}
    train_data/{id}.pt                                                                  (slime)
        {"rollout_id": 7, "format_version": 2, "raw_reward": […], "samples": [{"rollout_position",
        "tokens", "response_lengths", "log_probs", "advantages", …}, …]}
    train_data/{id}_{rank}.pt                                                           (miles)
        {"rollout_id": 7, "rank": 0, "rollout_data": {"sample_indices": […], "tokens": […], …}}

A train file alone has neither text nor groups: it is joined with the rollout file of its number.
Values per token that are cut over context-parallel ranks are left out, aborted samples too. Media
are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from omni_grpo_core.doctor.dumps.places import Place, files_of, number_of, required, text_of
from omni_grpo_core.doctor.dumps.rows import Numbers, Row, Step, Tokens
from omni_grpo_core.doctor.dumps.safe_pt import load_plain

_WANTED = "a .pt file of --save-debug-rollout-data or --save-debug-train-data"
_FIX = "pass such a file, a folder of them, or the folder of --dump-details"
_SAMPLE = ("prompt", "tokens", "response", "response_length", "reward", "status")
_TRAINED = ("tokens", "response_lengths", "loss_masks")
_ENDED = "aborted"


@dataclass(slots=True)
class _Rollout:
    """All that files of one number hold. ``raw``: rewards in rollout order."""

    name: str
    samples: list[tuple[Place, Mapping[str, Any]]] = field(default_factory=list)
    trained: list[tuple[Place, Mapping[str, Any]]] = field(default_factory=list)
    raw: Sequence[Any] = ()


def read(path: Path) -> Iterator[Step]:
    """The rollouts of a file or folder; those of evaluations last."""
    place = Place(str(path), _WANTED, _FIX)
    files = files_of(path, ".pt", place, "rollout_data", "train_data")
    if (path / "rollout_data").is_dir() and (path / "train_data").is_dir():
        files += files_of(path / "train_data", ".pt", place)
    numbered: dict[tuple[bool, int], list[Path]] = {}
    for file in files:
        numbered.setdefault((file.stem.startswith("eval"), _number(file)), []).append(file)
    for (_, number), together in sorted(numbered.items()):
        held = _Rollout(str(together[0]))
        for file in together:
            _take(held, load_plain(file, Place(str(file), _WANTED, _FIX)), file)
        rows = tuple(_rows(held))
        if not rows:
            raise Place(held.name, _WANTED, _FIX).error("no sample that ran to its end")
        yield Step(held.name, number, rows)


def _number(file: Path) -> int:
    """
    >>> _number(Path("eval_12.pt")), _number(Path("7_0.pt")), _number(Path("dump.pt"))
    (12, 7, 0)
    """
    return next((int(part[:18]) for part in file.stem.split("_") if part.isdigit()), 0)


def _take(held: _Rollout, content: Any, file: Path) -> None:
    place = Place(str(file), _WANTED, _FIX)
    if not isinstance(content, dict):
        raise place.error(f"a {type(content).__name__}")
    columns = content.get("rollout_data")
    if isinstance(columns, dict):
        required(columns, _TRAINED, place)
        held.raw = held.raw or columns.get("raw_reward") or ()
        held.trained += _transposed(columns, place)
        return
    samples = content.get("samples")
    if not isinstance(samples, list) or not all(isinstance(one, dict) for one in samples):
        required(content, ("samples",), place)
        raise place.error("samples that are no list of dicts")
    listed = [(place.inside(f"sample {at}"), one) for at, one in enumerate(samples)]
    if any("response_lengths" in one for one in samples):
        for at, one in listed:
            required(one, _TRAINED, at)
        held.raw = held.raw or content.get("raw_reward") or ()
        held.trained += listed
        return
    for at, one in listed:
        required(one, _SAMPLE, at)
    held.samples += listed


def _transposed(
    columns: Mapping[str, Any], place: Place
) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """One mapping per sample; columns of another length are of the whole batch."""
    count = len(columns["response_lengths"])
    own = {k: v for k, v in columns.items() if isinstance(v, list | Tensor) and len(v) == count}
    if "sample_indices" in own:
        own["sample_index"] = own["sample_indices"]
    own.pop("raw_reward", None)
    for at in range(count):
        yield place.inside(f"sample {at}"), {name: column[at] for name, column in own.items()}


def _rows(held: _Rollout) -> Iterator[Row]:
    if not held.samples:
        for at, (place, one) in enumerate(held.trained):
            yield _row(None, one, _raw(held, at, len(held.trained)), place)
        return
    by_place, by_index = (
        {one[name]: one for _, one in held.trained if name in one}
        for name in ("rollout_position", "sample_index")
    )
    for at, (place, sample) in enumerate(held.samples):
        if sample["status"] == _ENDED:
            continue
        found = by_place.get(at) if by_place else by_index.get(sample.get("index"))
        yield _row(sample, found or {}, _raw(held, at, len(held.samples)), place)


def _raw(held: _Rollout, at: int, count: int) -> Any:
    return held.raw[at] if len(held.raw) == count else None


def _row(
    sample: Mapping[str, Any] | None, trained: Mapping[str, Any], raw: Any, place: Place
) -> Row:
    own = sample or {}
    ids = _integers(own.get("tokens", trained.get("tokens")), place.inside("tokens"))
    length = own.get("response_length", trained.get("response_lengths"))
    if not isinstance(length, int) or not 0 <= length <= len(ids):
        raise place.inside("response_length").error(f"{length!r}", f"a number up to {len(ids)}")
    counted = own.get("loss_mask")
    counted = trained.get("loss_masks") if counted is None else counted
    own_scores = own.get("rollout_log_probs")
    tokens = Tokens(
        prompt=ids[: len(ids) - length],
        ids=ids[len(ids) - length :],
        counted=_mask(counted, length, place.inside("loss_mask")),
        sampled=_exactly(own_scores, length, place.inside("rollout_log_probs"))
        if own_scores is not None
        else _whole(trained, "rollout_log_probs", length, place),
        scored=_whole(trained, "log_probs", length, place),
        reference=_whole(trained, "ref_log_probs", length, place),
    )
    group = own.get("group_index")
    return Row(
        # ids tell prompts apart where their text is not known
        prompt=str(ids[: len(ids) - length])
        if sample is None
        else text_of(own["prompt"], place.inside("prompt")),
        completion=None if sample is None else text_of(own["response"], place.inside("response")),
        rewards=_rewards(own.get("reward") if raw is None else raw, place),
        group=None if group is None else str(group),
        advantage=_advantage(_whole(trained, "advantages", length, place), tokens.counted),
        columns={name: own[name] for name in ("label", "status") if name in own},
        tokens=tokens if ids else None,
    )


def _rewards(value: Any, place: Place) -> dict[str, float | None]:
    """By name: a reward may be a number, or a mapping of which one number is used."""
    if isinstance(value, dict):
        numbers = {k: v for k, v in value.items() if isinstance(v, int | float)}
        return {str(k): number_of(v, place.inside(f"reward {k}")) for k, v in numbers.items()}
    return {"reward": number_of(_plain(value), place.inside("reward"))}


def _advantage(values: Numbers | None, counted: Sequence[bool] | None) -> float | None:
    """That of a completion; ``None`` where its tokens have several."""
    held = values or ()
    kept = {v for v, own in zip(held, counted or [True] * len(held), strict=False) if own}
    return kept.pop() if len(kept) == 1 else None


def _whole(held: Mapping[str, Any], name: str, length: int, place: Place) -> Numbers | None:
    """A value per token of the completion; ``None`` where there is none, or only a part."""
    if held.get(name) is None:
        return None
    values = _numbers(held[name], place.inside(name))
    return values if len(values) == length else None


def _exactly(value: Any, length: int, place: Place) -> Numbers:
    values = _numbers(value, place)
    if len(values) != length:
        raise place.error(f"{len(values)} numbers", f"{length}, one per token of the response")
    return values


def _mask(value: Any, length: int, place: Place) -> tuple[bool, ...] | None:
    return None if value is None else tuple(map(bool, _exactly(value, length, place)))


def _integers(value: Any, place: Place) -> tuple[int, ...]:
    values = _numbers(value, place)
    if any(number != int(number) for number in values):
        raise place.error("numbers that are no token ids", "token ids")
    return tuple(map(int, values))


def _numbers(value: Any, place: Place) -> Numbers:
    listed = _plain(value)
    if not isinstance(listed, list | tuple) or not all(isinstance(v, int | float) for v in listed):
        raise place.error(f"a {type(value).__name__}", "a list of numbers")
    return tuple(map(float, listed))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
