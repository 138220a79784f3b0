"""A model's parameters by layer, before and after an optimizer step."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from omni_grpo_core.recorder.elements import Elements, signs
from omni_grpo_core.recorder.tensors import local
from omni_grpo_core.recorder.thinker import is_adapter, part_of
from omni_grpo_core.trace.calls import GradientSeen, LayerSeen

_GRADIENTS, _WEIGHTS = 2048, 1024
"""Elements of each parameter that are kept of its gradient, and of its weights."""
_STEEP = 0.01
"""Of a parameter's largest gradient: smaller ones may be outdone by weight decay."""
_ENOUGH = 32
"""Weights by which a direction is told."""
_MOST_ODD = 4
"""Parameters of a layer that are named."""
_SAME = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Relative distance from a common factor that rounding explains; of 16-bit gradients 4e-3, two
spacings of bfloat16."""
_SHELLS = re.compile(
    r"^(?:module|_orig_mod|_fsdp_wrapped_module|base_model|model|thinker|language_model)\."
)
_NUMBERED = re.compile(r"(?:^|\.)(?:layers|blocks|h|layer)\.(\d+)\.")


@functools.cache
def layer_of(name: str) -> tuple[str, str]:
    """(readable name of the layer, part) of a parameter.

    >>> layer_of("base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight")
    ('adapter of text layer 3', 'adapter')
    >>> layer_of("visual.merger.ln_q.weight"), layer_of("model.embed_tokens.weight")
    (('vision merger', 'vision'), ('embeddings', 'text'))
    """
    part = part_of(name)
    base = part_of(".".join(p for p in name.split(".") if not is_adapter(p)))
    if base == "head":
        where = "head"
    elif "embed_tokens" in name:
        where = "embeddings"
    elif numbered := _NUMBERED.search(name):
        where = f"{base} layer {numbered[1]}"
    else:
        while (shorter := _SHELLS.sub("", name)) != name:
            name = shorter
        pieces = name.split(".")
        where = f"{base} {pieces[min(base != 'text', len(pieces) - 1)]}"
    return (f"adapter of {where}" if part == "adapter" else where), part


@dataclass(frozen=True, slots=True)
class Held:
    """What the optimizers of a step hold: the learning rate by id of the parameter, every group's,
    and those that schedulers start from; ``others``: elements that the model does not have;
    ``states``: what they keep of a parameter, by its id."""

    rates: Mapping[int, float]
    groups: tuple[float, ...]
    planned: tuple[float, ...]
    others: int
    states: Mapping[int, Mapping[str, Any]]

    @classmethod
    def of(cls, optimizers: Sequence[Any], model: nn.Module) -> Held:
        groups = [group for one in optimizers for group in one.param_groups]
        states = {id(p): kept for one in optimizers for p, kept in one.state.items()}
        own = {id(p) for p in model.parameters()}
        rates = {
            id(p): float(group.get("lr", math.nan)) for group in groups for p in group["params"]
        }
        held = {id(p): p for group in groups for p in group["params"]}
        others = sum(local(p).numel() for at, p in held.items() if at not in own)
        every = tuple(float(group.get("lr", math.nan)) for group in groups)
        # set by every torch scheduler
        planned = tuple(float(g["initial_lr"]) for g in groups if "initial_lr" in g)
        return cls(rates, every, planned, others, states)


def gradient_norms(model: nn.Module) -> dict[int, Tensor]:
    """L2 of every gradient that is there, by id of its parameter, on its device."""
    held = {id(p): g for p in model.parameters() if (g := _gradient_of(p)) is not None}
    norms = torch._foreach_norm(list(held.values()), 2, dtype=torch.float32) if held else []
    return dict(zip(held, norms, strict=True))


class Layers:
    """Reads the parameters of one step; every reading stays on their device until :meth:`seen`.

    Made after a backward: before it, sharded parameters may still be gathered. ``stale``: by
    :func:`gradient_norms` before the first backward. ``last``: the weights at the end of the step
    before, by :meth:`end`; ``start``: at its begin, by :attr:`first`.
    """

    def __init__(
        self,
        model: nn.Module,
        last: Tensor | None,
        stale: Mapping[int, Tensor] | None = None,
        start: Tensor | None = None,
    ) -> None:
        self._model, self._stale = model, stale or {}
        # a rank may hold no shard of a parameter
        named = [(n, p) for n, p in model.named_parameters() if _readable(local(p))]
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        shards = [local(p) for p in self._parameters]
        self._gradients = Elements(shards, _GRADIENTS)
        self._weights = Elements(shards, _WEIGHTS)
        self._backward: Tensor | None = None
        self._before: Tensor | None = None
        self._has_backward = self._has_before = [False] * len(shards)
        self._norms: dict[int, Tensor] = {}
        self._pull: Tensor | None = None
        self._fresh: set[int] = set()
        self.first = self._take_weights()
        self._last = last if last is not None and last.shape == self.first.shape else None
        self._start = start if start is not None and start.shape == self.first.shape else None

    def after_backward(self) -> None:
        """The gradient that a backward has left; the last one counts."""
        self._backward, self._has_backward = self._reading(), self._given()

    def are_gone(self) -> bool:
        """Whether the gradients that the last backward left are no longer there."""
        return any(self._has_backward) and not any(self._given())

    def before_step(
        self, parameters: Iterable[Tensor] | None = None, fresh: Iterable[Tensor] = ()
    ) -> None:
        """The gradient that an optimizer is about to use; a second one has its own parameters.
        ``fresh``: those of an optimizer that has no momentum yet, so that its step follows the
        gradient alone."""
        reading, given, norms = self._reading(), self._given(), gradient_norms(self._model)
        pull = self._weights.take([_gradient_of(p) for p in self._parameters])
        self._fresh |= self._rows(fresh)
        if parameters is None or self._before is None or self._pull is None or reading is None:
            self._before, self._has_before, self._norms = reading, given, norms
            self._pull = pull
            return
        ids = set(map(id, parameters))
        rows = [row for row, p in enumerate(self._parameters) if id(p) in ids]
        self._before[rows], self._pull[rows] = reading[rows], pull[rows]
        self._has_before = [
            new if row in rows else old
            for row, (old, new) in enumerate(zip(self._has_before, given, strict=True))
        ]
        self._norms |= {at: norm for at, norm in norms.items() if at in ids}

    def end(self) -> Tensor:
        """The sampled weights now."""
        return self._take_weights()

    def downhill(self, end: Tensor) -> float | None:
        """Of the sampled weights that an optimizer at rest changed, the share that went
        against their gradient; ``None`` where too few did."""
        if self._pull is None or not self._fresh:
            return None
        rows = sorted(self._fresh)
        change, pull = end[rows] - self.first[rows], self._pull[rows]
        steep = (change != 0) & (pull.abs() > _STEEP * pull.abs().amax(1, keepdim=True))
        down = (change * pull < 0) & steep
        many, against = torch.stack([steep.sum(), down.sum()]).tolist()
        return against / many if many >= _ENOUGH else None

    def _rows(self, parameters: Iterable[Tensor]) -> set[int]:
        ids = set(map(id, parameters))
        return {row for row, p in enumerate(self._parameters) if id(p) in ids}

    def unheld(self, held: Iterable[Tensor]) -> set[int]:
        """Ids of trainable parameters with a gradient that are not among ``held``."""
        ids = set(map(id, held))
        return {
            id(p)
            for p in self._parameters
            if p.requires_grad and p.grad is not None and id(p) not in ids
        }

    def seen(self, held: Held, end: Tensor) -> tuple[tuple[LayerSeen, ...], float | None]:
        """All layers, and the common factor between backward and step."""
        rows = self._transferred(end)
        factor = _factor(rows)
        names = [layer_of(name) for name in self._names]
        by_layer: dict[tuple[str, str], list[int]] = {}
        for row, at in enumerate(names):
            by_layer.setdefault(at, []).append(row)
        layers = [
            self._layer(name, part, [rows[i] for i in members], members, factor, held)
            for (name, part), members in by_layer.items()
        ]
        return tuple(layers), factor

    # ------------------------------------------------------------------ readings

    def _reading(self) -> Tensor | None:
        grads = [_gradient_of(p) for p in self._parameters]
        return self._gradients.take(grads) if any(g is not None for g in grads) else None

    def _given(self) -> list[bool]:
        return [_gradient_of(p) is not None for p in self._parameters]

    def _take_weights(self) -> Tensor:
        return self._weights.take([local(p) for p in self._parameters])

    def _transferred(self, end: Tensor) -> list[_Row]:
        """One transfer for everything: each one waits for the device."""
        device = self.first.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        count = len(self._parameters)
        none = torch.zeros(count, dtype=wide, device=device)

        def norm(of: Tensor | None) -> Tensor:
            return none if of is None else torch.linalg.vector_norm(of, dim=1)

        def widened(of: Tensor | None) -> Tensor | None:
            return None if of is None else of.to(wide)

        def sums(of: Tensor | None) -> tuple[Tensor, Tensor]:
            if of is None:
                return none, none
            first, second = signs(of.shape[1], device)
            return (of * first).sum(1).to(wide), (of * second).sum(1).to(wide)

        def top(of: Tensor | None) -> Tensor:
            return none if of is None else of.abs().amax(1).to(wide)

        a, s = self._backward, self._before
        wide_a, wide_s = widened(a), widened(s)
        dot = none if wide_a is None or wide_s is None else (wide_a * wide_s).sum(1)
        moved = (end != self.first).sum(1).to(wide)
        between = none if self._last is None else (self.first != self._last).sum(1).to(wide)
        undone = none
        if self._last is not None and self._start is not None:
            undone = ((self.first == self._start) & (self.first != self._last)).sum(1).to(wide)

        def by_id(norms: Mapping[int, Tensor]) -> Tensor:
            zero = none.new_zeros((), dtype=torch.float32)
            given = [norms.get(id(p), zero).to(device) for p in self._parameters]
            return torch.stack(given).to(wide) if norms else none

        table = torch.stack(
            [
                by_id(self._stale), norm(wide_a), *sums(a), top(a), norm(wide_s), *sums(s), top(s),
                dot,
                by_id(self._norms), moved, norm(widened(end - self.first)),
                norm(widened(self.first)), between, undone, sums(end)[0],
            ],
            1,
        )  # fmt: skip
        rounding = [_SAME.get(p.dtype, 4e-3) for p in self._parameters]
        more = zip(self._has_backward, self._has_before, rounding, strict=True)
        return [_Row._make([*row, *m]) for row, m in zip(table.tolist(), more, strict=True)]

    def _layer(
        self,
        name: str,
        part: str,
        rows: Sequence[_Row],
        members: Sequence[int],
        factor: float | None,
        held: Held,
    ) -> LayerSeen:
        parameters = [self._parameters[i] for i in members]
        own = [p for p in parameters if id(p) in held.rates]
        sizes = [self._weights.counts[i] for i in members]
        size = sum(sizes)
        odd = {
            self._names[i]: times
            for i, row in zip(members, rows, strict=True)
            if (times := row.odd(factor)) is not None
        }
        return LayerSeen(
            name=name,
            part=part,
            elements=sum(p.numel() for p in parameters),
            trainable=sum(p.numel() for p in parameters if p.requires_grad),
            held=sum(p.numel() for p in own),
            rates=tuple(sorted({held.rates[id(p)] for p in own})),
            dtype=str(parameters[0].dtype).removeprefix("torch."),
            stale=_root(row.stale for row in rows),
            backward=_gradient([row for row in rows if row.has_backward], "backward"),
            before=_gradient([row for row in rows if row.has_before], "before"),
            norm=_root(row.whole for row in rows),
            odd=dict(list(odd.items())[:_MOST_ODD]),
            size=size,
            moved=sum(row.moved for row in rows) / size,
            change=_root(row.change for row in rows) / (_root(row.weight for row in rows) or 1.0),
            between=None if self._last is None else sum(row.between for row in rows) / size,
            undone=sum(row.undone for row in rows) / size,
            weights=math.fsum(row.end_sum for row in rows),
            sharded=any(map(_is_share, parameters)),
            updates=max(
                (int(held.states.get(id(p), {}).get("step", 0)) for p in own[:1]), default=0
            ),
        )


def _is_share(parameter: Tensor) -> bool:
    """Whether other ranks hold the rest of it: a DTensor, FSDP1's and DeepSpeed's."""
    marks = ("to_local", "_fsdp_flattened", "ds_id")
    return any(hasattr(parameter, mark) for mark in marks)


class _Row(NamedTuple):
    """One parameter in numbers."""

    stale: float
    backward: float
    backward_sum: float
    backward_other: float
    backward_top: float
    before: float
    before_sum: float
    before_other: float
    before_top: float
    dot: float
    whole: float
    moved: float
    change: float
    weight: float
    between: float
    undone: float
    end_sum: float
    has_backward: bool
    has_before: bool
    rounding: float

    def ratio(self) -> float | None:
        """What the gradient was multiplied by; NaN where it is no multiple, ``None`` where it was
        0."""
        if not self.has_backward or not 0 < self.backward < math.inf:
            return None
        if not self.before:
            return 0.0
        times = self.dot / self.backward**2
        rest = max(self.before**2 - self.dot * times, 0.0) ** 0.5
        return times if rest <= self.rounding * self.before else math.nan

    def odd(self, factor: float | None) -> float | None:
        """What it was multiplied by beyond the common factor; ``None`` where nothing."""
        own = self.ratio()
        if own is None or factor is None:
            return own if own is not None and math.isnan(own) else None
        beyond = own / factor
        return None if abs(beyond - 1) <= self.rounding else beyond


def _factor(rows: Iterable[_Row]) -> float | None:
    """The median: most parameters are treated alike; below 0 where all are negated."""
    found = [times for row in rows if (times := row.ratio()) is not None]
    usable = [t for t in found if t > 0] or [t for t in found if t < 0]
    return median_low(usable) if usable else None


def _gradient(rows: Sequence[_Row], when: str) -> GradientSeen | None:
    if not rows:
        return None
    return GradientSeen(
        norm=_root(getattr(row, when) for row in rows),
        sums=(
            sum(getattr(row, f"{when}_sum") for row in rows),
            sum(getattr(row, f"{when}_other") for row in rows),
        ),
        top=max(getattr(row, f"{when}_top") for row in rows),
    )


def _gradient_of(parameter: Tensor) -> Tensor | None:
    share = None if parameter.grad is None else local(parameter.grad)
    return share if share is not None and _readable(share) else None


def _root(values: Iterable[float]) -> float:
    return math.hypot(*values)


def _readable(tensor: Tensor) -> bool:
    return bool(tensor.numel()) and tensor.layout == torch.strided and tensor.is_floating_point()
