"""Digests, decoded completions and reference models: what follows content from call to call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_thinker
from plain_loop import GROUP, PlainLoop, one_step, only, recording

from omni_grpo_core import record
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.reference_loop import ReferenceLoop
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.recorder.completions import decoded
from omni_grpo_core.recorder.thinker import weights_apart
from omni_grpo_core.trace.calls import (
    ForwardCall,
    GenerateCall,
    ProcessorCall,
    TemplateCall,
    calls_of,
)
from omni_grpo_core.trace.digest import digest_of
from omni_grpo_core.trace.store import load_trace
from omni_grpo_core.types import Sample, Trace

Loop = Callable[..., PlainLoop]
PIXELS = "pixel_values_videos"


@pytest.fixture
def loop(policy: Policy, samples: tuple[Sample, ...], settings: Settings) -> Loop:
    torch.manual_seed(1)

    def make(**keywords: Any) -> PlainLoop:
        return PlainLoop(policy, samples[0], settings, **keywords)

    return make


def one_trace(folder: Path) -> Trace:
    return load_trace(folder / "step-000000")


# ------------------------------------------------------------------ digests


def test_the_same_content_has_the_same_digest_in_every_call(tmp_path: Path, loop: Loop) -> None:
    trace = one_step(tmp_path, loop())
    processed, generated = only(trace, ProcessorCall), only(trace, GenerateCall)
    scored = only(trace, ForwardCall)
    for name in (PIXELS, "input_features"):
        made = processed.digests[name]
        assert torch.equal(made, digest_of(name, processed.outputs[name]))
        assert torch.equal(made, generated.digests[name])
        assert torch.equal(made, scored.digests[name])
        for kind in (torch.bfloat16, torch.float16):
            cast = processed.digests[f"{name}@{str(kind).removeprefix('torch.')}"]
            assert torch.equal(cast, digest_of(name, processed.outputs[name].to(kind)))
    rows, length = generated.inputs["input_ids"].shape
    prompt = generated.digests["inputs_embeds"]
    assert prompt.shape == (rows, length)
    # prompt and completion are scored together
    assert torch.equal(scored.digests["inputs_embeds"][:, :length], prompt)
    # ids are kept whole
    assert not generated.digests.keys() & {"input_ids", "attention_mask", "video_grid_thw"}


def test_a_value_changed_between_two_calls_has_another_digest(tmp_path: Path, loop: Loop) -> None:
    """Written through numpy, which no version counter of torch notices."""
    made = loop()
    _, batch = made.prepare()
    with recording(tmp_path, made), torch.no_grad():
        made.model(**batch, use_audio_in_video=True)
        batch[PIXELS].numpy()[3] += 1
        made.model(**batch, use_audio_in_video=True)
    first, second = calls_of(one_trace(tmp_path), ForwardCall)
    differs = first.digests[PIXELS] != second.digests[PIXELS]
    assert differs.nonzero()[:, 0].tolist() == [3]
    assert (first.inputs[PIXELS] != second.inputs[PIXELS]).any(1).nonzero()[:, 0].tolist() == [3]


def test_a_tensor_too_large_to_keep_is_digested(tmp_path: Path, loop: Loop) -> None:
    trace = one_step(tmp_path, loop(), max_tensor_bytes=4096)
    processed, scored = only(trace, ProcessorCall), only(trace, ForwardCall)
    assert PIXELS in scored.large
    assert torch.equal(processed.digests[PIXELS], scored.digests[PIXELS])


def test_a_step_is_stored_in_three_megabytes(tmp_path: Path, policy: Policy) -> None:
    """Eight rows of 145 tokens took 16 MB: processor, generate and forward hold the same media,
    and every completion of a group repeats them."""
    torch.manual_seed(0)
    loop = ReferenceLoop(policy, LoopConfig(rows=(0, 5), group_size=4))
    with record(
        tmp_path,
        model=loop.model,
        processor=loop.processor,
        reward_funcs=loop.reward_funcs,
        steps=1,
    ) as recorder:
        loop.step(recorder)
    call = only(one_trace(tmp_path), GenerateCall)
    assert call.inputs["input_ids"].shape == (8, 145)
    assert call.inputs[PIXELS].nbytes > 1_000_000
    # 1.3 MB in fact
    assert sum(file.stat().st_size for file in (tmp_path / "step-000000").iterdir()) < 3_000_000


# ------------------------------------------------------------------ completions as text


class Letters:
    """Ids 1 to 26 are letters, 0 is padding, 30 the end of text, 31 another special token."""

    def batch_decode(self, rows: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        names = {0: "<pad>", 30: "<eos>", 31: "<im>"}
        shown = {} if skip_special_tokens else names
        return [
            "".join(shown.get(i, "") if i in names else chr(96 + i) for i in row) for row in rows
        ]


@pytest.mark.parametrize(
    ("row", "kept", "skipped"),
    [
        ([1, 2, 30, 0], "ab", "ab"),
        ([1, 30, 3, 30], "a", "a"),  # only up to the first
        ([1, 31, 2, 3], "a<im>bc", "abc"),
        ([1, 2, 0, 0], "ab", "ab"),  # ended by a stop string
        ([1, 0, 2, 0], "a<pad>b", "ab"),
        ([30, 0, 0, 0], "", ""),
    ],
)
def test_completions_are_decoded_without_end_and_padding(
    row: list[int], kept: str, skipped: str
) -> None:
    prompt = torch.tensor([[5, 6], [7, 30]])
    sequences = torch.cat([prompt, torch.tensor([row, [4, 4, 4, 4]])], 1)
    config = {"eos_token_id": (30,), "pad_token_id": 0}
    texts = decoded(Letters(), prompt, sequences, config)
    assert texts == {"kept": (kept, "dddd"), "skipped": (skipped, "dddd")}
    # several for each prompt
    twice = sequences.repeat_interleave(2, 0)
    assert decoded(Letters(), prompt, twice, config)["kept"] == (kept, kept, "dddd", "dddd")
    # embeddings were passed in place of ids, so only completions come back
    assert decoded(Letters(), None, sequences[:, 2:], config) == texts


def test_without_a_tokenizer_nothing_is_decoded() -> None:
    assert decoded(object(), None, torch.tensor([[1]]), {}) == {}


def test_generate_is_kept_as_text(tmp_path: Path, loop: Loop) -> None:
    made = loop()
    call = only(one_step(tmp_path, made), GenerateCall)
    length = call.inputs["input_ids"].shape[1]
    tokenizer = made.processor.tokenizer
    for name, skip in (("kept", False), ("skipped", True)):
        ends = [row[length:].tolist() for row in call.sequences]
        eos = call.config["eos_token_id"]
        cut = [row[: next((i for i, t in enumerate(row) if t in eos), len(row))] for row in ends]
        assert call.decoded[name] == tuple(tokenizer.batch_decode(cut, skip_special_tokens=skip))
    assert len(call.decoded["kept"]) == GROUP


# ------------------------------------------------------------------ reference models


@pytest.mark.parametrize("made_when", ["before", "while recording", "with hooks, before"])
def test_a_reference_model_is_seen_and_is_not_the_policy(
    tmp_path: Path, loop: Loop, made_when: str
) -> None:
    made = loop()
    _, batch = made.prepare()
    reference = copy.deepcopy(made.model)
    with recording(tmp_path, made), torch.no_grad():
        if made_when == "while recording":
            reference = copy.deepcopy(made.model)
        torch.nn.init.zeros_(reference.lm_head.weight)
        made.model(**batch, use_audio_in_video=True)
        wanted = reference(**batch, use_audio_in_video=True).logits
        assert wanted.abs().sum() == 0
        reference.generate(**batch, use_audio_in_video=True, max_new_tokens=3, do_sample=False)
    policy, other = calls_of(one_trace(tmp_path), ForwardCall)
    assert (policy.own, other.own) == (True, False)
    # its rollout is seen whole, and is not one of forwards
    generated = only(one_trace(tmp_path), GenerateCall)
    assert not generated.own
    assert generated.apart is not None
    assert 0 < generated.apart < 0.5
    assert generated.logprobs is not None
    assert generated.inputs_embeds is not None
    assert len(generated.cached) == 2
    assert torch.equal(policy.digests[PIXELS], other.digests[PIXELS])
    assert torch.equal(policy.digests["inputs_embeds"], other.digests["inputs_embeds"])
    assert other.position_ids is not None
    assert not torch.equal(policy.logprobs, other.logprobs)  # type: ignore[arg-type]
    assert "__call__" not in vars(type(made.model))
    assert not reference._forward_hooks or made_when == "while recording"
    # the copied hooks do nothing, now or later
    reference(**batch, use_audio_in_video=True)


def test_a_copy_holds_nothing_of_the_recording() -> None:
    model = toy_thinker.make()
    with record("unused", model=model, processor=toy_thinker.ToyProcessor()) as recorder:
        twin = copy.deepcopy(model)
        pickled = pickle.loads(pickle.dumps(model._forward_pre_hooks))
        for hooks in (twin._forward_pre_hooks, twin.model._forward_pre_hooks, pickled):
            [hook] = hooks.values()
            hook(twin, (), {})
        model(torch.tensor([[1, 2]]))
        twin(torch.tensor([[1, 2]]))
        calls = [record.value for record in recorder.buffer.take()[0]]
        assert [call.own for call in calls if isinstance(call, ForwardCall)] == [True, False]


def test_a_copy_with_the_trained_weights_generates_in_the_model_s_place() -> None:
    """A copy for rollouts was not seen at all: one that got no updates was a healthy run."""
    model = toy_thinker.make()
    twin, merged = copy.deepcopy(model), toy_thinker.make()
    assert weights_apart(twin, model) == 0
    assert weights_apart(copy.deepcopy(model).bfloat16(), model) == 0
    with torch.no_grad():
        model.lm_head.weight += 1
    assert 0 < float(weights_apart(twin, model) or 0) < 1
    del merged.lm_head
    assert weights_apart(merged, model) is None


def test_a_reference_that_raises_leaves_the_next_forward_whole(tmp_path: Path) -> None:
    model = toy_thinker.make()
    reference = toy_thinker.make()
    ids = torch.tensor([[1, 2, 3]])
    with record(tmp_path, model=model, processor=toy_thinker.ToyProcessor()):
        with pytest.raises(IndexError):
            reference(ids + 99)
        model(ids)
    failed, scored = calls_of(one_trace(tmp_path), ForwardCall)
    assert (failed.own, scored.own) == (False, True)
    assert failed.error is not None
    assert failed.error.startswith("IndexError")
    assert scored.error is None
    assert scored.logprobs is not None


# ------------------------------------------------------------------ templates


def test_a_template_inside_a_processor_that_raises_is_kept(tmp_path: Path, loop: Loop) -> None:
    """A trainer that renders and tokenizes in one call died inside the processor, and the recording
    had no template call."""
    made = loop()
    processor = made.processor

    class Rendering(type(processor)):  # type: ignore[misc]
        def apply_chat_template(self, conversation: Any, **keywords: Any) -> Any:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False)
            return self(text=[text + "<|AUDIO|>"], audio=[])

    processor = copy.copy(processor)
    processor.__class__ = Rendering
    with (
        pytest.raises(Exception),  # noqa: B017, PT011 - which one differs between versions
        record(tmp_path, model=made.model, processor=processor),
    ):
        processor.apply_chat_template([{"role": "user", "content": "how?"}])
    trace = one_trace(tmp_path)
    [failed], [rendered] = calls_of(trace, ProcessorCall), calls_of(trace, TemplateCall)
    assert failed.error
    assert "how?" in rendered.texts[0]
    assert rendered.texts == failed.texts
