"""Small handwritten recordings, and steps of the clean loop, for tests of the doctor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Reference
from omni_grpo_core.trace.calls import MediumSeen, ProcessorCall, SamplesSeen, TemplateCall
from omni_grpo_core.types import Modality, StageRecord, Trace

SYSTEM = {"role": "system", "content": "Answer inside <answer> </answer>."}
MARKS = {
    "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
}


def case(*values: Any, reference: Reference | None = None) -> Case:
    """A step with ``values`` in order."""
    return Case(Trace({}, tuple(StageRecord("text", v, (), 0.0) for v in values)), reference)


def facts(look: Look, step: Case) -> list[str]:
    """The facts of everything that a look finds."""
    return [evidence.fact for evidence in look(step)]


def only(look: Look, step: Case) -> Evidence:
    """The only evidence of a look."""
    [evidence] = look(step)
    return evidence


def user(*parts: str, question: str = "Which way?") -> dict[str, Any]:
    """A user turn: media as ``"video clip.mp4"``, then the question."""
    content = [
        {"type": kind, kind: name} for kind, _, name in (part.partition(" ") for part in parts)
    ]
    return {"role": "user", "content": (*content, {"type": "text", "text": question})}


def rendered(messages: Sequence[Mapping[str, Any]]) -> str:
    """ChatML, independent of the package's own."""
    lines = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(MARKS.get(part["type"], part.get("text", "")) for part in content)
        lines.append(f"<|im_start|>{message['role']}\n{content}<|im_end|>\n")
    return "".join(lines) + "<|im_start|>assistant\n"


def template(*messages: Mapping[str, Any], text: str | None = None) -> TemplateCall:
    text = rendered(messages) if text is None else text
    return TemplateCall(messages, {"add_generation_prompt": True}, (text,), False)


def samples(*rows: Mapping[str, Any]) -> SamplesSeen:
    return SamplesSeen(rows, None)


def medium(modality: Modality, values: torch.Tensor | None = None, name: str = "") -> MediumSeen:
    """A small image, clip or audio; by default one with content."""
    if values is None:
        shape = {"image": (3, 56, 56), "video": (4, 3, 56, 56), "audio": (1600,)}[modality]
        values = torch.linspace(0, 255 if modality != "audio" else 1, torch.Size(shape).numel())
        values = values.reshape(shape)
    digest = hashlib.sha256(values.numpy().tobytes() + name.encode()).hexdigest()
    return MediumSeen(
        modality, values, tuple(values.shape), "float32", digest, float(values.min()),
        float(values.max()), float(values.mean()), float(values.std()),
    )  # fmt: skip


def processed(*texts: str, **given: Any) -> ProcessorCall:
    """A processor call: media by ``images``, ``videos``, ``audios``; ``flag``: audio-in-video."""
    keywords: dict[str, Any] = {"padding": True, **given.pop("keywords", {})}
    if "flag" in given:
        keywords["use_audio_in_video"] = given.pop("flag")
    fields: dict[str, Any] = {
        "nested": False, "images": (), "videos": (), "audios": (), "ignored": (), "warnings": (),
        "outputs": {}, "padding_side": "left", "error": None, **given,
    }  # fmt: skip
    return ProcessorCall(texts=texts, keywords=keywords, **fields)


@cache
def steps_with(*ids: str, audio: str = "interleaved", rows: tuple[int, ...] = (0, 5)) -> Any:
    """Cases: the recorded steps of the clean loop with faults of the catalogue planted in it."""
    import tempfile

    from omni_grpo_core.doctor.load import as_cases
    from omni_grpo_core.faults.config import LoopConfig
    from omni_grpo_core.faults.plan import BY_ID
    from omni_grpo_core.faults.trial import config_for, recorded, reference

    faults = [BY_ID[name] for name in ids]
    base = LoopConfig(audio=audio, rows=rows, group_size=2)  # type: ignore[arg-type]
    config = config_for(faults, base)
    assert config is not None
    with tempfile.TemporaryDirectory() as folder:
        traces, _ = recorded(faults, config, Path(folder) / "trace")
    return as_cases(traces, reference("float32"))
