"""Calls a reward function once on completions whose scores are known, on rows it really got.

Only functions that are safe to call: those that declare it (an attribute ``pure = True``), rewards
of this package without a judge, and plain Python functions that use no network and keep no state.
Random state is restored afterwards.
"""

from __future__ import annotations

import dis
import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, MappingProxyType, ModuleType
from typing import Any

import numpy as np
import torch

from omni_grpo_core.errors import MissingExtra
from omni_grpo_core.recorder.caught import Caught
from omni_grpo_core.recorder.plain import Plain
from omni_grpo_core.recorder.probe_cases import Asked, ProbeCase, first_cases, later_cases
from omni_grpo_core.rewards import Reward
from omni_grpo_core.rewards.call import RewardFunction, values_of

_MODELS = frozenset({"torch", "transformers", "vllm"})
_NETWORK = frozenset(
    {
        *("aiohttp", "anthropic", "boto3", "google", "grpc", "httpx", "litellm", "openai"),
        *("requests", "socket", "urllib", "urllib3", "websockets"),
    }
)
_REMOTE = _MODELS | _NETWORK | {"subprocess"}
"""Modules that make a function unsafe to probe."""
_OWN = ("prompts", "completions")
_MOST_TRIED = 8
"""Cases in which a column's first row is tried as the reason for all."""
_TOKENS = ("completion_ids", "completion_mask")
"""Arguments that a made completion does not have."""

Value = float | str | None
"""A score, ``None`` where the function gave none, or the error as text."""


def probe(
    function: RewardFunction,
    arguments: Mapping[str, Any],
    plain: Plain,
    by_rows: RewardFunction | None = None,
) -> dict[str, dict[str, Any]]:
    """What ``function`` pays for completions made from the rows of one recorded call of it, with
    these ``arguments`` by name; empty when it must not be probed, or cannot be. ``by_rows``: it, as
    it is called with them, where it has a signature of its own.

    By case name: ``role`` and ``form`` as in :mod:`~omni_grpo_core.recorder.probe_cases`; ``value``
    (all cases in one call) and ``alone`` (the case in its own call), each a number, ``None``, or
    the error as text; ``swallowed``, an exception that the function caught; ``decided``, columns
    whose first row explains that the two values differ; ``completion``, ``solution``,
    ``problem_type``.
    """
    if not may_probe(function):
        return {}
    completions = arguments.get("completions")
    if not isinstance(completions, list | tuple) or not completions:
        return {}
    columns = {name: value for name, value in arguments.items() if name not in _OWN}
    asked = Asked.of(columns, len(completions), _read_by(function))
    ask = _Asker(function, by_rows or function, arguments, asked, plain)
    random_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            first = first_cases(asked)
            alone = {case.name: ask.alone(case) for case in first}
            later = list(later_cases(asked, _best(first, alone)))
            alone |= {case.name: ask.alone(case) for case in later}
            # a case that raises alone would fail the whole batch
            sound = [c for c in (*first, *later) if not isinstance(alone[c.name][0], str)]
            together = dict(zip((c.name for c in sound), ask(sound), strict=True))
            differ = [c for c in sound if together[c.name] != alone[c.name][0]]
            decided = ask.deciding(differ, sound[:1], together)
    except MissingExtra:  # our own reward without its packages
        return {}
    finally:
        random.setstate(random_state)
        np.random.set_state(numpy_state)
    return {
        case.name: {
            "role": case.role,
            "form": case.form,
            "value": together.get(case.name, alone[case.name][0]),
            "alone": alone[case.name][0],
            "swallowed": alone[case.name][1],
            "decided": decided if case in differ else [],
            "completion": case.completion,
            "solution": case.gold,
            "problem_type": case.problem_type,
        }
        for case in (*first, *later)
    }


def _best(cases: Sequence[ProbeCase], alone: Mapping[str, tuple[Value, str]]) -> str:
    """The form in which right answers earn most beyond wrong ones, or else most."""
    gained: dict[str, list[float]] = {}
    for case in cases:
        value = alone[case.name][0]
        if isinstance(value, int | float) and case.form not in ("", "verbatim"):
            got = gained.setdefault(case.form, [0.0, 0.0])
            got[0] += {"right": value, "foreign": -value}.get(case.role, 0.0)
            got[1] += value if case.role == "right" else 0.0
    return max(gained, key=lambda form: gained[form], default="context-think-answer")


@dataclass(frozen=True, slots=True)
class _Asker:
    """One function, called as the trainer calls it, with rows of the recorded call."""

    function: RewardFunction
    by_rows: RewardFunction
    arguments: Mapping[str, Any]
    asked: Asked
    plain: Plain

    def alone(self, case: ProbeCase) -> tuple[Value, str]:
        """The value of a case in its own call, and an exception that was caught on the way."""
        with Caught(self.function) as caught:
            [value] = self([case])
        last = next(reversed(caught.texts), "")
        return value, "" if isinstance(value, str) else self.plain.text(last)

    def deciding(
        self, differ: Sequence[ProbeCase], first: Sequence[ProbeCase], together: Mapping[str, Value]
    ) -> list[str]:
        """Columns of which the ``first`` row's value, in the place of their own, gives what the
        cases that ``differ`` earned ``together`` with it."""
        lists = [name for name in self.arguments if name not in _OWN and self._is_column(name)]
        tried = differ[:_MOST_TRIED]
        return [
            name
            for name in lists
            if tried and all(self([c], {name: first[0]}) == [together[c.name]] for c in tried)
        ]

    def _is_column(self, name: str) -> bool:
        value = self.arguments[name]
        return isinstance(value, list | tuple) and len(value) == self.asked.count

    def _value(self, name: str, case: ProbeCase) -> Any:
        """Of a column, for a case."""
        own = self.arguments[name][case.row]
        if name != self.asked.gold:
            return own
        return case.gold if isinstance(own, str) else type(own)(case.gold)

    def __call__(
        self, cases: Sequence[ProbeCase], instead: Mapping[str, ProbeCase] = MappingProxyType({})
    ) -> list[Value]:
        """A value for each case, or the error of the call for all. ``instead``: whose value all
        have of a column."""
        if not cases:
            return []
        given = {
            name: [self._value(name, instead.get(name, case)) for case in cases]
            if self._is_column(name)
            else value
            for name, value in self.arguments.items()
        }
        example = self.arguments["completions"][0]
        given["completions"] = [_formed(case.completion, example) for case in cases]
        prompts = given.pop("prompts", ())
        completions = given.pop("completions")
        try:
            return list(values_of(self._positional(given), prompts, completions, given))
        except MissingExtra:
            raise
        except Exception as error:  # a foreign function can raise anything
            return [self.plain.error(error)] * len(cases)

    def _positional(self, given: Mapping[str, Any]) -> RewardFunction:
        """The function without arguments that the trainer did not pass."""
        if "prompts" in self.arguments:
            return self.by_rows

        def without(prompts: Any, **columns: Any) -> Any:
            return self.by_rows(**columns)

        return without


def _formed(text: str, example: Any) -> Any:
    """A completion as the trainer passes it: a text, or the messages of an assistant's turn."""
    return text if isinstance(example, str) else [{"role": "assistant", "content": text}]


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
    return inspect.isfunction(function) and not _reaches_out(function)


def _read_by(function: RewardFunction) -> frozenset[str]:
    """Names that a function mentions: its arguments, the keys that it reads."""
    code = getattr(function, "__code__", None)
    return frozenset(_words(code)) if code is not None else frozenset()


def _judges(reward: Reward) -> bool:
    return bool(getattr(reward, "judge", None)) or "judge" in type(reward).__module__


def may_trace(function: RewardFunction) -> bool:
    """Whether Python's tracing can be on in a call of it: it asks others, by the network, so that
    it is slow anyway; a model in this process is not."""
    reached = [*_reached(function, set())] if inspect.isfunction(function) else []
    return _use(reached, _NETWORK) and not _use(reached, _MODELS)


def _reaches_out(function: Any) -> bool:
    """Whether the function, or one that it names, uses a module in ``_REMOTE``, writes a variable
    outside itself, or reads the sampled ids, which a made completion does not have."""
    reached = [*_reached(function, set())]
    codes = [held.__code__ for held in reached if inspect.isfunction(held)]
    return _use(reached, _REMOTE) or any(_writes(c) or _words(c) & set(_TOKENS) for c in codes)


def _reached(function: Any, seen: set[int]) -> Iterator[Any]:
    """A function, and what it names or encloses; functions are followed if not of ``_REMOTE``."""
    if id(function) in seen:
        return
    seen.add(id(function))
    yield function
    if _root(function) in _REMOTE:
        return
    named = [function.__globals__.get(name) for name in _names(function.__code__)]
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    for held in (*named, *cells):
        if inspect.isfunction(held):
            yield from _reached(held, seen)
        else:
            yield held


def _use(reached: Iterable[Any], modules: frozenset[str]) -> bool:
    return any(_is_of(held, modules) for held in reached)


def _is_of(held: Any, modules: frozenset[str]) -> bool:
    if inspect.isfunction(held):
        imported = {name.partition(".")[0] for name in _names(held.__code__)}
        return _root(held) in modules or bool(imported & modules)
    if isinstance(held, ModuleType):
        return held.__name__.partition(".")[0] in modules
    if isinstance(held, Reward):
        return _judges(held)
    if isinstance(held, Mapping | list | tuple | str | int | float | None):
        return False
    kind = held if isinstance(held, type) else type(held)
    # a model's class may be the user's own
    bases = kind.__mro__ if not isinstance(held, type) else (kind,)
    return any(_root(base) in modules for base in bases)


def _root(named: Any) -> str:
    return str(named.__module__).partition(".")[0]


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*map(_names, _inner(code)))


def _words(code: CodeType) -> set[str]:
    own = {*code.co_varnames, *(c for c in code.co_consts if isinstance(c, str))}
    return own.union(*map(_words, _inner(code)))


def _writes(code: CodeType) -> bool:
    """Whether it assigns a global, or a variable of the function around it."""
    return any(
        step.opname == "STORE_GLOBAL"
        or (step.opname == "STORE_DEREF" and step.argval in code.co_freevars)
        for step in dis.get_instructions(code)
    )


def _inner(code: CodeType) -> list[CodeType]:
    return [c for c in code.co_consts if isinstance(c, CodeType)]


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # not assigned yet
        return False
