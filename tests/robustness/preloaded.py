"""What every case of the table needs, imported once: the cases are forked from a process that
has it, at a hundredth of a second each."""

from __future__ import annotations

from omni_grpo_core.console import quiet_libraries

quiet_libraries()

import transformers  # noqa: E402

from omni_grpo_core.family import FAMILIES  # noqa: E402

for family in FAMILIES:
    for name in (family.thinker_class, family.processor_class):
        getattr(transformers, name, None)
