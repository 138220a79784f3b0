"""Where a judge is asked: settings alone, so that reading a configuration loads no client."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omni_grpo_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the judge is and how patient to be. Times in seconds, prices in dollars per million
    tokens. ``timeout`` is for one whole attempt, ``deadline`` for all rows of one call; what is
    not answered by then is unscored. ``backoff`` bounds the first random wait, which doubles.
    ``cache``: a file that keeps verdicts. The key is read from the environment, never from a
    configuration.

    Raises :class:`~omni_grpo_core.errors.ConfigError` for what cannot work.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    cache: str | Path | None = None
    concurrency: int = 8
    timeout: float = 60.0
    attempts: int = 4
    backoff: float = 1.0
    deadline: float = 600.0
    max_tokens: int = 512
    prompt_price: float = 0.0
    completion_price: float = 0.0

    def __post_init__(self) -> None:
        wants = {
            "base_url": (self.base_url.startswith(("http://", "https://")), "an http(s) address"),
            "model": (bool(self.model.strip()), "the name of a model"),
            "concurrency": (self.concurrency >= 1, "at least 1"),
            "attempts": (self.attempts >= 1, "at least 1"),
            "timeout": (self.timeout > 0, "more than 0 seconds"),
            "deadline": (self.deadline > 0, "more than 0 seconds"),
            "backoff": (self.backoff >= 0, "0 seconds or more"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
        }
        for name, (fine, want) in wants.items():
            if not fine:
                raise ConfigError(
                    f"judge {name}", got=repr(getattr(self, name)), want=want, fix=f"set {name}"
                )
