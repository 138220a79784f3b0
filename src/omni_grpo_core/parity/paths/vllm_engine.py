"""Our rollout engine, vLLM running in this process with the checkpoint's weights: the prompt ids
that it reports for the requests of a rollout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_grpo_core.core.policy import load_policy
from omni_grpo_core.engines.requests import Request, sampling_of
from omni_grpo_core.engines.vllm_backend import VllmBackend
from omni_grpo_core.engines.weights import write_checkpoint
from omni_grpo_core.parity.given import Given, Setup
from omni_grpo_core.parity.paths import InputPath
from omni_grpo_core.parity.paths.vllm import scratch_folder


def open_path(setup: Setup) -> InputPath:
    backend = VllmBackend()
    policy = load_policy(setup.checkpoint)
    folder = scratch_folder()
    write_checkpoint(policy, dict(policy.model.named_parameters()), folder)
    backend.load(folder)
    sampling = sampling_of(policy, group_size=1, max_new_tokens=1, temperature=0.0)

    def engine(given: Given) -> Mapping[str, Any]:
        pair = setup.processor.video_processor.temporal_patch_size
        request = Request(
            given.prompt.text,
            given.media,
            given.conversation.audio_in_video,
            tuple(pair / video.sample_fps for video in given.media.videos),
            seed=0,
        )
        (answer,) = backend.generate([request], sampling)
        return {"input_ids": answer.prompt_ids, "ids_only": True}

    return engine
