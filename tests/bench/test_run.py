"""What is measured again is the same again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from omni_grpo_core.bench.run import Options, _Bench
from omni_grpo_core.bench.shapes import ROUNDED, SETTINGS, make_batch, make_policy

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("4.57"), reason="no attention functions"
)


def test_repeated_updates_do_not_add_up() -> None:
    """Three repeats held a second gradient of each weight: 35.3 GiB in place of 32.1."""
    policy = make_policy("tiny", "cpu", "float32")
    bench = _Bench(policy, ROUNDED["tiny"], Options())
    update = bench._parts("fast")["update"]
    update()
    first = [p.grad.clone() for p in bench.learning if p.grad is not None]
    update()
    again = [p.grad for p in bench.learning if p.grad is not None]
    assert len(first) > 0
    assert all(map(torch.equal, first, again))


def test_the_usual_update_goes_back_through_the_towers_where_the_library_does() -> None:
    """From transformers 5 on its gradient checkpointing makes the inputs of frozen towers require
    gradients. Our step leaves that out, and with it the usual one had got three times quicker than
    anybody's."""
    policy = make_policy("tiny", "cpu", "float32")
    bench = _Bench(policy, ROUNDED["tiny"], Options())
    model, updates = policy.model, {"plain": bench._parts("plain")["update"]}
    updates |= {name: call for name, call in bench._parts("usual").items() if "update" in name}
    back = {name: set[str]() for name in updates}

    def watch(tower: str, updating: str) -> Callable[..., None]:
        def look(module: Any, given: tuple[Tensor, ...]) -> None:
            if given[0].requires_grad:
                back[updating].add(tower)

        return look

    for name, update in updates.items():
        blocks = {"audio": model.audio_tower.layers[0], "video": model.visual.blocks[0]}
        hooks = [b.register_forward_pre_hook(watch(tower, name)) for tower, b in blocks.items()]
        update()
        for hook in hooks:
            hook.remove()
    both = {"audio", "video"} if Version(version("transformers")) >= Version("5") else set()
    assert back == {"plain": set(), "update": both, "update_without_towers": set()}
    assert not model.audio_tower.conv1._forward_hooks


def test_prompts_of_the_tiny_size_are_as_long_as_asked_for() -> None:
    """From 900 tokens on its sound was longer than the 8 s of the shipped extractor: the sweep of
    prompts told people to cut a clip that they had never seen."""
    policy = make_policy("tiny", "cpu", "float32")
    (row,) = make_batch(policy, replace(SETTINGS["tiny"], prompt=2048, groups=1)).rows
    assert len(row.input_ids) == pytest.approx(2048, rel=0.02)
