"""What ``attach`` has to know of a trainer: where its parts are, and which method does what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from omni_grpo_core.rewards.call import name_of

if TYPE_CHECKING:
    from torch import Tensor


def _as_it_is(held: Any, scores: Tensor | None) -> Mapping[str, Any]:
    return {**held, "logprobs": scores} if isinstance(held, Mapping) else {}


@dataclass(frozen=True, slots=True)
class Adapter:
    """One family of trainers. Its parts are named as seen from the trainer, dotted where they are
    inside another; of several names the first that is there counts.

    ``name``: of the family, for people. ``package``: the distribution whose version is reported
    with it, if it is one that ships them.

    ``rollout``: the method that turns rows into completions and advantages. ``loss``: the one that
    computes the loss of ``(model, inputs)``. ``scores``: the one that returns the tokens' logprobs,
    alone or first of several; ``whole``: of all tokens after the first, not of the completion only.
    ``partial``: the key of the rollout's result that holds partial rewards with their token masks.
    Empty: there is no such method or key, so what it would show is not noted.
    ``named``: under TRL's names, what a rollout returns, or what a loss takes, with the logprobs
    that it computed.
    """

    name: str
    package: str = ""
    model: tuple[str, ...] = ("model",)
    processor: tuple[str, ...] = ("processing_class",)
    reward_funcs: tuple[str, ...] = ("reward_funcs",)
    rollout: str = ""
    scores: str = ""
    loss: str = ""
    whole: bool = False
    partial: str = ""
    named: Callable[[Any, Tensor | None], Mapping[str, Any]] = _as_it_is

    def fits(self, trainer: Any) -> bool:
        """Whether a trainer has everything that is named."""
        methods = filter(None, (self.rollout, self.scores, self.loss))
        parts = (self.model, self.processor)
        return all(callable(getattr(trainer, name, None)) for name in methods) and all(
            part(trainer, names) is not None for names in parts
        )

    def recognised(self, trainer: Any) -> str:
        """One line: the trainer's class, its family and version, and where its parts were found."""
        processor, functions = part(trainer, self.processor), part(trainer, self.reward_funcs) or ()
        said = [
            f"{type(trainer).__name__} as {self.name}{_version(self.package)}",
            f"processor {type(processor).__name__} ({_name(trainer, self.processor)})",
            f"rewards {', '.join(map(name_of, functions)) or 'none'}",
        ]
        if self.loss:
            said.append(f"loss {self.loss}")
        return "; ".join(said)


def part(trainer: Any, names: tuple[str, ...]) -> Any:
    """The first of ``names`` that a trainer has, or ``None``.

    >>> from types import SimpleNamespace as Trainer
    >>> swift = Trainer(tokenizer="tokenizer", template=Trainer(processor="processor"))
    >>> part(swift, ("template.processor", "tokenizer")), part(Trainer(), ("tokenizer",))
    ('processor', None)
    """
    found = (_at(trainer, name) for name in names)
    return next((value for value in found if value is not None), None)


def _at(trainer: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        trainer = getattr(trainer, name, None)
    return trainer


def _name(trainer: Any, names: tuple[str, ...]) -> str:
    return next((name for name in names if _at(trainer, name) is not None), "")


def _version(package: str) -> str:
    """
    >>> _version("no-such-package")
    ''
    """
    try:
        return f" {version(package)}" if package else ""
    except PackageNotFoundError:
        return ""
