"""The settings of a judge's endpoint, separate so that reading a configuration loads no client."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from omni_grpo_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A judge's endpoint, its limits and its prices.

    The key is read from the environment, never from a configuration, which is stored with every
    run: so ``base_url`` may not contain one either.

    Raises :class:`~omni_grpo_core.errors.ConfigError` for what cannot work.
    """

    base_url: str
    """An http(s) address without a user, a query or a fragment."""
    model: str
    """The endpoint's name for the judge model."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key."""
    cache: str | Path | None = None
    """A file that stores verdicts; ``None`` requests them anew in every run."""
    concurrency: int = 8
    """Concurrent requests."""
    timeout: float = 60.0
    """Seconds for one complete attempt."""
    attempts: int = 4
    """Attempts per row, including the first."""
    backoff: float = 1.0
    """Seconds: the upper bound of the first random wait between attempts; it doubles."""
    deadline: float = 600.0
    """Seconds for all rows of one call; rows not answered by then are unscored."""
    max_tokens: int = 512
    """For one verdict."""
    prompt_price: float = 0.0
    """Dollars per million tokens."""
    completion_price: float = 0.0
    """Dollars per million tokens."""

    def __post_init__(self) -> None:
        wants = {
            "base_url": (
                _is_address(self.base_url),
                "an http(s) address without a user, a query or a fragment",
            ),
            "api_key_env": (
                re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env) is not None,
                "the name of an environment variable",
            ),
            "model": (bool(self.model.strip()), "the name of a model"),
            "cache": ("\0" not in str(self.cache) and self.cache != "", "the name of a file"),
            "concurrency": (self.concurrency >= 1, "at least 1"),
            "attempts": (self.attempts >= 1, "at least 1"),
            "timeout": (self.timeout > 0, "more than 0 seconds"),
            "deadline": (self.deadline > 0, "more than 0 seconds"),
            "backoff": (self.backoff >= 0, "0 seconds or more"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "prompt_price": (self.prompt_price >= 0, "0 dollars or more"),
            "completion_price": (self.completion_price >= 0, "0 dollars or more"),
        }
        for name, (fine, want) in wants.items():
            if not fine:
                value = getattr(self, name)
                # a key in the wrong place is not repeated
                hidden = name == "api_key_env" or bool(set("@?#") & set(str(value)))
                got = "a value not shown, as it may hold a key" if hidden else repr(value)
                raise ConfigError(f"judge {name}", got=got, want=want, fix=f"set {name}")

    @property
    def url(self) -> str:
        """The URL of chat completions."""
        return f"{self.base_url.rstrip('/')}/chat/completions"


def _is_address(base_url: str) -> bool:
    if not re.fullmatch(r"https?://[!-~]+", base_url):
        return False
    try:
        parts = urlsplit(base_url)
        found = parts.hostname and parts.port != 0
    except ValueError:
        return False
    return bool(found) and not set("@?#\\") & set(base_url)
