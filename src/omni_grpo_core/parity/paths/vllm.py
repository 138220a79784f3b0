"""vLLM's input processing alone: no weights, no engine, a few seconds on a CPU.

It is given what a rollout gives an engine: our text as ids with one placeholder per medium, our
decoded media, and the keywords of one request.
"""

from __future__ import annotations

import atexit
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from omni_grpo_core.core.processing import pil_image
from omni_grpo_core.parity.given import Given, Setup
from omni_grpo_core.parity.paths import InputPath
from omni_grpo_core.types import AUDIO_SAMPLING_RATE


def open_path(setup: Setup) -> InputPath:
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    config = ModelConfig(
        model=str(full_layout(setup)), dtype="float32", enforce_eager=True, seed=0,
        limit_mm_per_prompt=None,
    )  # fmt: skip
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    model = _without_weights(config, processor.info.get_hf_config())

    def vllm(given: Given) -> Mapping[str, Any]:
        ids = setup.processor.tokenizer(given.prompt.text)["input_ids"]
        data = media_of(given)
        if not data:
            return {"input_ids": ids}
        result = processor.apply(
            ProcessorInputs(
                prompt=ids,
                mm_data_items=processor.info.parse_mm_data(data),
                hf_processor_mm_kwargs=keywords_of(given),
            ),
            TimingContext(enabled=False),
        )
        ids = result["prompt_token_ids"]
        items = [
            MultiModalFeatureSpec(data=item, modality=kind, identifier="", mm_position=place)
            for kind, found in result["mm_kwargs"].items()
            for item, place in zip(found, result["mm_placeholders"][kind], strict=True)
        ]
        return {
            "input_ids": ids,
            "position_ids": model.get_mrope_input_positions(ids, items)[0],
            **_audio(result["mm_kwargs"].get_data()),
        }

    return vllm


def _without_weights(config: Any, of: Any) -> Any:
    """An instance of vLLM's model class that has its config and nothing else: what computes
    positions needs no more."""
    from vllm.model_executor.model_loader.utils import get_model_cls

    kind = get_model_cls(config)
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.config = of
    return model


def media_of(given: Given) -> dict[str, Any]:
    """The decoded media as vLLM takes them, ``multi_modal_data``."""
    media = given.media
    data = {
        "image": [pil_image(image.pixels) for image in media.images],
        "video": [video.frames.numpy() for video in media.videos],
        "audio": [(audio.samples.numpy(), AUDIO_SAMPLING_RATE) for audio in media.audios],
    }
    return {kind: items for kind, items in data.items() if items}


def keywords_of(given: Given) -> dict[str, Any]:
    """``mm_processor_kwargs`` of one request, as its users write them. Our own engine adds
    ``second_per_grid_ts``: its path is ``vllm-engine``."""
    keywords: dict[str, Any] = {"do_resize": False}
    if given.media.videos:
        keywords["fps"] = given.media.videos[0].sample_fps
    if given.interleaved:
        keywords["use_audio_in_video"] = True
    return keywords


def full_layout(setup: Setup) -> Path:
    """A checkpoint as vLLM expects it: a thinker alone has its config under ``thinker_config``
    there. The folder itself where it is whole already."""
    config = json.loads((setup.checkpoint / "config.json").read_text(encoding="utf-8"))
    if "thinker_config" in config:
        return setup.checkpoint
    folder = scratch_folder()
    for file in setup.checkpoint.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file)
    family = setup.policy.family
    whole = {
        "architectures": [family.full_class],
        "model_type": family.model_types[0],
        "thinker_config": config,
        "enable_audio_output": False,
    }
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    return folder


def scratch_folder() -> Path:
    """A folder that lasts as long as this process."""
    folder = Path(mkdtemp(prefix="omni-grpo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _audio(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """By the processor's names: vLLM keeps the mel frames of all sounds in one row."""
    found = dict(tensors)
    features, lengths = found.pop("input_audio_features", None), found.get("audio_feature_lengths")
    if features is None or lengths is None:
        return found
    parts = list(features) if isinstance(features, list | tuple) else [features]
    flat = torch.cat([part.reshape(part.shape[-2:]) for part in parts], dim=-1)
    sizes = [int(n) for n in torch.as_tensor(lengths).flatten()]
    longest = max(sizes)
    padded = torch.zeros(len(sizes), flat.shape[0], longest)
    mask = torch.zeros(len(sizes), longest, dtype=torch.int64)
    for number, part in enumerate(torch.split(flat, sizes, dim=-1)):
        padded[number, :, : part.shape[-1]] = part
        mask[number, : part.shape[-1]] = 1
    return {**found, "input_features": padded, "feature_attention_mask": mask}
