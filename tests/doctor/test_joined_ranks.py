"""Several processes that trained together are one step."""

from __future__ import annotations

import torch
from joined_calls import rows, sampled, scored, step, weighed
from small_recordings import stepped

from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.ranks import join_ranks
from omni_grpo_core.doctor.rollouts import joined, rows_of_gradient
from omni_grpo_core.types import Trace

PROMPT = (3, 4)


def rank(ids: tuple[int, ...], loss: float) -> Trace:
    """One completion of the same prompt on each rank, after a forward on something else."""
    whole = scored(rows([(*PROMPT, *ids)]))
    other = scored(rows([(8, 8)]), grad=False)
    calls = sampled(rows([PROMPT]), [ids]), other, whole, weighed(1, torch.ones(1, 3))
    return step(*calls, stepped(losses=(loss,)), world="2").trace


def test_a_group_that_spans_ranks_is_one() -> None:
    """One row a process is the only way the open-r1 family runs: a group of one had no signal."""
    traces = [
        ("t/rank-0/step-000000", rank((5, 9), 0.5)),
        ("t/rank-1/step-000000", rank((6, 9), 1.5)),
    ]
    [(name, trace)] = join_ranks(traces)
    case = Case(trace, None)
    assert (name, case.trace.header["world"]) == ("t/rank-0/step-000000", "1")
    assert [c.group for c in joined(case).completions] == [0, 0]
    assert [step.losses for step in case.steps] == [(0.5, 1.5)]
    second = case.gradients[1]
    assert second.forward == 3
    assert rows_of_gradient(case, second) == joined(case).completions[1:]


def test_a_step_that_a_rank_lacks_is_not_made_up() -> None:
    first = ("t/rank-0/step-000000", rank((5, 9), 0.5))
    assert join_ranks([first]) == [first]
    alone = [("t/step-000000", first[1]), ("t/step-000001", first[1])]
    assert join_ranks(alone) == alone
