"""ms-swift's ``GRPOTrainer``. Its template renders, tokenizes and expands prompts by itself, in
threads, and gives the processor the media alone: what it makes of a request is what another
trainer's processor makes of a prompt."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.recorder.adapters.adapter import Adapter
from omni_grpo_core.recorder.hooks import Patches
from omni_grpo_core.recorder.media import media_seen
from omni_grpo_core.recorder.step_buffer import Seen, StepBuffer
from omni_grpo_core.trace.calls import ProcessorCall, TemplateCall
from omni_grpo_core.types import MODALITIES

_TAG = re.compile(rf"<({'|'.join(MODALITIES)})>")


def _named(held: Any, scores: Tensor | None) -> Mapping[str, Any]:
    """What a loss takes, a micro-batch, or a rollout makes, a list of them, under TRL's names."""
    if not isinstance(held, list):
        return _micro_batch(held, scores)
    made = [_micro_batch(one, None)["advantages"] for one in held]
    return {"advantages": torch.cat(made)}


def _micro_batch(held: Mapping[str, Any], scores: Tensor | None) -> Mapping[str, Any]:
    """Its values are of the last tokens of all rows, some of them a prompt's: moved to the left."""
    batch, ids = held["grpo_batch"], held["model_inputs"]["input_ids"]
    mask = batch.completion_mask
    columns = mask.int().argmax(1, keepdim=True) + torch.arange(mask.shape[1], device=mask.device)

    def left(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.gather(1, columns % mask.shape[1])

    advantages = left(batch.advantages)
    if advantages is not None and bool((advantages == advantages[:, :1])[left(mask)].all()):
        advantages = advantages[:, 0]
    return {
        "completion_ids": left(ids[:, -mask.shape[1] :]),
        "completion_mask": left(mask),
        "logprobs": left(scores),
        "old_per_token_logps": left(batch.old_per_token_logps),
        "ref_per_token_logps": left(batch.ref_per_token_logps),
        "advantages": advantages,
    }


SWIFT = Adapter(
    name="ms-swift's GRPOTrainer",
    package="ms-swift",
    processor=("template.processor",),
    rollout="_generate_and_score_completions",
    scores="_get_per_token_logps_and_entropies",
    loss="compute_loss",
    named=_named,
)


class SwiftRequests:
    """Watches what its inference engine encodes for ``generate``, with one processor."""

    def __init__(self, processor: Any, buffer: StepBuffer) -> None:
        self._processor, self._buffer = processor, buffer
        self._texts: dict[int, str] = {}

    def start(self, patches: Patches) -> None:
        engines = sys.modules.get("swift.infer_engine.infer_engine")
        templates = sys.modules.get("swift.template.base")
        if engines is None or templates is None:
            return
        kind, engine_kind = templates.Template, engines.InferEngine
        render, encode, encode_all = kind._encode, kind.encode, engine_kind._batch_encode

        @functools.wraps(render)
        def rendered(template: Any, inputs: Any) -> Any:
            made = render(template, inputs)
            if template.processor is self._processor:
                with self._buffer.guarded("template"):  # before media are expanded
                    self._texts[id(inputs)] = template.tokenizer.decode(made["input_ids"])
            return made

        @functools.wraps(encode)
        def encoded(template: Any, *args: Any, **keywords: Any) -> Any:
            before = len(self._buffer.records)
            made = encode(template, *args, **keywords)
            # of a completion that is scored the model's call shows more; others are logged
            if template.is_training and template.processor is self._processor:
                del self._buffer.records[before:]
            return made

        @functools.wraps(encode_all)
        def encoded_all(engine: Any, requests: Any, *args: Any, **keywords: Any) -> Any:
            self._texts.clear()
            before = len(self._buffer.records)
            made = encode_all(engine, requests, *args, **keywords)
            if engine.template.processor is self._processor:
                with self._buffer.guarded("template"):
                    self._note(engine.template, requests, made[0], before)
            return made

        patches.set(kind, "_encode", rendered)
        patches.set(kind, "encode", encoded)
        patches.set(engine_kind, "_batch_encode", encoded_all)

    def stop(self) -> None:
        self._texts.clear()

    def _note(
        self, template: Any, requests: Sequence[Any], made: Sequence[Mapping[str, Any]], before: int
    ) -> None:
        """In the place of the processor's calls since ``before``, which threads made in any order.
        Where a request failed, these say more."""
        if len(requests) != len(made):
            return
        del self._buffer.records[before:]
        calls = [self._processed(template, row) for row in made]
        for request, call in zip(requests, calls, strict=True):
            messages = self._buffer.plain.value(_messages(request))
            self._buffer.add(TemplateCall(messages, {}, call.texts, nested=False))
        for call in calls:
            self._buffer.add(call)

    def _processed(self, template: Any, row: Mapping[str, Any]) -> ProcessorCall:
        inputs, buffer, seen = row["template_inputs"], self._buffer, Seen()
        ids = torch.tensor(row["input_ids"])[None]
        tensors = {name: held for name, held in row.items() if isinstance(held, Tensor)}
        tensors |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        buffer.see(tensors, seen, casts=True)
        text = self._texts[id(inputs)]
        inside = bool(getattr(template, "use_audio_in_video", False)) and bool(inputs.videos)
        return ProcessorCall(
            texts=(buffer.plain.text(_as_template(text, self._processor) if inside else text),),
            nested=False,
            images=media_seen("image", inputs.images or None, buffer.fits),
            videos=media_seen("video", inputs.videos or None, buffer.fits),
            audios=media_seen("audio", inputs.audios or None, buffer.fits),
            keywords=buffer.plain.mapping(
                {**inputs.mm_processor_kwargs, "use_audio_in_video": inside, "do_resize": False}
            ),
            ignored=(),
            warnings=(),
            outputs=seen.tensors,
            padding_side=str(template.tokenizer.padding_side),
            error=None,
            large=seen.described(),
            digests=seen.digests,
        )


def _as_template(text: str, processor: Any) -> str:
    """Qwen's chat template leaves the marks of a sound inside a video to the processor."""
    begin, end = processor.audio_bos_token, processor.audio_eos_token
    return text.replace(f"{begin}{processor.video_token}{end}", str(processor.video_token))


def _messages(request: Any) -> list[dict[str, Any]]:
    """A request's conversation with its media in the place of their tags.

    >>> from types import SimpleNamespace as Request
    >>> said = [{"role": "user", "content": "<image>What?"}]
    >>> _messages(Request(messages=said, images=["a.png"]))[0]["content"]
    [{'type': 'image', 'image': 'a.png'}, {'type': 'text', 'text': 'What?'}]
    """
    listed = {kind: iter(getattr(request, f"{kind}s", ())) for kind in MODALITIES}

    def parts(content: str) -> list[dict[str, Any]]:
        pieces = _TAG.split(content)  # words, then a tag's name and the words after it
        found: list[dict[str, Any]] = [{"type": "text", "text": pieces[0]}]
        for kind, words in zip(pieces[1::2], pieces[2::2], strict=True):
            medium = next(listed[kind], "")  # type: ignore[index]
            found.append({"type": kind, kind: medium if isinstance(medium, str) else "<array>"})
            found.append({"type": "text", "text": words})
        return [part for part in found if part.get("text") != ""]

    return [
        {**message, "content": parts(message["content"])}
        if isinstance(message["content"], str) and _TAG.search(message["content"])
        else message
        for message in request.messages
    ]
