"""Advantages that do not follow from their rewards, on numbers checked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_recordings import GROUPS, advantaged, case, found, generated, rewarded, samples

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor.checks import partial as checks_partial
from omni_grpo_core.doctor.checks.partial import section_tokens
from omni_grpo_core.doctor.evidence import Evidence
from omni_grpo_core.trace.calls import SamplesSeen

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


def test_a_column_that_rewards_get_changed_tells_nothing_of_the_others() -> None:
    """ms-swift's messages end with the completion: no row has them, and golds of other rows went
    unseen beside them."""
    from omni_grpo_core.doctor.checks import groups as checks_groups

    noted = SamplesSeen(
        tuple({"messages": [name], "path": name, "gold": name * 2} for name in "ab"), ("a", "b")
    )
    columns = {
        "messages": [[name, "answer"] for name in GROUPS],
        "path": list(GROUPS),
        "gold": ["bb", "bb", "aa", "aa"],
    }
    torn = found(checks_groups.LOOKS, case(noted, generated(), rewarded(columns=columns)))
    assert torn["columns-moved"].row == 0


def _golds(own: tuple[str, ...], given: tuple[str, ...]) -> dict[str, Evidence]:
    """Two rows that ask the same, each answered twice."""
    from omni_grpo_core.doctor.checks import groups as checks_groups

    rows = [
        {"sample_id": n, "problem": "which?", "gold": g} for n, g in zip("ab", own, strict=True)
    ]
    columns = {"sample_id": list(GROUPS), "gold": [given[0], given[0], given[1], given[1]]}
    noted = SamplesSeen(tuple(rows), ("a", "b"))
    return found(checks_groups.LOOKS, case(noted, generated(), rewarded(columns=columns)))


def test_golds_that_are_no_row_s_own() -> None:
    """Golds were looked up by the question: both rows got that of a third one, which was not in the
    batch, and no column had come from another row of it."""
    by_question = _golds(("A", "B"), ("C", "C"))["gold-of-another"]
    assert (by_question.row, by_question.values["by_question"]) == (0, True)
    other = _golds(("A", "B"), ("C", "D"))["gold-of-another"]
    assert not other.values["by_question"]
    one = _golds(("A", "B"), ("A", "C"))["gold-of-another"]
    assert (one.row, one.values["by_question"]) == (2, False)


@pytest.mark.parametrize(
    ("own", "given"),
    [
        (("<answer>A</answer>", "<answer>B</answer>"), ("A", "B")),
        (("A", "B"), ("(a)", "b.")),
        (("A", "B"), ("a cat", "a dog")),
        (("A", "B"), ("0", "1")),
        (("1", "2"), ("0", "3")),
    ],
)
def test_golds_in_another_form_are_no_other_golds(
    own: tuple[str, ...], given: tuple[str, ...]
) -> None:
    """Collators take the answer out of its tags, or the option's text for its letter."""
    assert _golds(own, given) == {}
