"""Every command and option, read from the commands themselves: a new option is tested from the day
it is added."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer

from omni_grpo_core.cli.main import app


@dataclass(frozen=True)
class Option:
    """``flag``: ``--html``, or ``None`` for an argument. ``kind``: the type of one value."""

    name: str
    flag: str | None
    kind: type
    required: bool


@dataclass(frozen=True)
class Command:
    words: tuple[str, ...]
    options: tuple[Option, ...]

    @property
    def name(self) -> str:
        return " ".join(self.words)

    @property
    def json(self) -> bool:
        return any(option.flag == "--json" for option in self.options)

    def given(self, *, without: Option | None = None) -> list[str]:
        """The command with its required arguments and options, each ``x``."""
        required = [o for o in self.options if o.required and o != without]
        return [*self.words, *(word for o in required for word in (o.flag, "x") if word)]


def commands(of: typer.Typer = app, words: tuple[str, ...] = ()) -> Iterator[Command]:
    for info in of.registered_commands:
        assert info.callback is not None
        name = info.name or info.callback.__name__
        yield Command((*words, name), tuple(_options(info.callback)))
    for group in of.registered_groups:
        assert group.typer_instance is not None
        yield from commands(group.typer_instance, (*words, str(group.name)))


def _options(callback: Any) -> Iterator[Option]:
    hints = typing.get_type_hints(callback, include_extras=True)
    for name, parameter in inspect.signature(callback).parameters.items():
        if hints[name] is typer.Context:
            continue
        kind, info = typing.get_args(hints[name])[:2]
        # in an annotation typer takes the first name for a default, and sorts it out later
        given = [one for one in (info.default, *(info.param_decls or ())) if one is not ...]
        flags = [one.partition("/")[0] for one in given] or [f"--{name.replace('_', '-')}"]
        argument = isinstance(info, type(typer.Argument()))
        required = parameter.default is parameter.empty
        yield Option(name, None if argument else flags[-1], _one(kind), required)


def _one(kind: Any) -> type:
    """``Path`` of ``Optional[Path]``, ``str`` of ``Optional[list[str]]``."""
    while arguments := [one for one in typing.get_args(kind) if one is not types.NoneType]:
        kind = arguments[0]
    assert isinstance(kind, type)
    return kind


COMMANDS = tuple(commands())
