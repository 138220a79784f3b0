"""The imports that every case of the table needs, done once: cases are forked from this process, at
a hundredth of a second each."""

from __future__ import annotations

import gc
import io
import tempfile
from contextlib import redirect_stderr, redirect_stdout

from omni_grpo_core.io.console import quiet_libraries

quiet_libraries()

import reading  # noqa: E402, F401 - imports the decoder too
import runner  # noqa: E402, F401 - imports pytest too
import transformers  # noqa: E402

from omni_grpo_core.cli.main import app  # noqa: E402
from omni_grpo_core.core.family import FAMILIES  # noqa: E402
from omni_grpo_core.io.exits import run  # noqa: E402

for family in FAMILIES:
    for name in (family.thinker_class, family.processor_class):
        getattr(transformers, name, None)

# what a command imports on its first call: typer's parsing, checks and causes
with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
    for words in (
        ["--help"],
        ["check", "--checkpoint", "nowhere"],
        ["doctor", "nowhere"],
        ["train", "nowhere"],
        ["golden", "review", "--golden", "nowhere"],
    ):
        run(lambda: app, words)
tempfile.tempdir = None  # each case has its own
gc.freeze()  # garbage collection in a fork copies the pages it visits
