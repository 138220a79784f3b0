"""``omni-grpo golden``: options that its commands share, and what each loads first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.io.console import quiet_libraries, quiet_transformers, require_device

if TYPE_CHECKING:
    from omni_grpo_core.core.policy import Policy
    from omni_grpo_core.golden.suite import Suite

Cases = Annotated[
    list[str] | None,
    typer.Argument(metavar="CASE...", help="Cases of the suite. Default: all."),
]
Folder = Annotated[
    Path | None,
    typer.Option("--golden", help="Folder of goldens. Default: ./golden."),
]
DeviceOption = Annotated[
    cli.Device | None,
    typer.Option(help="Device to run the model on. Default: the suite's, else cpu."),
]
DtypeOption = Annotated[
    cli.Dtype | None,
    typer.Option(help="Model dtype. Default: the suite's, else float32 on cpu, bfloat16 on cuda."),
]
GOLDEN = Path("golden")


def goldens(folder: Path | None, *, shipped: bool = False) -> Path:
    """The given folder, else ``./golden``; with ``shipped``, the shipped goldens if there is
    none."""
    if folder is not None or not shipped or os.path.lexists(GOLDEN):
        return folder or GOLDEN
    from omni_grpo_core.golden.suite import shipped_goldens

    return shipped_goldens()


def load(
    folder: Path,
    checkpoint: Path | None,
    device: cli.Device | None,
    dtype: cli.Dtype | None,
) -> tuple[Suite, Policy, str]:
    """Suite, policy and platform key."""
    quiet_libraries()
    from omni_grpo_core.golden.checking import load_suite_policy
    from omni_grpo_core.golden.suite import load_suite

    quiet_transformers()
    suite = load_suite(folder, checkpoint=checkpoint)
    require_device(suite.placed(device, dtype)[0])
    return suite, *load_suite_policy(suite, device, dtype)
