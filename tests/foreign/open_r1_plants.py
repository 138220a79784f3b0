"""Changes of a trainer of the open-r1 family from outside: mistakes, and advice followed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from plants import Around, Plant, around, of_rollout, own_reference, sampled_hotter


def of_scoring(change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Plant:
    """Change the media that are scored."""

    def changed(trainer: Any, call: Around, *args: Any, **media: Any) -> Any:
        # R1-V passes them by position
        media |= dict(zip(("pixel_values", "image_grid_thw"), args[3:], strict=False))
        return call(*args[:3], **{**media, **change(media)})

    return around("_get_per_token_logps", changed)


def of_reward(change: Callable[[list[float]], list[float]]) -> Plant:
    """Change what the last reward function pays, between it and the trainer."""

    @contextmanager
    def plant(trainer: Any) -> Iterator[None]:
        function = trainer.reward_funcs[-1]

        @functools.wraps(function)
        def changed(*given: Any, **columns: Any) -> list[float]:
            return change(function(*given, **columns))

        trainer.reward_funcs[-1] = changed
        yield

    return plant


def of_prompts(change: Callable[[list[str]], list[str]]) -> Plant:
    """Change the rendered prompts, between the template and the processor."""

    @contextmanager
    def plant(trainer: Any) -> Iterator[None]:
        prepare = trainer.vlm_module.prepare_prompt

        def changed(*given: Any) -> list[str]:
            return change(prepare(*given))

        with mock.patch.object(trainer.vlm_module, "prepare_prompt", changed):
            yield

    return plant


@contextmanager
def generates_in_eval(trainer: Any) -> Iterator[None]:
    """Around generate: eval mode, no gradient checkpointing."""
    module = sys.modules["open_r1.trainer.grpo_trainer"]
    unwrap = module.unwrap_model_for_generation

    @contextmanager
    def unwrapped(*given: Any, **more: Any) -> Iterator[Any]:
        with unwrap(*given, **more) as model:
            model.gradient_checkpointing_disable()
            model.eval()
            yield model
            model.train()
            model.gradient_checkpointing_enable()

    with mock.patch.object(module, "unwrap_model_for_generation", unwrapped):
        yield


@contextmanager
def states_rate(trainer: Any) -> Iterator[None]:
    """The processor is told the clips' rate, and not to resize frames again."""
    prepare = trainer.vlm_module.prepare_model_inputs

    def prepared(processor: Any, *given: Any, **more: Any) -> Any:
        told = functools.partial(processor, fps=4.0, do_resize=False)
        return prepare(told, *given, **more)

    with mock.patch.object(trainer.vlm_module, "prepare_model_inputs", prepared):
        yield


PLANTS: dict[str, Plant] = {
    "generates in eval": generates_in_eval,
    "states rate": states_rate,
    "advantages rolled": of_rollout(lambda made: {"advantages": made["advantages"].roll(1)}),
    "advantages negated": of_rollout(lambda made: {"advantages": -made["advantages"]}),
    "padding in the loss": of_rollout(
        lambda made: {"completion_mask": torch.ones_like(made["completion_mask"])}
    ),
    "rewards rolled": of_reward(lambda paid: paid[1:] + paid[:1]),
    "picture blanked while scoring": of_scoring(
        lambda media: {"pixel_values": torch.zeros_like(media["pixel_values"])}
    ),
    "picture dropped while scoring": of_scoring(dict.fromkeys),
    "reference is the policy": own_reference,
    "sampled hotter": sampled_hotter,
    "prompts of another order": of_prompts(lambda texts: texts[::-1]),
}
