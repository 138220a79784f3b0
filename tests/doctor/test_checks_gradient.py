"""What is trainable, held by the optimizer, changed: hand-written optimizer steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from joined_calls import rows, sampled, scored
from joined_calls import step as joined_step
from small_recordings import case, found, generated, layer, lost, stepped

from omni_grpo_core.doctor.checks import repeated as checks_repeated
from omni_grpo_core.doctor.checks import run as checks_run
from omni_grpo_core.doctor.checks.gradient import LOOKS


def facts(*values: Any) -> set[str]:
    return set(found(LOOKS, case(*values)))


def test_a_healthy_step_is_no_evidence() -> None:
    assert facts(lost(0.5), stepped()) == set()
    assert facts(lost(0.5), stepped(trainable={"adapter": 8})) == set()
    # a part with zero gradient need not change; towers may be trained with the text model
    norms, still = {"text": 0.5, "vision": 0.0}, {"text": True, "vision": False}
    towers = stepped(trainable={"text": 9, "vision": 9}, norms=norms, changed=still)
    assert facts(lost(0.5), towers) == set()


@pytest.mark.parametrize(
    ("fact", "step"),
    [
        ("nothing-trainable", stepped(trainable={}, norms={})),
        ("no-gradient", stepped(norms={"text": 0.0})),
        ("no-gradient", stepped(norms={}, changed={"text": False})),
        ("text-frozen", stepped(trainable={"vision": 5})),
        ("beside-adapter", stepped(trainable={"adapter": 5, "text": 5})),
        ("tower-trained", stepped(trainable={"text": 5, "vision": 5},
                                  settings={"freeze_vision": True})),
        ("not-held", stepped(held={"head": 10})),
        ("not-moved", stepped(changed={"text": False, "head": True})),
        ("accumulation-differs", stepped(settings={"gradient_accumulation_steps": 4})),
        ("batch-cuts-groups", stepped(settings={"per_device_train_batch_size": 3,
                                                "num_generations": 2})),
        ("gradient-not-finite", stepped(norms={"text": math.nan})),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_step(fact: str, step: Any) -> None:
    assert facts(lost(0.5), step) == {fact}


def test_a_text_model_of_which_hardly_anything_is_trained() -> None:
    """Everything frozen but norms was healthy. It may be meant so, and adapters are small."""
    norms = layer(elements=100_000, trainable=448)
    [one] = [e for look in LOOKS for e in look(case(lost(0.5), stepped(layers=(norms,))))]
    assert (one.fact, one.severity) == ("text-mostly-frozen", "differs")
    assert one.sentence.startswith("448 of the text model's 100,000 weights can be trained")


def test_a_detached_loss() -> None:
    assert facts(lost(0.5, requires_grad=False), stepped()) == {"loss-detached"}


def test_no_gradient_is_right_without_a_signal() -> None:
    assert facts(lost(0.5, advantages=(0.0,) * 4), stepped(norms={"text": 0.0})) == set()


def test_backward_on_other_numbers() -> None:
    two = (lost(0.5, settings={"loss_type": "?"}),) * 2
    assert facts(*two, stepped(losses=(0.5, 0.7))) == {"backward-differs"}
    # halved for accumulation, or scaled up for 16 bits
    assert facts(*two, stepped(losses=(0.25, 0.25))) == set()
    assert facts(*two, stepped(losses=(32768.0, 32768.0))) == set()


def test_groups_spread_over_processes_are_whole() -> None:
    """Four processes with one completion and two passes each make four groups of two."""
    settings = {"per_device_train_batch_size": 1, "num_generations": 2}
    alone = case(lost(0.5), stepped(settings=settings))
    four = replace(alone, trace=replace(alone.trace, header={"world": "4"}))
    assert set(found(LOOKS, alone)) == {"batch-cuts-groups"}
    assert found(LOOKS, four) == {}


def test_a_negated_backward_is_the_loss_s_fault() -> None:
    assert (
        found(LOOKS, case(lost(0.5), stepped(losses=(-0.5,))))["backward-differs"].stage == "loss"
    )


# --------------------------------------------------------------------------- between


def layered(*layers: Any, **more: Any) -> Any:
    """Two sound layers and these."""
    return stepped(layers=(layer("text layer 0"), layer("head", "head"), *layers), **more)


NAN = math.nan


@pytest.mark.parametrize(
    ("fact", "severity", "step"),
    [
        ("gradient-zeroed", "breaks",
         layered(layer("text layer 1", odd={"q": 0.0, "k": 0.0}, norm=0.5))),
        ("gradient-negated", "breaks", layered(layer("text layer 1", odd={"q": -1.0}))),
        # all of them: by -1 and a clip, by noise, by an optimizer that maximizes
        ("gradient-negated", "breaks", stepped(factor=-0.3)),
        ("gradient-changed", "breaks",
         stepped(factor=None, layers=(layer(odd={"q": NAN}), layer(odd={"k": NAN}, norm=0.3)))),
        ("uphill", "breaks", stepped(downhill=0.0)),
        ("gradient-scaled", "breaks", layered(layer("text layer 1", odd={"q": 3.0}, norm=0.37))),
        # clip_grad_norm_ called for each part of the model
        ("gradient-scaled", "differs", layered(layer("text layer 1", odd={"q": 0.3}, norm=1.0))),
        ("gradient-changed", "breaks",
         layered(layer("text layer 1", odd={"q": NAN}, norm=0.3))),
        # clip_grad_value_: the largest element of each layer is the same
        ("gradient-changed", "differs",
         layered(layer("text layer 1", odd={"q": NAN}, norm=0.5))),
        ("not-zeroed", "breaks", layered(layer("text layer 1", stale=0.4), step=1)),
        ("not-zeroed", "differs", layered(layer("text layer 1", stale=0.4), step=0)),
        ("clipped-while-scaled", "breaks",
         stepped(layers=(layer(norm=1.0 / 1024),), scale=1024.0, factor=1e-5)),
        ("rate-zero", "breaks", stepped(layers=(layer(rates=(0.0,)),), rates=(0.0,))),
        # a warm-up begins at 0
        ("rate-zero", "differs", stepped(layers=(layer(rates=(0.0,)),), rates=(0.0,),
                                         planned=(1e-3,))),
        ("rate-zero", "breaks", layered(layer("text layer 1", rates=(0.0,)))),
        ("step-skipped", "differs", stepped(outcome="skipped", scale=65536.0)),
        ("never-stepped", "breaks", stepped(outcome="never", changed={"text": False})),
        ("moved-frozen", "breaks",
         layered(layer("text layer 1", trainable=0, held=0, norm=None))),
        ("not-held", "breaks",
         layered(layer("text layer 1", held=0, moved=False), others=100)),
    ],
)  # fmt: skip
def test_a_step_by_layer(fact: str, severity: str, step: Any) -> None:
    seen = found(LOOKS, case(step))
    assert {name: evidence.severity for name, evidence in seen.items()} == {fact: severity}
    if "text layer 1" in {one.name for one in step.layers}:
        assert "text layer 1" in seen[fact].sentence


def test_gradients_that_ranks_average_by_hand_are_not_judged() -> None:
    """Between backward and step every gradient becomes another one; a layer of zeros does not."""
    mixed, zeroed = (
        layer(f"text layer {i}", odd={"q": times}) for i, times in ((1, NAN), (2, 0.0))
    )
    one = case(stepped(layers=(layer(), mixed, zeroed)))
    four = replace(one, trace=replace(one.trace, header={"world": "4"}))
    assert set(found(LOOKS, four)) == {"gradient-zeroed"}


def test_an_optimizer_of_master_copies_is_judged_by_the_next_step() -> None:
    """DeepSpeed's and Megatron's optimizers hold float32 copies, and write them back later."""
    first = layer(held=0, moved=False, dtype="bfloat16")
    assert facts(stepped(layers=(first,), others=100)) == set()
    later = replace(first, between=1.0)
    assert facts(stepped(layers=(later,), others=100)) == set()
    assert facts(stepped(layers=(replace(first, between=0.0),), others=100)) == {"not-held"}


def test_sixteen_bit_weights_round_small_updates_away() -> None:
    still = layer("text layer 1", moved=False, dtype="bfloat16")
    assert found(LOOKS, case(layered(still)))["not-moved"].severity == "differs"
    alone = found(LOOKS, case(stepped(layers=(still,))))["not-moved"]
    assert alone.severity == "breaks"


def test_a_second_forward_should_be_equal() -> None:
    """In train mode dropout acts: the ratio of two passes with the same weights is not 1."""
    ids = rows([(1, 2, 3), (1, 2, 4)])
    full = rows([(1, 2, 3, 5, 9), (1, 2, 4, 6, 9)])
    rolled = sampled(ids, [(5, 9), (6, 9)])
    old, new = (
        replace(scored(full, grad=grad), logprobs=torch.full((2, 4), value))
        for grad, value in ((False, -1.0), (True, -1.25))
    )
    steps = joined_step(rolled, old, new, stepped())
    evidence = found(checks_repeated.LOOKS, steps)["second-forward-differs"]
    assert (evidence.stage, evidence.severity) == ("logits", "breaks")
    assert "differ by 0.25 on average" in evidence.sentence
    assert "the second in train mode" in evidence.sentence
    assert "dropout" not in evidence.sentence
    dropping = replace(new, modes=replace(new.modes, dropout=0.2))
    evidence = found(checks_repeated.LOOKS, joined_step(rolled, old, dropping, stepped()))[
        "second-forward-differs"
    ]
    assert "with dropout of 0.2" in evidence.sentence
    equal = replace(new, logprobs=old.logprobs)
    assert found(checks_repeated.LOOKS, joined_step(rolled, old, equal, stepped())) == {}
    reference = replace(new, own=False)
    assert found(checks_repeated.LOOKS, joined_step(rolled, old, reference, stepped())) == {}


# --------------------------------------------------------------------------- from step to step

LIKELY = torch.tensor([[0.5] * 3] * 4).log()
RARE = torch.tensor([[1e-3] * 3] * 4).log()


def again(first: Any, second: Any) -> set[str]:
    earlier = case(*first, stepped(step=0))
    later = case(*second, stepped(step=1))
    _, later = checks_run.in_order([earlier, later])
    return set(found(checks_run.LOOKS, later))


def test_repeated_samples() -> None:
    """Ten tokens of 1e-3: e^-69 by chance. Tokens of 1/2: 2^-10 over four rows may happen."""
    step = (generated(logprobs=RARE),)
    assert again(step, step) == {"began-anew"}
    usual = (generated(logprobs=LIKELY),)
    assert again(usual, usual) == set()


def test_the_same_samples_on_other_rows_are_no_restart() -> None:
    step = (generated(logprobs=RARE),)
    assert again(step, (generated(prompts=(1, 1, 0, 0), logprobs=RARE),)) == set()


def test_a_counter_that_goes_back() -> None:
    earlier = case(generated(), stepped(settings={"global_step": 7}))
    later = case(generated(), stepped(step=1, settings={"global_step": 1}))
    _, later = checks_run.in_order([earlier, later])
    assert set(found(checks_run.LOOKS, later)) == {"counter-back"}


def test_steps_of_another_rank_do_not_follow() -> None:
    first, second = case(generated(), stepped(step=2)), case(generated(), stepped(step=0))
    assert [one.before for one in checks_run.in_order([first, second])] == [None, None]


def test_an_optimizer_whose_count_goes_back_has_lost_its_state() -> None:
    def counted(first: int, second: int) -> set[str]:
        earlier = case(generated(), stepped(layers=(layer(updates=first),)))
        later = case(generated(), stepped(step=1, layers=(layer(updates=second),)))
        _, later = checks_run.in_order([earlier, later])
        return set(found(checks_run.LOOKS, later))

    assert counted(1, 1) == {"optimizer-anew"}
    # one without a count, and one that goes on
    assert counted(0, 0) == counted(1, 2) == set()


def test_a_layer_without_a_gradient_is_not_updated_and_has_lost_nothing() -> None:
    """Was proved of audio layers, in a step of rows without sound."""
    audio = layer("audio conv1", "audio", updates=1)
    earlier = case(generated(), stepped(layers=(layer(updates=1), audio)))

    def later(text: int, norm: float | None, times: int) -> set[str]:
        sound = layer("audio conv1", "audio", norm=norm, updates=times)
        step = case(generated(), stepped(step=1, layers=(layer(updates=text), sound)))
        return set(found(checks_run.LOOKS, checks_run.in_order([earlier, step])[1]))

    assert later(2, None, 1) == set()
    # only some of its parameters may have one
    assert later(2, 0.5, 1) == set()
    assert later(1, None, 1) == later(1, 0.5, 1) == {"optimizer-anew"}


def test_a_step_that_leaves_nothing_of_the_model() -> None:
    """A learning rate of 5 was healthy: the loss was right, and every weight changed."""
    thrown = stepped(layers=(layer(change=70.0), layer("vision layer 0", "vision", change=1e-4)))
    assert facts(lost(0.5), thrown) == {"weights-thrown"}
    # an adapter begins at 0, and a head may be new
    begun = (layer("adapter of text layer 0", "adapter", change=9.0), layer(change=1e-4))
    grown = stepped(layers=(*begun, layer("head", "head", change=2.0)))
    assert "weights-thrown" not in facts(lost(0.5), grown)


def test_weights_of_a_norm_are_near_1() -> None:
    """An update of 2e-8 is lost in them: "the optimizer holds another copy" was said of that."""
    still = layer("text norm", elements=64, norm=9e-10, rates=(2e-6,), moved=False)
    moved = layer(norm=1e-3, rates=(2e-6,))
    assert facts(lost(0.5), stepped(layers=(still, moved))) == set()
    asked = layer("text norm", elements=64, norm=9e-3, rates=(2e-6,), moved=False)
    assert facts(lost(0.5), stepped(layers=(asked, moved))) == {"not-moved"}


def test_gradients_of_micro_batches_that_were_dropped() -> None:
    two = (0.5, 0.25)
    assert facts(lost(0.5), stepped(losses=two, dropped=1)) == {"gradient-dropped"}
    # kept elsewhere and put back: no multiple of the last backward's
    summed = layer(odd={"a.weight": math.nan})
    found = facts(lost(0.5), stepped(losses=two, dropped=1, layers=(summed,)))
    assert "gradient-dropped" not in found


def test_an_update_that_is_undone_before_the_next_step() -> None:
    """load_state_dict() after the step: every step was sound, and the policy never moved."""
    back = layer(between=0.75, undone=0.75)
    assert facts(lost(0.5), stepped(layers=(back,))) == {"update-undone"}
    # an average's weights, or those of a merged adapter, are others than before
    other = layer(between=0.75, undone=0.25)
    assert facts(lost(0.5), stepped(layers=(other, layer(between=0.0)))) == set()
