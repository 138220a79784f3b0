"""Every look and every rule of a diagnosis, by area.

An area adds its own tuples here, one import line each, with the stages that its looks may blame.
"""

from __future__ import annotations

from collections.abc import Mapping

from omni_grpo_core.doctor import continuity
from omni_grpo_core.doctor.causes import batch as causes_batch
from omni_grpo_core.doctor.causes import completion as causes_completion
from omni_grpo_core.doctor.causes import conversation as causes_conversation
from omni_grpo_core.doctor.causes import edges as causes_edges
from omni_grpo_core.doctor.causes import engine as causes_engine
from omni_grpo_core.doctor.causes import gradient as causes_gradient
from omni_grpo_core.doctor.causes import loss as causes_loss
from omni_grpo_core.doctor.causes import media as causes_media
from omni_grpo_core.doctor.causes import reward as causes_reward
from omni_grpo_core.doctor.checks import batch as checks_batch
from omni_grpo_core.doctor.checks import completion as checks_completion
from omni_grpo_core.doctor.checks import conversation as checks_conversation
from omni_grpo_core.doctor.checks import degenerate as checks_degenerate
from omni_grpo_core.doctor.checks import drawn as checks_drawn
from omni_grpo_core.doctor.checks import embeddings as checks_embeddings
from omni_grpo_core.doctor.checks import gradient as checks_gradient
from omni_grpo_core.doctor.checks import groups as checks_groups
from omni_grpo_core.doctor.checks import handed as checks_handed
from omni_grpo_core.doctor.checks import logged as checks_logged
from omni_grpo_core.doctor.checks import logits as checks_logits
from omni_grpo_core.doctor.checks import loss as checks_loss
from omni_grpo_core.doctor.checks import media as checks_media
from omni_grpo_core.doctor.checks import partial as checks_partial
from omni_grpo_core.doctor.checks import positions as checks_positions
from omni_grpo_core.doctor.checks import repeated as checks_repeated
from omni_grpo_core.doctor.checks import replayed as checks_replayed
from omni_grpo_core.doctor.checks import reward as checks_reward
from omni_grpo_core.doctor.checks import run as checks_run
from omni_grpo_core.doctor.checks import said as checks_said
from omni_grpo_core.doctor.checks import text as checks_text
from omni_grpo_core.doctor.evidence import Look, Rule
from omni_grpo_core.doctor.signatures import PREFIXES, rule_of_reproductions
from omni_grpo_core.types import Stage

_AREAS: tuple[tuple[tuple[Look, ...], tuple[Stage, ...]], ...] = (
    (checks_conversation.LOOKS, ("conversation",)),
    (checks_said.LOOKS, ("conversation",)),
    (checks_text.LOOKS, ("text",)),
    (checks_media.LOOKS, ("media",)),
    (checks_batch.LOOKS, ("batch",)),
    (checks_replayed.LOOKS, ("batch",)),
    (continuity.LOOKS, ("media", "batch", "positions", "logits", "completion", "reward")),
    (checks_positions.MODEL, ("policy",)),
    (checks_embeddings.LOOKS, ("embeddings",)),
    (checks_positions.LOOKS, ("positions",)),
    (checks_logits.LOOKS, ("logits", "completion", "loss")),
    (checks_completion.LOOKS, ("completion",)),
    (checks_degenerate.LOOKS, ("completion",)),
    (checks_drawn.LOOKS, ("completion",)),
    (checks_groups.LOOKS, ("completion", "reward", "advantage")),
    (checks_reward.LOOKS, ("parsed", "reward")),
    (checks_partial.LOOKS, ("advantage",)),
    (checks_handed.LOOKS, ("completion", "advantage")),
    (checks_loss.LOOKS, ("completion", "advantage", "loss", "gradient")),
    (checks_logged.LOOKS, ("loss",)),
    (checks_repeated.LOOKS, ("logits",)),
    (checks_gradient.LOOKS, ("loss", "gradient")),
    (checks_run.LOOKS, ("gradient",)),
)
"""The looks of each area, and the stages that they may blame."""

LOOKS: tuple[Look, ...] = tuple(look for looks, _ in _AREAS for look in looks)
"""In the order in which they run. A look knows nothing of causes."""

BLAMES: Mapping[Look, tuple[Stage, ...]] = {look: of for looks, of in _AREAS for look in looks}
"""The stages that cannot be judged once a look has failed."""

RULES: tuple[Rule, ...] = (
    *causes_conversation.RULES,
    *causes_media.RULES,
    *causes_batch.RULES,
    *causes_edges.RULES,
    *causes_completion.RULES,
    *causes_reward.RULES,
    *causes_loss.RULES,
    *causes_gradient.RULES,
    *causes_engine.RULES,
    rule_of_reproductions(
        *causes_media.TABLES,
        *causes_batch.TABLES,
        *causes_edges.TABLES,
        *causes_completion.TABLES,
        *causes_loss.TABLES,
    ),
)
"""Rules explain evidence; they never add any."""

_REPRODUCED = (
    "absolute", "cast-bfloat16", "cast-float16", "cast-integer", "cast-uint8",
    "channels-permuted", "channels-swapped", "chosen", "clipped", "constant", "cropped",
    "first-dropped", "grey", "inserted", "inverted", "items-swapped", "last-dropped", "lost",
    "mirrored-height", "mirrored-width", "negated", "normalised", "overflowed", "padded",
    "partly-constant", "permuted", "plus", "repeated", "replaced", "resampled", "reshaped",
    "resized", "reversed", "rolled", "shifted", "strided", "swapped-with", "tempered", "tiled",
    "time-scaled", "times", "transposed", "zero",
)  # fmt: skip
"""The changes that :mod:`reproduce <omni_grpo_core.doctor.reproduce>` names, without a story."""

CAUSES: frozenset[str] = frozenset(
    {cause for rule in RULES for cause in getattr(rule, "causes", ())}
    | {f"{prefix}.{name}" for prefix in PREFIXES.values() for name in _REPRODUCED}
)
"""Causes that a diagnosis may name; those that a rule words itself are faults of the catalogue."""
