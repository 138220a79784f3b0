"""TRL: how its GRPO trainer turns prompts into ids and media, without the rest of the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from omni_grpo_core.parity.given import Given, Setup
from omni_grpo_core.parity.paths import InputPath
from omni_grpo_core.parity.paths.transformers import processor_keywords, reading_files


def open_path(setup: Setup) -> InputPath:
    """``GRPOTrainer._tokenize_prompts`` on a conversational prompt whose media are paths. Settings
    go where TRL takes them, into ``chat_template_kwargs``."""
    from trl import GRPOTrainer

    def trl(given: Given) -> Mapping[str, Any]:
        keywords = processor_keywords(setup, given.interleaved)
        # what a trainer knows, of which this method reads the attributes below
        trainer = SimpleNamespace(
            processing_class=setup.processor,
            chat_template_kwargs={
                "processor_kwargs": {"videos_kwargs": keywords["videos_kwargs"]},
                "load_audio_from_video": given.interleaved,
            },
            chat_template=None,
            tools=None,
            environment_factories=None,
            _is_vlm=True,
        )
        with reading_files(setup.processor):
            ids, _, media = GRPOTrainer._tokenize_prompts(trainer, [given.messages()])
        return {"input_ids": ids[0], **media}

    return trl
