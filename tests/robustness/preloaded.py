"""What every case of the table needs, imported once: the cases are forked from a process that
has it, at a hundredth of a second each."""

from __future__ import annotations

import gc
import os
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

from omni_grpo_core.console import quiet_libraries

quiet_libraries()

import transformers  # noqa: E402

from omni_grpo_core.cli import app  # noqa: E402
from omni_grpo_core.exits import run  # noqa: E402
from omni_grpo_core.family import FAMILIES  # noqa: E402

for family in FAMILIES:
    for name in (family.thinker_class, family.processor_class):
        getattr(transformers, name, None)

# the module that the fork runs in, and what a command loads on its way to a first message
for name in ("runner", "rich.console", "rich.table"):
    import_module(name)
with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
    run(lambda: app, ["--help"])
    run(lambda: app, ["check", "--help"])
gc.collect()
gc.freeze()  # nor does a fork look at it again
