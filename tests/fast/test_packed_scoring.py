"""Packed scoring is pinned to the plain scoring forward: logprobs, entropies and every gradient."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from sides import (
    GRADIENT,
    LOGPROB,
    TEMPERATURE,
    Scored,
    Tokens,
    apart,
    assert_parity,
    packed,
    plain,
    ragged,
    scored,
    with_adapters,
)
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.dialect import switch_checkpointing
from omni_grpo_core.core.forward import first_positions
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import TrainError
from omni_grpo_core.fast import head, layout, scoring
from omni_grpo_core.fast.head import chunked_logprobs
from omni_grpo_core.fast.layout import PackedRow, Spans
from omni_grpo_core.fast.scoring import Kernel, packed_scores
from omni_grpo_core.fast.step import FastStep
from omni_grpo_core.training.trainable import freeze
from omni_grpo_core.types import Batch

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("4.57"), reason="no attention functions"
)

LENGTHS = [3, 1, 7, 2, 5, 4]


@pytest.fixture(autouse=True)
def untouched(policy: Policy) -> Iterator[None]:
    yield
    policy.model.requires_grad_(True).eval()


@pytest.fixture(scope="module", params=["policy", "qwen3_policy"])
def own(request: pytest.FixtureRequest) -> Policy:
    """Each family's."""
    found: Policy = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def batch(own: Policy, request: pytest.FixtureRequest) -> Batch:
    """Interleaved sound, sound apart, silence, an image and text alone, in one batch."""
    if own.family.deepstack:
        found: Batch = request.getfixturevalue("qwen3_mixed")
        return found
    rows = request.getfixturevalue("mixed").rows
    return collate([rows[at] for at in (0, 2, 4, 6, 7)], own.pad_token_id)


@pytest.fixture(scope="module")
def tokens(own: Policy, batch: Batch) -> Tokens:
    """Two ragged completions a group; one group has nothing but its first tokens."""
    return ragged(own, [4, 9, 1, 1, 6, 2, 3, 8, 5, 1])


@pytest.fixture(scope="module")
def want(own: Policy, batch: Batch, tokens: Tokens) -> Scored:
    return scored(own, plain(own), batch, tokens)


@pytest.mark.parametrize("kernel", ["merged", pytest.param("masked", marks=pytest.mark.slow)])
def test_a_mixed_ragged_batch(
    own: Policy, batch: Batch, tokens: Tokens, want: Scored, kernel: Kernel
) -> None:
    assert_parity(scored(own, packed(own, kernel), batch, tokens), want)


def test_checkpointing_runs_the_layers_with_the_same_attention_again(
    own: Policy, batch: Batch, tokens: Tokens, want: Scored
) -> None:
    """The backward pass begins when the attention function is switched off again. Layers that were
    run with the model's own then gave gradients of another model, of the right shape."""
    assert_parity(scored(own, packed(own), batch, tokens, checkpointing=True), want)
    assert own.text_model.config._attn_implementation == "sdpa"


def _by_transformers(policy: Policy, reentrant: bool) -> None:
    switch_checkpointing(policy.model, True, reentrant=reentrant)
    policy.model.train()


def _by_torch(policy: Policy) -> None:
    """As FSDP's own checkpointing wraps them."""
    layers = policy.text_model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "switch",
    [partial(_by_transformers, reentrant=False), partial(_by_transformers, reentrant=True),
     _by_torch],
    ids=["transformers", "reentrant", "torch"],
)  # fmt: skip
def test_checkpointing_of_the_users_own(
    own: Policy, batch: Batch, tokens: Tokens, want: Scored, switch: Callable[[Policy], None]
) -> None:
    policy = replace(own, model=copy.deepcopy(own.model))
    switch(policy)
    found = packed(policy)(batch, tokens.ids, tokens.mask, temperature=TEMPERATURE)
    torch.autograd.backward((found.logprobs * tokens.weights).sum())
    named = policy.model.named_parameters()
    gradients = {
        n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in named if p.grad is not None
    }
    assert_parity(Scored(found.logprobs.detach(), found.entropy, gradients), want)


def test_adapters_with_checkpointing(mixed: Batch) -> None:
    policy = with_adapters("qwen2.5")
    rows = collate(mixed.rows[6:], policy.pad_token_id)
    tokens = ragged(policy, [3, 1, 6, 2])
    want = scored(policy, plain(policy), rows, tokens, checkpointing=True)
    assert len(want.gradients) == 2 * 7 * policy.model.config.text_config.num_hidden_layers
    fast = FastStep(policy)
    assert_parity(scored(policy, fast.scores, rows, tokens, checkpointing=True), want)
    assert_parity(scored(policy, fast.scores, rows, tokens), want)


ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "ends as wholes": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "towers too": {"target_modules": ["q_proj", "qkv", "fc1"]},
    "dora": {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
    "one of rank 1": {"target_modules": ["v_proj"], "r": 1, "use_rslora": True},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 3]},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.3},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True], ids=["injected", "wrapped"])
@pytest.mark.parametrize("given", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_of_the_users_own(
    own: Policy, batch: Batch, tokens: Tokens, given: dict[str, Any], wrapped: bool
) -> None:
    """As PEFT's settings make them. A wrapped model's towers must not be taken for frozen ones."""
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    add: Any = get_peft_model if wrapped else lambda model, to: inject_adapter_in_model(to, model)
    adapted = add(copy.deepcopy(own.model), LoraConfig(**{"r": 2, **given})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "embedding_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    policy = replace(own, model=adapted)
    want = scored(policy, plain(policy), batch, tokens)
    assert want.gradients
    fast = FastStep(policy)
    fast.rollout(batch, group_size=1, max_new_tokens=1)
    assert_parity(scored(policy, fast.scores, batch, tokens), want)
    assert_parity(scored(policy, fast.scores, batch, tokens, checkpointing=True), want)


@pytest.mark.slow
def test_bfloat16_weights(mixed: Batch) -> None:
    from omni_grpo_core import tiny
    from omni_grpo_core.core.policy import load_policy

    policy = load_policy(tiny.checkpoint_dir(), dtype="bfloat16")
    tokens = ragged(policy, LENGTHS)
    rows = collate(mixed.rows[:3], policy.pad_token_id)
    with torch.no_grad():
        want, found = (
            side(policy)(rows, tokens.ids, tokens.mask, temperature=TEMPERATURE).logprobs
            for side in (plain, packed)
        )
    # logits of 30 are 0.125 apart in bfloat16; a wrong mask moves logprobs by 1 and more
    assert float((found - want).abs().max()) < 0.5
    assert float((found - want).abs().mean()) < 0.05


@pytest.mark.slow
def test_autocast_scores_as_the_plain_step_under_autocast(policy: Policy, mixed: Batch) -> None:
    """Rotary embeddings leave queries and keys in float32 under autocast, values in bfloat16."""
    tokens = ragged(policy, LENGTHS)
    rows = collate(mixed.rows[:3], policy.pad_token_id)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, found = (
            side(policy)(rows, tokens.ids, tokens.mask, temperature=TEMPERATURE).logprobs
            for side in (plain, packed)
        )
    assert found.dtype == torch.float32
    assert float((found - want).abs().max()) < 0.5
    assert float((found - want).abs().mean()) < 0.05


def _visual(policy: Policy) -> Any:
    return getattr(policy.model, "visual", None) or policy.model.model.visual


def test_towers_run_once_for_sampling_and_update_while_they_are_frozen(
    policy: Policy, mixed: Batch
) -> None:
    rows = collate(mixed.rows[:2], policy.pad_token_id)
    tokens = ragged(policy, LENGTHS[:4])
    calls: list[str] = []
    hook = _visual(policy).register_forward_hook(lambda *_: calls.append("visual"))
    try:
        for frozen, passes in ((True, 1), (False, 2)):
            freeze(policy.model, ("video", "audio") if frozen else ())
            calls.clear()
            fast = FastStep(policy)
            fast.rollout(rows, group_size=2, max_new_tokens=2, temperature=TEMPERATURE)
            found = scored(policy, fast.scores, rows, tokens)
            assert len(calls) == passes * (len(rows.rows) if frozen else 1)
            assert_parity(found, scored(policy, plain(policy), rows, tokens))
    finally:
        hook.remove()


def test_a_copy_has_towers_run_only_where_the_policys_learn(policy: Policy, mixed: Batch) -> None:
    """The reference of a run without adapters."""
    rows = collate(mixed.rows[:1], policy.pad_token_id)
    tokens = ragged(policy, LENGTHS[:2])
    copied = replace(policy, model=copy.deepcopy(policy.model).requires_grad_(False))
    calls: list[str] = []
    _visual(copied).register_forward_hook(lambda *_: calls.append("visual"))
    for frozen, passes in ((True, 0), (False, 1)):
        freeze(policy.model, ("video", "audio") if frozen else ())
        fast = FastStep(policy)
        fast.rollout(rows, group_size=2, max_new_tokens=1)
        with torch.no_grad():
            found = fast.of_copy(copied).scores(
                rows, tokens.ids, tokens.mask, temperature=TEMPERATURE
            )
        assert len(calls) == passes
        want = scored(policy, plain(policy), rows, tokens)
        assert float((found.logprobs - want.logprobs).abs().max()) <= LOGPROB


def test_what_is_known_of_rows_goes_with_them(policy: Policy, mixed: Batch) -> None:
    """A reference and a step beside vLLM never sample. Their clips' features were kept for good."""
    fast = FastStep(policy)
    tokens = ragged(policy, [2])
    batch = collate([replace(mixed.rows[7])], policy.pad_token_id)
    with torch.no_grad():
        fast.scores(batch, tokens.ids, tokens.mask, temperature=TEMPERATURE)
    row = weakref.ref(batch.rows[0])
    assert len(fast._prompts._rows) == 1
    del batch
    gc.collect()
    assert row() is None
    assert not fast._prompts._rows


def test_logits_of_all_positions_never_exist(
    policy: Policy, mixed: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = collate(mixed.rows[6:], policy.pad_token_id)
    tokens = ragged(policy, [5, 8, 1, 6])
    want = scored(policy, plain(policy), rows, tokens)
    monkeypatch.setattr(head, "CHUNK_LOGITS", 3 * len(policy.suppressed))
    seen: list[int] = []
    hook = policy.model.lm_head.register_forward_hook(
        lambda _module, _args, logits: seen.append(logits.numel() // logits.shape[-1])
    )
    try:
        assert_parity(scored(policy, packed(policy), rows, tokens), want)
    finally:
        hook.remove()
    # once forward, once again backward
    assert sorted(seen) == sorted([3] * 6 + [2] + [3] * 6 + [2])


@pytest.mark.parametrize("width", [3, 0])
def test_completions_without_any_token(policy: Policy, mixed: Batch, width: int) -> None:
    """As of an engine that stopped at once; the loss of the plain step is 0 and has a gradient."""
    rows = collate(mixed.rows[6:], policy.pad_token_id)
    shape = 4, width
    tokens = Tokens(torch.zeros(shape).long(), torch.zeros(shape).bool(), torch.ones(shape))
    want, found = (scored(policy, side(policy), rows, tokens) for side in (plain, packed))
    assert found.logprobs.tolist() == want.logprobs.tolist()
    assert found.gradients.keys() == want.gradients.keys()
    assert not any(bool(gradient.any()) for gradient in found.gradients.values())


def test_shapes_that_differ_are_refused_as_in_the_plain_step(policy: Policy, mixed: Batch) -> None:
    rows = collate(mixed.rows[7:], policy.pad_token_id)
    ids, mask = torch.ones(2, 3).long(), torch.ones(2, 3).bool()
    for given, message in (
        ((ids, mask[:, :2]), r"completion ids: found .*\(2, 3\)"),
        ((ids, mask.long()), "mask: found torch.int64"),
    ):
        for side in (plain, packed):
            with pytest.raises(TrainError, match=message):
                side(policy)(rows, *given, temperature=1.0)


def test_a_mask_with_a_hole_is_refused(policy: Policy, mixed: Batch) -> None:
    rows = collate(mixed.rows[7:], policy.pad_token_id)
    tokens = ragged(policy, [3, 3])
    tokens.mask[0, 1] = False
    with pytest.raises(TrainError, match="left out before one that counts"):
        packed(policy)(rows, tokens.ids, tokens.mask, temperature=1.0)


def test_a_layer_that_is_run_with_another_attention_gives_nan(
    policy: Policy, mixed: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Causal over the whole row, it would be wrong in silence."""
    monkeypatch.setattr(scoring, "PACKED", "sdpa")
    rows = collate(mixed.rows[7:], policy.pad_token_id)
    tokens = ragged(policy, [3, 3])
    with torch.no_grad():
        found = packed(policy)(rows, tokens.ids, tokens.mask, temperature=1.0)
    assert bool(found.logprobs.isnan().all())


# ------------------------------------------------------------------- planted faults


def _see_each_other(patch: pytest.MonkeyPatch) -> None:
    """A group's completions as one causal stretch."""
    made = PackedRow.of

    def joined(prompts: Any, completions: Any, device: Any) -> PackedRow:
        row = made(prompts, completions, device)
        stretches = [*prompts, *row.across.queries]
        return replace(row, within=Spans.of(stretches, stretches, device, causal=True))

    patch.setattr(layout.PackedRow, "of", joined)


def _another_groups_prompt(patch: pytest.MonkeyPatch) -> None:
    """The completions of the first two groups look at each other's prompts."""
    made = PackedRow.of

    def swapped(prompts: Any, completions: Any, device: Any) -> PackedRow:
        row = made(prompts, completions, device)
        queries = [row.across.queries[0] + row.across.queries[1], *row.across.queries[2:]]
        keys = [prompts[0] + prompts[1], *prompts[2:]]
        return replace(row, across=Spans.of(queries, keys, device, causal=False))

    patch.setattr(layout.PackedRow, "of", swapped)


def _positions_off_by_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scoring, "first_positions", lambda *given: first_positions(*given) + 1)


def _positions_run_on(patch: pytest.MonkeyPatch) -> None:
    """Every completion continues the one before it instead of the prompt."""
    real = scoring.packed_positions

    def run_on(batch: Batch, where: Any, row: PackedRow) -> Tensor:
        found = real(batch, where, row)
        first = row.prompt_tokens
        found[:, 0, first:] = found[:, 0, first][:, None] + torch.arange(row.length - first)
        return found

    patch.setattr(scoring, "packed_positions", run_on)


def _prompt_ends_early(patch: pytest.MonkeyPatch) -> None:
    """A completion's first token is predicted one position before the prompt's last."""
    real = PackedRow.predicting

    def early(row: PackedRow) -> Tensor:
        found = real(row)
        return torch.where(found < row.prompt_tokens, found - 1, found)

    patch.setattr(layout.PackedRow, "predicting", early)


def _predicted_by_itself(patch: pytest.MonkeyPatch) -> None:
    """Every later token at its own position: the logits are not shifted."""
    real = PackedRow.predicting

    def late(row: PackedRow) -> Tensor:
        found = real(row)
        return torch.where(found < row.prompt_tokens, found, found + 1).clamp_max(row.length - 1)

    patch.setattr(layout.PackedRow, "predicting", late)


def _one_completion_early(patch: pytest.MonkeyPatch) -> None:
    """Repeated hidden states of the prompt's end: only the last of them gets a gradient."""

    def detached(policy: Policy, hidden: Tensor, at: Tensor, *rest: Any) -> Any:
        kept = torch.zeros(len(hidden), 1)
        kept[at] = 1.0
        kept[at[(at == at[0]).nonzero()[0, 0]]] = 0.0
        return chunked_logprobs(policy, hidden * kept + (hidden * (1 - kept)).detach(), at, *rest)

    patch.setattr(scoring, "chunked_logprobs", detached)


def _vision_one_token_late(patch: pytest.MonkeyPatch) -> None:
    real = scoring._deepstack

    def late(*given: Any) -> dict[str, Any]:
        found = real(*given)
        if found:
            found["visual_pos_masks"] = found["visual_pos_masks"].roll(1, 1)
        return found

    patch.setattr(scoring, "_deepstack", late)


PLANTED = {
    "completions see each other": _see_each_other,
    "groups see each other's prompts": _another_groups_prompt,
    "positions off by one": _positions_off_by_one,
    "positions run on from one completion to the next": _positions_run_on,
    "the prompt's last position is the one before it": _prompt_ends_early,
    "tokens predicted at their own position": _predicted_by_itself,
    "no gradient through the prompt's last position": _one_completion_early,
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_seen(
    fault: str, policy: Policy, mixed: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parity tests above would fail for each of these."""
    rows = collate(mixed.rows[6:], policy.pad_token_id)
    tokens = ragged(policy, LENGTHS)
    want = scored(policy, plain(policy), rows, tokens)
    PLANTED[fault](monkeypatch)
    _assert_seen(scored(policy, packed(policy), rows, tokens), want)


def test_deepstack_features_at_the_wrong_place_are_seen(
    qwen3_policy: Policy, qwen3_mixed: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = collate(qwen3_mixed.rows[2:4], qwen3_policy.pad_token_id)
    tokens = ragged(qwen3_policy, LENGTHS[:4])
    want = scored(qwen3_policy, plain(qwen3_policy), rows, tokens)
    _vision_one_token_late(monkeypatch)
    _assert_seen(scored(qwen3_policy, packed(qwen3_policy), rows, tokens), want)


def _assert_seen(found: Scored, want: Scored) -> None:
    logprob, gradient = apart(found, want)
    assert logprob > 10 * LOGPROB or gradient > 10 * GRADIENT


def test_one_step_is_the_plain_one(policy: Policy, mixed: Batch) -> None:
    """Through ``optimize``: loss, metrics and gradient norm of a whole step."""
    from omni_grpo_core.core.rollout import rollout
    from omni_grpo_core.losses import LossConfig
    from omni_grpo_core.training.micro_batches import make_micro_batches
    from omni_grpo_core.training.step import Scorer, SingleProcess, StepPlan, optimize

    rows = collate([mixed.rows[at] for at in (5, 6, 7, 7)], policy.pad_token_id)
    rolled = rollout(policy, rows, group_size=2, max_new_tokens=8, temperature=3.0, seed=3)
    advantages = torch.tensor([1.0, -0.5, 0.25, -2.0, 1.5, 0.75, -1.0, 0.5], dtype=torch.float64)
    window = make_micro_batches(
        policy, rows, rolled, advantages, torch.tensor([True] * 7 + [False]), 4
    )
    plan = StepPlan(LossConfig(), None, 1, max_grad_norm=1e9, gradient_checkpointing=False)
    updates = []
    for scores in (None, FastStep(policy).scores):
        still: Any = torch.optim.SGD(policy.model.parameters(), lr=0.0)
        scorer = Scorer(policy, 3.0, scores)
        (update,) = optimize(plan, SingleProcess(), scorer, policy.model, still, window)
        updates.append(update)
    want, found = updates
    assert found.loss == pytest.approx(want.loss, abs=1e-5)
    assert found.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
    assert found.metrics.peaks["drift_max"] < LOGPROB
    assert found.metrics.means.keys() == want.metrics.means.keys()


def test_what_is_scored_is_what_was_given(policy: Policy, mixed: Batch) -> None:
    rows = collate(mixed.rows[7:], policy.pad_token_id)
    tokens = ragged(policy, [2, 4])
    with torch.no_grad():
        found = packed_scores(policy, rows, tokens.ids, tokens.mask, temperature=TEMPERATURE)
    assert found.logprobs.shape == found.entropy.shape == tokens.ids.shape
    assert found.logprobs[0, 2:].tolist() == found.entropy[0, 2:].tolist() == [0.0, 0.0]
