"""Packages that only an extra installs: imported where used, with an error that names the extra if
they are missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Literal

from omni_grpo_core.errors import MissingExtra

Extra = Literal["bench", "data", "judge", "low-memory", "qwen", "rewards", "train", "vllm"]

EXTRAS: Mapping[Extra, str] = {
    "bench": "a picture of the benchmark",
    "data": "parquet and arrow files, folders of `datasets` and the Hub",
    "judge": "rewards by an LLM judge",
    "low-memory": "an optimizer with eight bits a moment",
    "qwen": "Qwen's vocabulary",
    "rewards": "accuracy of free text, OCR and formulas",
    "train": "training",
    "vllm": "rollouts by vLLM",
}
"""The extras of pyproject.toml whose packages are imported here, and what each is for."""


@contextmanager
def extra(name: Extra) -> Iterator[None]:
    """Imports of packages that the extra ``name`` installs::

        with extra("judge"):
            import httpx

    Raises:
        MissingExtra: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(
            EXTRAS[name],
            got=f"no package {error.name}",
            want=f"the packages of the extra {name!r}",
            fix=f"pip install 'omni-grpo-core[{name}]'",
        ) from error


def require(name: Extra, *packages: str) -> list[ModuleSpec]:
    """Locate packages of the extra before the work starts, without importing them.

    Raises:
        MissingExtra: one of them is not installed.
    """
    with extra(name):
        return [_found(package) for package in packages]


def _found(package: str) -> ModuleSpec:
    spec = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(name=package)
    return spec
