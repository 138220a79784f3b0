"""Calls each reward function once on completions whose scores are known.

Only functions that are safe to call: those that declare it (an attribute ``pure = True``), rewards
of this package without a judge, and plain Python functions that use no network. Random state is
restored afterwards.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

import numpy as np
import torch

from omni_grpo_core.errors import MissingExtra
from omni_grpo_core.recorder.plain import Plain
from omni_grpo_core.recorder.probe_cases import ProbeCase, probe_cases
from omni_grpo_core.rewards import Reward
from omni_grpo_core.rewards.call import RewardFunction, values_of

_REMOTE = frozenset(
    {
        *("aiohttp", "anthropic", "boto3", "google", "grpc", "httpx", "litellm", "openai"),
        *("requests", "socket", "subprocess", "torch", "transformers", "urllib", "urllib3"),
        *("vllm", "websockets"),
    }
)
"""Modules that make a function unsafe to probe: the network, a model, a process."""


def probe(function: RewardFunction, plain: Plain) -> dict[str, Any]:
    """What ``function`` pays for each of :func:`probe_cases`; empty when it must not be probed.

    By case name: ``value`` (all cases in one call) and ``alone`` (the case in its own call), each
    a number, ``None``, or the error as text; ``format`` and ``accuracy``, what a reward of that
    kind should pay; ``completion``, ``solution`` and ``problem_type``.
    """
    if not may_probe(function):
        return {}
    cases = probe_cases()
    random_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        ask = _Asker(function, plain, messages=False)
        # plain texts if it accepts them, else messages: trainers pass either
        if isinstance(ask([cases[0]])[cases[0].name], str):
            ask = _Asker(function, plain, messages=True)
        alone = {case.name: ask([case])[case.name] for case in cases}
        # a case that raises alone would fail the whole batch
        together = ask([case for case in cases if not isinstance(alone[case.name], str)])
    random.setstate(random_state)
    np.random.set_state(numpy_state)
    return {
        case.name: {
            "value": together.get(case.name, alone[case.name]),
            "alone": alone[case.name],
            "format": case.format,
            "accuracy": case.accuracy,
            "completion": case.completion,
            "solution": case.gold,
            "problem_type": case.problem_type,
        }
        for case in cases
    }


@dataclass(frozen=True, slots=True)
class _Asker:
    """One function, called with texts or with messages."""

    function: RewardFunction
    plain: Plain
    messages: bool

    def __call__(self, cases: Sequence[ProbeCase]) -> dict[str, float | str | None]:
        """A value by case name, or the error of the call for every case."""
        if not cases:
            return {}
        columns = {key: [case.columns[key] for case in cases] for key in cases[0].columns}
        prompts = [self._form("user", case.question) for case in cases]
        completions = [self._form("assistant", case.completion) for case in cases]
        try:
            values = values_of(self.function, prompts, completions, columns)
        except MissingExtra:  # our own reward without its packages: not probed
            return {}
        except Exception as error:  # a foreign function can raise anything
            return dict.fromkeys((case.name for case in cases), self.plain.error(error))
        return {case.name: value for case, value in zip(cases, values, strict=True)}

    def _form(self, role: str, text: str) -> Any:
        return [{"role": role, "content": text}] if self.messages else text


def may_probe(function: RewardFunction) -> bool:
    """
    >>> may_probe(lambda prompts, completions, **columns: [0.0] * len(completions))
    True
    >>> may_probe(torch.nn.Linear(1, 1))
    False
    """
    declared = getattr(function, "pure", None)
    if isinstance(declared, bool):
        return declared
    if isinstance(function, torch.nn.Module) or inspect.iscoroutinefunction(function):
        return False
    if isinstance(function, Reward):
        return not _judges(function)
    return inspect.isfunction(function) and not _reaches_out(function, set())


def _judges(reward: Reward) -> bool:
    return bool(getattr(reward, "judge", None)) or "judge" in type(reward).__module__


def _reaches_out(function: Any, seen: set[int]) -> bool:
    """Whether the function, or one that it names, uses a module in ``_REMOTE``."""
    if id(function) in seen:
        return False
    seen.add(id(function))
    code = function.__code__
    named = [function.__globals__.get(name) for name in _names(code)]
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    imported = {name.partition(".")[0] for name in _names(code)}
    return bool(imported & _REMOTE) or any(_is_remote(held, seen) for held in (*named, *cells))


def _is_remote(held: Any, seen: set[int]) -> bool:
    if inspect.isfunction(held):
        home = held.__module__.partition(".")[0]
        return home in _REMOTE or _reaches_out(held, seen)
    if isinstance(held, ModuleType):
        return held.__name__.partition(".")[0] in _REMOTE
    if isinstance(held, Reward):
        return _judges(held)
    if isinstance(held, Mapping | list | tuple | str | int | float | None):
        return False
    kind = held if isinstance(held, type) else type(held)
    return kind.__module__.partition(".")[0] in _REMOTE


def _names(code: CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # not assigned yet
        return False
