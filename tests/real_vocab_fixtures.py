"""The real vocabulary, built once per worker from the installed package that contains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def ranks() -> Path:
    """Qwen's BPE ranks in the installed dashscope; the test is skipped without it."""
    from omni_grpo_core.errors import ConfigError
    from omni_grpo_core.tiny.realvocab.ranks import ranks_file

    try:
        return ranks_file()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def qwen_folder(ranks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from omni_grpo_core.tiny.realvocab import write_processor

    folder = tmp_path_factory.mktemp("qwen") / "processor"
    write_processor(folder)
    return folder


@pytest.fixture(scope="session")
def qwen(qwen_folder: Path) -> Any:
    """Qwen2.5-Omni's processor."""
    from transformers import Qwen2_5OmniProcessor

    return Qwen2_5OmniProcessor.from_pretrained(qwen_folder, local_files_only=True)
