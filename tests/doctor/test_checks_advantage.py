"""Advantages that do not follow from their rewards, on numbers checked by hand."""

from __future__ import annotations

from typing import Any

import torch
from small_recordings import GROUPS, advantaged, case, found, generated, rewarded, samples

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor.checks import partial as checks_partial
from omni_grpo_core.doctor.checks.partial import section_tokens

LOOKS = checks_partial.LOOKS


def facts(*values: Any) -> set[str]:
    return set(found(LOOKS, case(*values)))


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
