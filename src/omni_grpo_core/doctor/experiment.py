"""The result of one experiment, and what experiments need: recorded inputs as the checkpoint takes
them, and the embeddings and positions that it computes from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from omni_grpo_core.core.policy import Policy, generating
from omni_grpo_core.doctor.teacher_forced import Replayed, text_hidden
from omni_grpo_core.trace.calls import GenerateCall

Outcome = Literal["proved", "cleared", "open"]

MEDIA: Mapping[str, tuple[str, str]] = {
    "pixel_values": ("image", "image_token_id"),
    "pixel_values_videos": ("video", "video_token_id"),
    "input_features": ("audio", "audio_token_id"),
}


@dataclass(frozen=True, slots=True)
class Experiment:
    """``cause``: the id of the cause tested. ``outcome``: ``"proved"`` where it does the recorded
    harm, ``"cleared"`` where it does none, ``"open"`` where that is undecided. ``sentence``: what
    was done and the result."""

    cause: str
    outcome: Outcome
    sentence: str
    values: Mapping[str, Any] = field(default_factory=dict)


def recorded_inputs(policy: Policy, call: GenerateCall) -> dict[str, Any]:
    """The recorded inputs as the checkpoint takes them."""
    found: dict[str, Any] = {}
    for name, value in call.inputs.items():
        moved = value.to(policy.device)
        found[name] = moved.to(policy.model.dtype) if name in MEDIA else moved
    if "use_audio_in_video" in call.keywords:
        found["use_audio_in_video"] = bool(call.keywords["use_audio_in_video"])
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """Recorded inputs as the reference computes them: embeddings (N, L, H), positions (3, N, L)."""

    embeds: Tensor
    positions: Tensor
    mask: Tensor

    def scored(self, policy: Policy, embeds: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
        """Logprobs of ``ids``, (N, K), after a prompt with these positions and other embeddings."""
        with torch.no_grad():
            tokens = policy.model.get_input_embeddings()(ids.to(policy.device))
        begin = torch.where(self.mask[None].bool(), self.positions, 0).amax((0, 2)) + 1
        after = begin[:, None] + torch.arange(ids.shape[1])
        hidden = text_hidden(
            policy,
            torch.cat([embeds.to(tokens), tokens], 1),
            torch.cat([self.positions, after.expand(3, -1, -1).to(self.positions.dtype)], 2),
            torch.cat([self.mask, kept.to(self.mask.dtype)], 1),
        )
        scores = Replayed(policy, ids, kept, hidden[:, -ids.shape[1] - 1 :], self.mask.shape[1])
        return scores.logprobs()


def prompt_of(policy: Policy, inputs: Mapping[str, Any]) -> Prompt | None:
    """What the library passes to the text model for ``inputs``; ``None`` where it rejects them."""
    seen: dict[str, Tensor] = {}

    def look(_module: Any, _args: Any, keywords: dict[str, Any]) -> None:
        seen["embeds"], seen["positions"] = keywords["inputs_embeds"], keywords["position_ids"]

    hook = policy.text_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with generating(policy.model), torch.no_grad():
            policy.model(**inputs, use_cache=False)
    except (ValueError, RuntimeError, TypeError, IndexError, StopIteration):
        return None  # inputs that the checkpoint rejects were judged where they were made
    finally:
        hook.remove()
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).cpu()
    if seen.get("positions") is None:
        return None
    return Prompt(seen["embeds"].cpu(), seen["positions"][-3:].cpu(), mask)
