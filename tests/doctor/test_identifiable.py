"""What a loss's weights cannot tell apart is not said: rounding is no advantage, and a healthy way
to have made the same numbers is enough to be silent.

Completions of three tokens and rewards of 2 and 4 (a word's length): advantages -1 and 1, unscaled,
each token's weight minus that by the tokens of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from joined_calls import rewarded, rows, sampled, scored, step
from small_recordings import layer, stepped
from torch import Tensor

from omni_grpo_core.doctor.checks.logits import look_at_adapter
from omni_grpo_core.doctor.checks.loss import LOOKS
from omni_grpo_core.doctor.evidence import Case, Evidence, Look
from omni_grpo_core.doctor.loss_rows import trained_rows
from omni_grpo_core.doctor.policy_term import policy_term
from omni_grpo_core.trace.calls import GenerateCall, LossGradient

WORDS = {2.0: "ab", 4.0: "abcd", 3.0: "abc", 8.0: "abcdefgh"}
LENGTH = 3
GAPS = torch.tensor([0.01, -0.03, 0.05])
"""By how much the reference's logprob of each token is above the policy's."""


def recorded(
    rewards: Sequence[float],
    weights: Tensor,
    gaps: Tensor | None = None,
    prompts: Sequence[int] | None = None,
    after: int = 0,
    at: int = 1,
    before: Case | None = None,
    rate: float = 1e-4,
    tail: tuple[int, int] = (0, 0),
) -> Case:
    """A step of one completion a reward, two a prompt. ``weights``: (R, 3) of their tokens;
    ``gaps``: (3,) of a reference, where one scored them; ``at``: number of the step; ``rate``: the
    share of its weights by which a layer moves; ``after``: weight on a token after the end, which
    ``tail`` follows."""
    count = len(rewards)
    asked = [n // 2 for n in range(count)] if prompts is None else list(prompts)
    answers = [(10 + n, 5, 9) for n in range(count)]
    call = sampled(
        rows([(1, 2, 3 + prompt) for prompt in asked]),
        [(*answer, *tail) for answer in answers] if after else answers,
        [WORDS[reward] for reward in rewards],
    )
    paid = rewarded([f"ask {prompt}" for prompt in asked], [WORDS[reward] for reward in rewards])
    whole = call.sequences
    assert whole is not None
    mask = torch.ones_like(whole)
    logprobs = torch.full((count, whole.shape[1] - 1), -1.0)
    forward = replace(scored({"input_ids": whole, "attention_mask": mask}), logprobs=logprobs)
    calls: list[Any] = [call, paid]
    if gaps is not None:
        other = logprobs.clone()
        other[:, 2:5] += gaps
        reference = scored({"input_ids": whole, "attention_mask": mask}, grad=False)
        calls.append(replace(reference, logprobs=other, own=False))
    calls += [forward, backward(whole, weights, after, number=int(gaps is not None))]
    moved = layer(change=rate, between=0.0)
    return step(*calls, stepped(at, layers=(moved,)), before=before)


def backward(ids: Tensor, weights: Tensor, after: int, number: int) -> LossGradient:
    given = torch.zeros(ids.shape)
    given[:, 2:5] = weights
    if after:
        given[:, 5] = after
    tokens = torch.where(given != 0, ids.roll(-1, 1), -1)
    nothing = torch.where(given != 0, 0.0, torch.nan)
    return LossGradient(number, "logits", tokens, given, nothing + 1, nothing, 0 * given)


def per_token(advantages: Sequence[float]) -> Tensor:
    """(R, 3): weights of a mean over the step's tokens."""
    return -torch.tensor(advantages)[:, None].expand(-1, LENGTH) / (len(advantages) * LENGTH)


def facts(case: Case, looks: Sequence[Look] = LOOKS) -> dict[str, Evidence]:
    return {evidence.fact: evidence for look in looks for evidence in look(case)}


PAID, WANTED = (4.0, 2.0, 4.0, 2.0), (1.0, -1.0, 1.0, -1.0)


def with_kl(beta: float, advantages: Sequence[float] = WANTED) -> Tensor:
    return per_token(advantages) + beta * (1 - GAPS.exp()) / (len(advantages) * LENGTH)


# --------------------------------------------------------------------------- a slight KL


def test_a_kl_of_a_small_beta_is_in_the_loss() -> None:
    """Was proved to be left out: weights along a completion differed by less than 1e-4."""
    assert facts(recorded(PAID, with_kl(1e-3), GAPS)) == {}
    assert "kl-left-out" in facts(recorded(PAID, with_kl(0.0), GAPS))


def test_a_kl_is_missed_in_a_later_update_too() -> None:
    """Was told of a first update only: ratios vary along a completion as much as a KL would."""
    first = recorded(PAID, with_kl(0.0), GAPS, at=0)
    moved = torch.tensor([0.2, -0.1, 0.05])

    def later(beta: float) -> dict[str, Evidence]:
        kl = beta * (1 - GAPS.exp()) / (len(PAID) * LENGTH)
        case = recorded(PAID, with_kl(0.0) * moved.exp() + kl, GAPS)
        _, _, old, forward, seen, done = (cast(Any, record.value) for record in case.trace.stages)
        given = forward.logprobs.clone()
        given[:, 2:5] -= moved
        calls = (replace(old, logprobs=given, own=True), forward, seen, done)
        return facts(step(*calls, before=first))

    assert "kl-left-out" in later(0.0)
    assert "kl-left-out" not in later(1e-3)


def test_ratios_to_the_reference_are_those_of_old_logprobs_that_are_its() -> None:
    """A ``disable_adapter`` block that was closed one line too late: that weights vary was said,
    and nothing of what they vary with."""
    given = per_token(WANTED) * (-GAPS).exp()
    found = facts(recorded(PAID, given, GAPS), (*LOOKS, look_at_adapter))
    assert "old-of-reference" in found
    assert not {"weights-vary", "kl-left-out", "tokens-left-out"} & {*found}
    found = facts(recorded(PAID, with_kl(4e-2), GAPS), (*LOOKS, look_at_adapter))
    assert "old-of-reference" not in found


def test_a_ratio_to_the_policy_that_is_the_reference_is_no_kl() -> None:
    """In a first rollout both have the same log-probabilities: where one row counts, a KL gave the
    weights of a ratio, and "the old log-probabilities are the current ones" was said of a sound
    run."""
    gaps = torch.tensor([0.0, 0.0043, 0.071])
    first = recorded(PAID, with_kl(0.0), gaps, at=0)
    one_row = torch.tensor([1.0, 0.0, 0.0, 0.0])[:, None]
    case = recorded(PAID, per_token(WANTED) * (-gaps).exp() * one_row, gaps)
    _, _, reference, forward, seen, done = (cast(Any, r.value) for r in case.trace.stages)
    calls = (replace(reference, own=True), reference, forward, replace(seen, forward=2), done)
    later = step(*calls, before=first)
    term = policy_term(later)
    assert term is not None
    assert (term.ratio, term.kl is None) == ("none", False)
    assert {"kl-subtracted", "old-recomputed"}.isdisjoint(facts(later))


def test_a_kl_that_was_taken_from_rewards_is_not_left_out() -> None:
    """Of whole completions, before they were compared: every token's weight is still the same."""
    taken = per_token([0.9, -0.9, 1.3, -1.3])
    assert "kl-left-out" not in facts(recorded(PAID, taken, GAPS))


def test_one_token_a_row_does_not_tell_whether_a_kl_is_in_the_loss() -> None:
    only_last = with_kl(1e-3) * torch.tensor([0.0, 0.0, 1.0])
    assert "kl-left-out" not in facts(recorded(PAID, only_last, GAPS))


def test_large_advantages_hide_a_kl() -> None:
    large = with_kl(0.01, [1e4, -1e4, 1e4, -1e4])
    assert "kl-left-out" not in facts(recorded(PAID, large, GAPS))


def test_a_kl_against_the_policy_itself_is_seen_in_the_loss() -> None:
    """A reference that is the policy and old log-probabilities give the same gradient; the KL is in
    the loss's graph, and at its first step any reference is the policy."""

    def after(gap: float, rate: float = 1e-4) -> Case:
        before = recorded(PAID, with_kl(0.0), rate=rate, at=0)
        case = recorded(PAID, with_kl(0.0), before=before)
        *calls, last = case.values
        return step(*calls, replace(last, kl_gaps=(gap,)), before=before)  # type: ignore[type-var]

    assert "reference-is-policy" in facts(after(0.0))
    assert "reference-is-policy" not in facts(after(1e-5))
    assert "reference-is-policy" not in facts(after(0.0, rate=0.0))


# --------------------------------------------------------------------------- some tokens alone


def test_a_reward_of_a_section_acts_on_its_tokens_alone() -> None:
    """Where the completions' own advantages are 0: the others were proved to be left out."""
    whole = torch.tensor([1.0, 1.0, 1.0])

    def counted(*kept: float) -> dict[str, Evidence]:
        others = torch.tensor(kept)
        weights = per_token(WANTED) * torch.stack([whole, whole, others, others])
        return facts(recorded(PAID, weights))

    assert "tokens-left-out" not in counted(0, 1, 0)
    assert "tokens-left-out" in counted(0, 1, 1)
    assert "tokens-left-out" in counted(1, 1, 0)


def test_one_token_of_each_completion_is_no_recipe() -> None:
    """A mask of the first column: the rest of nine tokens was "a recipe that differs"."""

    def counted(tokens: int) -> Evidence:
        answers = [(10 + n, *range(20, 27), 9) for n in range(4)]
        words = [WORDS[reward] for reward in PAID]
        call = sampled(rows([(1, 2, 3 + n // 2) for n in range(4)]), answers, words)
        assert call.sequences is not None
        ids, given = call.sequences, torch.zeros(call.sequences.shape)
        given[:, 2 : 2 + tokens] = per_token(WANTED)[:, :1]
        trained = torch.where(given != 0, ids.roll(-1, 1), -1)
        nothing = torch.where(given != 0, 0.0, torch.nan)
        seen = LossGradient(0, "logits", trained, given, nothing + 1, nothing, 0 * given)
        forward = scored({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        paid = rewarded([f"ask {n // 2}" for n in range(4)], words)
        return facts(step(call, paid, forward, seen, stepped(1)))["tokens-left-out"]

    assert [counted(tokens).severity for tokens in (1, 2)] == ["breaks", "differs"]
    assert "although one of each completion has one" in counted(1).sentence


# --------------------------------------------------------------------------- rounding


def test_rounding_of_a_kl_is_no_advantage() -> None:
    """Equal rewards; a reference that is the policy leaves weights of 1e-12 of either sign: they
    were read as advantages against the rewards."""
    noise = torch.tensor([[5e-12] * 3, [-4e-12] * 3, [3e-12] * 3, [-5e-12] * 3])
    case = recorded((2.0,) * 4, noise, torch.zeros(3), at=0)
    assert facts(case) == {}
    assert not any(bool((row.tokens >= 0).any()) for row in trained_rows(case))


def test_a_token_on_which_both_policies_agree_is_not_left_out() -> None:
    """In a group without an advantage only the KL acts: its weight is 0 where the logprobs are
    equal."""
    gaps = torch.tensor([0.0, -0.03, 0.05])
    wanted = per_token([1.0, -1.0, 0.0, 0.0]) + 0.04 * (1 - gaps.exp()) / 12
    assert facts(recorded((4.0, 2.0, 4.0, 4.0), wanted, gaps)) == {}


def test_a_gradient_that_is_rounding_moves_nothing() -> None:
    from omni_grpo_core.doctor.checks import gradient

    sound, audio = layer(), layer("audio conv1", "audio", norm=5e-13, moved=False)
    found = facts(step(stepped(layers=(sound, audio))), gradient.LOOKS)
    assert "not-moved" not in found
    # where only a KL acts, all gradients are small: Adam moves a weight by a 1e-4th of its rate
    small = (layer(norm=1e-6), replace(audio, norm=1e-11, rates=(2e-6,)))
    assert "not-moved" not in facts(step(stepped(layers=small)), gradient.LOOKS)
    driven = replace(audio, norm=0.01)
    assert "not-moved" in facts(step(stepped(layers=(sound, driven))), gradient.LOOKS)


# --------------------------------------------------------------------------- the reference


def test_equal_logprobs_are_a_shared_model_only_where_the_policy_has_learnt() -> None:
    """With equal rewards only weight decay moves the weights, by 1e-8 of them: a deep copy still
    gives equal logprobs."""
    nothing = torch.zeros(4, 3)

    def second(first: Case, **more: Any) -> dict[str, Evidence]:
        weights = per_token(WANTED)
        return facts(recorded(PAID, weights, torch.zeros(3), before=first, **more))

    learnt = recorded(PAID, per_token(WANTED), torch.zeros(3), at=0)
    assert "reference-is-policy" in second(learnt)
    idle = recorded((2.0,) * 4, nothing, torch.zeros(3), at=0)
    assert "reference-is-policy" not in second(idle)
    decayed = recorded(PAID, per_token(WANTED), torch.zeros(3), at=0, rate=1e-8)
    assert "reference-is-policy" not in second(decayed)


# --------------------------------------------------------------------------- groups


def test_a_prompt_drawn_twice_has_two_groups() -> None:
    """Means 3 and 6 of two rollouts of one prompt: other groups than the prompt's, proved."""
    case = recorded((4.0, 2.0, 8.0, 4.0), per_token([1.0, -1.0, 2.0, -2.0]), prompts=[0] * 4)
    assert "advantage-differs" not in facts(case)


def test_the_deviation_of_a_single_group_is_a_factor() -> None:
    scaled = [0.7071, -0.7071, 0.0, 0.0]
    for wanted in ([1.0, -1.0, 0.0, 0.0], scaled):
        assert facts(recorded((4.0, 2.0, 4.0, 4.0), per_token(wanted))) == {}
    # of two groups whose deviations differ, it is none
    two = recorded((4.0, 2.0, 8.0, 2.0), per_token([1.0, -1.0, 3.0, -3.0]))
    assert facts(two)["scale-differs"].values == {"scale": "none", "alone": True}


def test_the_batch_s_deviation_of_a_single_group_only_fits() -> None:
    """1 / 3 over all tokens: a usual divisor makes it the batch's deviation, an unusual one the
    group's. Nothing was said."""
    case = recorded((4.0, 2.0, 8.0, 8.0), per_token([0.33333, -0.33333, 0.0, 0.0]))
    assert facts(case)["scale-differs"].values == {"scale": "batch", "alone": False}


def test_advantages_may_be_divided_by_their_own_deviation() -> None:
    """Whitened once more in the batch. Of about 1 / 2 it was read as a sum of two micro-batches
    that nobody divided by 2."""
    raw = torch.tensor([1.0, -1.0, 3.0, -3.0])
    whitened = raw / raw.std()
    found = facts(recorded((4.0, 2.0, 8.0, 2.0), per_token(whitened.tolist())))
    assert found["scale-differs"].values == {"scale": "batch", "alone": True}


def test_a_factor_fitted_to_two_numbers_proves_nothing() -> None:
    case = recorded((4.0, 8.0), per_token([1.0, 2.0]), prompts=[0, 1])
    assert "advantage-differs" not in facts(case)


def test_groups_do_not_follow_from_pictures_that_were_changed(monkeypatch: Any) -> None:
    """Noise on each copy's pixels made every completion a group of its own, and the mean of its
    prompt that of the whole batch."""
    from omni_grpo_core.doctor import continuity

    case = recorded(PAID, per_token([1.0, -1.0, 1.0, -1.0]), prompts=range(4))
    assert "advantage-differs" in facts(case)
    said = Evidence("batch", "edge-media-changed", "other values", values={"call": "generate"})
    monkeypatch.setattr(continuity, "look_at_edges", lambda case: (said,))
    assert "advantage-differs" not in facts(case)


# --------------------------------------------------------------------------- rewards


def test_noise_on_rewards_is_a_recipe() -> None:
    """Equal rewards with noise added after the functions returned; the sentence is true, and the
    run learns what it is told to."""
    noise = recorded((2.0,) * 4, per_token([0.5, -0.5, 0.2, -0.2]))
    assert facts(noise)["weights-against-rewards"].severity == "differs"
    other = recorded((2.0, 2.0, 2.0, 8.0), per_token([1.0, -1.0, 0.9, -0.9]))
    assert facts(other)["weights-against-rewards"].severity == "breaks"


def test_what_earns_less_and_is_raised_more_is_no_advantage_of_its_rewards() -> None:
    """The advantages' absolute value raises all completions, the worst one most: nothing was said
    of it, as none was made less likely."""
    absolute = recorded((2.0, 4.0, 4.0, 4.0), per_token([1.5, 0.5, 0.5, 0.5]), prompts=[0] * 4)
    found = facts(absolute)["weights-against-rewards"]
    assert (found.stage, found.severity) == ("advantage", "breaks")


def test_rows_that_are_scored_and_not_in_the_loss_are_named() -> None:
    """``loss[: len(loss) // 2]``: how the rewards became the weights could not be told."""
    paid = (4.0, 2.0, 4.0, 2.0, 8.0, 2.0, 4.0, 2.0)
    half = per_token([1.0, -1.0, 1.0, -1.0, 3.0, -3.0, 0.0, 0.0])
    found = facts(recorded(paid, half))["rows-left-out"]
    assert (found.stage, found.values["rows"]) == ("loss", [6, 7])
    # a recipe: only what is better than its group counts
    better = per_token([1.0, 0.0, 1.0, 0.0, 3.0, 0.0, 1.0, 0.0])
    assert "rows-left-out" not in facts(recorded(paid, better))


def test_weights_that_vary_along_a_completion_are_shown() -> None:
    """Old log-probabilities padded on the other side: ratios from 0 to 1e5 stood as a remark below
    HEALTHY. A critic's values per token vary as well, so it is no more than a difference."""
    drawn = torch.tensor([[-3.0, 1.0, 0.1], [0.2, -2.0, 4.0]] * 2)
    found = facts(recorded(PAID, drawn))["weights-vary"]
    assert (found.stage, found.severity) == ("loss", "differs")


def test_a_temperature_is_that_of_weights_that_are_explained() -> None:
    """A softmax of a softmax has the slope of one at temperature 1: "scored at 1" was proved."""

    def sampled_warm(weights: Tensor) -> dict[str, Evidence]:
        call, *rest = recorded(PAID, weights).values
        assert isinstance(call, GenerateCall)
        warm = {**call.config, "do_sample": True, "temperature": 1.7}
        return facts(step(replace(call, config=warm), *rest))

    drawn = torch.tensor([[-3.0, 1.0, 0.1], [0.2, -2.0, 4.0]] * 2)
    assert "temperature-differs" not in sampled_warm(drawn)
    assert "temperature-differs" in sampled_warm(per_token(WANTED))


def test_no_weight_at_all_has_several_causes_where_a_reference_scored() -> None:
    none = torch.zeros(4, 3)
    assert facts(recorded(PAID, none))["no-signal"].values["alone"]
    # a KL reaches the model by itself: the ratio may be detached as well
    assert not facts(recorded(PAID, none, torch.zeros(3), at=0))["no-signal"].values["alone"]
    # advantages that are none leave no weight at all; a loss times 1e-9 was "proved" to have such
    slight = 1e-12 * per_token([1.0, -1.0, 1.0, -1.0])
    assert not facts(recorded(PAID, slight))["no-signal"].values["alone"]
    # an inverted mask
    assert set(facts(recorded(PAID, none, after=1))) == {"after-eos"}


def test_tokens_that_were_sampled_after_the_end_are_no_padding() -> None:
    """A loop's own sampling that goes on: "they are padding, not sampled" was said of them."""
    found = facts(recorded(PAID, per_token(WANTED), after=1, tail=(6, 7)))
    assert (found["end-ignored"].stage, "after-eos" in found) == ("completion", False)
    # end tokens as padding
    assert "end-ignored" not in facts(recorded(PAID, per_token(WANTED), after=1, tail=(9, 6)))


def test_weights_of_no_known_kind_are_shown() -> None:
    """Signs of advantages, a baseline on the wrong side, one completion a group: the doctor said
    "could not be told" in small print and called the run healthy."""
    rewards = (2.0, 4.0, 8.0, 2.0, 2.0, 4.0)
    groups = (0, 0, 0, 1, 1, 1)
    for advantages, said in (
        ((-1.0, -1.0, 1.0, -1.0, -1.0, 1.0), "advantages [-1, -1, 1, -1, -1, 1] in the loss"),
        ((-6.0, -4.0, -2.0, -5.0, -5.0, -3.0), "; all are made less likely"),
        ((-5.0, 0.0, 0.0, -1.0, 0.0, 0.0), "; 4 of 6 completions have none"),
    ):
        found = facts(recorded(rewards, per_token(advantages), prompts=groups))
        one = found["advantages-unknown"]
        assert one.severity == "differs"
        assert said in one.sentence


def test_weights_that_no_reward_moves_break_the_run() -> None:
    """Of rewards 2 and 4 in one group, both are raised by as much: nothing tells them apart."""
    rewards, groups = (2.0, 4.0, 2.0, 4.0), (0, 0, 1, 1)
    found = facts(recorded(rewards, per_token((1.0, 1.0, 1.0, 1.0)), prompts=groups))
    one = found["advantages-unknown"]
    assert one.severity == "breaks"
    assert one.sentence.endswith(
        "what earns more than its group's mean is raised like what earns less"
    )
