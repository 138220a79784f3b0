"""A checkpoint's processor, and its model without weights: what prepares inputs needs no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from omni_grpo_core.core.checkpoint_files import check_config, read_object
from omni_grpo_core.core.family import FAMILIES, Family, family_of
from omni_grpo_core.core.policy import (
    Policy,
    check_template,
    empty_thinker,
    load_processor,
    require_library,
)
from omni_grpo_core.core.processor_files import check_processor_files
from omni_grpo_core.errors import CheckpointError

_STATED_IN = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json")


def load_weightless(path: str | Path, *, processor: str | Path | None = None) -> Policy:
    """The processor of a checkpoint, in a policy that cannot run: of its model there is only what
    the config says, which is enough for position ids. Without a ``config.json`` the model is
    ``None``: a folder with nothing but the processor's files is enough for everything before them.

    Raises:
        CheckpointError: no processor, one that does not load, or of no known family.
    """
    folder = Path(path)
    files = Path(processor or folder)
    config: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        config = read_object(folder / "config.json")
        family = family_of(config.get("model_type"), str(folder))
    else:
        family = _stated_family(files)
    require_library(folder, family)
    check_processor_files(files, family)
    loaded = load_processor(files, family)
    check_template(files, loaded)
    model = None
    if config:
        check_config(config, folder)
        model = empty_thinker(folder, family, config)
    tokenizer = loaded.tokenizer
    return Policy(
        model=model,
        processor=loaded,
        family=family,
        checkpoint=str(folder),
        eos_token_ids=(),
        pad_token_id=int(tokenizer.pad_token_id or 0),
        suppressed=torch.zeros(0, dtype=torch.bool),
    )


def _stated_family(files: Path) -> Family:
    """The family whose processor class the processor's files name."""
    stated = [
        read_object(files / name).get("processor_class")
        for name in _STATED_IN
        if (files / name).is_file()
    ]
    for family in FAMILIES:
        if family.processor_class in stated:
            return family
    raise CheckpointError(
        str(files),
        got=f"a processor_class of {stated[0]!r}" if stated else "neither config nor processor",
        want=" or ".join(family.processor_class for family in FAMILIES),
        fix="pass a Qwen-Omni checkpoint, or the folder of its processor",
    )
