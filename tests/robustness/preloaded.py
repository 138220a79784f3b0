"""What every case of the table needs, imported once: the cases are forked from a process that
has it, at a hundredth of a second each."""

from __future__ import annotations

from typing import Any

from omni_grpo_core.console import quiet_libraries

quiet_libraries()

import transformers  # noqa: E402

from omni_grpo_core.family import FAMILIES  # noqa: E402

for family in FAMILIES:
    for name in (family.thinker_class, family.processor_class):
        getattr(transformers, name, None)

import typer  # noqa: E402

import omni_grpo_core.grpo.load_config  # noqa: E402
import omni_grpo_core.grpo.train  # noqa: E402, F401
from omni_grpo_core.cli import app  # noqa: E402

command: Any = typer.main.get_command(app)
command.make_context("omni-grpo", ["tiny", "path"])  # typer imports more when it reads options
