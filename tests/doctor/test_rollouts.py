"""How the calls of a step are joined: by content, whatever their number and order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from joined_calls import (
    PAD,
    SEEN,
    made,
    rendered,
    rewarded,
    rows,
    sampled,
    scored,
    step,
    weighed,
)

from omni_grpo_core.doctor.asked import asked
from omni_grpo_core.doctor.rollouts import (
    Completion,
    batches,
    is_decode,
    joined,
    prompts_of,
    rollouts,
    rows_of_gradient,
)

A, B = (1, *SEEN, 2), (3, 4)
"""A prompt with a picture, and a shorter one without."""
ONE, TWO, THREE, FOUR = (5, 6, 9), (5, 9), (7, 8, 9), (8, 9)
TEXTS = ("five six", "five", "seven eight", "eight")


def numbers(found: tuple[Completion | None, ...]) -> list[int | None]:
    return [None if c is None else c.at for c in found]


def whole() -> tuple[object, ...]:
    """Two prompts rendered at once, two completions each, scored in two chunks, shuffled."""
    prompts = rows([A, A, B, B], [1, 1])
    generate = sampled(prompts, (ONE, TWO, THREE, FOUR), TEXTS)
    first = scored(rows([(*B, *THREE), (*A, *TWO)], [1], left=False))
    second = scored(rows([(*A, *ONE), (*B, *FOUR)], [1]))
    return (
        rendered("look", "read"),
        made(["look", "look", "read", "read"], prompts),
        generate,
        rewarded(["look", "look", "read", "read"], TEXTS),
        first,
        second,
        weighed(1, torch.ones(2, 2)),
    )


def test_rows_are_joined_through_a_shuffle_and_chunks() -> None:
    """A trainer shuffled rows between generate and scoring: its rewards were joined with other
    rows' scores by order."""
    case = step(*whole())
    found = joined(case)
    assert [c.group for c in found.completions] == [0, 0, 1, 1]
    assert [c.sampled for c in found.completions] == [ONE, TWO, THREE, FOUR]
    assert numbers(found.entries[0]) == [0, 1, 2, 3]
    assert [numbers(found.scored[f]) for f in case.forwards] == [[2, 1], [0, 3]]
    assert numbers(rows_of_gradient(case, case.gradients[0])) == [0, 3]
    assert found.rewards_of(found.completions[3]) == {"length": 5.0}
    assert len(rollouts(case)) == 1
    assert len(batches(case)[0].values) == 7


def test_a_prompt_s_media_tell_its_group() -> None:
    """Two rows of one text and two pictures are two prompts; a text without knows none."""
    prompts = rows([A, A, A, A], [1, 1, 2, 2])
    generate = sampled(prompts, (ONE, TWO, ONE, TWO), TEXTS)
    case = step(generate, scored(rows([(*A, *ONE)], [2])))
    assert prompts_of(case, generate) == [0, 0, 1, 1]
    assert numbers(joined(case).scored[case.forwards[0]]) == [2]
    # one picture for two rows: whose it is cannot be told
    fewer = sampled(rows([A, A], [1]), (ONE, TWO))
    assert prompts_of(step(fewer), fewer) is None
    assert prompts_of(step(generate, placeholders=""), generate) == [0, 0, 1, 1]


def test_num_return_sequences_repeats_rows_inside_generate() -> None:
    generate = sampled(rows([A, B], [1]), (ONE, TWO, THREE, FOUR))
    found = joined(step(generate)).completions
    assert [(c.at, c.group, c.prompt.at) for c in found] == [(0, 0, 0), (1, 0, 0), (2, 1, 1),
                                                            (3, 1, 1)]  # fmt: skip


def test_equal_completions_of_a_group_are_each_rewarded_and_scored_once() -> None:
    generate = sampled(rows([B, B, B]), (ONE, ONE, TWO), ("a", "a", "b"))
    rest = scored(rows([(*B, *ONE)])), scored(rows([(*B, *ONE), (*B, *TWO)]))
    old = scored(rows([(*B, *ONE), (*B, *ONE)]), grad=False)
    case = step(generate, rewarded(["q"] * 3, ["a", "a", "b"]), old, *rest)
    found = joined(case)
    assert numbers(found.entries[0]) == [0, 1, 2]
    assert [numbers(found.scored[f]) for f in case.forwards] == [[0, 1], [0], [1, 2]]


def test_a_reward_is_of_what_was_sampled_before_it() -> None:
    """Two micro-batches had the same words twice: the first one's rewards went to the second's
    completions, which answer another prompt, and a healthy loop had scrambled its columns."""
    first = sampled(rows([A, B], [1]), (ONE, TWO), ("a", "b"))
    again = sampled(rows([B, A], [1]), (ONE, TWO), ("a", "b"))
    case = step(first, rewarded(["q"] * 2, ["b", "a"]), again, rewarded(["q"] * 2, ["a", "b"]))
    one, two = ([c.call for c in found if c is not None] for found in joined(case).entries)
    assert (one, two) == ([first] * 2, [again] * 2)


def test_a_rollout_of_an_earlier_step_is_scored_in_a_later_one() -> None:
    """Several updates on a rollout: the later steps have no completions of their own."""
    first = step(*whole())
    again = step(scored(rows([(*B, *THREE)])), before=first)
    (known,) = joined(again).scored[again.forwards[0]]
    assert known is joined(first).completions[2]
    assert joined(again).rewards_of(known) == {"length": 11.0}


def test_micro_batches_that_share_no_content_are_rollouts_of_their_own() -> None:
    """Render once, generate twice, was one rollout with half of the rows."""
    alone = [
        (
            rendered(text),
            made([text], rows([prompt])),
            sampled(rows([prompt]), [ids], [text]),
            rewarded([text], [text]),
        )
        for text, prompt, ids in (("read", B, ONE), ("write", (3, 5), TWO))
    ]
    assert len(rollouts(step(*alone[0], *alone[1]))) == 2
    mixed = (rendered("read", "write"), *alone[0][1:], *alone[1][1:])
    (one,) = rollouts(step(*mixed))
    assert len(one.generates) == len(one.rewards) == 2
    assert one.generated is None


def test_a_micro_batch_that_was_scored_is_over_before_the_next_is_rendered() -> None:
    """verl scores each micro-batch before it samples the next: two of four rows were one batch of
    four conversations, and a clip of the second was "of another row" in the first."""
    parts = [
        (rendered(text), made([text], rows([prompt])), sampled(rows([prompt]), [ids], [text]),
         rewarded([text], [text]), scored(rows([(*prompt, *ids)])))
        for text, prompt, ids in (("read", B, ONE), ("write", (3, 5), TWO))
    ]  # fmt: skip
    assert [len(one.values) for one in batches(step(*parts[0], *parts[1]))] == [5, 5]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("five<x>", True),  # special tokens kept
        ("  five<x>\n", True),  # not stripped
        ("five", True),  # special tokens skipped
        ("five<x><|im_end|>", True),  # with its eos
        ("five<x><|im_end|><|endoftext|><|endoftext|>", True),  # padded after it
        ("five<x> six", False),
        ("fiv", False),
        ("look five<x>", False),
    ],
)
def test_the_decodes_of_a_completion(text: str, same: bool) -> None:
    generate = replace(
        sampled(rows([B]), [TWO]), decoded={"kept": ("five<x>",), "skipped": ("five",)}
    )
    (completion,) = joined(step(generate)).completions
    assert is_decode(text, completion) == same


def test_scored_rows_reach_the_eos_at_least() -> None:
    """Padding after the eos may be scored, and the last token need not be fed, as nothing is
    predicted from it; a completion without its end is another one."""
    generate = sampled(rows([B, B]), (TWO, (7, 7, 7)))
    rows_ = [(*B, *TWO, PAD), (*B, *TWO), (*B, *TWO[:1]), (*B, 7, 7), (*B, 7)]
    case = step(generate, scored(rows(rows_, left=False)))
    assert numbers(joined(case).scored[case.forwards[0]]) == [0, 0, 0, 1, None]


def test_a_completion_may_be_masked_out() -> None:
    """TRL's ``mask_truncated_completions`` takes a capped completion out of the attention too."""
    generate = sampled(rows([B, B]), ((7, 7, 7), TWO))
    inputs = rows([(*B, 7, 7, 7), (*B, *TWO)], left=False)
    inputs["attention_mask"][0, len(B) :] = 0
    case = step(generate, scored(inputs))
    assert numbers(joined(case).scored[case.forwards[0]]) == [0, 1]


def test_a_reward_function_may_name_its_arguments_as_it_likes() -> None:
    generate = sampled(rows([B, B]), (ONE, TWO), ("a", "b"))
    other = replace(rewarded([], [], response="b", answer="C"), values=(1.0,))
    case = step(generate, other)
    assert numbers(joined(case).entries[0]) == [1]
    assert joined(case).rewards_of(joined(case).completions[1]) == {"length": 1.0}


def test_a_completion_is_no_column_of_its_row() -> None:
    """``judge(completion, answer)`` handed its own first argument over as a column: the tags that
    the policy had written were taken for those of a gold, and the prompt did not ask for them."""
    case = step(
        rendered("read"),
        made(["read"], rows([B])),
        sampled(rows([B]), [ONE], ["<a>"]),
        replace(rewarded([], [], response="<a>", answer="C"), values=(1.0,)),
    )
    assert [one.row for one in asked(case)] == [{"answer": "C"}]


def test_a_gold_that_a_completion_repeats_is_a_column_still() -> None:
    """Of rows that differ in nothing else, those answered right had no gold any more: a completion
    of another prompt among them was no longer found."""
    case = step(
        rendered("read"),
        made(["read"], rows([B])),
        sampled(rows([B, B]), (ONE, TWO), ("C", "D")),
        rewarded([], ["C", "D"], answer=["C", "C"], response=["C", "D"]),
    )
    assert [one.row for one in asked(case)] == [{"answer": "C"}] * 2
