"""Backward and the optimizer step: what is trainable, what the optimizer holds, what changed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged
from omni_grpo_core.doctor.rollouts import losses_of, settings_of, world_size
from omni_grpo_core.trace.calls import StepSeen

_LANGUAGE = ("text", "head", "adapter")
_TOWERS = ("vision", "audio")
_FREEZE = ("freeze_towers", "freeze_vision", "freeze_vision_modules", "freeze_vision_tower")


def look_at_graph(case: Case) -> Iterable[Evidence]:
    """A loss without a gradient."""
    cut = _cut_at_checkpoints(case)
    for at, one in enumerate(losses_of(case)):
        if not one.loss.requires_grad:
            yield Evidence(
                "gradient",
                "loss-detached",
                f"loss {at} ({one.loss.loss:.4g}) does not require a gradient: nothing is trained "
                "by it" + ("; checkpointed blocks had no input that requires one" if cut else ""),
                values={"at_checkpoints": cut},
            )
    for step in case.steps:
        note_judged(case, "gradient")
        if not sum(step.trainable.values()):
            yield Evidence(
                "gradient", "nothing-trainable", "no parameter of the model requires a gradient"
            )
        elif _signal(case) and not any(norm != 0 for norm in step.grad_norms.values()):
            yield Evidence(
                "gradient",
                "no-gradient",
                "the loss has non-zero advantages, but no parameter has a gradient before the step",
                values={"norms": dict(step.grad_norms)},
            )
        for part, norm in step.grad_norms.items():
            if not math.isfinite(norm):
                broken = any(not math.isfinite(one.loss.loss) for one in losses_of(case))
                yield Evidence(
                    "gradient",
                    "gradient-not-finite",
                    f"the gradient of the {part} part is {norm}",
                    "inherited" if broken else "added",
                    values={"part": part},
                )


def _cut_at_checkpoints(case: Case) -> bool:
    """Whether a scoring forward ran checkpointed, and torch warned that no input of a block
    requires a gradient."""
    warned = any("requires_grad=True" in text for step in case.steps for text in step.warnings)
    scored = [call.modes for call in case.forwards if call.modes.grad_enabled]
    return warned and any(modes.checkpointing for modes in scored)


def _signal(case: Case) -> bool:
    """Whether some advantage that counts in a loss is not 0."""
    for one in losses_of(case):
        advantages, mask = one.loss.advantages, one.loss.mask
        if advantages is None:
            continue
        live = torch.nan_to_num(advantages.double()).abs() > 1e-6
        if mask is not None:
            live = live & (mask.bool() if live.ndim == 2 else mask.bool().any(-1))
        if bool(live.any()):
            return True
    return False


def look_at_parts(case: Case) -> Iterable[Evidence]:
    """Which parts of the model are trained: the text model, or its adapters, should be."""
    for step in case.steps:
        learning = {part for part, count in step.trainable.items() if count}
        if learning and not learning & set(_LANGUAGE):
            yield Evidence(
                "gradient",
                "text-frozen",
                f"only {' and '.join(sorted(learning))} can be trained: the text model and its "
                "head, which write the completions, are frozen",
                values={"trainable": dict(step.trainable)},
            )
        elif "adapter" in learning and learning & {"text", *_TOWERS}:
            yield Evidence(
                "gradient",
                "beside-adapter",
                f"besides adapters, {', '.join(sorted(learning - {'adapter'}))} can be trained: "
                "base weights change too, and the model with adapters off is no longer the "
                "reference",
                values={"trainable": dict(step.trainable)},
            )
        elif learning & set(_TOWERS) and _configured_frozen(case, step):
            yield Evidence(
                "gradient",
                "tower-trained",
                f"{' and '.join(sorted(learning & set(_TOWERS)))} can be trained "
                f"({sum(step.trainable[p] for p in learning & set(_TOWERS)):,} parameters), "
                "although the settings freeze the towers",
                values={"trainable": dict(step.trainable)},
            )


def _configured_frozen(case: Case, step: StepSeen) -> bool:
    settings = {**settings_of(case), **step.settings}
    return any(settings.get(name) is True for name in _FREEZE)


def look_at_optimizer(case: Case) -> Iterable[Evidence]:
    """Trainable parameters, compared with those that the optimizer holds and that changed."""
    for step in case.steps:
        for part, count in step.trainable.items():
            held = step.held.get(part, 0)
            if held < count:
                yield Evidence(
                    "gradient",
                    "not-held",
                    f"{count:,} parameters of the {part} part require a gradient; the optimizer "
                    f"holds {held:,} of them",
                    values={"part": part, "trainable": count, "held": held},
                )
        moved = [part for part, changed in step.changed.items() if changed]
        driven = [p for p, norm in step.grad_norms.items() if norm > 0 and math.isfinite(norm)]
        still = [p for p in driven if step.changed.get(p) is False and step.trainable.get(p)]
        if still and any(rate > 0 for rate in step.rates):
            yield Evidence(
                "gradient",
                "not-moved",
                f"the {' and '.join(still)} part has a gradient "
                f"({', '.join(f'{step.grad_norms[p]:.3g}' for p in still)}) but none of its "
                f"sampled parameters changed in the step"
                + (f"; {' and '.join(moved)} did" if moved else ""),
                values={"parts": still, "moved": moved},
            )


def look_at_accumulation(case: Case) -> Iterable[Evidence]:
    """Backward passes of one optimizer step, compared with the settings."""
    for step in case.steps:
        settings = {**settings_of(case), **step.settings}
        configured = settings.get("gradient_accumulation_steps")
        if isinstance(configured, int) and step.losses and len(step.losses) != configured:
            yield Evidence(
                "gradient",
                "accumulation-differs",
                f"{len(step.losses)} backward passes before the optimizer step, but the settings "
                f"say {configured}",
                values={"losses": len(step.losses), "told": configured},
            )
        batch = settings.get("per_device_train_batch_size")
        size = settings.get("num_generations")
        if isinstance(batch, int) and isinstance(size, int) and size:
            whole = batch * (configured if isinstance(configured, int) else 1) * world_size(case)
            if whole % size:
                yield Evidence(
                    "gradient",
                    "batch-cuts-groups",
                    f"a step of {whole} completions cannot consist of whole groups of {size}",
                    values={"completions": whole, "group": size},
                )


def look_at_losses(case: Case) -> Iterable[Evidence]:
    """The numbers that backward was called on, compared with the computed losses: equal, or all
    scaled by one positive number (accumulation, a gradient scaler)."""
    for step in case.steps:
        losses = [one.loss.loss for one in losses_of(case)]
        if len(losses) != len(step.losses):
            continue
        scales = [
            (at, backed / loss)
            for at, (loss, backed) in enumerate(zip(losses, step.losses, strict=True))
            # the sign of a number that is 0 up to rounding means nothing
            if math.isfinite(loss) and abs(loss) > 1e-5
        ]
        if not scales:
            continue
        at, scale = min(scales, key=lambda pair: pair[1])
        if scale > 0 and max(s for _, s in scales) <= 1.01 * scale:
            continue
        yield Evidence(
            "loss" if scale < 0 else "gradient",
            "backward-differs",
            f"loss {at} is {losses[at]:.6g}; backward was called on {step.losses[at]:.6g}",
            values={"loss": losses[at], "backward": step.losses[at], "negated": scale < 0},
        )


LOOKS: tuple[Look, ...] = (
    look_at_graph,
    look_at_parts,
    look_at_optimizer,
    look_at_accumulation,
    look_at_losses,
)
