"""Weights that are higher in a section of a completion: whose they are.

HumanOmniV2 adds a partial reward's advantage to the tokens of its section, and computes that
advantage from the total: judges are asked and paid, and what they say reaches no gradient. Here
completions of three tokens, of which the first is a section; ``length`` pays 8 and 2, as the
advantages 3 and -3, and ``judge`` pays 0.2 and 0.8.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from joined_calls import step
from test_identifiable import facts, recorded

from omni_grpo_core.doctor.diagnose import diagnose
from omni_grpo_core.doctor.evidence import Case

OWN = torch.tensor([3.0, -3.0])
JUDGED = torch.tensor([-0.3, 0.3])
SECTION = torch.tensor([1.0, 0.0, 0.0])


def judged(advantages: Any, section: Any, judge: tuple[float, ...] = (0.2, 0.8)) -> Case:
    """Two completions; ``section``: what is added to the tokens of the first one's section."""
    weights = -(advantages[:, None] + section[:, None] * SECTION) / 6
    return also_judged(recorded((8.0, 2.0), weights), judge)


def also_judged(case: Case, judge: tuple[float, ...]) -> Case:
    [paid] = case.rewards
    values: list[Any] = list(case.values)
    values.insert(values.index(paid), replace(paid, name="judge", values=judge))
    return step(*values)


def test_a_section_that_repeats_the_total_is_not_the_judges() -> None:
    case = judged(OWN, OWN)
    found = facts(case)["partial-repeats"]
    assert (found.stage, found.severity) == ("advantage", "breaks")
    assert (found.values["names"], found.values["times"]) == (["judge"], 2)
    assert "of row 0 the first 1 tokens" in found.sentence
    [finding] = [one for one in diagnose(case).findings if one.stage == "advantage"]
    assert [(c.cause, c.proved) for c in finding.causes] == [("adv.partial-repeats", True)]


def test_a_section_with_its_own_advantage_is_no_fault() -> None:
    assert "partial-repeats" not in facts(judged(OWN, JUDGED))


def test_all_rewards_in_the_sum_and_a_section_that_counts_twice_is_a_recipe() -> None:
    found = facts(judged(OWN + JUDGED, OWN + JUDGED))
    assert "partial-repeats" not in found
    assert found["weights-vary"].severity == "differs"


def test_a_judge_that_says_the_same_of_all_is_not_missed() -> None:
    assert "partial-repeats" not in facts(judged(OWN, OWN, judge=(0.4, 0.4)))


def test_the_one_reward_that_differs_may_not_be_in_the_loss() -> None:
    """Advantages of 0 were a proved cause, where only the judge had anything to say."""
    case = also_judged(recorded((4.0, 4.0), torch.zeros(2, 3)), (0.2, 0.8))
    [finding] = [one for one in diagnose(case).findings if one.stage == "advantage"]
    assert finding.severity == "breaks"
    assert "differ by judge alone" in finding.evidence[0].sentence
    causes = {cause.cause: cause.proved for cause in finding.causes}
    assert causes["adv.reward-unused"] is causes["adv.zero-variance"] is False
