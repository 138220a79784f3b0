"""What hurts, measured before anything is explained.

A symptom is no finding: it blames nothing. The headline of a diagnosis is the finding that explains
the worst symptom; a symptom that no finding explains is itself the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_grpo_core.doctor.checks.degenerate import IMPOSSIBLE, against_reference
from omni_grpo_core.doctor.evidence import Case, Finding, Severity, raised_by
from omni_grpo_core.doctor.probed import number
from omni_grpo_core.doctor.rollouts import (
    Completion,
    completion_ids,
    first_step,
    ids_of,
    joined,
    until_end,
)
from omni_grpo_core.doctor.scored import scored_as_sampled
from omni_grpo_core.doctor.teacher_forced import tolerance
from omni_grpo_core.rewards.degenerate import degenerate, degenerate_text
from omni_grpo_core.trace.calls import (
    CallT,
    ForwardCall,
    GenerateCall,
    LossGradient,
    MediumSeen,
    ProcessorCall,
    RewardCall,
    StepSeen,
)
from omni_grpo_core.types import FinishReason, Modality, Stage

_BEFORE_TEXT: tuple[Stage, ...] = (
    "completion", "positions", "embeddings", "batch", "policy", "media", "text", "conversation",
)  # fmt: skip
"""What could make a completion garbage, the most direct first."""
_BEFORE_REWARD: tuple[Stage, ...] = ("reward", "parsed", *_BEFORE_TEXT, "sample")
_BEFORE_ADVANTAGE: tuple[Stage, ...] = ("advantage", *_BEFORE_REWARD)
_BEFORE_GRADIENT: tuple[Stage, ...] = ("gradient", "loss", "advantage", "logits", "reward")

_FEATURES: dict[str, Modality] = {
    "pixel_values": "image",
    "pixel_values_videos": "video",
    "input_features": "audio",
}
_INSTEAD = ("mm_encoder_outputs", "encoder_outputs", "inputs_embeds")
"""Inputs that replace the features of all modalities."""
_NATS = 0.1
"""Mean distance of two logprobs of one token from which ratios are off by a tenth."""
_GROUPS, _COMPLETIONS = 4, 8
"""Groups, and completions, without a difference in reward that are too many for chance."""
_MANY, _STEPS = 32, 3
"""Completions, and steps, without a reward that are too many for a policy that can earn one."""


@dataclass(frozen=True, slots=True)
class Symptom:
    """``name``: of its kind. ``sentence``: what was measured, with numbers. ``stages``: those that
    could explain it, the most direct first. ``severity``: ``"breaks"`` where a run that shows it
    learns nothing or something wrong, ``"differs"`` where a sound run may show it too. ``idle``:
    these steps taught nothing, so a run that shows it is not called healthy."""

    name: str
    sentence: str
    stages: tuple[Stage, ...]
    severity: Severity = "breaks"
    idle: bool = False

    def explained_by(self, finding: Finding) -> bool:
        """Whether a finding could be the reason: at one of the stages, and bad enough.

        >>> symptom = Symptom("rewards-zero", "all 8 rewards are 0", ("reward", "completion"))
        >>> symptom.explained_by(Finding("reward", (), ())), symptom.explained_by(
        ...     Finding("loss", (), ()))
        (True, False)
        """
        mild = finding.evidence and all(e.severity == "differs" for e in finding.evidence)
        return finding.stage in self.stages and not mild

    def closeness(self, finding: Finding) -> int:
        """Rank of the finding's stage among those that could explain it; 0: the most direct."""
        return self.stages.index(finding.stage)


def symptoms(cases: Sequence[Case]) -> tuple[Symptom, ...]:
    """What hurts in a run, the worst first; nothing that follows from an earlier one. ``cases``:
    its steps, of all ranks."""
    found = [symptom for measure in _MEASURES for symptom in measure(cases)]
    names = {symptom.name for symptom in found}
    left = [s for s in found if not names & _FOLLOWS.get(s.name, frozenset())]
    return tuple(sorted(left, key=lambda symptom: symptom.severity != "breaks"))


# --------------------------------------------------------------------------- a run that raised


def _raised(cases: Sequence[Case]) -> Iterator[Symptom]:
    for raised in filter(None, map(raised_by, cases)):
        stages = (raised.stage or "trace", *(s for s in _BEFORE_ADVANTAGE if s != raised.stage))
        yield Symptom("raised", raised.sentence, stages)


# --------------------------------------------------------------------------- completions


def _garbage(cases: Sequence[Case]) -> Iterator[Symptom]:
    """Degenerate completions. Where the checkpoint itself gives them, the run did not make them."""
    reasons: list[str] = []
    total, own = 0, True
    for case in cases:
        for call in case.generated:
            bad = degenerate_rows(call)
            total += len(_completions(call))
            reasons += bad.values()
            own &= not bad or checkpoints_own(case, call)
        bad_texts = degenerate_texts(case)
        total += len(bad_texts)
        reasons += filter(None, bad_texts)
        own &= not any(bad_texts)
    if total and 2 * len(reasons) >= total:
        sentence = f"{len(reasons)} of {total} completions are degenerate ({reasons[0]})"
        if own:
            sentence += "; the checkpoint itself gives them on the recorded prompts"
        yield Symptom("garbage", sentence, _BEFORE_TEXT, "differs" if own else "breaks")


def degenerate_rows(call: GenerateCall) -> dict[int, str]:
    """The first rule that each degenerate completion fails, by row: by raw ids, and by the text
    with special tokens where it was recorded."""
    rows, eos = _completions(call), ids_of(call.config.get("eos_token_id"))
    texts = call.decoded.get("kept", ())
    found = {}
    for row, tokens in enumerate(rows):
        stopped = bool(tokens) and tokens[-1] in eos
        # without a text only the rules on ids apply
        text = texts[row] if row < len(texts) else "?" * len(tokens[:1])
        finish: FinishReason = "stop" if stopped else "length"
        reasons = degenerate(tokens, text, finish_reason=finish, eos_ids=eos)
        if reasons:
            found[row] = reasons[0]
    return found


def degenerate_texts(case: Case) -> tuple[str, ...]:
    """For each text that rewards got, the first rule that it fails, or ``""``, where no call of
    generate was recorded: the rollout ran elsewhere."""
    if case.generated or case.trace.header.get("completions") == "files":
        return ()
    texts = next((call.completions for call in case.rewards if call.completions), ())
    return tuple(
        next(iter(degenerate_text(text)), "") if text.strip() else "empty: no text"
        for text in texts
    )


def checkpoints_own(case: Case, call: GenerateCall) -> bool:
    """Whether the checkpoint is likely to give these completions on the recorded prompts."""
    against = against_reference(case, call) if first_step(case) else None
    return against is not None and against <= IMPOSSIBLE


def _completions(call: GenerateCall) -> list[list[int]]:
    """Ids up to and including the first eos."""
    ids = completion_ids(call)
    if ids is None:
        return []
    kept = until_end(ids, ids_of(call.config.get("eos_token_id")))
    return [row[mask].tolist() for row, mask in zip(ids, kept, strict=True)]


def _capped(cases: Sequence[Case]) -> Iterator[Symptom]:
    rows: list[list[int]] = []
    for call in _all(cases, GenerateCall):
        eos = ids_of(call.config.get("eos_token_id"))
        rows += _completions(call)
        if not eos or any(row and row[-1] in eos for row in rows):
            return
    if len(rows) > 1:
        longest = max(map(len, rows))
        sentence = f"all {len(rows)} completions end at the cap ({longest} tokens), none in an eos"
        yield Symptom("capped", sentence, _BEFORE_TEXT, "differs")


# --------------------------------------------------------------------------- rewards


def _rewards(cases: Sequence[Case]) -> Iterator[Symptom]:
    """Functions that pay one value for different completions."""
    calls: dict[str, list[RewardCall]] = {}
    for call in _all(cases, RewardCall):
        calls.setdefault(call.name, []).append(call)
    stuck = {name: value for name, own in calls.items() if (value := _only(own)) is not None}
    if stuck and stuck.keys() == calls.keys():
        yield _all_stuck(calls, stuck, sum(bool(case.rewards) for case in cases))
        return
    for name, value in stuck.items():
        sentence = f"reward {name} pays {value:g} for each of {_count(calls[name])} completions"
        yield Symptom("reward-stuck", sentence, _BEFORE_REWARD, "differs")


def _all_stuck(
    calls: Mapping[str, Sequence[RewardCall]], stuck: Mapping[str, float], steps: int
) -> Symptom:
    """No reward ever moved. A policy that gets everything right has nothing to learn; one that gets
    nothing right yet is no fault of functions that are known to tell completions apart, until it
    has had many chances."""
    count = max(map(_count, calls.values()))
    zero = not any(stuck.values())
    paid = " and ".join(f"{name} pays {value:g}" for name, value in stuck.items())
    sentence = (
        f"all rewards are 0: {' and '.join(stuck)}, for each of {count} completions"
        if zero
        else f"no reward ever moves: {paid} for each of {count} completions"
    )
    name = "rewards-zero" if zero else "rewards-stuck"
    if all(_most(own) == stuck[name] for name, own in calls.items()):
        more = ", which is all that there is to earn"
        return Symptom(name, sentence + more, _BEFORE_REWARD, "differs")
    tells = all(map(_tells_apart, calls.values()))
    if tells:
        sentence += "; other completions are paid otherwise, as its probes show"
    few = _too_few_chances(count, steps) if tells else not zero and count < _COMPLETIONS
    return Symptom(name, sentence, _BEFORE_REWARD, "differs" if few else "breaks", idle=True)


def _only(calls: Sequence[RewardCall]) -> float | None:
    """The one value that different completions were paid; ``None`` where there were others."""
    values = {value for call in calls for value in call.values if value is not None}
    different = len({text for call in calls for text in call.completions}) > 1
    return values.pop() if different and len(values) == 1 and _count(calls) > 1 else None


def _count(calls: Sequence[RewardCall]) -> int:
    return sum(value is not None for call in calls for value in call.values)


def _tells_apart(calls: Sequence[RewardCall]) -> bool:
    """Whether a probed function pays more than one value."""
    values = {number(probed) for call in calls for probed in call.probe.values()}
    return len(values - {None}) > 1


def _most(calls: Sequence[RewardCall]) -> float:
    """The full reward of a function: the most that it paid for a probed gold, if it paid less for
    something else; where that is unknown the most that it paid at all, and at least 1."""
    paid = [value for p in calls[-1].probe.values() if (value := number(p)) is not None]
    if paid and min(paid) < max(paid):
        return max(paid)
    return max((1.0, *(v for call in calls for v in call.values if v is not None)))


def _flat(cases: Sequence[Case]) -> Iterator[Symptom]:
    """Groups whose completions all earn the same: their advantages are 0."""
    flat, groups, solved = 0, 0, 0
    calls: dict[str, list[RewardCall]] = {}
    for call in _all(cases, RewardCall):
        calls.setdefault(call.name, []).append(call)
    # a penalty is no mark of being right
    marks = [None if _penalises(own) else _most(own) for own in calls.values()]
    for case in cases:
        by_group: dict[str | int, list[tuple[float | None, ...]]] = {}
        for group, paid in _paid(case):
            by_group.setdefault(group, []).append(paid)
        sizes = [set(rows) for rows in by_group.values() if len(rows) > 1]
        groups += len(sizes)
        flat += sum(len(rows) == 1 for rows in sizes)
        # a group that gets everything right teaches nothing either, and is no complaint
        solved += sum(len(rows) == 1 and _is_full(next(iter(rows)), marks) for rows in sizes)
    if groups and flat == groups:
        sentence = (
            f"in all {groups} groups every completion earns the same: every advantage is 0"
            if groups > 1
            else "every completion of the only group earns the same: every advantage is 0"
        )
        open_ = groups - solved
        steps = sum(bool(case.rewards) for case in cases)
        few = _too_few_chances(max(map(_count, calls.values()), default=0), steps)
        idle = few and bool(open_) and all(map(_tells_apart, calls.values()))
        severity: Severity = "breaks" if open_ >= _GROUPS and not idle else "differs"
        yield Symptom("no-advantage", sentence, _BEFORE_ADVANTAGE, severity, idle=idle)


def _too_few_chances(completions: int, steps: int) -> bool:
    """Whether that is too little for functions that tell completions apart to be blamed."""
    return completions < _MANY or steps < _STEPS


def _penalises(calls: Sequence[RewardCall]) -> bool:
    """Whether a probed function pays something else more than any right answer, as one of length
    does."""
    probes = [p for p in calls[-1].probe.values() if isinstance(p, Mapping)]
    values = [(p.get("role") == "right", v) for p in probes if (v := number(p)) is not None]
    right = [value for is_right, value in values if is_right]
    return bool(right) and max(right) < max(value for _, value in values)


def _is_full(paid: Sequence[float | None], marks: Sequence[float | None]) -> bool:
    """Whether every function that marks answers pays all that it can."""
    if len(paid) != len(marks) or not any(mark is not None for mark in marks):
        return False
    return all(mark is None or value == mark for value, mark in zip(paid, marks, strict=True))


def _paid(case: Case) -> Iterator[tuple[str | int, tuple[float | None, ...]]]:
    """Group and rewards of each completion of a step; groups by prompt text where completions were
    not generated here. Nothing where functions got other rows."""
    step = joined(case)
    paid = [(one.group, tuple(step.rewards_of(one).values())) for one in step.completions]
    if paid and len({len(values) for _, values in paid}) == 1 and paid[0][1]:
        yield from paid
        return
    rows: dict[str, list[tuple[str, str, float | None]]] = {}
    for call in case.rewards:
        if call.error is not None or not (
            len(call.prompts) == len(call.completions) == len(call.values)
        ):
            return
        rows.setdefault(call.name, []).extend(
            zip(call.prompts, call.completions, call.values, strict=True)
        )
    texts = {tuple((prompt, text) for prompt, text, _ in given) for given in rows.values()}
    if len(texts) == 1:
        for given in zip(*rows.values(), strict=True):
            yield given[0][0], tuple(value for _, _, value in given)


# --------------------------------------------------------------------------- scores


def _disagreement(cases: Sequence[Case]) -> Iterator[Symptom]:
    """Generate's own logprobs of its tokens against the first scoring forward's, both recorded."""
    gaps: dict[Completion, Tensor] = {}
    allowed = 0.0
    for scored in (one for case in cases for one in scored_as_sampled(case)):
        call, count = scored.completion.call, len(scored.logprobs)
        if call.logprobs is None or scored.completion in gaps:
            continue
        sampled = call.logprobs[scored.completion.at, :count].float()
        gaps[scored.completion] = (sampled - scored.logprobs).abs()
        allowed = max(allowed, tolerance(scored.forward.modes).mean)
    apart = torch.cat([*gaps.values()]) if gaps else torch.zeros(0)
    mean = float(torch.nan_to_num(apart, nan=math.inf).mean()) if len(apart) else 0.0
    if mean > allowed:
        sentence = (
            f"sampling and scoring disagree by {mean:.3g} nats on average about the same "
            f"{len(apart)} tokens: the ratio of policy and sampler is off by a "
            f"factor of {math.exp(min(mean, 50.0)):.3g}"
        )
        stages: tuple[Stage, ...] = ("logits", "positions", "embeddings", "completion", "batch")
        severity: Severity = "breaks" if mean > _NATS else "differs"
        # media that only one of them gets are the last reason
        yield Symptom("scores-disagree", sentence, (*stages, "policy", "media"), severity)


# --------------------------------------------------------------------------- media


def _media(cases: Sequence[Case]) -> Iterator[Symptom]:
    """Features that were made and never arrive, or say nothing about the media."""
    for name, modality in _FEATURES.items():
        made = [call for call in _all(cases, ProcessorCall) if name in {*call.outputs, *call.large}]
        if not made:
            continue
        stages: tuple[Stage, ...] = ("embeddings", "batch", "media", "completion", "logits")
        sampling = [*_all(cases, GenerateCall)]
        scoring = [call for call in _all(cases, ForwardCall) if call.own]
        for calls, what in ((sampling, "sampling"), (scoring, "scoring")):
            if calls and not any(_given(call, name) for call in calls):
                sentence = f"the processor made {name}, and none of {len(calls)} calls for {what} "
                yield Symptom(f"{modality}-unused", f"{sentence}got it", stages)
        yield from _empty(made, name, modality, stages)


def _empty(
    made: Sequence[ProcessorCall], name: str, modality: Modality, stages: tuple[Stage, ...]
) -> Iterator[Symptom]:
    contents = {_content(call, name) for call in made}
    if all(_constant(call, name) for call in made):
        yield Symptom(
            f"{modality}-constant", f"{name} is one number in all {len(made)} processor calls",
            ("media", *stages),
        )  # fmt: skip
    elif len(contents) == 1 and None not in contents:
        media = {tuple(m.sha256 for m in _items(call, modality)) for call in made}
        if len(media) > 1:
            yield Symptom(
                f"{modality}-identical",
                f"{name} is the same for {len(media)} different inputs of the processor",
                ("media", *stages),
            )


def _items(call: ProcessorCall, modality: Modality) -> tuple[MediumSeen, ...]:
    return {"image": call.images, "video": call.videos, "audio": call.audios}[modality]


def _given(call: GenerateCall | ForwardCall, name: str) -> bool:
    names = {*call.inputs, *call.large, *call.keywords}
    return bool(names & {name, *_INSTEAD}) or call.error is not None


def _constant(call: ProcessorCall, name: str) -> bool:
    kept, described = call.outputs.get(name), call.large.get(name)
    if kept is not None:
        return kept.numel() > 1 and bool((kept == kept.flatten()[0]).all())
    return described is not None and described.low == described.high


def _content(call: ProcessorCall, name: str) -> object:
    digests, kept = call.digests.get(name), call.outputs.get(name)
    given = digests if digests is not None else kept
    return None if given is None else (tuple(given.shape), given.cpu().numpy().tobytes())


# --------------------------------------------------------------------------- the step


def _steps(cases: Sequence[Case]) -> Iterator[Symptom]:
    steps = [step for step in _all(cases, StepSeen) if sum(step.trainable.values())]
    ended = [step for step in steps if step.outcome != "never"]
    stepped = [step for step in ended if step.outcome == "stepped"]
    lost = [loss for step in steps for loss in step.losses if not math.isfinite(loss)]
    if lost:
        yield Symptom("loss-not-finite", f"backward was called on {lost[0]}", _BEFORE_GRADIENT)
    wild = [n for step in stepped for n in step.grad_norms.values() if not math.isfinite(n)]
    if wild:
        yield Symptom("gradient-not-finite", f"a gradient's norm is {wild[0]}", _BEFORE_GRADIENT)
    many = f"in {len(ended)} steps" if len(ended) > 1 else "in the only step"
    # an engine may keep gradients and weights of its own
    elsewhere = any(step.others or any(step.changed.values()) for step in ended)
    none = not any(any(step.grad_norms.values()) for step in stepped)
    if stepped and none and (any(step.grad_norms for step in stepped) or not elsewhere):
        # a loss that was read, and that pushes no token, may have had nothing to push
        weights = [gradient.weights for gradient in _all(cases, LossGradient)]
        idle = bool(weights) and not any(bool((one != 0).any()) for one in weights)
        few = idle and len(stepped) < _GROUPS
        severity: Severity = "differs" if few else "breaks"
        yield Symptom("no-gradient", f"every gradient is 0 {many}", _BEFORE_GRADIENT, severity)
    if ended and all(map(_still, ended)):
        # Adam moves nothing while no gradient has come yet
        unsure = none or all(_warming(step) or step.others for step in ended)
        severity = "differs" if unsure else "breaks"
        yield Symptom("weights-still", f"no weight changes {many}", _BEFORE_GRADIENT, severity)
    if steps and not ended and not any(map(_moved, steps)):
        count = sum(len(step.losses) for step in steps)
        sentence = f"backward was called {count} times, and no optimizer ever stepped"
        yield Symptom("never-stepped", sentence, ("gradient",))


def _moved(step: StepSeen) -> bool:
    return any(step.changed.values())


def _still(step: StepSeen) -> bool:
    """Whether no weight changed in the step, nor before it since the last one."""
    return bool(step.changed) and not _moved(step) and not any(one.between for one in step.layers)


def _warming(step: StepSeen) -> bool:
    """A scheduler has begun at 0."""
    return step.step == 0 and any(step.planned) and not any(step.rates)


def _all(cases: Sequence[Case], kind: type[CallT]) -> Iterator[CallT]:
    return (value for case in cases for value in case.values if isinstance(value, kind))


_MEASURES: tuple[Callable[[Sequence[Case]], Iterator[Symptom]], ...] = (
    _raised,
    _garbage,
    _disagreement,
    _media,
    _rewards,
    _flat,
    _steps,
    _capped,
)
"""The worst first: an earlier one is the likelier reason of a later one."""

_FOLLOWS: dict[str, frozenset[str]] = {
    "capped": frozenset({"garbage"}),
    "no-advantage": frozenset({"rewards-zero", "rewards-stuck"}),
    "no-gradient": frozenset({"rewards-zero", "rewards-stuck", "no-advantage"}),
    "gradient-not-finite": frozenset({"loss-not-finite"}),
    "weights-still": frozenset(
        {"rewards-zero", "rewards-stuck", "no-advantage", "no-gradient", "loss-not-finite"}
    ),
    "never-stepped": frozenset({"raised"}),
    # weights that are NaN, of which nothing can be sampled
    "raised": frozenset({"loss-not-finite", "gradient-not-finite"}),
}
"""What need not be said beside something that makes it so."""
