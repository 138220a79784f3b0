"""Rollouts whose settings, ids or texts alone show a fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from joined_calls import scored
from small_recordings import EVAL, advantaged, case, found, generated, rewarded

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor.checks import logits
from omni_grpo_core.doctor.checks.completion import LOOKS
from omni_grpo_core.doctor.diagnose import diagnose
from omni_grpo_core.doctor.evidence import Reference, noted_missing
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.trace.calls import ProcessorCall

TRAINING = replace(EVAL, training=True, checkpointing=True)


def facts(*values: Any) -> set[str]:
    return set(found(LOOKS, case(*values)))


def test_a_healthy_rollout_is_no_evidence() -> None:
    assert facts(generated(), rewarded(), advantaged()) == set()
    # train mode with checkpointing does no harm where the cache was kept: transformers 4.52, 5.24
    assert facts(generated(modes=TRAINING)) == set()


def test_an_unreadable_cache_is_missing_not_history_lost() -> None:
    step = case(generated(cached=(None, None), modes=TRAINING))
    assert set(found(LOOKS, step)) == set()
    (note,) = noted_missing(step)
    assert note.startswith("whether generate saw prompt and history is unknown")


@pytest.mark.parametrize(
    ("fact", "call"),
    [
        ("history-lost", generated(cached=(0, 0), modes=TRAINING)),
        # from_pretrained(…, use_cache=None), as VLM-R1 and R1-V load without checkpointing
        ("history-twice", generated(cached=(6, 10))),
        ("eos-unset", generated(config={"eos_token_id": None})),
        ("all-capped", generated(completions=((5, 6, 7), (5, 6, 8)), prompts=(0, 1))),
        ("truncated-sampling", generated(config={"top_k": 50})),
        ("truncated-sampling", generated(config={"repetition_penalty": 1.1})),
        ("generate-raised", replace(generated(), error="StopIteration")),
    ],
)
def test_what_a_call_shows(fact: str, call: Any) -> None:
    assert facts(call) == {fact}


def test_settings_that_change_nothing() -> None:
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
    assert facts(generated(config=neutral)) == set()


def test_a_copy_that_generates_has_the_trained_weights() -> None:
    """A copy that got no updates left no trace, and the run was healthy."""

    def seen(own: bool, apart: float | None) -> set[str]:
        return set(found(logits.LOOKS, case(replace(generated(), own=own, apart=apart))))

    assert seen(False, 0.4) == {"other-weights"}
    assert seen(False, 0.0) == seen(False, None) == set()


SAME = ((5, 6, 9), (5, 6, 9), (7, 8, 9), (7, 8, 9))
RARE = torch.full((4, 3), 1e-2).log()
USUAL = torch.full((4, 3), 0.9).log()


def test_completions_that_are_all_the_same() -> None:
    """Three tokens of 1/100, repeated in each of two groups: 1e-12 by chance; of 9/10, 1 in 2."""
    greedy = generated(completions=SAME, config={"do_sample": False})
    assert facts(greedy, advantaged()) == {"identical"}
    assert facts(generated(completions=SAME, logprobs=RARE), advantaged()) == {"identical"}
    assert facts(generated(completions=SAME, logprobs=USUAL), advantaged()) == set()
    # one group of two that differs is enough
    other = ((5, 6, 9), (5, 6, 9), (7, 8, 9), (7, 5, 9))
    assert facts(generated(completions=other, config={"do_sample": False})) == set()


# --------------------------------------------------------------------------- pixels

PATCHES = torch.arange(32.0).view(8, 4)
GRID = torch.tensor([[1, 2, 2], [1, 2, 2]])


def with_pixels(pixels: torch.Tensor, grid: torch.Tensor, **config: Any) -> Any:
    inputs = {"pixel_values_videos": pixels, "video_grid_thw": grid}
    return generated(inputs=inputs, config=config)


def processed(pixels: torch.Tensor) -> ProcessorCall:
    outputs = {"pixel_values_videos": pixels}
    return ProcessorCall((), False, (), (), (), {}, (), (), outputs, "left", None)


def test_pixel_rows_repeated_one_by_one() -> None:
    blanket = with_pixels(PATCHES.repeat_interleave(2, 0), GRID.repeat_interleave(2, 0))
    assert facts(processed(PATCHES), blanket) == {"pixels-scrambled"}
    assert facts(blanket) == {"pixels-scrambled"}  # found without the processor's output, too


def test_pixels_repeated_picture_by_picture_are_right() -> None:
    whole = PATCHES.view(2, 4, 4).repeat_interleave(2, 0).reshape(16, 4)
    assert facts(processed(PATCHES), with_pixels(whole, GRID.repeat_interleave(2, 0))) == set()


def test_pictures_of_one_colour_are_not_scrambled() -> None:
    black = torch.zeros(16, 4)
    assert facts(with_pixels(black, GRID.repeat_interleave(2, 0))) == set()


def test_return_sequences_with_pixels() -> None:
    """Qwen2.5-Omni's generate repeats patches one by one; Qwen2.5-VL's repeats pictures."""
    call = with_pixels(PATCHES, GRID, num_return_sequences=2)
    whole = torch.arange(2.0).repeat_interleave(2).view(4, 1, 1).expand(4, 2, 3) + 1
    scrambled = torch.arange(4.0).view(4, 1, 1).expand(4, 2, 3)
    assert facts(replace(call, inputs_embeds=whole)) == set()
    assert facts(replace(call, inputs_embeds=scrambled)) == {"pixels-scrambled"}
    assert facts(generated(config={"num_return_sequences": 2})) == set()


# --------------------------------------------------------------------------- ids of a tokenizer


def spelled(
    policy: Policy, texts: tuple[str, ...], config: Mapping[str, Any] | None = None
) -> tuple[Any, Reference]:
    """A rollout of these texts, each ended by the first eos."""
    tokenizer = policy.processor.tokenizer
    rows = [[*tokenizer(text)["input_ids"], policy.eos_token_ids[0]] for text in texts]
    width = max(map(len, rows))
    padded = [row + [policy.pad_token_id] * (width - len(row)) for row in rows]
    settings = {"eos_token_id": list(policy.eos_token_ids), **(config or {})}
    call = generated(completions=padded, prompts=(0, 1)[: len(rows)], config=settings)
    return call, Reference(policy, Settings())


@pytest.mark.parametrize(
    ("text", "fact"),
    [("the bar", None), ("the <|VIDEO|> bar", "media-token"), ("a <|im_start|>", "special-token")],
)
def test_special_tokens_among_the_sampled(policy: Policy, text: str, fact: str | None) -> None:
    call, reference = spelled(policy, ("the bar", text))
    assert set(found(LOOKS, case(call, reference=reference))) == ({fact} if fact else set())


def test_special_tokens_stripped_before_rewards(policy: Policy) -> None:
    call, reference = spelled(policy, ("red", "re<|im_start|>d"))
    hidden = rewarded((1.0, 1.0), completions=("red", "red"))
    seen = found(LOOKS, case(call, hidden, reference=reference))
    assert seen["specials-stripped"].row == 1
    shown = rewarded((1.0, 1.0), completions=("red", "re<|im_start|>d"))
    assert "specials-stripped" not in found(LOOKS, case(call, shown, reference=reference))


def test_one_of_two_eos(policy: Policy) -> None:
    """An eos that generate is not told of is a fault where it is sampled, and gone past."""
    first, second = policy.eos_token_ids
    call, reference = spelled(policy, ("red", "blue"), {"eos_token_id": first})
    assert found(LOOKS, case(call, reference=reference)) == {}
    call, reference = spelled(policy, ("red", "blue and"), {"eos_token_id": second})
    seen = found(LOOKS, case(call, reference=reference))
    assert seen["eos-left-out"].values["left_out"] == [first]
    assert seen["eos-left-out"].severity == "breaks"
    call, reference = spelled(policy, ("red", "blue and"), {"eos_token_id": None})
    assert set(found(LOOKS, case(call, reference=reference))) == {"eos-unset"}


def test_a_greedy_baseline_is_not_trained_on() -> None:
    """ReMax compares a sampled completion with a greedy one, which need not vary."""
    greedy = generated(completions=SAME, config={"do_sample": False})
    sampled = generated(logprobs=USUAL)
    assert sampled.sequences is not None
    assert greedy.sequences is not None
    assert facts(greedy, sampled, scored({"input_ids": sampled.sequences})) == set()
    assert facts(greedy, scored({"input_ids": greedy.sequences})) == {"identical"}


def test_a_cap_that_all_completions_reach() -> None:
    """A short cap is a recipe as long as rewards tell the completions of a prompt apart."""
    cut, texts = ((5, 6, 7), (5, 6, 8), (5, 7, 7), (5, 8, 8)), ("one", "two", "three", "four")
    call = replace(generated(completions=cut), decoded={"kept": texts, "skipped": texts})
    for values, severity in (((0.0, 1.0, 0.0, 1.0), "differs"), ((0.0, 0.0, 0.0, 0.0), "breaks")):
        seen = found(LOOKS, case(call, rewarded(values)))
        assert seen["all-capped"].severity == severity


@pytest.mark.parametrize(
    ("config", "fact", "said"),
    [
        ({"suppress_tokens": [2, 5]}, "end-banned", "suppress_tokens forbids every eos (2)"),
        ({"bad_words_ids": [[2]]}, "end-banned", "bad_words_ids forbids every eos (2)"),
        ({"min_new_tokens": 3}, "end-banned", "min_new_tokens=3 forbids an end before it"),
        ({"bad_words_ids": [[2, 7]], "min_new_tokens": 2}, "all-capped", "none ended before it"),
    ],
)
def test_completions_that_cannot_end(config: Any, fact: str, said: str) -> None:
    """The advice was to raise the cap, which fills up whatever it is."""
    settings = {"eos_token_id": [2], **config}
    call = generated(((5, 6, 7), (5, 6, 8)), (0, 0), config=settings)
    assert said in found(LOOKS, case(call))[fact].sentence


def test_raising_the_cap_is_no_advice_where_nothing_may_repeat() -> None:
    call = generated(((5, 6, 7), (5, 6, 8)), (0, 0), config={"no_repeat_ngram_size": 2})
    causes = [c.cause for f in diagnose(case(call)).findings for c in f.causes]
    assert "gen.cap" not in causes


def test_what_is_only_a_recipe(policy: Policy) -> None:
    stray, reference = spelled(policy, ("red", "a <|im_start|>"))
    top_k = generated(config={"top_k": 50})
    for fact, step in (
        ("special-token", case(stray, reference=reference)),
        ("truncated-sampling", case(top_k)),
        ("truncated-sampling", case(generated(config={"repetition_penalty": 1.05}))),
    ):
        assert found(LOOKS, step)[fact].severity == "differs"
    harsh = generated(config={"repetition_penalty": 1.3})
    assert found(LOOKS, case(harsh))["truncated-sampling"].severity == "breaks"
