"""A whole run of the benchmark: one setting in every way, then sweeps around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from omni_grpo_core.bench.growth import growth
from omni_grpo_core.bench.measure import speed
from omni_grpo_core.bench.rounding import rounding
from omni_grpo_core.bench.run import Options, measure
from omni_grpo_core.bench.shapes import Setting
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.strict import read_mapping

FORMAT = "omni-grpo bench 1"
Sweep = Literal["group", "groups", "prompt"]
SWEEPS: dict[Sweep, tuple[int, ...]] = {
    "group": (2, 4, 8, 16, 32),
    "groups": (1, 2, 4, 8),
    "prompt": (1024, 2048, 4096, 8192, 16384),
}


def read_results(paths: Sequence[Path]) -> dict[str, Any]:
    """What an earlier :func:`session` returned, with the sweeps of all of them.

    Raises:
        ConfigError: a file is none.
    """
    results = [read_mapping(path) for path in paths]
    for path, found in zip(paths, results, strict=True):
        if found.get("format") != FORMAT:
            raise ConfigError(
                str(path),
                got=f"format {found.get('format')!r}",
                want=repr(FORMAT),
                fix="pass what omni-grpo bench --out wrote",
            )
    sweeps = {name: points for found in results for name, points in found["sweeps"].items()}
    rounded: dict[str, Any] = next(filter(None, (found["rounding"] for found in results)), {})
    return {**results[0], "sweeps": sweeps, "growth": _growth(sweeps), "rounding": rounded}


def session(
    policy: Policy,
    setting: Setting,
    options: Options,
    *,
    sweeps: Sequence[Sweep] = (),
    rounded: Setting | None = None,
    done: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """The result that ``omni-grpo bench`` prints; ``done`` is called with it after each point.
    ``rounded``: what is run again in float32, see :mod:`~omni_grpo_core.bench.rounding`.

    A sweep leaves out the usual way and is ``brief``.
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
        "bytes_per_second": found.bytes,
        "operations_per_second": found.operations,
        "points": [measure(policy, setting, found, options).to_json()],
        "sweeps": {},
        "growth": {},
        "rounding": {},
    }
    done(result)
    swept = replace(options, ways=[way for way in options.ways if way != "usual"], brief=True)
    for name in sweeps:
        points = result["sweeps"][name] = []
        for value in SWEEPS[name]:
            changed: dict[str, Any] = {name: value}
            point = measure(policy, replace(setting, **changed), found, swept)
            points.append(point.to_json())
            result["growth"] = _growth(result["sweeps"])
            done(result)
    if rounded is not None:
        result["rounding"] = rounding(policy, rounded, checkpointing=options.checkpointing)
        done(result)
    return result


def _growth(sweeps: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    return dict(growth([point for points in sweeps.values() for point in points]))
