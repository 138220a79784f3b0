"""Each modality removed: do the recorded scores equal those without it?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.experiment import MEDIA, Experiment, Prompt, prompt_of, recorded_inputs
from omni_grpo_core.doctor.teacher_forced import text_hidden
from omni_grpo_core.trace.calls import GenerateCall

_CAUSES = {
    "video": "media.video-dropped",
    "audio": "media.audio-dropped",
    "image": "media.images-dropped",
}


def modalities(case: Case, policy: Policy, call: GenerateCall) -> Iterator[Experiment]:
    """Each modality blanked and left out: whether the recorded scores equal those without it."""
    recorded = call.first_logits
    inputs = recorded_inputs(policy, call)
    whole = prompt_of(policy, inputs)
    if whole is None or recorded is None or len(recorded) != len(whole.embeds):
        return
    intact = _first(policy, whole, whole.embeds)
    with torch.no_grad():
        bare = policy.model.get_input_embeddings()(inputs["input_ids"]).cpu()
    places = {
        name: (inputs["input_ids"] == getattr(policy.model.config, token)).cpu()
        for name, (_, token) in MEDIA.items()
    }
    nothing = torch.stack(list(places.values())).any(0)
    bare_all = _first(policy, whole, torch.where(nothing[..., None], bare, whole.embeds))
    for name, (modality, _) in MEDIA.items():
        place = places[name]
        if not bool(place.any()):
            continue
        if name not in inputs:
            if name not in call.large:
                yield Experiment(
                    _CAUSES[modality],
                    "proved",
                    f"{int(place.sum())} {modality} placeholders went into generate without "
                    f"{name}: the {modality} did not reach the model",
                )
            continue
        raw = torch.where(place[..., None], bare, whole.embeds)
        without = {"left out": _first(policy, whole, raw), "and all other media left out": bare_all}
        blank = prompt_of(policy, {**inputs, name: torch.zeros_like(inputs[name])})
        if blank is not None:
            without["blanked"] = _first(policy, blank, blank.embeds)
        yield _missed(modality, place.any(1), recorded, intact, without)


def _first(policy: Policy, prompt: Prompt, embeds: Tensor) -> Tensor:
    """Log-probabilities after the prompt, float32, (N, V)."""
    hidden = text_hidden(policy, embeds, prompt.positions, prompt.mask)
    with torch.no_grad():
        scores: Tensor = policy.model.lm_head(hidden[:, -1]).float().cpu()
    return scores.log_softmax(-1)


def _missed(
    modality: str, rows: Tensor, recorded: Tensor, intact: Tensor, without: Mapping[str, Tensor]
) -> Experiment:
    own = recorded.float().log_softmax(-1)[rows]
    near = float((own - intact[rows]).abs().mean())
    gaps = {how: float((own - scores[rows]).abs().mean()) for how, scores in without.items()}
    moved = {how: float((intact - scores)[rows].abs().mean()) for how, scores in without.items()}
    how = min(gaps, key=lambda name: gaps[name])
    values = {"from_intact": near, **{f"from_{k.replace(' ', '_')}": v for k, v in gaps.items()}}
    cause = _CAUSES[modality]
    found = (
        f"with the {modality} {how} the checkpoint's scores after the prompt change by "
        f"{moved[how]:.2g} on average; the recorded ones are {near:.2g} from those with it, "
        f"{gaps[how]:.2g} from those without"
    )
    if moved[how] < 1e-4:
        return Experiment(cause, "open", f"{found}: this checkpoint ignores it", values)
    dead = gaps[how] < 0.5 * near
    end = f"the {modality} did not reach the model" if dead else f"the {modality} was seen"
    return Experiment(cause, "proved" if dead else "cleared", f"{found}: {end}", values)
