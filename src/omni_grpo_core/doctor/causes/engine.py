"""Causes of a rollout engine that disagrees with the trainer: what the proof of agreement named."""

from __future__ import annotations

from collections.abc import Mapping

from omni_grpo_core.doctor.evidence import Case, Evidence, Rule
from omni_grpo_core.doctor.signatures import Signature, rule_of
from omni_grpo_core.pipeline.hints import BY_ENGINE
from omni_grpo_core.types import MODALITIES

_CAUSES: Mapping[str, str] = {
    **{f"{m} reaches the engine": f"engine.{m}-dropped" for m in MODALITIES},
    **{f"{m} has the batch's content in the engine": f"engine.{m}-content" for m in MODALITIES},
    **{f"{m} stays with its row": f"engine.{m}-exchanged" for m in MODALITIES},
    "media are sent once": "engine.media-repeated",
    "media have the batch's size in the engine": "engine.media-size",
    "the engine interleaves as the batch does": "engine.interleaving",
    "placeholders are expanded once": "engine.expanded-twice",
    "the engine reads the batch's text": "engine.text",
    "the engine has the trainer's weights": "engine.weights-stale",
    "the adapter is applied in the engine": "engine.adapter-off",
    "the engine places media as the batch does": "engine.positions",
    "the engine scores as the trainer does": "engine.rounding",
    "logprobs are finite": "engine.not-finite",
    "logprobs are at the sampling temperature": "engine.temperature",
    "the engine draws from the allowed ids": "engine.allowed-ids",
    "the engine samples from the whole distribution": "engine.top-k",
    "tokens are drawn as their logprobs say": "engine.other-draws",
    "no token is penalised": "engine.penalty",
    "logprobs are those of the drawn tokens": "engine.other-logprobs",
    "a group's completions are drawn apart": "engine.copies",
    "completions end where and as they say": "engine.finish",
    "answers belong to their prompts": "engine.requests-reordered",
    "a group's completions are adjacent": "engine.n-reordered",
}
"""By the check that failed."""


def _reproduced(case: Case, evidence: Evidence) -> str:
    """The proof tried its causes out on the engine; one that was left over is not proved."""
    return evidence.sentence if evidence.values.get("proved") else ""


_ENGINE = tuple(
    Signature(
        cause=_CAUSES[name],
        fact=name,
        harm=advice.partition(": ")[0],
        fix=advice.partition(": ")[2],
        confirm="start the run again: the proof passes, and the log has engine/gap_max",
        prove=_reproduced,
    )
    for (_, name), advice in BY_ENGINE.items()
)
RULES: tuple[Rule, ...] = (rule_of("causes_of_an_engine", _ENGINE),)
