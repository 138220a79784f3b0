from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.policy import Policy, generating
from omni_grpo_core.core.rollout import choose, rollout
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.pipeline.checks import scoring_drift
from omni_grpo_core.types import Batch, Completion, Rollout


def sample(policy: Policy, batch: Batch, group_size: int = 3, **options: float) -> Rollout:
    return rollout(
        policy,
        batch,
        group_size=group_size,
        max_new_tokens=int(options.get("max_new_tokens", 12)),
        temperature=options.get("temperature", 1.0),
        seed=int(options.get("seed", 7)),
    )


def test_a_draw_finds_its_token_in_any_block_of_the_vocabulary() -> None:
    """Blocks of 512 are added up first. 600 tokens of equal probability, then two likely ones with
    impossible tokens behind each: a draw just below 1 takes the last that is possible."""
    even = torch.full((4, 600), 1 / 600).log()
    draws = (torch.tensor([0, 511, 512, 599], dtype=torch.float64) + 0.5) / 600
    assert choose(even, draws).tolist() == [0, 511, 512, 599]
    two = torch.full((4, 600), -torch.inf)
    two[:, [3, 513]] = torch.tensor(0.5).log()
    draws = torch.tensor([0.0, 0.499, 0.501, 1 - 2**-53], dtype=torch.float64)
    assert choose(two, draws).tolist() == [3, 3, 513, 513]


@pytest.mark.parametrize("draws", [None, torch.tensor([0.3, 0.7])], ids=["greedy", "sampled"])
def test_without_a_distribution_a_token_that_can_be_scored_is_taken(draws: Tensor | None) -> None:
    """Of weights that are NaN, the id behind the last block was taken: a failed assertion on a
    device, from which no process recovers, and a traceback in place of the guard's finding."""
    some = torch.tensor([[0.0, -torch.inf, -torch.inf], [torch.nan] * 3])
    assert choose(some, draws, 2).tolist() == [0, 2]


def test_groups_are_1122_and_indexed(policy: Policy, mixed: Batch) -> None:
    rolled = sample(policy, mixed, group_size=2, max_new_tokens=2)
    rows = [row.sample_id for row in mixed.rows]
    assert [c.group_id for c in rolled.completions] == [i for row in rows for i in (row, row)]
    assert [c.index for c in rolled.completions] == [0, 1] * len(rows)


def test_g_expanded_copies_equal_g_separate_ones(policy: Policy, mixed: Batch) -> None:
    """``num_return_sequences`` repeats pixel rows patch by patch and silently scrambles the video;
    here the cache is copied after one prefill. Greedy, so that copies are equal."""
    expanded = sample(policy, mixed, group_size=3, temperature=0.0)
    for row in mixed.rows:
        alone = sample(policy, collate([row] * 3, 0), group_size=1, temperature=0.0).completions
        copies = [c for c in expanded.completions if c.group_id == row.sample_id]
        assert [c.token_ids for c in copies] == [c.token_ids for c in alone]
        for ours, theirs in zip(copies, alone, strict=True):
            # float32 sums in another order: measured 1e-6
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_a_completion_depends_neither_on_batch_order_nor_on_other_rows(
    policy: Policy, mixed: Batch
) -> None:
    together = {(c.group_id, c.index): c.token_ids for c in sample(policy, mixed).completions}
    backwards = sample(policy, collate(mixed.rows[::-1], 0)).completions
    assert {(c.group_id, c.index): c.token_ids for c in backwards} == together
    alone = sample(policy, collate(mixed.rows[2:3], 0)).completions
    assert all(together[c.group_id, c.index] == c.token_ids for c in alone)


def test_seeds_differ_and_repeat(policy: Policy, mixed: Batch) -> None:
    batch = collate(mixed.rows[:2], 0)
    first = sample(policy, batch, temperature=2.0).completions
    assert first == sample(policy, batch, temperature=2.0).completions
    assert first != sample(policy, batch, temperature=2.0, seed=8).completions
    assert len({c.token_ids for c in first}) > 2, "each member of a group has its own draws"


def test_logprobs_with_cache_equal_scoring_without(policy: Policy, mixed: Batch) -> None:
    for temperature in (0.7, 1.0, 1.3):
        same, worst = scoring_drift(policy, mixed, sample(policy, mixed, temperature=temperature))
        assert same, worst


def test_train_mode_with_checkpointing_gives_what_eval_gives(policy: Policy, mixed: Batch) -> None:
    """The incident: the trainer generated in train mode with gradient checkpointing on, where
    transformers since 4.53 silently drops the cache: garbage from the second token on."""
    wanted = sample(policy, mixed, temperature=0.0)
    policy.model.train()
    policy.model.gradient_checkpointing_enable()
    try:
        found = sample(policy, mixed, temperature=0.0)
        assert policy.model.training
        assert policy.model.is_gradient_checkpointing
    finally:
        policy.model.gradient_checkpointing_disable()
        policy.model.eval()
    assert found == wanted


def test_modes_are_restored_even_on_an_error(policy: Policy) -> None:
    model = policy.model
    model.train()
    # a frozen tower: each module's own mode is restored, not one for all
    tower = next(module for name, module in model.named_modules() if name.endswith("visual"))
    tower.eval()
    model.gradient_checkpointing_enable()

    def stopped() -> None:
        with generating(model):
            assert not any(module.training for module in model.modules())
            assert not model.is_gradient_checkpointing
            assert not torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
            raise InterruptedError

    try:
        with pytest.raises(InterruptedError):
            stopped()
        assert model.training
        assert not tower.training
        assert model.is_gradient_checkpointing
        assert torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def _always(policy: Policy, token: int) -> Policy:
    """The same policy with a head that always predicts one token."""
    import copy
    from dataclasses import replace

    model = copy.deepcopy(policy.model)
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.bias[token] = 100.0
    model.lm_head = head
    return replace(policy, model=model)


def test_an_immediate_eos_is_one_token_and_stop(policy: Policy, mixed: Batch) -> None:
    eos = policy.eos_token_ids[0]
    first: Completion = sample(_always(policy, eos), mixed).completions[0]
    assert (first.token_ids, first.text, first.finish_reason) == ((eos,), "", "stop")


def test_at_the_length_limit_every_token_is_kept(policy: Policy, mixed: Batch) -> None:
    token = policy.processor.tokenizer.encode("A")[0]
    first = sample(_always(policy, token), mixed, max_new_tokens=5).completions[0]
    assert (first.token_ids, first.finish_reason) == ((token,) * 5, "length")
    assert first.text == policy.decode([token] * 5)


def test_media_and_other_special_tokens_are_never_sampled(policy: Policy, mixed: Batch) -> None:
    """After ~90 GRPO steps a policy sampled <|VIDEO|>, and the scoring forward crashed."""
    video = policy.model.config.video_token_id
    rolled = sample(_always(policy, video), mixed, temperature=5.0)
    assert all(video not in completion.token_ids for completion in rolled.completions)


@pytest.mark.parametrize("wrong", [{"group_size": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}])
def test_settings_that_cannot_work(policy: Policy, mixed: Batch, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="rollout"):
        sample(policy, mixed, **wrong)
