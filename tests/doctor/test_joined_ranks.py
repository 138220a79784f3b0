"""Several processes that trained together are one step."""

from __future__ import annotations

from dataclasses import replace

import torch
from joined_calls import rows, sampled, scored, step, weighed
from small_recordings import layer, stepped

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


def test_a_layer_is_what_all_ranks_have_of_it() -> None:
    """Only the first rank's layers were read: what was done to a shard of another did not show."""
    first = layer("text layer 0", norm=3.0)
    zeroed = layer("text layer 0", norm=4.0, moved=False, odd={"a.weight": 0.0})
    head = layer("head", norm=2.0)
    ranks = [
        step(replace(stepped(), layers=layers), world="2").trace
        for layers in ((first,), (zeroed, head))
    ]
    [(_, trace)] = join_ranks([(f"t/rank-{n}/step-000000", one) for n, one in enumerate(ranks)])
    [seen] = Case(trace, None).steps
    whole, other = seen.layers
    assert (whole.norm, whole.odd, whole.moved) == (5.0, {"a.weight": 0.0}, 0.5)
    assert other == head


def test_a_gradient_that_every_rank_has_is_not_added_up() -> None:
    one = stepped(norms={"text": 2.0})
    ranks = [step(one, world="2").trace] * 2
    [(_, trace)] = join_ranks([(f"t/rank-{n}/step-000000", r) for n, r in enumerate(ranks)])
    [seen] = Case(trace, None).steps
    assert [layer.before for layer in seen.layers] == [layer.before for layer in one.layers]
    assert seen.grad_norms == one.grad_norms
