"""Our own batch, each row without padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_grpo_core.parity.given import Given, Setup, our_row
from omni_grpo_core.parity.paths import InputPath


def open_path(setup: Setup) -> InputPath:
    """:func:`~omni_grpo_core.core.batch.process_row`, which checks what it makes."""

    def ours(given: Given) -> Mapping[str, Any]:
        row = our_row(setup, given)
        return {"input_ids": row.input_ids[None], **row.tensors}

    return ours
