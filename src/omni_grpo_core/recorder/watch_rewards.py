"""Watches reward functions: each is replaced in the trainer's own list by a watched one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from omni_grpo_core.recorder.caught import Caught
from omni_grpo_core.recorder.hooks import Patches, arguments
from omni_grpo_core.recorder.probe import may_trace, probe
from omni_grpo_core.recorder.probe_cases import types_in
from omni_grpo_core.recorder.reward_arguments import Form, form_of, score_in
from omni_grpo_core.recorder.step_buffer import Outcome, StepBuffer
from omni_grpo_core.rewards import compose, plain_text
from omni_grpo_core.rewards.call import RewardFunction, name_of, scores_of
from omni_grpo_core.trace.calls import RewardCall
from omni_grpo_core.types import Score

_MOST_TYPES = 8
"""Problem types after which a function is not probed again."""


class RewardWatch:
    """``functions``: the watched functions, in order, for a loop that calls them by hand."""

    def __init__(
        self, functions: Sequence[RewardFunction], buffer: StepBuffer, *, probing: bool
    ) -> None:
        self._buffer, self._given, self._probing = buffer, functions, probing
        self._before = tuple(functions)
        self._active = True
        self.probes: dict[int, Mapping[str, Any]] = {}
        self._types: dict[int, set[str]] = {}
        self._forms: dict[int, Form] = {}
        self._called: set[int] = set()
        self.functions = tuple(map(self._watched, self._before))

    def start(self, patches: Patches) -> None:
        if not self._before:  # a run of this package makes its own from a configuration
            patches.set(compose, "scores_of", self._scores_of)
        self._replace(dict(zip(map(id, self._before), self.functions, strict=True)))

    def stop(self) -> None:
        self._replace(dict(zip(map(id, self.functions), self._before, strict=True)))
        # a loop that kept a function goes on calling it after the end
        self._active = False

    def _replace(self, others: Mapping[int, RewardFunction]) -> None:
        """Function by function: the trainer may have changed its list in the meantime."""
        if isinstance(self._given, MutableSequence):
            self._given[:] = [others.get(id(function), function) for function in self._given]

    def _watched(self, function: RewardFunction) -> RewardFunction:
        # a trainer calls a reward *model* differently, and checks its class
        if isinstance(function, nn.Module) or not callable(function):
            return function
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def later(*args: Any, **keywords: Any) -> Any:
                with self._watching(function, args, keywords) as outcome:
                    outcome.result = await function(*args, **keywords)
                    return outcome.result

            return later
        return (
            _WatchedObject(function, self._call)
            if not inspect.isfunction(function)
            else (functools.wraps(function)(functools.partial(self._call, function)))
        )

    def _call(self, function: RewardFunction, /, *args: Any, **keywords: Any) -> Any:
        caught = Caught(function)
        with self._watching(function, args, keywords, caught.texts) as outcome:
            with caught if self._traced(function) else nullcontext():
                outcome.result = function(*args, **keywords)
            return outcome.result

    def _scores_of(
        self,
        function: RewardFunction,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Any],
    ) -> list[Score]:
        """Of a component, see :func:`~omni_grpo_core.rewards.call.scores_of`."""
        given = {"prompts": prompts, "completions": completions, **columns}
        with self._watching(function, (), given) as outcome:
            scores = scores_of(function, prompts, completions, columns)
            outcome.result = [score.value for score in scores]
            return scores

    def _traced(self, function: RewardFunction) -> bool:
        """Whether to trace a call: the first of a function that asks others, such as a judge."""
        first = id(function) not in self._called
        self._called.add(id(function))
        return first and self._active and self._probing and may_trace(function)

    def _watching(
        self,
        function: RewardFunction,
        args: tuple[Any, ...],
        keywords: Mapping[str, Any],
        caught: Mapping[str, int] = MappingProxyType({}),
    ) -> AbstractContextManager[Outcome]:
        if not self._active:
            return nullcontext(Outcome())
        note = functools.partial(self._note, function, args, keywords, caught)
        return self._buffer.watching("reward", note)

    def _note(
        self,
        function: RewardFunction,
        args: tuple[Any, ...],
        keywords: Mapping[str, Any],
        caught: Mapping[str, int],
        outcome: Outcome,
    ) -> None:
        plain = self._buffer.plain
        given = arguments(function, args, keywords)
        given.pop("self", None)
        form = self._form(function, given)
        self._probe(function, form, given)
        self._buffer.add(
            RewardCall(
                name=name_of(function),
                source=source_of(function),
                prompts=_texts(given.pop("prompts", None), plain.text),
                completions=_texts(given.pop(form.name, None), plain.text, alone=form.alone),
                columns=plain.mapping(given),
                values=_numbers(outcome.result),
                probe=self.probes.get(id(function), {}),
                error=outcome.error,
                caught={plain.text(text): times for text, times in caught.items()},
            ),
            outcome.seconds,
        )

    def _form(self, function: RewardFunction, given: Mapping[str, Any]) -> Form:
        """How it takes completions, once that is known."""
        form = self._forms.get(id(function)) or form_of(given, self._buffer.sampled)
        if form.name in given:
            self._forms[id(function)] = form
        return form

    def _probe(self, function: RewardFunction, form: Form, given: Mapping[str, Any]) -> None:
        """Once, when the rows are known, and again for a problem type that was not among them."""
        if not self._probing:
            return
        rows = form.of_rows(given)
        types = set(types_in(rows))
        known = self._types.setdefault(id(function), set())
        if id(function) in self.probes and (types <= known or len(known) >= _MOST_TYPES):
            return
        known |= types
        with self._buffer.guarded("reward probe"):
            self.probes[id(function)] = {
                **probe(function, rows, self._buffer.plain, form.by_rows(function)),
                **self.probes.get(id(function), {}),
            }


class _WatchedObject:
    """A proxy of a callable object: everything but the call is the object's own."""

    def __init__(self, target: Any, call: Callable[..., Any]) -> None:
        self.__dict__["_target"] = target
        self.__dict__["_call"] = call

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self._call(self._target, *args, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._target, name, value)

    def __repr__(self) -> str:
        return repr(self._target)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._target)


def source_of(function: RewardFunction) -> str:
    """Module and qualified name.

    >>> source_of(plain_text)
    'omni_grpo_core.rewards.plain_text'
    """
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', '')}"


def _texts(values: Any, clean: Callable[[str], str], *, alone: bool = False) -> tuple[str, ...]:
    if values is None:
        return ()
    many = [values] if alone or isinstance(values, str) else values
    return tuple(clean(plain_text(value, "reward")) for value in many)


def _numbers(values: Any) -> tuple[float | None, ...]:
    values = score_in(values)
    if isinstance(values, torch.Tensor):
        values = values.detach().flatten().tolist()
    if values is None or not hasattr(values, "__iter__"):
        return () if values is None else (float(values),)
    found = map(score_in, values)
    return tuple(None if value is None else float(value) for value in found)
