"""Shipped clips with their own questions: the cases of the real vocabulary's goldens."""

from __future__ import annotations

from typing import Any

import torch

from omni_grpo_core import tiny
from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.family import QWEN2_5_OMNI
from omni_grpo_core.core.media import MediaConfig
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.pipeline.inputs import Inputs, prepare
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.tiny.architecture import thinker_config
from omni_grpo_core.types import Batch, MediaRef, Modality, ProblemType, Sample

SETTINGS = Settings(media=MediaConfig(max_pixels=56 * 56))
"""The library's defaults, except for frames of 4 tokens."""

_CLIPS = tiny.data_file().parent
_GOLD = "<answer>A</answer>"


def _sample(
    name: str, question: str, kind: ProblemType, *media: tuple[Modality, str], options: str = ""
) -> Sample:
    refs = tuple(MediaRef(modality, str(_CLIPS / file)) for modality, file in media)
    choices = tuple(options.split("|")) if options else ()
    return Sample(name, question, kind, choices, _GOLD, refs, "real_vocab_cases.py")


SAMPLES = {
    sample.sample_id: sample
    for sample in (
        # 3 s: more than one of the 2 s chunks in which video and sound alternate
        _sample(
            "interleaved",
            "Does the speaker's tone match what's on screen, and why isn't it louder?",
            "multiple choice",
            ("video", "clip-09.mp4"),
            options="A. It does.|B. It doesn't.|C. Can't tell </think>",
        ),
        _sample(
            "separate",
            "视频里的人在说什么？请先描述画面，再回答。",
            "free-form",
            ("video", "clip-02.mp4"),
            ("audio", "clip-02.mp4"),
        ),
        _sample(
            "silent",
            "How many 🔴 appear in 1,024 px?",
            "numerical",
            ("video", "clip-10.mp4"),
        ),
        _sample("image", "Read `x = {'a': 0xFF}`\n\n\tthen ①②③.", "OCR", ("image", "clip-12.png")),
        _sample(
            "audio", "Quelle émotion entend-on, à 3.5 s ?", "emer_ov", ("audio", "clip-14.wav")
        ),
        _sample("text", "Is 3.9 greater than 3.11?", "judge"),
    )
}
MIXED = ("interleaved", "image", "text")


def weightless(processor: Any) -> Policy:
    """A policy that can compute positions and nothing else: the tiny thinker with the processor's
    ids, on the meta device. Positions depend on ids, merge size, and ids per second; see
    ``test_positions_are_those_of_the_full_model``."""
    from transformers import (
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
    )

    config = Qwen2_5OmniThinkerConfig(**thinker_config(processor.tokenizer.backend_tokenizer))
    with torch.device("meta"):
        model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    return Policy(
        model=model,
        processor=processor,
        family=QWEN2_5_OMNI,
        checkpoint="none",
        eos_token_ids=(processor.tokenizer.eos_token_id,),
        pad_token_id=processor.tokenizer.pad_token_id,
        suppressed=torch.zeros(1, dtype=torch.bool),
    )


def inputs_of(policy: Policy) -> Inputs:
    return prepare(policy, tuple(SAMPLES.values()), SETTINGS)


def batch_of(policy: Policy, inputs: Inputs, *names: str) -> Batch:
    rows = {row.sample_id: row for row in inputs.batch.rows}
    return collate([rows[name] for name in names], policy.pad_token_id)
