"""Faults between the calls of any loop, planted from outside it, on top of the recorder: what a
call returned was recorded before it is changed, what a call gets is changed before it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.doctor.checks.run import in_order
from omni_grpo_core.doctor.evidence import Case, Reference
from omni_grpo_core.doctor.load import as_cases, read_traces
from omni_grpo_core.faults.healthy.world import Setting, World, policy_of, world_of
from omni_grpo_core.pipeline.settings import load_settings
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.recorder.thinker import find
from omni_grpo_core.tiny import checkpoint_dir

Inputs = dict[str, Any]
Change = Callable[["State", Inputs], Inputs]


@dataclass(slots=True)
class State:
    """What plants remember: outputs of the processor by call, and its texts."""

    tokenizer: Any = None
    outputs: list[Inputs] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plant:
    """A change of what the processor returned, of what generate or a scoring forward gets, or of
    a reward function's completions. ``edge``: where it must be found, and nowhere else."""

    name: str
    edge: str
    made: Change | None = None
    generating: Change | None = None
    scoring: Change | None = None
    rewarding: Callable[[State, list[Any]], list[Any]] | None = None


class PlantedWorld:
    """A world whose recorder has plants on top of it."""

    def __init__(self, world: World, plant: Plant | None) -> None:
        self._world, self._plant = world, plant

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)

    @contextmanager
    def record(self, *, model: Any, processor: Any, reward_funcs: list[Any]) -> Iterator[Any]:
        with self._world.record(
            model=model, processor=processor, reward_funcs=reward_funcs
        ) as recorder:
            if self._plant is None:
                yield recorder
                return
            with _planted(self._plant, model, processor, reward_funcs):
                yield recorder


@contextmanager
def _planted(plant: Plant, model: Any, processor: Any, rewards: list[Any]) -> Iterator[None]:
    state, thinker = State(getattr(processor, "tokenizer", processor)), find(model).thinker
    kind, generate = type(processor), thinker.generate
    process, busy = kind.__call__, [False]

    @wraps(process)
    def called(this: Any, *args: Any, **keywords: Any) -> Any:
        made = process(this, *args, **keywords)
        text = keywords.get("text", args[0] if args else None)
        if this is processor and plant.made is not None:
            changed = plant.made(state, dict(made))
            state.outputs.append({k: v for k, v in made.items() if isinstance(v, Tensor)})
            for name, value in changed.items():
                made[name] = value
        if this is processor and text is not None:
            state.texts += [text] if isinstance(text, str) else list(text)
        return made

    @wraps(generate)
    def generated(*args: Any, **keywords: Any) -> Any:
        if plant.generating is not None and not args:
            keywords = plant.generating(state, keywords)
        busy[0] = True
        try:
            return generate(*args, **keywords)
        finally:
            busy[0] = False

    def before(_module: Any, args: Any, keywords: Inputs) -> Any:
        if busy[0] or plant.scoring is None or "input_ids" not in keywords:
            return None
        return args, plant.scoring(state, dict(keywords))

    def scored(function: Any) -> Any:
        @wraps(function)
        def instead(*args: Any, **keywords: Any) -> Any:
            if plant.rewarding is not None and isinstance(keywords.get("completions"), list):
                changed = plant.rewarding(state, keywords["completions"])
                keywords = {**keywords, "completions": changed}
            return function(*args, **keywords)

        return instead

    handle = thinker.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    rewards[:] = [scored(function) for function in rewards]
    try:
        with patched(kind, __call__=called), patched(thinker, generate=generated):
            yield
    finally:
        handle.remove()


def planted(
    loop: Callable[[Any], None], plant: Plant | None, setting: Setting, folder: Path
) -> tuple[Case, ...]:
    """The recorded steps of a loop."""
    world = world_of(setting, folder)
    loop(PlantedWorld(world, plant))
    reference = Reference(
        policy_of(setting.family, setting.dtype), load_settings(checkpoint_dir(setting.family))
    )
    return in_order(as_cases(read_traces(folder), reference))


# --------------------------------------------------------------------------- changes


def times_two(name: str) -> Change:
    return lambda _, held: {**held, name: held[name] * 2}


def resized(name: str) -> Change:
    """Every patch at half its resolution, in the same number of values."""

    def change(_: State, held: Inputs) -> Inputs:
        wide = held[name]
        small = torch.nn.functional.interpolate(wide.float()[None], size=wide.shape[1] // 2)
        again = torch.nn.functional.interpolate(small, size=wide.shape[1])[0]
        return {**held, name: again.to(wide.dtype)}

    return change


def exchanged(name: str, grid: str) -> Change:
    """The first picture or clip and the first one of another content change places."""

    def change(_: State, held: Inputs) -> Inputs:
        sizes = held[grid].prod(-1).tolist()
        parts = list(held[name].split(sizes))
        other = next(
            n for n, part in enumerate(parts)
            if part.shape == parts[0].shape and not torch.equal(part, parts[0])
        )  # fmt: skip
        parts[0], parts[other] = parts[other], parts[0]
        return {**held, name: torch.cat(parts)}

    return change


def rows_flipped(_: State, held: Inputs) -> Inputs:
    return {**held, **{k: held[k].flip(0) for k in ("input_ids", "attention_mask")}}


def frames_reversed(_: State, held: Inputs) -> Inputs:
    parts = [
        part.view(int(t), -1, part.shape[-1]).flip(0).flatten(0, 1)
        for part, (t, h, w) in zip(
            held["pixel_values_videos"].split(held["video_grid_thw"].prod(-1).tolist()),
            held["video_grid_thw"],
            strict=True,
        )
    ]
    return {**held, "pixel_values_videos": torch.cat(parts)}


def stale(name: str) -> Change:
    def change(state: State, held: Inputs) -> Inputs:
        old = [o[name] for o in state.outputs if name in o and o[name].shape == held[name].shape]
        return {**held, name: old[0]} if old else held

    return change


def dropped(*names: str) -> Change:
    return lambda _, held: {k: v for k, v in held.items() if k not in names}


def truncated(_: State, held: Inputs) -> Inputs:
    return {**held, **{k: held[k][:, 4:] for k in ("input_ids", "attention_mask")}}


def mask_of_ones(_: State, held: Inputs) -> Inputs:
    return {**held, "attention_mask": torch.ones_like(held["attention_mask"])}


def flat_positions(_: State, held: Inputs) -> Inputs:
    ids = held["input_ids"]
    places = torch.arange(ids.shape[1]).expand(3, *ids.shape)
    return {**held, "position_ids": places}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value[0]["content"])


def _as(value: Any, text: str) -> Any:
    return text if isinstance(value, str) else [{**value[0], "content": text}]


def other_tokenizer(state: State, completions: list[Any]) -> list[Any]:
    """The ids of another vocabulary: each token the next one's text."""
    found = []
    for value in completions:
        ids = state.tokenizer(_text(value), add_special_tokens=False)["input_ids"]
        found.append(_as(value, state.tokenizer.decode([3 + i % 200 for i in ids])))
    return found


def with_prompt(state: State, completions: list[Any]) -> list[Any]:
    texts = state.texts[-len(completions) :]
    texts = texts if len(texts) == len(completions) else texts[-1:] * len(completions)
    return [_as(v, prompt + _text(v)) for v, prompt in zip(completions, texts, strict=True)]


def rolled(_: State, completions: list[Any]) -> list[Any]:
    return [*completions[1:], *completions[:1]]


TO_GENERATE, TO_SCORING = "processor -> generate", "generate -> the scoring forward"
TO_REWARD = "generate -> reward"

VIDEO = (
    Plant("pixels resized", TO_GENERATE, made=resized("pixel_values_videos")),
    Plant("frames reversed", TO_GENERATE, made=frames_reversed),
    Plant("stale pixels", TO_GENERATE, made=stale("pixel_values_videos")),
    Plant("video dropped while scoring", TO_SCORING, scoring=dropped("pixel_values_videos")),
    Plant("pixels scaled while scoring", TO_SCORING, scoring=times_two("pixel_values_videos")),
    Plant("positions while scoring", TO_SCORING, scoring=flat_positions),
)
SOUND = (
    Plant("mel scaled", TO_GENERATE, made=times_two("input_features")),
    Plant("sound dropped while scoring", TO_SCORING, scoring=dropped("input_features")),
)
IMAGE = (
    Plant("pixels resized", TO_GENERATE, made=resized("pixel_values")),
    Plant("image dropped while scoring", TO_SCORING, scoring=dropped("pixel_values")),
)
SEVERAL = (
    Plant("pictures exchanged", TO_GENERATE, made=exchanged("pixel_values", "image_grid_thw")),
)
ROWS = (
    Plant("ids truncated", TO_GENERATE, generating=truncated),
    Plant("ids truncated while scoring", TO_SCORING, scoring=truncated),
)
ORDER = (Plant("rows flipped", TO_GENERATE, generating=rows_flipped),)
PADDED = (
    Plant("mask of ones", TO_GENERATE, generating=mask_of_ones),
    Plant("mask of ones while scoring", TO_SCORING, scoring=mask_of_ones),
)
TEXTS = (
    Plant("another tokenizer", TO_REWARD, rewarding=other_tokenizer),
    Plant("prompt and completion", TO_REWARD, rewarding=with_prompt),
    Plant("completions rolled", TO_REWARD, rewarding=rolled),
)


def broken_at(cases: Sequence[Case]) -> set[str]:
    """The edges that are broken, rewards by no name."""
    from omni_grpo_core.doctor.continuity import look_at_edges

    found = {str(e.values["edge"]) for case in cases for e in look_at_edges(case)}
    return {TO_REWARD if "-> reward" in edge else edge for edge in found}
