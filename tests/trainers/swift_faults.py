"""Mistakes planted in ms-swift's trainer, its template or its inference engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from plants import Around, Plant, around
from torch import Tensor

SCORE = "_get_per_token_logps_and_entropies"


def of_advantages(change: Callable[[Tensor], Tensor]) -> Plant:
    def changed(trainer: Any, call: Around, *args: Any) -> Tensor:
        return change(call(*args))

    return around("_compute_advantages", changed)


# --------------------------------------------------------------------------- media


@contextmanager
def silent(trainer: Any) -> Iterator[None]:
    """Every sound is read as zeros."""
    from swift.template.templates import qwen

    read = qwen.load_audio
    with mock.patch.object(qwen, "load_audio", lambda *args: 0 * read(*args)):
        yield


def collated(change: Callable[[dict[str, Any]], dict[str, Any]], *, training: bool = True) -> Plant:
    """Change what the template collates, for the scoring forward too if ``training``."""

    @contextmanager
    def plant(trainer: Any) -> Iterator[None]:
        kind = type(trainer.template)
        collate = kind.data_collator

        @functools.wraps(collate)
        def instead(template: Any, *args: Any, **keywords: Any) -> Any:
            made = collate(template, *args, **keywords)
            return {**made, **change(made)} if training or not template.is_training else made

        with mock.patch.object(kind, "data_collator", instead):
            yield

    return plant


def zeros(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda made: {name: torch.zeros_like(made[name])}


def padded_right(made: dict[str, Any]) -> dict[str, Any]:
    """Prompts of generate with their padding at the end."""
    held = {name: made[name] for name in ("input_ids", "attention_mask")}
    pads = (made["attention_mask"] == 0).sum(1).tolist()
    return {
        name: torch.stack([row.roll(-n) for row, n in zip(rows, pads, strict=True)])
        for name, rows in held.items()
    }


def while_scoring(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Plant:
    """Change what the model gets to score completions."""

    def changed(trainer: Any, call: Around, model: Any, given: Any, *args: Any, **more: Any) -> Any:
        return call(model, change(given), *args, **more)

    return around(SCORE, changed)


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda given: {name: held for name, held in given.items() if name not in names}


def rolled_by_half(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Of two prompts each gets the other's media."""
    return lambda given: {**given, name: given[name].roll(len(given[name]) // 2, 0)}


@contextmanager
def resized_again(trainer: Any) -> Iterator[None]:
    """The processor resizes frames that are resized."""
    kind = type(trainer.template.processor)
    call = kind.__call__

    @functools.wraps(call)
    def instead(processor: Any, *args: Any, **keywords: Any) -> Any:
        keywords["do_resize"] = True
        keywords["videos_kwargs"] = {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28}}
        return call(processor, *args, **keywords)

    with mock.patch.object(kind, "__call__", instead):
        yield


@contextmanager
def four_frames_a_second(trainer: Any) -> Iterator[None]:
    """Frames half a second apart: ms-swift itself cuts their times to whole numbers while scoring.
    It reads its variables once in a process."""
    from qwen_omni_utils import vision_process

    with mock.patch.object(vision_process, "FPS", 4.0):
        yield


# --------------------------------------------------------------------------- sampling


@contextmanager
def in_train_mode(trainer: Any) -> Iterator[None]:
    """generate in train mode, gradient checkpointing on."""
    model = trainer.model

    def as_it_is() -> Any:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    with mock.patch.object(model, "eval", as_it_is):
        yield


@contextmanager
def sampled_hotter(trainer: Any) -> Iterator[None]:
    trainer.request_config.temperature = 3.0
    yield


def without_adapter(trainer: Any, call: Around, *args: Any, **keywords: Any) -> Any:
    with trainer.model.disable_adapter():
        return call(*args, **keywords)


# --------------------------------------------------------------------------- rewards, loss


def late(trainer: Any, call: Around, samples: Sequence[Any]) -> Any:
    """Rewards get the completions of the rollout before."""
    told = [sample.messages[-1]["content"] for sample in samples]
    held = getattr(trainer, "held_back", told)
    trainer.held_back = told
    return _with_texts(call, samples, held)


def _with_texts(call: Around, samples: Sequence[Any], texts: Sequence[str]) -> Any:
    own = [sample.messages[-1]["content"] for sample in samples]
    for sample, text in zip(samples, texts, strict=True):
        sample.messages[-1]["content"] = text
    try:
        return call(samples)
    finally:
        for sample, text in zip(samples, own, strict=True):
            sample.messages[-1]["content"] = text


def golds_rolled(trainer: Any, call: Around, samples: Sequence[Any]) -> Any:
    """The other prompt's gold for every completion."""
    own = [sample.extra["solution"] for sample in samples]
    size = trainer.num_generations
    for sample, gold in zip(samples, own[size:] + own[:size], strict=True):
        sample.extra["solution"] = gold
    try:
        return call(samples)
    finally:
        for sample, gold in zip(samples, own, strict=True):
            sample.extra["solution"] = gold


def padding_counted(
    trainer: Any, call: Around, model: Any, given: Any, *args: Any, **more: Any
) -> Any:
    mask = given["grpo_batch"].completion_mask
    given["grpo_batch"].completion_mask = torch.ones_like(mask)
    return call(model, given, *args, **more)
