"""Losses that do not follow from their inputs, each by hand.

With ratio 1 the token losses are minus the advantages. Rows of 3, 2, 3 and 2 tokens with advantages
1, -1, 1, -1: the mean over rows is 0, the mean over tokens -(3 - 2 + 3 - 2) / 10 = -0.2.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_recordings import COMPLETIONS, advantaged, case, found, generated, lost, stepped

from omni_grpo_core.doctor.checks import logged as checks_logged
from omni_grpo_core.doctor.checks import loss as checks_loss
from omni_grpo_core.doctor.checks.run import in_order

LOOKS = (*checks_loss.LOOKS, *checks_logged.LOOKS)
DAPO = {"loss_type": "dapo"}
THIRD = torch.full((4, 3), 1 / 3).log()


def facts(*values: Any) -> set[str]:
    return set(found(LOOKS, case(*values)))


def way(loss: Any) -> str:
    evidence = found(LOOKS, case(loss))["loss-differs"]
    return str(evidence.values["way"])


@pytest.mark.parametrize(
    "loss",
    [
        lost(0.0),
        lost(-0.2, settings=DAPO),
        lost(-0.2, settings={"loss_type": "bnpo"}),
        # divided by 4 rows of 5 tokens
        lost(-0.1, settings={"loss_type": "dr_grpo", "max_completion_length": 5}),
    ],
)
def test_a_right_loss_is_no_evidence(loss: Any) -> None:
    assert facts(loss) == set()


def test_two_micro_batches_share_the_tokens_of_the_step() -> None:
    """Ten tokens each: -2 / 20 is each one's share."""
    share = lost(-0.1, settings=DAPO)
    assert facts(share, share) == set()
    assert "loss-differs" in facts(lost(-0.2, settings=DAPO), lost(-0.2, settings=DAPO))


def test_the_opposite_sign() -> None:
    assert way(lost(0.2, settings=DAPO)) == "sign"


def test_another_normaliser() -> None:
    # the token mean instead of the row mean
    assert way(lost(-0.2)) == "normaliser"


def test_kl_subtracted() -> None:
    """Twice as likely as the reference: d = -log 2, k3 = 1/2 + log 2 - 1 = 0.1931; beta 0.5."""
    ref = torch.full((4, 3), 1 / 6).log()
    k3 = math.log(2) - 0.5
    settings = {"beta": 0.5}
    assert facts(lost(0.5 * k3, ref=ref, settings=settings)) == set()
    assert way(lost(-0.5 * k3, ref=ref, settings=settings)) == "kl-sign"


def test_a_kl_term_that_the_settings_deny() -> None:
    ref = torch.full((4, 3), 1 / 6).log()
    seen = found(LOOKS, case(lost(0.1 * (math.log(2) - 0.5), ref=ref)))
    assert seen["reference-unasked"].stage == "loss"
    # float32 logprobs have seven digits, and the KL is a difference of two of them
    assert seen["loss-differs"].values["implied_beta"] == pytest.approx(0.1, rel=1e-4)


def test_advantages_along_the_tokens_are_blamed_on_the_advantage() -> None:
    """Three rows of three tokens: column j has advantage j, so each row has all three."""
    ids, mask = COMPLETIONS[:3], ((1, 1, 1), (1, 0, 0), (1, 1, 1))
    loss = lost(
        # rows: -(1 + 2 - 4) / 3, -1, -(1 + 2 - 4) / 3
        (1 / 3 - 1 + 1 / 3) / 3,
        advantages=(1.0, 2.0, -4.0), ids=ids, mask=mask, logprobs=THIRD[:3],
    )  # fmt: skip
    evidence = found(LOOKS, case(loss))["advantage-broadcast"]
    assert evidence.stage == "advantage"


def test_token_advantages_of_other_rows() -> None:
    wrong = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat(3).view(4, 3) * 0.5**0.5
    seen = found(LOOKS, case(generated(), advantaged(), lost(0.0, advantages=wrong)))
    assert seen["advantage-broadcast"].stage == "advantage"


# --------------------------------------------------------------------------- mask


def test_padding_in_the_loss() -> None:
    everything = ((1, 1, 1),) * 4
    seen = found(LOOKS, case(generated(), lost(0.0, mask=everything)))["after-eos"]
    assert (seen.values["tokens"], seen.origin) == (2, "added")


def test_padding_in_the_loss_is_inherited_where_generate_did_not_stop(policy: Any) -> None:
    from omni_grpo_core.doctor.evidence import Reference
    from omni_grpo_core.pipeline.settings import Settings

    eos, other = policy.eos_token_ids
    ids = ((5, eos, 6), (5, eos, 7))
    call = generated(completions=ids, prompts=(0, 1), config={"eos_token_id": [other]})
    loss = lost(0.0, ids=ids, mask=((1, 1, 1),) * 2, advantages=(1.0, -1.0), logprobs=THIRD[:2])
    recorded = case(call, loss, reference=Reference(policy, Settings()))
    assert found(LOOKS, recorded)["after-eos"].origin == "inherited"


def test_an_eos_left_out() -> None:
    short = ((1, 1, 0), (1, 0, 0), (1, 1, 0), (1, 0, 0))
    assert "tokens-left-out" in facts(generated(), lost(0.0, mask=short))


def test_a_row_left_out_as_a_whole_is_a_choice() -> None:
    mask = ((0, 0, 0), (1, 1, 0), (1, 1, 1), (1, 1, 0))
    assert "tokens-left-out" not in facts(generated(), lost(0.0, mask=mask))


def test_the_prompt_in_the_loss() -> None:
    call = generated()
    assert call.sequences is not None
    ids = call.sequences[:, 1:].tolist()
    mask = [[1, 1, *row] for row in ((1, 1, 1), (1, 1, 0), (1, 1, 1), (1, 1, 0))]
    wide = torch.full((4, 5), 1 / 3).log()
    seen = found(LOOKS, case(call, lost(0.0, ids=ids, mask=mask, logprobs=wide)))
    assert seen["prompt-in-loss"].values["tokens"] == 2


def test_completions_that_were_not_sampled() -> None:
    strange = ((5, 6, 9), (4, 9, 0), (7, 8, 9), (8, 9, 0))
    assert found(LOOKS, case(generated(), lost(0.0, ids=strange)))["ids-differ"].row == 1


# --------------------------------------------------------------------------- clip, passes


def test_the_clip_rate_of_the_other_side() -> None:
    """Ratios 3/2 in the first column. Where the advantage is 1 (rows 0, 2) the clip applies: 2 of
    10 tokens; in rows 1 and 3, of the other sign, 2 of 10, it does not. With row 1's ratio 1:
    right 0.2, other 0.1."""
    old = THIRD.clone()
    old[:, 0] -= math.log(1.5)
    old[1, 0] = THIRD[1, 0]
    # l = -1.2 of three tokens in rows 0 and 2, 1.5 of two in row 3: the rest is -1 or 1
    value = ((-1.2 - 2) / 3 + 1 + (-1.2 - 2) / 3 + (1.5 + 1) / 2) / 4
    right = lost(value, old=old, metrics={"clip_ratio": 0.2})
    assert facts(right) == set()
    wrong = replace(right, metrics={"clip_ratio": 0.1})
    assert found(LOOKS, case(wrong))["clip-rate-differs"].values["other"] == pytest.approx(0.1)


def test_a_later_pass_without_its_old_logprobs() -> None:
    twice = {"num_iterations": 2}
    assert facts(lost(0.0, settings=twice)) == {"old-recomputed"}
    # the first pass, on its own rollout, has none yet
    assert facts(generated(), lost(0.0, settings=twice)) == set()


@pytest.mark.parametrize("moved", [True, False])
def test_old_logprobs_that_equal_the_new_ones(moved: bool) -> None:
    """They do where the first pass changed nothing: no signal, or a warm-up from 0."""
    first = case(generated(), stepped(changed={"text": moved}))
    again = case(lost(0.0, old=THIRD, settings={"num_iterations": 2}), stepped(step=1))
    _, again = in_order([first, again])
    assert set(found(LOOKS, again)) == ({"old-recomputed"} if moved else set())


def test_a_non_finite_loss() -> None:
    assert facts(lost(math.nan)) == {"not-finite"}


def test_a_negative_kl() -> None:
    assert "kl-negative" in facts(lost(0.0, metrics={"kl": -0.1}), stepped())
