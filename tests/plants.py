"""Mistakes planted in somebody's trainer from outside, for as long as a run takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

Around = Callable[..., Any]
Plant = Callable[[Any], AbstractContextManager[Any]]


def around(method: str, change: Around) -> Plant:
    """``change(trainer, call, *args, **keywords)`` in the place of one of the trainer's methods."""

    @contextmanager
    def plant(trainer: Any) -> Iterator[None]:
        call = getattr(trainer, method)
        with mock.patch.object(trainer, method, functools.partial(change, trainer, call)):
            yield

    return plant


def of_rollout(change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Plant:
    """Change what a rollout hands on to the loss."""

    def changed(trainer: Any, call: Around, *args: Any) -> Any:
        made = call(*args)
        return {**made, **change(made)}

    return around("_generate_and_score_completions", changed)


@contextmanager
def sampled_hotter(trainer: Any) -> Iterator[None]:
    """A temperature set on generate alone."""
    trainer.generation_config.temperature = 3.0
    yield


@contextmanager
def own_reference(trainer: Any) -> Iterator[None]:
    trainer.ref_model = trainer.model
    yield
