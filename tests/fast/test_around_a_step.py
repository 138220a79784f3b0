"""What surrounds a fast step changes nothing in it, and it leaves nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from sides import TEMPERATURE, Tokens, assert_parity, packed, plain, ragged, scored

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.fast.rollout import shared_rollout
from omni_grpo_core.fast.step import FastStep
from omni_grpo_core.training.config import Tower
from omni_grpo_core.training.step import scoring
from omni_grpo_core.training.trainable import freeze
from omni_grpo_core.types import Batch

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("4.57"), reason="no attention functions"
)


@pytest.fixture(scope="module")
def own(policy: Policy) -> Policy:
    """With frozen towers, whose features sampling leaves to the update."""
    found = replace(policy, model=copy.deepcopy(policy.model))
    freeze(found.model, ("image", "video", "audio"))
    return found


@pytest.fixture(scope="module")
def batch(own: Policy, mixed: Batch) -> Batch:
    return collate([mixed.rows[0], mixed.rows[7]], own.pad_token_id)


@pytest.fixture(scope="module")
def tokens(own: Policy) -> Tokens:
    return ragged(own, [3, 1, 4, 2])


def a_step(policy: Policy, batch: Batch, tokens: Tokens) -> None:
    fast = FastStep(policy)
    fast.rollout(batch, group_size=2, max_new_tokens=3, temperature=TEMPERATURE)
    with scoring(policy.model, checkpointing=True):
        found = fast.scores(batch, tokens.ids, tokens.mask, temperature=TEMPERATURE)
        torch.autograd.backward((found.logprobs * tokens.weights).sum())


def state(policy: Policy) -> list[Any]:
    """Every module's attributes, and what stands in their dictionaries of hooks; attention."""
    modules = [*policy.model.modules()]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    kernels: Any = torch.backends.cuda
    return [
        [{k: v for k, v in vars(module).items() if v is not None} for module in modules],
        [[*getattr(module, kind)] for module in modules for kind in kinds],
        [one.config._attn_implementation for one in modules if hasattr(one, "config")],
        [parameter.requires_grad for parameter in policy.model.parameters()],
        kernels.cudnn_sdp_enabled(),
    ]


# a layer is called for the prompt, for two further tokens, for scoring, and again in its backward
# pass; the head for the prompt, two tokens, scoring, and again
CALLS = {"nothing": 0, "prefill": 1, "decoding": 3, "scoring": 4, "backward": 5}


@pytest.mark.parametrize("stage", CALLS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_nothing_is_left_behind(
    own: Policy, batch: Batch, tokens: Tokens, stage: str, error: type[BaseException]
) -> None:
    """Also by a step that ends in the middle of a layer."""
    layer = own.text_model.layers[1]
    calls: list[int] = []

    def count(*_: object) -> None:
        calls.append(0)
        if len(calls) == CALLS[stage]:
            raise error

    own.model.train()
    layer.mlp.register_forward_pre_hook(count)
    before = state(own)
    with pytest.raises(error) if CALLS[stage] else nullcontext():
        a_step(own, batch, tokens)
    own.model.zero_grad(set_to_none=True)
    after = state(own)
    layer.mlp._forward_pre_hooks.clear()
    own.model.eval()
    assert len(calls) == CALLS[stage] or stage == "nothing"
    assert after == before


@pytest.mark.parametrize("ending", ["every", "several", "none"])
def test_what_may_end_a_completion(own: Policy, batch: Batch, ending: str) -> None:
    allowed = (~own.suppressed).nonzero()[:, 0]
    settings: dict[str, Any] = {"group_size": 3, "max_new_tokens": 8, "temperature": 1.6}
    if ending == "none":
        suppressed = own.suppressed.clone()
        suppressed[[*own.eos_token_ids, *allowed[::2].tolist()]] = True
        policy = replace(own, suppressed=suppressed)
    else:
        eos = allowed.tolist() if ending == "every" else allowed[::9].tolist()
        policy = replace(own, eos_token_ids=tuple(eos))
    want, found = (
        side(policy, batch, **settings).completions for side in (rollout, shared_rollout)
    )
    assert [c.token_ids for c in found] == [c.token_ids for c in want]
    assert [c.finish_reason for c in found] == [c.finish_reason for c in want]
    assert {len(c.token_ids) for c in found} == {"every": {1}, "none": {8}}.get(
        ending, {len(c.token_ids) for c in want}
    )


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "anomaly detection": torch.autograd.detect_anomaly,
    "deterministic algorithms": _deterministic,
    "saved tensors on the host": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_torch_can_be_switched_to(
    own: Policy, batch: Batch, tokens: Tokens, around: Callable[[], AbstractContextManager[Any]]
) -> None:
    want = scored(own, plain(own), batch, tokens)
    with around():
        assert_parity(scored(own, packed(own), batch, tokens, checkpointing=True), want)


@pytest.mark.slow
def test_sampling_in_inference_mode_leaves_features_that_can_be_learned_from(
    own: Policy, batch: Batch, tokens: Tokens
) -> None:
    want, fast = scored(own, plain(own), batch, tokens), FastStep(own)
    with torch.inference_mode():
        fast.rollout(batch, group_size=2, max_new_tokens=2, temperature=TEMPERATURE)
    assert_parity(scored(own, fast.scores, batch, tokens), want)


@pytest.mark.slow
def test_towers_may_thaw_and_freeze_between_two_updates(
    own: Policy, batch: Batch, tokens: Tokens
) -> None:
    policy = replace(own, model=copy.deepcopy(own.model))
    fast = FastStep(policy)
    fast.rollout(batch, group_size=2, max_new_tokens=2, temperature=TEMPERATURE)
    stages: tuple[tuple[Tower, ...], ...] = ((), ("image", "video", "audio"), ("audio",))
    for frozen in stages:
        freeze(policy.model, frozen)
        want = scored(policy, plain(policy), batch, tokens)
        assert_parity(scored(policy, fast.scores, batch, tokens), want)


@pytest.mark.slow
def test_a_prompt_of_one_token(own: Policy, mixed: Batch, tokens: Tokens) -> None:
    text = mixed.rows[7]
    rows = collate([replace(text, input_ids=text.input_ids[:1]), text], own.pad_token_id)
    want = scored(own, plain(own), rows, tokens)
    assert_parity(scored(own, packed(own), rows, tokens), want)
