"""Experiments on the checkpoint with a recorded rollout's inputs, which prove a cause or clear it.

Looks only compare what was recorded. Experiments generate again greedily in eval mode and in the
recorded mode, with the cache and without; score the recorded completion on the recorded positions
and on right ones, with its history and without; and remove each modality. Seconds on a small model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from omni_grpo_core.core.dialect import modes_restored, switch_checkpointing
from omni_grpo_core.core.policy import Policy, generating, library_generate
from omni_grpo_core.doctor.checks.completion import generated_rollouts
from omni_grpo_core.doctor.checks.logits import temperature_of
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.experiment import MEDIA, Experiment, Outcome, prompt_of, recorded_inputs
from omni_grpo_core.doctor.experiments_media import modalities
from omni_grpo_core.doctor.rollouts import completion_ids, until_end
from omni_grpo_core.doctor.teacher_forced import (
    Replayed,
    diff,
    replay_rollout,
    text_hidden,
    tolerance,
)
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.trace.calls import GenerateCall

_MOST_TOKENS = 32


def experiments_on(case: Case) -> tuple[Experiment, ...]:
    """Every experiment on the step's first rollout; none without a reference or a rollout.

    The model's mode is restored.
    """
    call = next((call for _, call in generated_rollouts(case) if call.error is None), None)
    if case.reference is None or call is None or call.sequences is None:
        return ()
    policy = case.reference.policy
    not_kept = sorted(set(MEDIA) & set(call.large))
    if not_kept:
        why = f"{', '.join(not_kept)} of the rollout were too large to keep: no experiment possible"
        fix = "record one step with a larger max_tensor_bytes"
        return (Experiment("gen.checkpointing-train", "open", f"{why}; {fix}"),)
    found: list[Experiment] = []
    for trial in (_modes_of_generate, _history, _positions, modalities):
        found += trial(case, policy, call)
    return tuple(found)


def run_experiments(cases: Sequence[Case]) -> tuple[Experiment, ...]:
    """The experiments on the first step of a run that has a rollout.

    Raises:
        ConfigError: no checkpoint was given, or no rollout was recorded.
    """
    for case in cases:
        found = experiments_on(case)
        if found:
            return found
    known = any(case.reference is not None for case in cases)
    raise ConfigError(
        "--experiments",
        got="a recording without a whole rollout" if known else "no checkpoint to test causes on",
        want="a recorded rollout and the checkpoint that it was made with",
        fix="record one complete step" if known else "pass the checkpoint with --checkpoint DIR",
    )


# --------------------------------------------------------------------------- generate again


def _modes_of_generate(case: Case, policy: Policy, call: GenerateCall) -> Iterator[Experiment]:
    """Greedily, in eval mode with the cache; without the cache; and in the recorded mode."""
    with generating(policy.model):
        right = _greedy(policy, call, use_cache=True)
        slow = _greedy(policy, call, use_cache=False)
    yield _compared(
        policy, call, right, slow, "logits.cache-differs",
        "greedily in eval mode, with the cache and without",
        "this version's cache is sound", "decoding with the cache gives different answers",
    )  # fmt: skip
    if not (call.modes.training or call.modes.checkpointing):
        yield Experiment(
            "gen.checkpointing-train",
            "cleared",
            "generate was recorded in eval mode: gradient checkpointing had no effect",
        )
        return
    state = "on" if call.modes.checkpointing else "off"
    how = f"greedily in eval mode and as recorded (train mode, gradient checkpointing {state})"
    with modes_restored(policy.model):
        if call.modes.checkpointing:
            switch_checkpointing(policy.model, True)
        policy.model.train(call.modes.training)
        try:
            recorded = _greedy(policy, call, use_cache=bool(call.config.get("use_cache", True)))
        except Exception as error:  # however this version rejects the mode, that is the result
            text = _quoted(policy, right[0])
            found = f"{how}: the recorded mode alone raises {type(error).__name__}: {error}"
            yield Experiment(
                "gen.checkpointing-train", "proved", f"{found}; eval mode answers {text}",
                {"rows": len(right), "of": len(right), "eval": text, "other": ""},
            )  # fmt: skip
            return
    yield _compared(
        policy, call, right, recorded, "gen.checkpointing-train", how,
        "the recorded mode does no harm in this version of transformers",
        "the recorded mode alone changes the answers",
    )  # fmt: skip


def _compared(
    policy: Policy, call: GenerateCall, right: Tensor, other: Tensor, cause: str, how: str,
    same: str, differs: str,
) -> Experiment:  # fmt: skip
    width = min(right.shape[1], other.shape[1])
    kept = until_end(right[:, :width], policy.eos_token_ids)
    off = ((right[:, :width] != other[:, :width]) & kept).any(1)
    count, rows = int(off.sum()), len(right)
    if not count:
        return Experiment(cause, "cleared", f"{how}: all {rows} answers are equal; {same}")
    row = int(off.nonzero()[0])
    texts = [_quoted(policy, ids[row]) for ids in (right, other)]
    return Experiment(
        cause,
        "proved",
        f"{how}: {count} of {rows} answers differ; {differs}: {texts[0]} became {texts[1]}",
        {"rows": count, "of": rows, "eval": texts[0], "other": texts[1]},
    )


def _quoted(policy: Policy, ids: Tensor) -> str:
    kept = until_end(ids[None], policy.eos_token_ids)[0]
    text = policy.decode(ids[kept].tolist())
    return repr(text if len(text) <= 80 else text[:79] + "…")


def _greedy(policy: Policy, call: GenerateCall, *, use_cache: bool) -> Tensor:
    """Completion ids, (N, at most 32), with the recorded inputs but greedy decoding."""
    width = 0 if call.sequences is None else _width(call)
    with torch.no_grad():
        sequences = library_generate(
            policy,
            recorded_inputs(policy, call),
            use_cache=use_cache,
            max_new_tokens=min(_MOST_TOKENS, width),
            suppress_tokens=policy.suppressed.nonzero()[:, 0].tolist(),
        )
    return sequences[:, call.inputs["input_ids"].shape[1] :].cpu()


def _width(call: GenerateCall) -> int:
    ids = completion_ids(call)
    return 0 if ids is None else int(ids.shape[1])


# --------------------------------------------------------------------------- teacher-forcing


def _history(case: Case, policy: Policy, call: GenerateCall) -> Iterator[Experiment]:
    """The recorded tokens scored with their whole history, and from the token before alone."""
    known = replay_rollout(case, call)
    if known is None or not int(known.mask[:, 1:].sum()):
        return
    temperature = temperature_of(call)
    counted = known.mask[:, 1:]
    whole = known.logprobs(temperature)[:, 1:]
    alone = _without_history(policy, call, known, temperature)
    with_it, without = float(whole[counted].mean()), float(alone[counted].mean())
    own = None if call.logprobs is None else call.logprobs[:, 1:]
    values = {"with_history": with_it, "without": without}
    found = (
        f"the recorded completions' tokens have a mean logprob of {with_it:.2f} with prompt and "
        f"history, {without:.2f} from the token before alone"
    )
    if own is not None and own.shape == whole.shape:
        near = diff(own, whole, counted)[0]
        far = diff(own, alone, counted)[0]
        values |= {"from_history": near, "from_alone": far}
        found += f"; generate's own are {near:.2g} from the former, {far:.2g} from the latter"
        without_it = far < near
    else:
        without_it = without > with_it
    outcome: Outcome = "proved" if without_it else "cleared"
    end = "they were sampled without history" if without_it else "history was seen"
    yield Experiment("gen.history-lost", outcome, f"{found}: {end}", values)


def _without_history(
    policy: Policy, call: GenerateCall, known: Replayed, temperature: float
) -> Tensor:
    """Logprob of each token but the first, given only the one before it, (N, K - 1)."""
    rows, width = known.ids.shape
    tokens = known.ids[:, :-1].reshape(-1, 1)
    with torch.no_grad():
        embeds = policy.model.get_input_embeddings()(tokens.to(policy.device))
    start = torch.tensor(
        [
            call.step_positions[at] if at < len(call.step_positions) else at
            for at in range(width - 1)
        ]
    )
    where = start.repeat(rows)[None, :, None].expand(3, -1, -1)
    hidden = text_hidden(policy, embeds, where, torch.ones_like(tokens))
    with torch.no_grad():
        scores = policy.model.lm_head(hidden[:, -1]).float().cpu() / temperature
    chosen: Tensor = scores.log_softmax(-1).gather(1, known.ids[:, 1:].reshape(-1, 1))
    return chosen.view(rows, width - 1)


def _positions(case: Case, policy: Policy, call: GenerateCall) -> Iterator[Experiment]:
    """The recorded completion on the recorded positions and on the reference's."""
    known = replay_rollout(case, call)
    prompt = prompt_of(policy, recorded_inputs(policy, call))
    if known is None or prompt is None or call.inputs_embeds is None or call.position_ids is None:
        return
    ids = known.ids
    if len(ids) != len(prompt.embeds):
        return
    own = known.logprobs()
    right = prompt.scored(policy, call.inputs_embeds, ids, known.mask)
    mean, worst = diff(own, right, known.mask)
    allowed = tolerance(call.modes, policy)
    values = {"mean": mean, "worst": worst}
    if mean <= allowed.mean and worst <= allowed.worst:
        yield Experiment(
            "pos.stale-deltas", "cleared",
            "the recorded completion has the same logprobs on the recorded positions and on the "
            "reference's", values,
        )  # fmt: skip
        return
    kept = prompt.mask[None].bool()
    same = torch.equal(
        torch.where(kept, call.position_ids[-3:].long(), 0),
        torch.where(kept, prompt.positions.long(), 0),
    )
    yield Experiment(
        "pos.stale-deltas" if same else "pos.prompt",
        "proved",
        f"the recorded positions ({'of the completion' if same else 'of the prompt'}) change the "
        f"recorded completion's logprobs by {mean:.2g} on average, {worst:.2g} at worst, compared "
        "with right positions",
        values,
    )
