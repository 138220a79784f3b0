"""What every edge of a step says, on calls that can be followed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from joined_calls import (
    SEEN,
    made,
    picture,
    rendered,
    rewarded,
    rows,
    sampled,
    scored,
    step,
)
from torch import Tensor

from omni_grpo_core.doctor.checks.groups import look_at_rollouts_of_old
from omni_grpo_core.doctor.continuity import edges, look_at_edges, misplaced
from omni_grpo_core.doctor.evidence import Case, Evidence
from omni_grpo_core.doctor.rollouts import joined
from omni_grpo_core.trace.calls import TemplateCall

A, B, C = (1, *SEEN, 2), (1, *SEEN, 3), (1, 4)
ONE, TWO, THREE, FOUR = (5, 6, 9), (5, 9), (7, 8, 9), (8, 9)
IDS = (ONE, TWO, THREE, FOUR)
TEXTS = ("five six", "five", "seven eight", "eight")
ASKED = ("look at this one", "look at this one", "look at that one", "look at that one")


def inputs() -> dict[str, Tensor]:
    """Two prompts with a picture each, twice each."""
    return rows([A, A, B, B], [1, 1, 2, 2])


def whole() -> dict[str, Tensor]:
    """What is scored of it: prompts and completions."""
    ids = [(*p, *c) for p, c in zip((A, A, B, B), IDS, strict=True)]
    return rows(ids, [1, 1, 2, 2])


def healthy(
    taken: dict[str, Tensor] | None = None,
    given: dict[str, Tensor] | None = None,
    texts: Sequence[str] = TEXTS,
    asked: Sequence[str] = ASKED,
    before: Case | None = None,
    **columns: Any,
) -> Case:
    """A step; ``taken``: by generate, ``given``: to the scoring forward, ``texts`` and ``asked``:
    to the reward."""
    return step(
        rendered(*ASKED[::2]),
        made(ASKED, inputs()),
        sampled(inputs() if taken is None else taken, IDS, TEXTS),
        rewarded(asked, texts, **columns),
        scored(whole() if given is None else given),
        before=before,
        step="1" if before else "0",
    )


def only(case: Case) -> Evidence:
    [evidence] = look_at_edges(case)
    return evidence


def relations(case: Case) -> dict[str, str]:
    return {f"{e.start} -> {e.end}": e.relation for e in edges(case) if e.state == "ok"}


def test_a_healthy_step_has_every_edge_and_nothing_to_say() -> None:
    case = healthy()
    assert list(look_at_edges(case)) == []
    assert relations(case) == {
        "rendered text -> processor": "each 2 times",
        "processor -> generate": "",
        "generate -> the scoring forward": "",
        "generate -> reward length": "",
    }
    assert case.judged == {"text", "batch", "completion", "reward"}


def test_rows_may_be_cast_repeated_and_scored_in_another_order() -> None:
    """TRL shuffles between generate and scoring; everybody casts pixels."""
    taken = inputs()
    taken["pixel_values"] = taken["pixel_values"].to(torch.bfloat16)
    ids = [(*p, *c) for p, c in zip((B, A, A, B), (FOUR, ONE, TWO, THREE), strict=True)]
    given = rows(ids, [2, 1, 1, 2], left=False)
    given["pixel_values"] = given["pixel_values"].to(torch.bfloat16)
    processed = made(ASKED[::2], rows([A, B], [1, 2]))
    case = step(processed, sampled(taken, IDS, TEXTS), scored(given))
    assert list(look_at_edges(case)) == []
    assert relations(case) == {
        "processor -> generate": "each 2 times, cast to bfloat16",
        "generate -> the scoring forward": "in another order",
    }


def with_pixels(held: dict[str, Tensor], *pictures: Tensor) -> dict[str, Tensor]:
    return {**held, "pixel_values": torch.cat(pictures)}


ONES, TWOS = picture(1), picture(2)


@pytest.mark.parametrize(
    ("pictures", "fact", "bad", "says"),
    [
        ((2 * ONES, ONES, TWOS, TWOS), "edge-media-changed", [0], "times 2"),
        ((ONES, ONES, TWOS.flip(0), TWOS), "edge-media-changed", [2], "in reverse order"),
        ((TWOS, ONES, TWOS, ONES), "edge-media-exchanged", [0, 3], "has the image of row 2"),
    ],
)
@pytest.mark.parametrize("where", ["generate", "scoring"])
def test_media_that_change_between_calls(
    pictures: tuple[Tensor, ...], fact: str, bad: list[int], says: str, where: str
) -> None:
    to_generate = where == "generate"
    change = with_pixels(inputs() if to_generate else whole(), *pictures)
    found = only(healthy(taken=change) if to_generate else healthy(given=change))
    assert (found.fact, found.values["rows"]) == (fact, bad)
    assert says in found.sentence
    assert found.stage == ("batch" if to_generate else "media")


def test_pixels_of_the_step_before_are_not_taken_for_another_row_s() -> None:
    """Rows turn from step to step, so that what was left over is also another row's of this one:
    two causes were proved, and one was not true."""
    others = [(1, *SEEN, last) for last in (4, 4, 5, 5)]
    old = step(made(ASKED, rows(others, [3, 3, 1, 1])), step="0")
    stale = with_pixels(inputs(), picture(3), picture(3), ONES, ONES)
    found = only(healthy(taken=stale, before=old))
    assert (found.fact, found.values["rows"]) == ("edge-media-stale", [0, 1, 2, 3])
    assert "that the processor made in step 0" in found.sentence


def test_patches_rolled_out_of_their_rows_are_others_or_moved() -> None:
    """``roll`` on all patches of a call: by a picture and a half they are other rows', by one they
    are only moved."""
    pixels = inputs()["pixel_values"]
    for by, fact, says in (
        (1, "edge-media-changed", "patches of generate are those of the call before it, rolled by"),
        (24, "edge-media-exchanged", "of row 0 of generate are those of row 2"),
    ):
        found = only(healthy(taken=with_pixels(inputs(), pixels.roll(by, 0))))
        assert found.fact == fact
        assert says in found.sentence


def test_a_row_that_was_wrong_in_generate_is_not_blamed_again() -> None:
    """A media fault used to be found two or three times more, in what follows from it."""
    pictures = (2 * ONES, ONES, TWOS, TWOS)
    case = healthy(with_pixels(inputs(), *pictures), with_pixels(whole(), *pictures))
    assert only(case).values["edge"] == "processor -> generate"
    assert [e.rows for e in edges(case) if e.state == "not judged"] == [(0,)]


def without(held: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in held.items() if name not in names}


def test_pixels_or_grids_that_are_dropped() -> None:
    """TRL 1.16 hands video to generate and not to the scoring forward."""
    found = only(healthy(given=without(whole(), "pixel_values")))
    assert (found.fact, found.stage, len(found.values["rows"])) == (
        "edge-media-dropped", "media", 4
    )  # fmt: skip
    found = only(healthy(given=without(whole(), "image_grid_thw")))
    assert (found.fact, found.stage) == ("edge-grid-dropped", "media")
    found = only(healthy(taken=without(inputs(), "pixel_values", "image_grid_thw")))
    assert (found.fact, found.values["call"]) == ("edge-media-dropped", "generate")


def test_a_medium_that_is_gone_follows_from_nothing() -> None:
    """Grids that were exchanged before generate hid that scoring got no pixels at all."""
    pictures = (2 * ONES, ONES, TWOS, TWOS)
    given = without(whole(), "pixel_values", "image_grid_thw")
    found = look_at_edges(healthy(with_pixels(inputs(), *pictures), given))
    assert {(e.fact, e.values["call"]) for e in found} == {
        ("edge-media-changed", "generate"),
        ("edge-media-dropped", "the scoring forward"),
    }


def test_rows_in_another_order() -> None:
    """All tensors of the rows change places together: every row is whole, and answers in another's
    place."""
    found = only(healthy(taken=rows([B, A, A, B], [2, 1, 1, 2])))
    assert (found.fact, found.stage) == ("edge-order", "batch")
    assert "in the order 3 1 1 3" in found.sentence


def test_the_same_text_with_two_pictures_is_not_an_exchange() -> None:
    """One question about two clips is common, and two rows of equal content are one."""
    same = rows([A, A, A, A], [1, 2, 1, 2])
    texts = ["look"] * 4
    case = step(made(texts, same), sampled(same, IDS, TEXTS))
    assert list(look_at_edges(case)) == []


def test_one_question_about_several_pictures_is_processed_one_row_at_a_time() -> None:
    """Both rows have the words of the call that was last, and its picture is one of theirs: the
    second step, of the same pictures in another order, got what was made in the first."""

    def asked(order: Sequence[float], before: Case | None = None) -> Case:
        calls = [made(ASKED[:1], rows([A], [number])) for number in order]
        taken = rows([A] * 4, [number for number in order for _ in range(2)])
        return step(rendered(*ASKED[:2]), *calls, sampled(taken, IDS, TEXTS), before=before)

    first = asked([1, 2])
    assert not look_at_edges(first)
    assert not look_at_edges(asked([2, 1], before=first))


def test_what_an_earlier_step_left_over() -> None:
    first = healthy()
    other = rows([A, A, B, B], [3, 3, 4, 4])
    late = step(made(ASKED, other), sampled(inputs(), IDS, TEXTS), before=first)
    found = only(late)
    assert (found.fact, found.values["of"]) == ("edge-stale", "step 0")
    part = with_pixels(other, ONES, ONES, picture(4), picture(4))
    late = step(made(ASKED, other), sampled(part, IDS, TEXTS), before=first)
    found = only(late)
    assert (found.fact, found.values["rows"]) == ("edge-media-stale", [0, 1])
    assert "made in step 0" in found.sentence


def test_blank_media_are_no_left_over() -> None:
    """TRL's generate with every picture blanked was "proved" to have the picture of the step
    before, which was blanked too, and to have mixed up its groups: all prompts were one."""

    def asked(taken: dict[str, Tensor], before: Case | None = None) -> Case:
        return step(made(ASKED[:1] * 4, alike), sampled(taken, IDS, TEXTS), before=before)

    alike = rows([A] * 4, [1, 1, 2, 2])
    blank = with_pixels(alike, *[0 * ONES] * 4)
    assert not misplaced(asked(alike))
    late = asked(blank, before=asked(blank))
    assert only(late).fact == "edge-media-changed"
    assert misplaced(late), "what follows from its rows is not judged"


def test_rows_that_were_processed_once_may_be_used_again() -> None:
    """A loop over one batch, as people overfit it: only the first step calls the processor."""
    again = step(sampled(inputs(), IDS, TEXTS), before=healthy())
    assert list(look_at_edges(again)) == []
    assert relations(again) == {"processor -> generate": "made in step 0"}
    others = step(rendered("another"), sampled(inputs(), IDS, TEXTS), before=healthy())
    assert only(others).fact == "edge-stale"


@pytest.mark.parametrize(
    ("change", "fact", "says"),
    [
        (
            lambda h: {**h, "attention_mask": torch.ones_like(h["attention_mask"])},
            "mask",
            "keeps 4",
        ),
        (lambda h: without(h, "attention_mask"), "mask", "no attention mask"),
        (lambda h: {k: v[:, 1:] for k, v in h.items()}, "cut", "truncated on the left"),
        (lambda h: {k: v[:, :-1] for k, v in h.items()}, "cut", "truncated on the right"),
        (lambda h: {**h, "input_ids": h["input_ids"] + 1}, "ids", "plus 1"),
    ],
)
def test_ids_and_masks_that_change(change: Any, fact: str, says: str) -> None:
    long, short = (1, 4, 5, 6, 7, 8), (2, 3)
    prompts = rows([long, short])
    case = step(made(["long", "short"], prompts), sampled(change(prompts), (ONE, TWO), TEXTS[:2]))
    found = only(case)
    assert (found.fact, found.stage) == (f"edge-{fact}", "batch")
    assert says in found.sentence


@pytest.mark.parametrize(
    ("ids", "fact"),
    [
        ((5, 6, 9, 0, 0), None),  # padded after its end
        ((5, 6), None),  # the last token is only predicted
        ((5,), "edge-scored-cut"),
        ((5, 7, 9), "edge-scored-ids"),
    ],
)
def test_what_is_scored_is_what_was_sampled(ids: tuple[int, ...], fact: str | None) -> None:
    generate = sampled(rows([C]), [ONE], TEXTS[:1])
    case = step(generate, scored(rows([(*C, *ids)])))
    assert [e.fact for e in look_at_edges(case)] == ([] if fact is None else [fact])


def test_rows_of_something_else_are_not_judged() -> None:
    """A critic, an auxiliary loss: their rows are no completion of this rollout."""
    case = step(sampled(rows([C]), [ONE], TEXTS[:1]), scored(rows([(30, 31, 32, 33)])))
    assert list(look_at_edges(case)) == []
    assert [e.why for e in edges(case) if e.end == "the scoring forward"] == [
        "not rows of this rollout"
    ]


def test_equal_completions_are_not_told_apart_by_media_that_were_exchanged() -> None:
    """TRL 1.16, each prompt's pictures exchanged while scoring: rows of one text and one completion
    were taken for each other's, and their advantages called swapped, as if that were proved."""
    ids = (ONE, FOUR, ONE, THREE)
    inputs = rows([A] * 4, [1, 1, 2, 2])

    def at(*pictures: int) -> tuple[list[str], list[bool]]:
        given = scored(rows([(*A, *c) for c in ids], pictures))
        case = step(made(["look"] * 4, inputs), sampled(inputs, ids), given)
        [found] = joined(case).scored.values()
        return [e.fact for e in look_at_edges(case)], [one is not None for one in found]

    assert at(1, 1, 2, 2) == ([], [True] * 4)
    assert at(2, 2, 1, 1) == (["edge-media-exchanged"], [False, True, False, True])


def test_positions_of_sampling_and_scoring() -> None:
    """One shift of all positions is invisible to a rotary embedding; another distance is not."""
    prompt = torch.tensor([0.0, 1, 1, 2]).expand(3, 1, 4)
    generate = replace(sampled(rows([(1, 2, 3, 4)]), [ONE]), position_ids=prompt)
    ids = rows([(1, 2, 3, 4, *ONE)])

    def at(*places: float) -> list[str]:
        positions = torch.tensor(places).expand(3, 1, 7)
        case = step(generate, scored(ids, position_ids=positions))
        return [e.fact for e in look_at_edges(case)]

    assert at(0, 1, 1, 2, 3, 4, 5) == at(7, 8, 8, 9, 10, 11, 12) == []
    assert at(0, 1, 2, 3, 4, 5, 6) == ["edge-positions"]
    assert at(0, 1, 1, 2, 4, 5, 6) == ["edge-positions"]


# --------------------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("texts", "fact", "stage"),
    [
        ([f" {t}\n" for t in TEXTS], None, ""),
        ([f"{t}<|im_end|>" for t in TEXTS], None, ""),
        ([f"Q: why? A: {t}" for t in TEXTS], None, ""),  # a judge's template
        ([t.replace("v", "") for t in TEXTS], None, ""),  # characters removed
        (["1", "2", "3", "4"], "edge-text", "completion"),
        ([q + t for q, t in zip(ASKED, TEXTS, strict=True)], "edge-prompt-inside", "reward"),
        ((*TEXTS[1:], TEXTS[0]), "edge-arguments", "reward"),
        ((TEXTS[1], TEXTS[0], *TEXTS[2:]), "edge-arguments", "reward"),
        ((TEXTS[0], TEXTS[0], *TEXTS[2:]), "edge-arguments", "reward"),
        (TEXTS * 2, None, ""),  # each of two judges
        (ASKED, "edge-prompt-inside", "reward"),  # the question in the place of the answer
        (["fivsix", "fi", *TEXTS[2:]], None, ""),  # something was taken out of them
    ],
)
def test_the_texts_that_a_reward_gets(texts: Sequence[str], fact: str | None, stage: str) -> None:
    found = [(e.fact, e.stage) for e in look_at_edges(healthy(texts=texts))]
    assert found == ([] if fact is None else [(fact, stage)])


@pytest.mark.parametrize("paid", [0.0, 1.0])
def test_texts_in_capitals(paid: float) -> None:
    """Tags and golds in other letters: every reward was 0, and nothing was said of why."""
    said = [text.capitalize() for text in TEXTS]
    probe = {"right": {"role": "right", "form": "", "alone": 1.0}}
    given = rewarded(ASKED, [text.upper() for text in said])
    odd = step(
        made(ASKED, inputs()),
        sampled(inputs(), IDS, said),
        replace(given, values=(paid,) * len(said), probe=probe),
        scored(whole()),
    )
    found = only(odd)
    assert (found.stage, found.fact) == ("completion", "edge-text-case")
    assert found.severity == ("differs" if paid else "breaks")
    assert [one is not None for one in joined(odd).entries[0]] == [True] * len(said)


def test_texts_that_were_sampled_in_small_letters() -> None:
    """One of them beside others, and one whose placeholder alone is in capitals: that every text
    was in lower case stood before what had made HumanOmniV2's garbage."""
    kept = ["five <|AUDIO|>", *TEXTS[1:]]
    call = replace(sampled(inputs(), IDS, TEXTS), decoded={"kept": tuple(kept), "skipped": TEXTS})
    given = replace(rewarded(ASKED, TEXTS), values=(0.0,) * 4)
    assert list(look_at_edges(step(made(ASKED, inputs()), call, given, scored(whole())))) == []


@pytest.mark.parametrize("copied", [True, False])
def test_pictures_that_generate_repeats_rightly_are_followed(copied: bool) -> None:
    """``num_return_sequences`` with pictures was taken for scrambled in every family, so that R1-V
    could score with blank ones."""
    call = sampled(rows([A, B], [1, 2]), IDS, TEXTS)
    embeds = torch.tensor([[7], [7], [8], [8]] if copied else [[7], [8], [7], [8]])
    call = replace(
        call, config={**call.config, "num_return_sequences": 2}, digests={"inputs_embeds": embeds}
    )
    blank = with_pixels(whole(), *(0 * ONES for _ in range(4)))
    odd = step(made(ASKED[::2], rows([A, B], [1, 2])), call, scored(blank))
    assert [e.fact for e in look_at_edges(odd)] == ["edge-media-changed"] * copied


def test_a_system_message_that_all_prompts_share_tells_none_of_them() -> None:
    """Two micro-batches of the same prompts, turned, with many equal answers: each answer was taken
    for one of the other prompt, and a healthy run's golds were another row's."""
    system = "answer every question in turn: "
    texts = {A: system + "what is shown here", B: system + "who is it that speaks"}
    turns = [
        ({"role": "system", "content": system}, {"role": "user", "content": said[len(system) :]})
        for said in texts.values()
    ]
    calls: list[Any] = [TemplateCall(tuple(turns), {}, tuple(texts.values()), True)]
    for order, at in (((A, A, B, B), (0, 0, 3, 2)), ((B, B, A, A), (0, 3, 2, 0))):
        asked = [texts[prompt] for prompt in order]
        given = rows(order, [1 if prompt is A else 2 for prompt in order])
        gold = ["this" if prompt is A else "that" for prompt in order]
        calls += [
            made(asked, given),
            sampled(given, [IDS[n] for n in at], [TEXTS[n] for n in at]),
            rewarded(asked, [TEXTS[n] for n in at], gold=gold),
        ]
    assert list(look_at_edges(step(*calls))) == []


def test_ids_decoded_by_another_tokenizer_are_told_from_other_texts() -> None:
    """Another tokenizer's texts follow from the ids; golds, or texts of another run, do not."""
    ids = ((5, 6, 7, 8, 9), (5, 6, 7, 9), (5, 6, 7, 7, 9), (6, 5, 8, 9))
    words = {5: "red ", 6: "bar ", 7: "up ", 8: "down ", 9: ""}
    others = {5: "qux", 6: "zoo", 7: "kiw", 8: "jy", 9: ""}
    own, foreign = (["".join(to[i] for i in row) for row in ids] for to in (words, others))

    def proved(texts: Sequence[str]) -> list[bool]:
        generate = sampled(inputs(), ids, own)
        found = look_at_edges(step(made(ASKED, inputs()), generate, rewarded(ASKED, texts)))
        return [bool(e.values["by_another"]) for e in found]

    assert proved(foreign) == [True]
    assert proved(["qux"] * 4) == [False]
    assert proved([*foreign[1:], foreign[0]]) == [False]


def test_texts_of_the_rollout_before() -> None:
    """The list that collected them was filled after it was read: the same questions, and answers of
    the step before. Only a step that trains on its own rollout should score it."""
    old = ("one", "two", "three", "four")
    ids = ((1, 1, 9), (1, 2, 9), (1, 3, 9), (1, 4, 9))
    before = step(made(ASKED, inputs()), sampled(inputs(), ids, old), rewarded(ASKED, old))
    found = only(healthy(texts=old, before=before))
    assert (found.fact, found.stage) == ("edge-text-stale", "reward")
    assert "4 of 4 texts are of the rollout before" in found.sentence
    late = step(
        made(ASKED, inputs()), sampled(inputs(), IDS, TEXTS), rewarded(ASKED, old),
        before=before, step="1",
    )  # fmt: skip
    assert list(look_at_edges(late)) == [], "a pipeline that samples one rollout ahead"


def test_a_rollout_that_is_trained_on_in_the_place_of_the_next() -> None:
    """A buffer that was filled once: each rollout was sampled, rewarded and thrown away."""
    first = healthy()
    ids = ((1, 1, 9), (1, 2, 9), (1, 3, 9), (1, 4, 9))
    words = ("one", "two", "three", "four")
    rollout = (made(ASKED, inputs()), sampled(inputs(), ids, words), rewarded(ASKED, words))

    def found(before: Case, *trained: dict[str, Tensor]) -> list[tuple[str, str]]:
        later = step(*rollout, *map(scored, trained), before=before, step="1")
        return [(e.stage, e.fact) for e in look_at_rollouts_of_old(later)]

    new = rows([(*p, *c) for p, c in zip((A, A, B, B), ids, strict=True)], [1, 1, 2, 2])
    assert found(first, whole()) == [("completion", "rollout-unused")]
    assert found(first, new) == found(first, new, whole()) == [], "a replay beside its own"
    ahead = step(made(ASKED, inputs()), sampled(inputs(), IDS, TEXTS), rewarded(ASKED, TEXTS))
    assert found(ahead, whole()) == [], "one rollout ahead"


def test_texts_cut_at_a_length_are_not_texts_cut_at_a_tag() -> None:
    long = tuple(f"{t} <a>{t}</a> and so on" for t in TEXTS)

    def found(texts: Sequence[str]) -> list[str]:
        generate = sampled(inputs(), IDS, long)
        case = step(made(ASKED, inputs()), generate, rewarded(ASKED, texts))
        return [e.fact for e in look_at_edges(case)]

    assert found([text[: text.index("</a>") + 4] for text in long]) == []
    assert found([text[:9] for text in long]) == ["edge-text-cut"]


def test_texts_without_the_tags_that_are_paid() -> None:
    """``re.sub("<[^>]*>", "", text)`` before the rewards: "part of a completion, or made from one",
    while every reward was 0. One that is paid without tags gets its answer taken out of them."""
    whole = tuple(f"<think>So</think><answer>{t}</answer>" for t in TEXTS)

    def found(texts: Sequence[str], *right: str) -> list[str]:
        paid = {"alone": 1.0, "form": "", "problem_type": ""}
        given = {**paid, "role": "right"}
        cases = {str(n): {**given, "completion": text} for n, text in enumerate(right)}
        wrong = {**paid, "role": "foreign", "completion": "", "alone": 0.0}
        call = replace(rewarded(ASKED, texts), probe={**cases, "other": wrong})
        case = step(made(ASKED, inputs()), sampled(inputs(), IDS, whole), call)
        return [e.fact for e in look_at_edges(case)]

    tagged = ("<answer>x</answer>", "<think>y</think><answer>x</answer>")
    stripped = [f"So{text}" for text in TEXTS]
    assert found(stripped, *tagged) == ["edge-text-unmarked"]
    assert found(stripped, *tagged, "x") == []
    assert found([text.removeprefix("<think>So</think>") for text in whole], *tagged) == []


@pytest.mark.parametrize("lost", ["<", "<think", "<think>", "<think>So"])
def test_texts_without_their_first_tokens(lost: str) -> None:
    """``sequences[:, length + 1:]``: a format that begins with a tag paid nobody, and every text
    was taken for an answer cut out of its completion."""
    whole = tuple(f"<think>So {t}</think> <answer>{t} and so on</answer>" for t in TEXTS)

    def found(texts: Sequence[str]) -> list[str]:
        generate = sampled(inputs(), IDS, whole)
        case = step(made(ASKED, inputs()), generate, rewarded(ASKED, texts))
        return [e.fact for e in look_at_edges(case)]

    assert found([text.removeprefix(lost) for text in whole]) == ["edge-text-begin"]
    # what follows the thinking, or stands inside the last tags, is taken out on purpose
    for tag in ("</think>", "<answer>"):
        assert found([text.partition(tag)[2] for text in whole]) == []


def test_rewards_of_whole_groups_in_another_order_are_healthy_with_their_prompts() -> None:
    texts, asked = (*TEXTS[2:], *TEXTS[:2]), (*ASKED[2:], *ASKED[:2])
    case = healthy(texts=texts, asked=asked)
    assert list(look_at_edges(case)) == []
    assert "in another order" in relations(case)["generate -> reward length"]


def test_columns_of_other_rows() -> None:
    """Two prompts, each repeated: the gold of one beside the completions of the other."""
    assert list(look_at_edges(healthy(solution=["x", "x", "y", "y"], number=[1, 2, 3, 4]))) == []
    assert only(healthy(solution=["x", "y", "x", "y"])).fact == "edge-columns"
    # each prompt's own words beside the other's completions
    moved = healthy(problem=[ASKED[2], ASKED[2], ASKED[0], ASKED[0]])
    assert only(moved).fact == "edge-columns"


def test_columns_beside_prompts_whose_media_were_changed() -> None:
    """Pixels were resized for all rows alike: whose question a gold belongs to is told by the words
    as before, and was not looked at."""
    moved = healthy(
        taken=with_pixels(inputs(), *[2 * ONES] * 2, *[2 * TWOS] * 2),
        problem=[ASKED[2], ASKED[2], ASKED[0], ASKED[0]],
    )
    assert [e.fact for e in look_at_edges(moved)] == ["edge-media-changed", "edge-columns"]


def test_one_prompt_of_another_row_moves_no_columns() -> None:
    """One copy was replaced by another row's prompt: its columns were called those of another row,
    "proved", and the order of all prompts wrong, although the columns are as even as they were."""
    asked = (ASKED[0], ASKED[0], ASKED[2], ASKED[0])
    replaced = rows([A, A, B, A], [1, 1, 2, 1])
    case = step(
        made(asked, replaced),
        sampled(replaced, IDS, TEXTS),
        rewarded(asked, TEXTS, problem=[*ASKED], solution=["x", "x", "y", "y"]),
    )
    assert list(look_at_edges(case)) == []
    # one column of another row beside even prompts
    assert only(healthy(problem=[ASKED[0], ASKED[0], ASKED[2], ASKED[0]])).fact == "edge-columns"


def test_why_a_completion_ended_is_no_column_of_the_data() -> None:
    """ms-swift hands ``finish_reason`` to rewards: of two completions each of two prompts the first
    was capped, and answers were said to be compared with other rows' values."""
    by_completion, by_prompt = ["x", "y", "x", "y"], ["a", "a", "b", "b"]
    assert list(look_at_edges(healthy(finish_reason=by_completion, prompt_id=by_prompt))) == []
    assert only(healthy(finish_reason=by_completion)).fact == "edge-columns", "nothing is known"
    assert only(healthy(solution=by_completion, prompt_id=by_prompt)).fact == "edge-columns"


def test_a_processor_that_is_given_media_alone_makes_no_prompts() -> None:
    """ms-swift renders and tokenizes by itself: its prompts were said to be padding that the mask
    keeps, as the processor had made rows without any token."""
    bare = rows([()], [1]) | {"input_ids": torch.zeros(1, 0, dtype=torch.long)}
    taken = rows([A, A], [1, 1])
    assert list(look_at_edges(step(made([""], bare), sampled(taken, [ONE, TWO])))) == []


def test_positions_that_were_cut_to_whole_numbers_while_scoring() -> None:
    """As ms-swift cuts those of Qwen3-Omni's clips."""
    ids = rows([(1, 2, 3, 4, *ONE)])
    prompt = torch.tensor([0.0, 1.0, 2.5, 3.5]).expand(3, 1, 4)
    generate = replace(sampled(rows([(1, 2, 3, 4)]), [ONE]), position_ids=prompt)
    cut = torch.tensor([0, 1, 2, 3, 4, 5, 6]).expand(3, 1, 7)
    found = only(step(generate, scored(ids, position_ids=cut)))
    assert found.fact == "edge-positions"
    assert found.values["reproduced"] == ("cast-integer",)


def test_prompts_repeated_in_another_order_than_columns() -> None:
    """Prompts 1 2 1 2, columns 1 1 2 2."""
    tiled = rows([A, B, A, B], [1, 2, 1, 2])
    asked = (ASKED[0], ASKED[2]) * 2
    case = step(
        made(asked, tiled),
        sampled(tiled, IDS, TEXTS),
        rewarded(asked, TEXTS, solution=["x", "x", "y", "y"]),
    )
    found = only(case)
    assert (found.fact, found.stage) == ("edge-group-order", "completion")
