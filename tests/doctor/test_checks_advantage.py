"""Advantages that do not follow from their rewards, on numbers checked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_recordings import GROUPS, advantaged, case, found, generated, rewarded, samples

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor.checks import advantage as checks_advantage
from omni_grpo_core.doctor.checks import partial as checks_partial
from omni_grpo_core.doctor.checks.partial import section_tokens

LOOKS = (*checks_advantage.LOOKS, *checks_partial.LOOKS)


def facts(*values: Any) -> set[str]:
    return set(found(LOOKS, case(*values)))


def test_right_advantages_are_no_evidence() -> None:
    assert facts(rewarded(), advantaged()) == set()


@pytest.mark.parametrize(
    ("scale", "advantages"),
    [
        # rewards (1, 0) and (2, 0): means 1/2 and 1
        ("none", (0.5, -0.5, 1.0, -1.0)),
        # standard deviation of all four: mean 3/4, squares 1/16 + 9/16 + 25/16 + 9/16 = 44/16, by 3
        ("batch", tuple(x / (44 / 48) ** 0.5 for x in (0.5, -0.5, 1.0, -1.0))),
        # no scale recorded, and the biased standard deviation: 1/2 and 1
        ("", (1.0, -1.0, 1.0, -1.0)),
    ],
)
def test_every_known_scale_is_right(scale: str, advantages: Sequence[float]) -> None:
    assert facts(rewarded(), advantaged(advantages, scale=scale)) == set()


@pytest.mark.parametrize(
    ("advantages", "how"),
    [
        ((-0.5, 0.5, -1.0, 1.0), "negated"),
        ((0.0, 0.0, 0.0, 0.0), "zero"),
        # (1, 0, 2, 0) minus its mean 3/4, over 1: the batch as one group
        ((0.25, -0.75, 1.25, -0.75), "by-batch"),
    ],
)
def test_a_known_mistake_is_named(advantages: Sequence[float], how: str) -> None:
    values = torch.tensor(advantages, dtype=torch.float64)
    seen = advantaged(values, scale="none")
    evidence = found(LOOKS, case(rewarded(), seen))["advantage-differs"]
    assert evidence.values["how"] == how
    assert evidence.origin == "added"


def test_groups_by_row_order_are_named() -> None:
    """Rows a b a b: by id the groups are (1, 2) and (0, 0), by row order (1, 0) and (2, 0)."""
    seen = advantaged((0.5, -0.5, 1.0, -1.0), group_ids=("a", "b", "a", "b"), scale="none")
    evidence = found(LOOKS, case(rewarded(), seen))["advantage-differs"]
    assert evidence.values["how"] == "by-row-order"


def test_a_total_that_is_not_the_weighted_sum() -> None:
    seen = advantaged(rewards=(1.0, 0.0, 0.5, 0.0))
    evidence = found(LOOKS, case(rewarded(), seen))["total-differs"]
    assert (evidence.row, evidence.values["wanted"][2]) == (2, 2.0)


def test_no_variance_is_inherited_where_rewards_are_equal() -> None:
    flat = advantaged((0.0,) * 4, rewards=(1.0,) * 4)
    assert found(LOOKS, case(rewarded((1.0,) * 4), flat))["no-variance"].origin == "inherited"


@pytest.mark.parametrize("groups", [GROUPS, ("a", "b", "c", "d")])
def test_no_variance_is_added_where_rewards_differ_or_groups_are_single(
    groups: tuple[str, ...],
) -> None:
    """Weights of 0, or a group per completion, remove the signal of rewards that had one."""
    weights = {"length": 0.0}
    seen = advantaged((0.0,) * 4, rewards=(0.0,) * 4, group_ids=groups, weights=weights)
    assert found(LOOKS, case(rewarded(), seen))["no-variance"].origin == "added"


def test_one_group_with_a_signal_is_enough() -> None:
    one = advantaged((1.0, -1.0, 0.0, 0.0), rewards=(1.0, 0.0, 1.0, 1.0))
    assert facts(rewarded((1.0, 0.0, 1.0, 1.0)), one) == set()


def test_non_finite_advantages() -> None:
    assert "not-finite" in facts(advantaged((float("nan"), -1.0, 1.0, -1.0)))


def test_groups_spread_over_processes_are_not_recomputed() -> None:
    """Only one completion of each group is here: its advantage needs another process's rewards."""
    seen = advantaged((1.0, -1.0), rewards=(1.0, 0.0), group_ids=("a", "b"))
    single = case(rewarded((1.0, 0.0), completions=("one", "two")), seen)
    assert set(found(LOOKS, single)) == {"advantage-differs"}
    spread = replace(single, trace=replace(single.trace, header={"world": "4"}))
    assert found(LOOKS, spread) == {}


# --------------------------------------------------------------------------- partial rewards

SPAN = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]]).bool()


def partial(added: float) -> Any:
    """Base advantages 1 and -1 (times 1/sqrt 2), plus on the first token ``added`` times the
    partial reward's own, which are equal."""
    base = torch.tensor([[1.0] * 3, [-1.0] * 3, [1.0] * 3, [-1.0] * 3])
    values = base + added * base * SPAN
    return advantaged(values, weights={"length": 1.0, "context": 1.0}, spans={"context": SPAN})


def test_a_partial_reward_that_acts_on_its_tokens() -> None:
    both = (rewarded(), rewarded(name="context"))
    assert facts(*both, partial(1.0)) == set()


def test_a_partial_reward_without_effect() -> None:
    both = (rewarded(), rewarded(name="context"))
    evidence = found(LOOKS, case(*both, partial(0.0)))["partial-unused"]
    assert evidence.values["added"] == [0.0] * 4


def test_section_tokens_are_found_by_offsets(policy: Policy) -> None:
    text = "<context>The bar is red.</context><think>so.</think><answer>A</answer>"
    ids = policy.processor.tokenizer(text)["input_ids"]
    content, with_tags = section_tokens(policy, ids, "context")
    assert policy.decode([ids[t] for t in content]).strip("<>") == "The bar is red."
    assert policy.decode([ids[t] for t in with_tags]).startswith("<context>The bar is red.")
    assert section_tokens(policy, ids, "reasoning") == []


# --------------------------------------------------------------------------- owners


def test_of_three_sources_the_one_that_differs_is_wrong() -> None:
    from omni_grpo_core.doctor.checks import groups as checks_groups

    def named(*values: Any) -> dict[str, str]:
        seen = found(checks_groups.LOOKS, case(samples(), *values))
        return {fact: evidence.stage for fact, evidence in seen.items()}

    crossed = {"sample_id": ["a", "b", "a", "b"]}
    assert named(generated(), rewarded(), advantaged()) == {}
    assert named(generated(prompts=(0, 1, 0, 1)), rewarded(), advantaged()) == {
        "group-order": "completion"
    }
    assert named(generated(), rewarded(columns=crossed), advantaged()) == {
        "columns-moved": "reward"
    }
    assert named(generated(), rewarded(), advantaged(group_ids=("a", "b", "a", "b"))) == {
        "groups-mixed": "advantage"
    }
    # even with unknown prompts, whole groups with other rows' columns are scored wrongly
    swapped = {"sample_id": ["b", "b", "a", "a"]}
    assert named(rewarded(columns=swapped), advantaged()) == {"columns-moved": "reward"}


def test_columns_of_several_rows() -> None:
    from omni_grpo_core.doctor.checks import groups as checks_groups

    columns = {
        "sample_id": list(GROUPS),
        "problem": ["who is a?", "who is b?", "who is b?", "who is b?"],
    }
    torn = found(checks_groups.LOOKS, case(samples(), generated(), rewarded(columns=columns)))
    assert torn["columns-moved"].row == 1
