"""What ms-swift's template and inference engine make of requests, on fakes of both."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import toy_thinker

from omni_grpo_core import record
from omni_grpo_core.recorder.adapters.swift import SWIFT
from omni_grpo_core.trace.calls import ProcessorCall, TemplateCall, calls_of
from omni_grpo_core.trace.store import load_trace

SOUND = torch.linspace(-1, 1, 8)


class Processor:
    tokenizer = SimpleNamespace(
        padding_side="left", decode=lambda ids: "".join(map(chr, ids)), pad_token_id=0
    )
    audio_token, audio_bos_token, audio_eos_token = "A", "(", ")"
    video_token = "V"

    def __call__(self, text: str, audio: Any = None, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(1, 0, dtype=torch.long)}


class Template:
    """Renders letters, and reads every medium as a sound of four placeholders."""

    is_training = False
    use_audio_in_video = False

    def __init__(self, processor: Processor) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer

    def _encode(self, inputs: Any) -> dict[str, Any]:
        return {"input_ids": list(map(ord, "A" + inputs.words))}

    def encode(self, request: Any) -> dict[str, Any]:
        inputs = SimpleNamespace(
            words=request.words, images=[], videos=[], audios=[SOUND], mm_processor_kwargs={}
        )
        made = self._encode(inputs)
        self.processor(text="", audio=inputs.audios)
        ids = [ord("A")] * 3 + made["input_ids"]
        features = SOUND.view(1, 2, 4) + len(request.words)
        return {"input_ids": ids, "input_features": features, "template_inputs": inputs}


class InferEngine:
    def __init__(self, template: Template) -> None:
        self.template = template

    def _batch_encode(self, requests: Sequence[Any], strict: bool) -> tuple[list[Any], list[Any]]:
        # threads end in any order
        made = {id(one): self.template.encode(one) for one in reversed(requests)}
        return [made[id(one)] for one in requests], []


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Processor:
    for name, kind in (("template.base", Template), ("infer_engine.infer_engine", InferEngine)):
        module = ModuleType(f"swift.{name}")
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return Processor()


def request(words: str, path: str) -> Any:
    said = [{"role": "user", "content": f"<audio>{words}"}]
    return SimpleNamespace(words=words, messages=said, audios=[path])


def test_each_request_is_a_prompt_with_its_media(processor: Processor, tmp_path: Path) -> None:
    """The processor got the media alone, in the order in which threads ended."""
    template = Template(processor)
    other = InferEngine(Template(Processor()))
    asked = [request("one", "a.wav"), request("three", "b.wav")]
    with record(tmp_path, model=toy_thinker.make(), processor=processor) as recorder:
        InferEngine(template)._batch_encode(asked, strict=True)
        other._batch_encode(asked, strict=True)
        template.is_training = True
        template.encode(asked[0])  # to be scored, which the model's call shows
        recorder.end_step()
    trace = load_trace(tmp_path / "step-000000")
    rendered, made = calls_of(trace, TemplateCall), calls_of(trace, ProcessorCall)
    assert [call.texts for call in rendered] == [("Aone",), ("Athree",)]
    assert rendered[1].messages[0]["content"] == (
        {"type": "audio", "audio": "b.wav"},
        {"type": "text", "text": "three"},
    )
    assert [call.texts for call in made] == [("Aone",), ("Athree",)]
    assert made[0].outputs["input_ids"].tolist() == [list(map(ord, "AAAAone"))]
    assert made[0].outputs["attention_mask"].tolist() == [[1] * 7]
    assert torch.equal(made[1].outputs["input_features"], SOUND.view(1, 2, 4) + 5)
    assert made[0].audios[0].values is not None
    assert torch.equal(made[0].audios[0].values, SOUND)


def test_a_micro_batch_under_the_names_of_trl() -> None:
    """Its values are of the last tokens of all rows: a row that is shorter begins further left, and
    what follows it is padding."""
    batch = SimpleNamespace(
        completion_mask=torch.tensor([[0, 1, 1], [1, 1, 0]]).bool(),
        advantages=torch.tensor([[9.0, 2.0, 2.0], [-2.0, -2.0, 9.0]]),
        old_per_token_logps=torch.tensor([[0.0, -1.0, -2.0], [-3.0, -4.0, 0.0]]),
        ref_per_token_logps=None,
    )
    ids = torch.tensor([[1, 2, 3, 7, 8], [1, 2, 7, 8, 0]])
    held = {"grpo_batch": batch, "model_inputs": {"input_ids": ids}}
    named = SWIFT.named(held, torch.tensor([[0.0, -1.5, -2.5], [-3.5, -4.5, 0.0]]))
    assert named["completion_ids"].tolist() == [[7, 8, 3], [7, 8, 0]]
    assert named["completion_mask"].tolist() == [[True, True, False]] * 2
    assert named["logprobs"].tolist() == [[-1.5, -2.5, 0.0], [-3.5, -4.5, 0.0]]
    assert named["old_per_token_logps"].tolist() == [[-1.0, -2.0, 0.0], [-3.0, -4.0, 0.0]]
    assert named["ref_per_token_logps"] is None
    assert named["advantages"].tolist() == [2.0, -2.0]
    assert SWIFT.named([held, held], None)["advantages"].tolist() == [2.0, -2.0, 2.0, -2.0]
