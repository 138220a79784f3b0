"""A whole run of the benchmark: one setting in every way, then sweeps around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from omni_grpo_core.bench.growth import growth
from omni_grpo_core.bench.measure import speed
from omni_grpo_core.bench.rounding import rounding
from omni_grpo_core.bench.run import Options, measure
from omni_grpo_core.bench.shapes import Setting, Size
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.bounded import Unreadable, json_value, mapping_in

FORMAT = "omni-grpo bench 1"
Sweep = Literal["group", "groups", "prompt"]
SWEEPS: dict[Sweep, tuple[int, ...]] = {
    "group": (2, 4, 8, 16, 32),
    "groups": (1, 2, 4, 8),
    "prompt": (1024, 2048, 4096, 8192, 16384),
}
_TINY = 8
"""Prompts of the tiny size are swept at this part: a CPU takes minutes for the longest ones."""
RANGES: dict[Sweep, range] = {
    "group": range(1, 257), "groups": range(1, 65), "prompt": range(100, 30_001),
}  # fmt: skip


def sweep_of(text: str, size: Size) -> tuple[Sweep, tuple[int, ...]]:
    """``NAME`` or ``NAME=VALUE,VALUE``: what is varied, and through which values.

    >>> sweep_of("groups", "7b"), sweep_of("group=2,32", "7b")
    (('groups', (1, 2, 4, 8)), ('group', (2, 32)))
    >>> sweep_of("prompt", "tiny")
    ('prompt', (128, 256, 512, 1024, 2048))

    Raises:
        ConfigError: any other form, or a value that is out of range.
    """
    name, _, listed = text.partition("=")
    values = [int(value) if value.isdecimal() else 0 for value in listed.split(",") if listed]
    for known, usual in SWEEPS.items():
        if name == known and all(value in RANGES[known] for value in values):
            if known == "prompt" and size == "tiny":
                usual = tuple(value // _TINY for value in usual)
            return known, tuple(values) or usual
    raise ConfigError(
        "--sweep",
        got=repr(text),
        want=" or ".join(f"{name} ({of.start} to {of.stop - 1})" for name, of in RANGES.items()),
        fix="write a name, or a name and its values: group=2,8,32",
    )


def read_results(paths: Sequence[Path]) -> dict[str, Any]:
    """What an earlier :func:`session` returned, with the sweeps of all of them.

    Raises:
        ConfigError: a file is none, or one of another device, dtype or size. What was changed in
            one may raise anything.
    """
    results = [_read(path) for path in paths]
    for path, found in zip(paths, results, strict=True):
        if found.get("format") != FORMAT:
            raise ConfigError(
                str(path),
                got=f"format {found.get('format')!r}",
                want=repr(FORMAT),
                fix="pass what omni-grpo bench --out wrote",
            )
        if _measured(found) != _measured(results[0]):
            raise ConfigError(
                str(path),
                got=_measured(found),
                want=f"{_measured(results[0])}, as in {paths[0]}",
                fix="show it by itself: a table and a line through both would mean nothing",
            )
    rounded: dict[str, Any] = next(filter(None, (found["rounding"] for found in results)), {})
    sweeps = {
        name: list(_joined(name, [p for found in results for p in found["sweeps"].get(name, ())]))
        for name in dict.fromkeys(name for found in results for name in found["sweeps"])
    }
    return {**results[0], "sweeps": sweeps, "growth": _growth(sweeps), "rounding": rounded}


def _measured(result: Mapping[str, Any]) -> str:
    size = result["points"][0]["setting"]["size"]
    return f"size {size} on {result['device']} in {result['dtype']}"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return mapping_in(path, json_value)
    except Unreadable as error:
        raise ConfigError(
            error.place(path),
            got=error.got,
            want="a benchmark's JSON",
            fix="pass what omni-grpo bench --out wrote",
        ) from None


def _joined(name: str, points: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Points in order, one for each value, with the ways of all that have it."""
    by_value: dict[int, dict[str, Any]] = {}
    for point in points:
        before = by_value.get(point["setting"][name], {"ways": {}, "failed": {}})
        both = {key: {**before[key], **point[key]} for key in ("ways", "failed")}
        by_value[point["setting"][name]] = {**point, **both}
    yield from (by_value[value] for value in sorted(by_value))


def session(
    policy: Policy,
    setting: Setting,
    options: Options,
    *,
    sweeps: Sequence[tuple[Sweep, Sequence[int]]] = (),
    rounded: Setting | None = None,
    done: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """The result that ``omni-grpo bench`` prints; ``done`` is called with it after each point.
    ``rounded``: what is run again in float32, see :mod:`~omni_grpo_core.bench.rounding`.

    With a sweep all is ``brief``, and its points leave out the usual way, which takes the longest.
    """
    device, dtype = policy.device, policy.model.dtype
    found = speed(device, dtype)
    result: dict[str, Any] = {
        "format": FORMAT,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "checkpointing": options.checkpointing,
        "micro_batch": options.micro_batch,
        "offload_gradients": options.offload_gradients,
        "bytes_per_second": found.bytes,
        "operations_per_second": found.operations,
        "points": [],
        "sweeps": {},
        "growth": {},
        "rounding": {},
    }
    options = replace(options, brief=options.brief or bool(sweeps))
    result["points"].append(measure(policy, setting, found, options).to_json())
    done(result)
    ways = [way for way in options.ways if way != "usual"]
    options = replace(options, ways=ways, warm=True)
    for name, values in sweeps:
        points = result["sweeps"].setdefault(name, [])
        for value in values:
            changed: dict[str, Any] = {name: value}
            points.append(measure(policy, replace(setting, **changed), found, options).to_json())
            result["growth"] = _growth(result["sweeps"])
            done(result)
    if rounded is not None:
        result["rounding"] = rounding(policy, rounded, checkpointing=options.checkpointing)
        done(result)
    return result


def _growth(sweeps: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    return dict(growth([point for points in sweeps.values() for point in points]))
