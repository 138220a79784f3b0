"""Mistakes planted in TRL's trainer, each as somebody may make it in a subclass or a patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from plants import Around, Plant, around
from torch import Tensor


def rolled(trainer: Any, call: Around, inputs: list[Any], *args: Any) -> Any:
    """The next prompt's columns for every completion."""
    size = trainer.num_generations
    return call(inputs[size:] + inputs[:size], *args)


def late(trainer: Any, call: Around, inputs: Any, prompts: Any, completions: Any, ids: Any) -> Any:
    """Completions of the rollout before: a buffer that is read before it is filled."""
    held = getattr(trainer, "held_back", completions)
    trainer.held_back = completions
    return call(inputs, prompts, held, ids)


def without_adapter(trainer: Any, call: Around, *args: Any, **keywords: Any) -> Any:
    with trainer.model.disable_adapter():
        return call(*args, **keywords)


def doubled(trainer: Any, call: Around, *args: Any, **keywords: Any) -> Any:
    """Micro-batches that are summed: TRL has divided by their number already."""
    return 2 * call(*args, **keywords)


def padded_right(trainer: Any, call: Around, *args: Any, **keywords: Any) -> Any:
    from trl.trainer import grpo_trainer

    pad = grpo_trainer.pad

    def right(tensors: Any, **given: Any) -> Any:
        return pad(tensors, **{**given, "padding_side": "right"})

    with mock.patch.object(grpo_trainer, "pad", right):
        return call(*args, **keywords)


@contextmanager
def in_train_mode(trainer: Any) -> Iterator[None]:
    """generate without TRL's own care for modes, gradient checkpointing on."""
    from trl.trainer import grpo_trainer

    @contextmanager
    def as_it_is(model: Any, *args: Any, **keywords: Any) -> Iterator[Any]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        yield model

    with mock.patch.object(grpo_trainer, "unwrap_model_for_generation", as_it_is):
        yield


def without_pixels(trainer: Any, call: Around, *args: Any, **keywords: Any) -> Any:
    """Scores without the picture: only generate gets it."""
    return call(*args, **{**keywords, "pixel_values": None, "image_grid_thw": None})


def _pixels(change: Callable[[Tensor], Tensor]) -> Around:
    def changed(trainer: Any, call: Around, *args: Any, **keywords: Any) -> Any:
        held = keywords.get("pixel_values")
        return call(
            *args, **keywords if held is None else {**keywords, "pixel_values": change(held)}
        )

    return changed


def pixels_of_generate(change: Callable[[Tensor], Tensor]) -> Plant:
    def changed(trainer: Any, call: Around, *args: Any, **keywords: Any) -> Any:
        ids, images, fields, *rest = args
        held = (
            torch.tensor(fields["pixel_values"])
            if isinstance(fields["pixel_values"], list)
            else fields["pixel_values"]
        )
        return call(ids, images, {**fields, "pixel_values": change(held)}, *rest, **keywords)

    return around("_generate_single_turn", changed)


SCORE = "_get_per_token_logps_and_entropies"
zeroed_while_scoring = around(SCORE, _pixels(torch.zeros_like))
flipped_while_scoring = around(SCORE, _pixels(lambda held: held.flip(0)))


def _own_exchanged(held: Tensor) -> Tensor:
    """The two pictures of each row, all of one size: sixteen patches each."""
    return held.view(-1, 2, 16, held.shape[-1]).flip(1).reshape(held.shape)


pictures_exchanged_while_scoring = around(SCORE, _pixels(_own_exchanged))
pictures_exchanged_while_sampling = pixels_of_generate(_own_exchanged)
