"""What must hold at each stage of a pass, checked from outside the stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.completions import pad_completions
from omni_grpo_core.core.forward import LibraryForward, library_keywords, token_logprobs
from omni_grpo_core.core.policy import Policy, library_generate
from omni_grpo_core.core.towers import audios_alone
from omni_grpo_core.pipeline import GENERATION_PROMPT, reference_text
from omni_grpo_core.rewards import Reward, columns_of
from omni_grpo_core.rewards.corpus import garbage
from omni_grpo_core.rewards.degenerate import degenerates
from omni_grpo_core.rewards.parse import gold_sections
from omni_grpo_core.tolerances import FLOAT32, HALF, POSITION
from omni_grpo_core.types import (
    MODALITIES,
    Batch,
    Check,
    Conversation,
    DeepstackEmbeddings,
    Embeddings,
    Logits,
    Malformed,
    Media,
    Parsed,
    Positions,
    Prompt,
    Rollout,
    Sample,
    Score,
)

BLANK = 0.5
"""Standard deviation, in grey levels of 255: below the step of 8-bit video."""
SILENT = 1e-4
"""Peak, -80 dB: near the step of 16-bit audio."""


def check_samples(samples: Sequence[Sample]) -> tuple[Check, ...]:
    ids = [sample.sample_id for sample in samples]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    missing = [ref.path for s in samples for ref in s.media if not Path(ref.path).is_file()]
    goldless = [s.sample_id for s in samples if isinstance(gold_sections(s.solution), Malformed)]
    return (
        Check("ids unique", not twice, ", ".join(twice) or f"{len(ids)} samples"),
        Check("media files there", not missing, ", ".join(missing) or "all"),
        Check("gold answers tagged", not goldless, ", ".join(goldless) or "all"),
    )


def check_text(
    conversations: Sequence[Conversation], prompts: Sequence[Prompt], processor: Any
) -> tuple[Check, ...]:
    """The template's text equals the ChatML that Qwen-Omni was trained on."""
    drifted = []
    for conversation, prompt in zip(conversations, prompts, strict=True):
        if prompt.text != reference_text(conversation, processor):
            drifted.append(prompt.sample_id)
    ends = all(prompt.text.endswith(GENERATION_PROMPT) for prompt in prompts)
    seen = {m: sum(p.placeholders[m] for p in prompts) for m in MODALITIES}
    media = [part.ref.modality for conversation in conversations for part in conversation.media]
    one_each = all(seen[modality] == media.count(modality) for modality in MODALITIES)
    return (
        Check(
            "one placeholder per medium", one_each, ", ".join(f"{n} {m}" for m, n in seen.items())
        ),
        Check("equals reference rendering", not drifted, ", ".join(drifted) or "ChatML"),
        Check("generation prompt", ends, "<|im_start|>assistant"),
    )


def check_media(media: Sequence[Media]) -> tuple[Check, ...]:
    """Frames and audio have content. One black or silent clip may be in the data; if all are, the
    decoder returns nothing."""
    pictures = [v.frames for m in media for v in m.videos]
    pictures += [image.pixels.float() for m in media for image in m.images]
    sounds = [audio.samples for m in media for audio in m.audios]
    blank = sum(bool(picture.std() < BLANK) for picture in pictures)
    silent = sum(bool(sound.abs().max() < SILENT) for sound in sounds)
    finite = all(bool(tensor.isfinite().all()) for tensor in [*pictures, *sounds])
    rates = sorted({f"{video.sample_fps:g}" for m in media for video in m.videos})
    return (
        Check("finite", finite, f"{len(pictures)} pictures and clips, {len(sounds)} sounds"),
        Check("pictures not blank", not pictures or blank < len(pictures), f"{blank} blank"),
        Check("sounds not silent", not sounds or silent < len(sounds), f"{silent} silent"),
        Check("sampled frame rate known", "0" not in rates, ", ".join(rates) + " fps"),
    )


def check_embeddings(
    policy: Policy, batch: Batch, made: Embeddings, library: Sequence[LibraryForward]
) -> tuple[Check, ...]:
    """Placeholders hold the towers' features, and each row is what transformers' own forward feeds
    to the text model for it alone."""
    width = batch.input_ids.shape[1]
    ours = [made.inputs_embeds[i, width - len(row.input_ids) :] for i, row in enumerate(batch.rows)]
    own = policy.model.get_input_embeddings().weight
    injected = different = True
    spans = 0
    for index, row in enumerate(batch.rows):
        for span, feature in zip(row.spans, made.features[index], strict=True):
            held = ours[index][span.start : span.start + span.length]
            token = own[row.input_ids[span.start]].to(held.dtype)
            injected &= bool(torch.equal(held, feature))
            different &= not bool(torch.equal(held, token.expand_as(held)))
            spans += 1
    same = [_close(a, b.inputs_embeds) for a, b in zip(ours, library, strict=True)]
    deepest = made.deepstack if isinstance(made, DeepstackEmbeddings) else ()
    for layer, depth in enumerate(deepest):
        theirs = [lib.deepstack[layer] for lib in library if lib.deepstack]
        same.append(_close(depth, torch.cat(theirs)))
    finite = bool(made.inputs_embeds.isfinite().all())
    return (
        Check("placeholders hold tower features", injected and different, f"{spans} spans"),
        Check("finite", finite, str(tuple(made.inputs_embeds.shape))),
        _all_close("equal transformers' forward, row by row", same),
    )


def check_positions(
    policy: Policy, batch: Batch, made: Positions, library: Sequence[LibraryForward]
) -> tuple[Check, ...]:
    """Positions equal transformers' own, and a video's time matches its true seconds."""
    width = batch.input_ids.shape[1]
    per_second = policy.model.config.position_id_per_seconds
    equal = timed = True
    steps: list[str] = []
    for index, row in enumerate(batch.rows):
        ours = made.position_ids[:, index, width - len(row.input_ids) :]
        equal &= bool(torch.equal(ours, library[index].position_ids.cpu()))
        for item, grid in enumerate(row.tensors.get("video_grid_thw", ())):
            step = float(row.tensors["video_second_per_grid"][item]) * per_second
            wanted = [k * step for k in range(grid[0])]
            if policy.family.whole_positions:
                wanted = [float(int(time)) for time in wanted]
            timed &= _times_are(_times(ours[0], row.spans, item), wanted)
            steps.append(f"{step:g}")
    detail = f"video time steps {', '.join(sorted(set(steps)))}" if steps else "no video"
    return (
        Check("equal transformers' own, row by row", equal, f"{len(batch.rows)} rows, exact"),
        Check("video time true to the clip", timed, detail),
    )


def _times_are(found: Sequence[float], wanted: Sequence[float]) -> bool:
    return len(found) == len(wanted) and all(
        abs(a - b) <= POSITION for a, b in zip(found, wanted, strict=True)
    )


def _times(time_axis: Tensor, spans: Sequence[Any], item: int) -> list[float]:
    where = [
        time_axis[span.start : span.start + span.length]
        for span in spans
        if span.modality == "video" and span.item == item
    ]
    times = sorted(set(torch.cat(where).tolist()))
    return [time - times[0] for time in times]


def check_logits(
    made: Logits, library: Sequence[LibraryForward], dtype: torch.dtype = torch.float32
) -> tuple[Check, ...]:
    """``dtype``: the model's own, which limits how exact the logits, always float32, are."""
    same = [_close(ours, lib.logits, dtype) for ours, lib in zip(made.values, library, strict=True)]
    return (
        Check("finite", bool(made.values.isfinite().all()), str(tuple(made.values.shape))),
        _all_close("row in the batch = row alone in transformers", same),
    )


def check_completions(
    policy: Policy, batch: Batch, greedy: Rollout, sampled: Rollout
) -> tuple[Check, ...]:
    """Greedy equals ``model.generate``, logprobs of sampling equal those of scoring, no garbage."""
    special = policy.suppressed.nonzero().flatten().tolist()
    rules = {"eos_ids": policy.eos_token_ids, "special_ids": special}
    broken, rare = (
        [f"{one.group_id}: {reason}" for one, reason in degenerates(rolled.completions, **rules)]
        for rolled in (greedy, sampled)
    )
    # greedy garbage means a broken policy; rare sampled garbage comes from the temperature
    few = len(rare) <= 0.1 * len(sampled.completions)
    ended = sum(completion.finish_reason == "stop" for completion in greedy.completions)
    drift = scoring_drift(policy, batch, sampled)
    return (
        Check("greedy not degenerate", not broken, _first(broken)),
        Check("sampled not degenerate", few, _first(rare)),
        Check("greedy completions end", 2 * ended > len(greedy.completions),
              f"{ended} of {len(greedy.completions)} in eos"),
        _greedy_equals_generate(policy, batch, greedy),
        _all_close("logprobs: sampling with cache = scoring without", [drift]),
    )  # fmt: skip


@torch.no_grad()
def scoring_drift(policy: Policy, batch: Batch, rolled: Rollout) -> tuple[bool, float]:
    """Whether the logprobs kept while sampling (with cache, from expanded prompts) are those of the
    scoring forward, and the largest difference."""
    tokens = pad_completions(rolled.completions, policy.pad_token_id)
    # greedy logprobs are kept at temperature 1
    scored = token_logprobs(policy, batch, tokens, rolled.temperature or 1.0)
    sampled = tokens.logprobs.float()
    kept = tokens.mask
    return _close(sampled[kept], scored[kept], policy.model.dtype)


def check_parsed(made: Sequence[Parsed | Malformed], least: float) -> tuple[Check, ...]:
    malformed = [f"{p.what} at {p.where}" for p in made if isinstance(p, Malformed)]
    share = 1 - len(malformed) / len(made)
    detail = f"{share:.2f} of {len(made)}, wanted {least:g}"
    return (
        Check("well-formed", share >= least, detail + "".join(f"; {m}" for m in malformed[:1])),
    )


def check_rewards(
    made: Mapping[str, tuple[Score, ...]],
    rewards: Sequence[Reward],
    samples: Sequence[Sample],
    least: float,
) -> tuple[Check, ...]:
    unscored = [
        f"{name}: {score.reason}"
        for name, scores in made.items()
        for score in scores
        if score.value is None
    ]
    gold = gold_sections(samples[0].solution)
    answer = "" if isinstance(gold, Malformed) else gold["answer"].text
    texts = garbage(answer, samples[0].solution)
    columns = columns_of([samples[0]] * len(texts))
    paid = [
        f"{reward.__name__} pays {value:g} for {kind}"
        for reward in rewards
        for kind, value in zip(
            texts, reward([""] * len(texts), list(texts.values()), **columns), strict=True
        )
        if value
    ]
    right = [score.value for score in made["accuracy"] if score.value is not None]
    accuracy = sum(right) / max(len(right), 1)
    return (
        Check("garbage earns nothing", not paid, _first(paid)),
        Check("every completion scored", not unscored, _first(unscored)),
        Check("accuracy", accuracy >= least, f"{accuracy:.2f}, wanted {least:g}"),
    )


def _greedy_equals_generate(policy: Policy, batch: Batch, greedy: Rollout) -> Check:
    """One row of each audio mode gives the same ids through transformers' ``generate``.

    In half precision two correct computations may choose differently where the margin is small, so
    only the first token is compared there.
    """
    exact = policy.model.dtype == torch.float32
    # ``generate`` takes one flag for all videos
    first = {
        row.audio_in_video: index
        for index, row in reversed(list(enumerate(batch.rows)))
        if isinstance(row.audio_in_video, str)
    }
    wrong = []
    for mode, index in first.items():
        ours = greedy.completions[index].token_ids
        theirs = _generate(policy, batch, index, len(ours) if exact else 1)
        if ours[: len(theirs)] != theirs:
            wrong.append(f"{mode}: {batch.rows[index].sample_id}")
    length = "whole" if exact else "first token"
    return Check("greedy = transformers' generate", not wrong,
                 ", ".join(wrong) or f"{', '.join(first)} ({length})")  # fmt: skip


def _generate(policy: Policy, batch: Batch, index: int, steps: int) -> tuple[int, ...]:
    row = batch.rows[index]
    with audios_alone(policy):
        output = library_generate(
            policy,
            library_keywords(policy, row),
            max_new_tokens=steps,
            suppress_tokens=policy.suppressed.nonzero().flatten().tolist(),
        )
    return tuple(output[0, len(row.input_ids) :].tolist())


def _close(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> tuple[bool, float]:
    """Whether two float tensors agree to their dtype's tolerance, and the largest difference."""
    if a.shape != b.shape:
        return False, float("inf")
    difference = (a.float() - b.float().to(a.device)).abs()
    if not difference.numel():
        return True, 0.0
    worst = float(difference.max())
    if (dtype or a.dtype) == torch.float32:
        close = FLOAT32
        return bool(torch.allclose(a, b.to(a.device), rtol=close.rtol, atol=close.atol)), worst
    return worst <= HALF.worst and float(difference.mean()) <= HALF.mean, worst


def _all_close(name: str, results: Sequence[tuple[bool, float]]) -> Check:
    worst = max((difference for _, difference in results), default=0.0)
    return Check(name, all(ok for ok, _ in results), f"largest difference {worst:.1e}")


def _first(found: Sequence[str]) -> str:
    return f"{len(found)}: {found[0]}" if found else "none"
