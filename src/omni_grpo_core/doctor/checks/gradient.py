"""Backward and the optimizer's step, layer by layer: what is trainable, held, and changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged, note_missing
from omni_grpo_core.doctor.rollouts import joined, losses_of, settings_of, world_size
from omni_grpo_core.trace.calls import LayerSeen, StepSeen

_LANGUAGE = ("text", "head", "adapter")
_TOWERS = ("vision", "audio")
_FREEZE = ("freeze_towers", "freeze_vision", "freeze_vision_modules", "freeze_vision_tower")
_SAME = 5e-3
"""Relative distance of two multiples that rounding of 16-bit gradients explains."""
_UPHILL = 0.1
"""Share of weights that go against their gradient: all in a first step, half where weight decay
decides."""
_ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Of the largest gradient of a step: what rounding leaves in a layer that nothing asks for."""
_SPACING, _OF_NORMS = 1e-9, 6e-8
"""Of float32 weights of 0.02, as models are initialised, and of a norm's, which are near 1."""
_UNDONE = 0.9
"""Of what changed between two steps: some weights are near what they were by rounding."""
_THROWN = 0.5
"""Of a layer's weights: a step of RL changes them by 1e-6 to 1e-3, and by a tenth nobody means."""
_LITTLE = 0.01
"""Of a text model's weights: one layer of a hundred. Tuning norms or biases alone is a recipe."""
_LIMITS = tuple(digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 2.5, 5))
"""Norms to which people clip."""


# --------------------------------------------------------------------------- backward


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
        lost = [loss for loss in step.losses if not math.isfinite(loss)]
        if lost:
            yield Evidence(
                "loss", "loss-not-finite", f"backward was called on {lost[0]}", "unknown",
                values={"loss": lost[0]},
            )  # fmt: skip
        if not sum(step.trainable.values()):
            note_judged(case, "gradient")
            yield Evidence(
                "gradient", "nothing-trainable", "no parameter of the model requires a gradient"
            )
        elif step.outcome == "stepped":
            yield from _gradient(case, step, cut)


def _gradient(case: Case, step: StepSeen, cut: bool) -> Iterator[Evidence]:
    if not any(norm != 0 for norm in step.grad_norms.values()):
        if not step.grad_norms and (any(step.changed.values()) or step.others):
            note_missing(case, "gradients are kept where the recorder cannot read them", "gradient")
        elif any(layer.backward and layer.backward.norm for layer in step.layers):
            pass  # it was there after backward: see look_at_flow
        elif _signal(case) or (_earned(case) and not any(one.backward for one in step.layers)):
            # zeros alone may be right: weighted rewards can cancel
            note_judged(case, "gradient")
            reached = any(layer.backward for layer in step.layers)
            yield Evidence(
                "gradient",
                "no-gradient",
                f"completions were rewarded differently, but backward was "
                f"{_times(len(step.losses))}, and "
                + ("every gradient is 0" if reached else "no parameter has a gradient"),
                values={
                    "backward": len(step.losses), "reached": reached, "at_checkpoints": cut,
                },
            )  # fmt: skip
    for part, norm in step.grad_norms.items():
        note_judged(case, "gradient")
        if not math.isfinite(norm):
            broken = any(not math.isfinite(loss) for loss in step.losses)
            yield Evidence(
                "gradient",
                "gradient-not-finite",
                f"the gradient of the {part} part is {norm}",
                "inherited" if broken else "added",
                values={"part": part},
            )


def _times(count: int) -> str:
    return {0: "never called", 1: "called once"}.get(count, f"called {count} times")


def _cut_at_checkpoints(case: Case) -> bool:
    """Whether a scoring forward ran checkpointed, and torch warned that no input of a block
    requires a gradient."""
    warned = any("requires_grad=True" in text for step in case.steps for text in step.warnings)
    scored = [call.modes for call in case.forwards if call.modes.grad_enabled]
    return warned and any(modes.checkpointing for modes in scored)


def _signal(case: Case) -> bool:
    """Whether the loss had something to push: an advantage, or a weight at its logits."""
    given = [one.loss.advantages for one in losses_of(case)]
    weights = [one.weights for one in case.gradients]
    return any(
        bool((torch.nan_to_num(values.double()).abs() > 1e-6).any())
        for values in given
        if values is not None
    ) or any(bool((torch.nan_to_num(values) != 0).any()) for values in weights)


def _earned(case: Case) -> bool:
    """Whether completions of one group earned different rewards."""
    step = joined(case)
    by_group: dict[int, set[tuple[float | None, ...]]] = {}
    for completion in step.completions:
        paid = tuple(step.rewards_of(completion).values())
        by_group.setdefault(completion.group, set()).add(paid)
    return any(len(paid) > 1 for paid in by_group.values())


# --------------------------------------------------------------------------- between


def look_at_flow(case: Case) -> Iterable[Evidence]:
    """From the last backward to the optimizer, every gradient is multiplied by the same number:
    clipped, unscaled, or nothing."""
    for step in case.steps:
        after = [layer for layer in step.layers if layer.backward and layer.backward.norm]
        if step.outcome != "stepped" or not after:
            continue
        note_judged(case, "gradient")
        if step.factor is None and not any(layer.norm for layer in after):
            yield Evidence(
                "gradient",
                "gradient-zeroed",
                f"backward left a gradient in {_named(after)} "
                f"({math.hypot(*(one.backward.norm for one in after if one.backward)):.3g}), and "
                "all of it is 0 before the step",
                values={"layers": _named(after), "parameters": "all parameters"},
            )
        if step.factor is not None and step.factor < 0:
            yield Evidence(
                "gradient",
                "gradient-negated",
                f"the gradient that backward left in {_named(after)} was multiplied by "
                f"{step.factor:.4g} before the step: the optimizer climbs the loss",
                values={"layers": "all layers", "parameters": "all parameters"},
            )
        odd = [layer for layer in step.layers if layer.odd]
        # a loop may keep gradients elsewhere, and put them back
        if step.dropped and step.factor is not None and not odd:
            yield Evidence(
                "gradient",
                "gradient-dropped",
                f"the gradients of {step.dropped} of the step's {len(step.losses)} backwards were "
                "gone before the next one: the optimizer gets those of the last alone",
                values={"dropped": step.dropped, "losses": len(step.losses)},
            )
        for kind in ("zeroed", "negated", "scaled", "changed"):
            layers = [layer for layer in odd if _kind(layer) == kind]
            # ranks that average gradients by hand change all of them, and are not recorded together
            if layers and (kind == "zeroed" or world_size(case) == 1):
                yield _between(step, layers, kind)
        yield from _clipped_while_scaled(step)


def _kind(layer: LayerSeen) -> str:
    times = list(layer.odd.values())
    if all(one == 0 for one in times):
        return "zeroed"
    if any(math.isnan(one) for one in times) or max(times) - min(times) > _SAME * abs(times[0]):
        return "changed"
    return "negated" if abs(times[0] + 1) <= _SAME else "scaled"


def _between(step: StepSeen, layers: Sequence[LayerSeen], kind: str) -> Evidence:
    first = layers[0]
    times = next(iter(first.odd.values()))
    was, now = first.backward, first.before
    done = {
        "zeroed": "is 0 before the step",
        "negated": "has the other sign before the step",
        "scaled": f"is {times:.4g} times as large before the step",
        "changed": "is another one before the step, no multiple of it",
    }[kind]
    others = len(step.layers) - len(layers)
    factor = step.factor or 1.0
    usual = "unchanged" if abs(factor - 1) < _SAME else f"multiplied by {factor:.4g}"
    names = _named(layers)
    sentence = f"the gradient that backward left in {names} ({was.norm if was else 0:.3g}) {done}"
    if step.factor is not None and others:
        sentence += f"; that of the other {others} layers is {usual}"
    mild = (kind == "scaled" and _clipped_apart(step, layers)) or (
        kind == "changed" and _clipped_by_value(step, layers)
    )
    if mild:
        sentence += "; they were clipped apart from the others"
    return Evidence(
        "gradient",
        f"gradient-{kind}",
        sentence,
        values={
            "layers": names, "times": times, "parameters": sorted(first.odd),
            "norm": 0.0 if now is None else now.norm,
        },
        severity="differs" if mild else "breaks",
    )  # fmt: skip


def _named(layers: Sequence[LayerSeen]) -> str:
    names = [layer.name for layer in layers]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _clipped_apart(step: StepSeen, layers: Sequence[LayerSeen]) -> bool:
    """Whether these layers' own norm was clipped to a number that people clip to, or to the norm
    of the others."""
    rest = [layer for layer in step.layers if layer not in layers]
    norm, other = (math.hypot(*(one.norm for one in those)) for those in (layers, rest))
    return any(abs(norm - limit) <= 1e-3 * limit for limit in (*_LIMITS, other))


def _clipped_by_value(step: StepSeen, layers: Sequence[LayerSeen]) -> bool:
    tops = [layer.before.top for layer in layers if layer.before is not None]
    most = max((layer.before.top for layer in step.layers if layer.before), default=0.0)
    return bool(tops) and all(abs(top - most) <= 1e-6 * most for top in tops)


def _clipped_while_scaled(step: StepSeen) -> Iterator[Evidence]:
    """The norm that a clipped and then unscaled gradient has: the limit over the scale."""
    if step.scale is None or step.scale <= 1 or step.factor is None:
        return
    norm = math.hypot(*step.grad_norms.values()) * step.scale
    limit = next((limit for limit in _LIMITS if abs(norm - limit) <= 1e-3 * limit), None)
    if limit is not None and abs(step.factor * step.scale - 1) > _SAME:
        yield Evidence(
            "gradient",
            "clipped-while-scaled",
            f"the gradient was clipped to {limit:g} while it was still multiplied by the scaler's "
            f"{step.scale:g}: {norm / step.scale:.3g} of it is left",
            values={"limit": limit, "scale": step.scale},
        )


def look_at_direction(case: Case) -> Iterable[Evidence]:
    """The first step of an optimizer, which has no momentum yet, goes against the gradient."""
    for step in case.steps:
        if step.outcome != "stepped" or step.downhill is None:
            continue
        note_judged(case, "gradient")
        if step.downhill < _UPHILL:
            yield Evidence(
                "gradient",
                "uphill",
                f"the optimizer moved {1 - step.downhill:.0%} of the sampled weights along their "
                "gradient instead of against it: it climbs the loss",
                values={"layers": "all layers"},
            )


def look_at_leftovers(case: Case) -> Iterable[Evidence]:
    """Gradients that were there before the step's first backward."""
    for step in case.steps:
        stale = [layer for layer in step.layers if layer.stale > 0 and layer.held]
        if not stale:
            continue
        norm, now = (math.hypot(*(getattr(one, n) for one in stale)) for n in ("stale", "norm"))
        yield Evidence(
            "gradient",
            "not-zeroed",
            f"{_named(stale)} had a gradient ({norm:.3g}) before the first backward of the step, "
            f"to which the new one was added ({now:.3g} in all): that of the step before was not "
            "set to zero",
            values={"layers": _named(stale)},
            # a recording may begin between two backward passes of one step
            severity="breaks" if step.step else "differs",
        )


# --------------------------------------------------------------------------- the optimizer


def look_at_outcome(case: Case) -> Iterable[Evidence]:
    """A backward without an optimizer's step."""
    for step in case.steps:
        if step.outcome == "skipped":
            yield Evidence(
                "gradient",
                "step-skipped",
                "the gradient scaler skipped the step, since a gradient is not finite at scale "
                f"{step.scale or 0:g}; the first steps of a run in float16 usually are",
                "unknown",
                severity="differs",
            )
        elif step.outcome == "never" and any(step.changed.values()):
            note_missing(case, "weights are changed by no optimizer of torch", "gradient")
        elif step.outcome == "never" and not case.trace.header.get("raised"):
            yield Evidence(
                "gradient",
                "never-stepped",
                f"backward was {_times(len(step.losses))}, and the recording ended before "
                "an optimizer stepped",
                severity="differs" if step.step else "breaks",
            )


def look_at_parts(case: Case) -> Iterable[Evidence]:
    """Which parts of the model are trained: the text model, or its adapters, should be."""
    for step in case.steps:
        learning = {part for part, count in step.trainable.items() if count}
        known = {layer.part for layer in step.layers}
        values = {"trainable": step.trainable}
        # a rank may have no shard of the text model
        if learning and not learning & set(_LANGUAGE) and known & set(_LANGUAGE):
            yield Evidence(
                "gradient",
                "text-frozen",
                f"only {' and '.join(sorted(learning))} can be trained: the text model and its "
                "head, which write the completions, are frozen",
                values=values,
            )
        elif "adapter" in learning and learning & {"text", *_TOWERS}:
            yield Evidence(
                "gradient",
                "beside-adapter",
                f"besides adapters, {', '.join(sorted(learning - {'adapter'}))} can be trained: "
                "base weights change too, and the model with adapters off is no longer the "
                "reference",
                values=values,
                severity="differs",
            )
        elif learning & set(_TOWERS) and _configured_frozen(case, step):
            yield Evidence(
                "gradient",
                "tower-trained",
                f"{' and '.join(sorted(learning & set(_TOWERS)))} can be trained "
                f"({sum(step.trainable[p] for p in learning & set(_TOWERS)):,} parameters), "
                "although the settings freeze the towers",
                values=values,
            )
        text = [layer for layer in step.layers if layer.part in ("text", "head")]
        free = sum(layer.trainable for layer in text)
        every = sum(layer.elements for layer in text)
        if 0 < free < _LITTLE * every and "adapter" not in learning:
            yield Evidence(
                "gradient",
                "text-mostly-frozen",
                f"{free:,} of the text model's {every:,} weights can be trained, and no adapter: "
                "the policy hardly moves",
                values=values,
                severity="differs",
            )


def _configured_frozen(case: Case, step: StepSeen) -> bool:
    settings = {**settings_of(case), **step.settings}
    return any(settings.get(name) is True for name in _FREEZE)


def look_at_held(case: Case) -> Iterable[Evidence]:
    """Trainable parameters that no optimizer holds."""
    for step in case.steps:
        if step.outcome != "stepped":
            continue
        missing = [one for one in step.layers if one.held < one.trainable and not one.moved]
        if not missing:
            continue
        if step.others and any(layer.between is None or layer.between for layer in missing):
            note_missing(
                case,
                f"the optimizer holds {step.others:,} elements that are not the model's: copies in "
                "another precision, or of another model; the next step would show which",
            )
            if _sixteen(missing) or any(layer.between for layer in missing):
                continue
        count = sum(layer.trainable - layer.held for layer in missing)
        parts = list(dict.fromkeys(layer.part for layer in missing))
        yield Evidence(
            "gradient",
            "not-held",
            f"{count:,} trainable elements of {_named(missing)} are in no parameter group"
            + (f"; the optimizer holds {step.others:,} of another model" if step.others else ""),
            values={"part": parts[0], "layers": _named(missing), "others": step.others},
            severity="breaks" if set(parts) & set(_LANGUAGE) else "differs",
        )


def _sixteen(layers: Sequence[LayerSeen]) -> bool:
    return any(layer.dtype in ("bfloat16", "float16") for layer in layers)


def look_at_rates(case: Case) -> Iterable[Evidence]:
    """Learning rates of 0."""
    for step in case.steps:
        if step.outcome != "stepped" or not step.rates:
            continue
        note_judged(case, "gradient")
        if not any(step.rates):
            # a scheduler keeps the rate that it started from
            warming = step.step == 0 and any(step.planned)
            yield Evidence(
                "gradient",
                "rate-zero",
                f"the learning rate of all {len(step.rates)} parameter groups is 0"
                + (f"; a scheduler leads it to {max(step.planned):g}" if warming else ""),
                values={"warming": warming},
                severity="differs" if warming else "breaks",
            )
            continue
        still = [layer for layer in step.layers if layer.rates == (0.0,) and layer.norm]
        if still:
            yield Evidence(
                "gradient",
                "rate-zero",
                f"the learning rate of {_named(still)} is 0; that of others is {max(step.rates):g}",
                values={"warming": False},
                severity="breaks" if {one.part for one in still} & set(_LANGUAGE) else "differs",
            )


def _could_move(layer: LayerSeen) -> bool:
    """Whether Adam's step, ``rate * g / (|g| + 1e-8)``, is above the spacing of float32 weights."""
    size = layer.norm / math.sqrt(max(layer.elements, 1))
    spacing = _OF_NORMS if layer.name.endswith(("norm", "ln_post")) else _SPACING
    return max(layer.rates, default=0.0) * size / (size + 1e-8) > spacing


def look_at_weights(case: Case) -> Iterable[Evidence]:
    """Weights that should change and do not, and those that change and should not."""
    for step in case.steps:
        if step.outcome != "stepped":
            continue
        most = max((one.norm for one in step.layers if math.isfinite(one.norm)), default=0.0)
        driven = [
            one
            for one in step.layers
            if _ROUNDING * most < one.norm < math.inf and one.size and _could_move(one)
        ]
        still = [layer for layer in driven if not layer.moved]
        if driven:
            note_judged(case, "gradient")
        if still:
            moved = len(driven) - len(still)
            yield Evidence(
                "gradient",
                "not-moved",
                f"{_named(still)} have a gradient ({math.hypot(*(one.norm for one in still)):.3g}) "
                f"and a learning rate ({max(max(one.rates) for one in still):.3g}), but none of "
                f"{sum(one.size for one in still):,} sampled weights changed in the step"
                + (f"; {moved} other layers did" if moved else "")
                + (f"; gradients were multiplied by {step.factor:.3g} before it"
                   if step.factor not in (None, 1.0) else ""),
                values={"parts": list(dict.fromkeys(one.part for one in still)), "moved": moved},
                # updates below the spacing of 16-bit weights come and go from layer to layer
                severity="differs" if moved and _sixteen(still) else "breaks",
            )  # fmt: skip
        loose = [one for one in step.layers if one.moved and not one.held and not one.trainable]
        if loose:
            yield Evidence(
                "gradient",
                "moved-frozen",
                f"{_named(loose)} are frozen and no optimizer holds them, but their weights "
                f"changed by {max(one.change for one in loose):.2g} of their size in the step",
                values={"layers": _named(loose)},
            )


def look_at_undone(case: Case) -> Iterable[Evidence]:
    """Weights that are again what they were before the last update."""
    for step in case.steps:
        held = [one for one in step.layers if one.part in _LANGUAGE and one.held and one.between]
        changed = sum((one.between or 0.0) * one.size for one in held)
        back = sum(one.undone * one.size for one in held)
        if back > 0 and back >= _UNDONE * changed:
            yield Evidence(
                "gradient",
                "update-undone",
                f"{_named(held)} changed between the step before and this one, and "
                f"{back / changed:.0%} of the weights that did are what they were before that "
                "step: its update is undone",
                values={"layers": _named(held), "share": back / changed},
            )
            return


def look_at_size(case: Case) -> Iterable[Evidence]:
    """A step that leaves nothing of a model: every layer of its text model is another one."""
    for step in case.steps:
        held = [one for one in step.layers if one.part == "text" and one.held and one.size]
        least = min((one.change for one in held), default=0.0)
        if least > _THROWN:
            yield Evidence(
                "gradient",
                "weights-thrown",
                f"one step changed the weights of every layer of the text model by {least:.3g} "
                "times their size or more: nothing of what it knew is left (learning rate "
                f"{max(step.rates, default=math.nan):g})",
                values={"change": least, "rate": max(step.rates, default=math.nan)},
            )
            return


# --------------------------------------------------------------------------- accumulation


def look_at_accumulation(case: Case) -> Iterable[Evidence]:
    """Backward passes of one optimizer step, compared with the settings."""
    for step in case.steps:
        settings = {**settings_of(case), **step.settings}
        configured = settings.get("gradient_accumulation_steps")
        if (
            isinstance(configured, int)
            and step.losses
            and step.outcome != "never"
            and len(step.losses) != configured * int(case.trace.header.get("ranks", "1"))
        ):
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


def look_at_ranks(case: Case) -> Iterable[Evidence]:
    """What each rank's optimizer was given, and what weights that left."""
    for step in case.steps:
        whole = [one for one in step.layers if one.held and not one.sharded and one.before]
        apart = [one for one in whole if one.apart[1]]
        if step.outcome != "stepped" or not apart:
            continue
        note_judged(case, "gradient")
        drifting = sum(one.apart[0] > _SAME for one in apart) > len(whole) / 2
        reason = (
            f"their gradients differ by up to {max(one.apart[0] for one in apart):.0%}: no mean of "
            "them was taken"
            if drifting
            else "although their gradients are the same: they did not start from the same weights"
        )
        yield Evidence(
            "gradient",
            "ranks-apart",
            f"after the step the ranks' weights are not the same in {_named(apart)}; {reason}",
            values={"averaged": not drifting},
        )


LOOKS: tuple[Look, ...] = (
    look_at_graph,
    look_at_flow,
    look_at_direction,
    look_at_leftovers,
    look_at_outcome,
    look_at_parts,
    look_at_held,
    look_at_rates,
    look_at_weights,
    look_at_undone,
    look_at_size,
    look_at_accumulation,
    look_at_losses,
    look_at_ranks,
)
