"""Several rewards as one: weights, gates by name, and unscored rewards left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.rewards.call import RewardFunction, name_of, scores_of
from omni_grpo_core.types import Score

_GATE = re.compile(r"\s*([\w.-]+)\s*(?:>=|≥)\s*(\d+(?:\.\d+)?|\.\d+)\s*")


@dataclass(frozen=True, slots=True)
class Gate:
    """Open only where the reward named ``on`` scored ``at_least`` this value."""

    on: str
    at_least: float

    @classmethod
    def read(cls, text: str) -> Gate:
        """Raises :class:`~omni_grpo_core.errors.ConfigError` for any other form.

        >>> Gate.read("context >= 0.4")
        Gate(on='context', at_least=0.4)
        """
        match = _GATE.fullmatch(text)
        if not match:
            raise ConfigError(
                "reward gate", got=repr(text), want="NAME >= NUMBER", fix="use that form"
            )
        return cls(match.group(1), float(match.group(2)))


@dataclass(frozen=True, slots=True)
class Component:
    """A reward function in a composition. ``weight`` > 0. ``partial``: it scores a part of the
    completion, so it is reported and may open a gate, but is not in the total."""

    function: RewardFunction
    weight: float = 1.0
    gate: Gate | None = None
    partial: bool = False

    @property
    def name(self) -> str:
        return name_of(self.function)


@dataclass(frozen=True, slots=True)
class Composed:
    """All scores of a batch by reward name, as they were before any gate, and the total."""

    scores: Mapping[str, tuple[Score, ...]]
    total: tuple[Score, ...]


class Composition:
    """The weighted mean of its components, itself a reward with TRL's signature.

    Per completion: an unscored component is left out of the mean. A component with a closed gate
    counts as 0, so lowering one reward never raises the total; if the gate's own reward is
    unscored, the gate's state is unknown and the component is left out too. Nothing scored:
    ``None``.

    Raises :class:`~omni_grpo_core.errors.ConfigError` without a non-partial component, and for a
    repeated name, a weight that is not positive, or a gate on an unknown name, on itself or of a
    partial component.

    >>> def half(prompts, completions, **columns): return [0.5] * len(completions)
    >>> def whole(prompts, completions, **columns): return [1.0] * len(completions)
    >>> both = Composition([Component(half), Component(whole, 3.0, Gate("half", 0.6))])
    >>> both.explain(["q"], ["t"])
    [Score(value=0.125, reason='half 0.5, whole 0 (1 but half 0.5 < 0.6)')]
    """

    def __init__(self, components: Sequence[Component], *, name: str = "reward") -> None:
        self.__name__ = name
        self.components = tuple(components)
        names = [component.name for component in self.components]
        if all(component.partial for component in self.components):
            got = "only partial ones" if names else "none"
            raise _bad("rewards", got, "at least one reward of the whole completion")
        for component in self.components:
            item = f"reward {component.name!r}"
            if names.count(component.name) > 1:
                raise _bad(item, "the name twice", "different names")
            if not 0 < component.weight < float("inf"):
                raise _bad(item, f"weight {component.weight}", "a weight above 0")
            gate = component.gate
            if gate and component.partial:
                raise _bad(item, "a gate and a span", "one of the two")
            if gate and (gate.on not in names or gate.on == component.name):
                raise _bad(
                    item, f"a gate on {gate.on!r}", "another of the rewards " + ", ".join(names)
                )

    def report(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Composed:
        """Every component's scores and the total. Raises RewardError like
        :func:`~omni_grpo_core.rewards.call.scores_of` does."""
        scores = {
            component.name: tuple(scores_of(component.function, prompts, completions, columns))
            for component in self.components
        }
        rows = range(len(completions))
        return Composed(
            scores, tuple(self._total({n: s[i] for n, s in scores.items()}) for i in rows)
        )

    def explain(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[Score]:
        return list(self.report(prompts, completions, **columns).total)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        return [score.value for score in self.explain(prompts, completions, **columns)]

    @property
    def weights(self) -> dict[str, float]:
        """Of the components in the total, by name."""
        return {c.name: c.weight for c in self.components if not c.partial}

    def counted(
        self, values: Mapping[str, Sequence[float | None]]
    ) -> dict[str, list[float | None]]:
        """What each component adds to the total, from the ``values`` of all by name: 0 behind a
        closed gate, ``None`` where it is left out."""
        rows = [
            {name: Score(value, "") for name, value in zip(values, row, strict=True)}
            for row in zip(*values.values(), strict=True)
        ]
        whole = [component for component in self.components if not component.partial]
        return {c.name: [_gated(c, row)[0] for row in rows] for c in whole}

    def _total(self, scores: Mapping[str, Score]) -> Score:
        paid = weights = 0.0
        reasons = []
        for component in self.components:
            if component.partial:
                continue
            value, why = _gated(component, scores)
            reasons.append(f"{component.name} {why}")
            if value is not None:
                paid += component.weight * value
                weights += component.weight
        return Score(paid / weights if weights else None, ", ".join(reasons))


def _gated(component: Component, scores: Mapping[str, Score]) -> tuple[float | None, str]:
    own, gate = scores[component.name], component.gate
    if own.value is None:
        return None, f"unscored ({own.reason})"
    if gate is None:
        return own.value, f"{own.value:g}"
    key = scores[gate.on].value
    if key is None:
        return None, f"left out ({gate.on} is unscored)"
    if key < gate.at_least:
        return 0.0, f"0 ({own.value:g} but {gate.on} {key:g} < {gate.at_least:g})"
    return own.value, f"{own.value:g}"


def _bad(item: str, got: str, want: str) -> ConfigError:
    return ConfigError(item, got=got, want=want, fix="correct the rewards of the configuration")
