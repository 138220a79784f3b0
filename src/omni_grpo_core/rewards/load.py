"""Reward functions by name: ours, or any as ``module:function``."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.rewards import Reward
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.call import RewardFunction
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.people_focus import PeopleFocus

if TYPE_CHECKING:
    from omni_grpo_core.rewards.judge import Judge

BY_RULE: dict[str, Callable[[], Reward]] = {
    "format": Format,
    "accuracy": Accuracy,
    "people_focus": PeopleFocus,
}
BY_JUDGE = ("context", "reasoning")


def load_reward(name: str, judge: Judge | None = None) -> RewardFunction:
    """A reward function by its name.

    Raises :class:`~omni_grpo_core.errors.ConfigError` for an unknown name, a module that cannot be
    imported, something that is not callable, or a judged reward without a judge.

    >>> load_reward("format")
    Format('format')
    >>> load_reward("omni_grpo_core.rewards.format:Format")
    Format('format')
    """
    if ":" in name:
        return _foreign(name)
    if name in BY_RULE:
        return BY_RULE[name]()
    if name not in BY_JUDGE:
        raise ConfigError(
            f"reward {name!r}",
            got="an unknown name",
            want="one of " + ", ".join((*BY_RULE, *BY_JUDGE)) + ", or module:function",
            fix="correct the name",
        )
    if judge is None:
        raise ConfigError(
            f"reward {name!r}",
            got="no judge",
            want="an OpenAI-compatible endpoint that scores it",
            fix="configure a judge, or leave the reward out",
        )
    from omni_grpo_core.rewards.judge import JudgeReward

    return JudgeReward("context" if name == "context" else "reasoning", judge)


def _foreign(path: str) -> RewardFunction:
    called, given = _arguments(path)
    module_name, _, attribute = called.partition(":")
    try:
        found: object = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # importing a foreign module can raise anything
        raise _bad(path, f"{type(error).__name__} while importing it: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise _bad(path, f"nothing named {attribute!r} in module {module_name!r}")
        found = getattr(found, part)
    if inspect.isclass(found) or given is not None:
        try:
            found = found(**(given or {}))  # type: ignore[operator]
        except TypeError as error:
            raise _bad(path, f"a class that needs arguments ({error})") from error
        except (Exception, SystemExit) as error:
            raise _bad(path, f"{type(error).__name__} while creating it: {error}") from error
    if not callable(found):
        raise _bad(path, type(found).__name__)
    return found


def _arguments(path: str) -> tuple[str, dict[str, object] | None]:
    """``module:maker(name=value)`` as ``module:maker`` and its keyword arguments, which are
    literals; ``None`` without parentheses.

    >>> _arguments("mine:scaled(longest=100)"), _arguments("mine:plain")
    (('mine:scaled', {'longest': 100}), ('mine:plain', None))
    """
    called, bracket, inside = path.partition("(")
    if not bracket:
        return path, None
    try:
        call = ast.parse(f"f({inside}", mode="eval").body
        if isinstance(call, ast.Call) and not call.args and all(one.arg for one in call.keywords):
            return called, {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise _bad(path, "arguments that cannot be read")


def _bad(path: str, got: str) -> ConfigError:
    return ConfigError(
        f"reward {path!r}",
        got=got,
        want="module:function, a reward function with TRL's signature, or module:maker(name=value)",
        fix="check the spelling, and that the module can be imported from here",
    )
