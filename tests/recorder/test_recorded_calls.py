"""What is kept of the calls of a plain loop."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import GROUP, PlainLoop, one_step, only, recording

from omni_grpo_core.core.dialect import CACHE, cache_among, cache_keyword
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.faults.fault import cache_is_dropped
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.trace.calls import (
    ForwardCall,
    GenerateCall,
    LossSeen,
    MediumSeen,
    ProcessorCall,
    RewardCall,
    StepSeen,
    TemplateCall,
    calls_of,
)
from omni_grpo_core.trace.store import load_trace
from omni_grpo_core.types import Sample

Loop = Callable[..., PlainLoop]


@pytest.fixture
def loop(policy: Policy, samples: tuple[Sample, ...], settings: Settings) -> Loop:
    torch.manual_seed(1)

    def make(**keywords: Any) -> PlainLoop:
        return PlainLoop(policy, samples[0], settings, **keywords)

    return make


def test_a_step_holds_its_calls_in_order(tmp_path: Path, loop: Loop) -> None:
    trace = one_step(tmp_path / "a", loop(), settings={"group": GROUP})
    assert [r.stage for r in trace.stages] == [
        *("sample", "text", "batch", "completion", "reward"),
        *("advantage", "logits", "loss", "loss", "gradient"),
    ]
    assert trace.header["complete"] == "True"
    assert trace.header["transformers"]
    assert only(trace, ProcessorCall).ignored == ()
    step = only(trace, StepSeen)
    assert step.step == 0
    assert step.settings == {"group": GROUP}
    assert step.losses == (only(trace, LossSeen).loss,)
    assert step.rates == (1e-4,)
    assert step.trainable == step.held
    assert set(step.trainable) == {"text", "vision", "audio", "head"}
    assert all(step.changed.values())
    assert all(norm > 0 for norm in step.grad_norms.values())


def test_generate_is_seen_from_inside(tmp_path: Path, loop: Loop) -> None:
    made = loop()
    trace = one_step(tmp_path / "a", made)
    call: GenerateCall = only(trace, GenerateCall)
    processed: ProcessorCall = only(trace, ProcessorCall)
    sequences = made.seen[0][0]
    length = processed.outputs["input_ids"].shape[1]
    new = sequences.shape[1] - length
    assert torch.equal(call.sequences, sequences)  # type: ignore[arg-type]
    assert call.inputs.keys() == processed.outputs.keys()
    assert call.keywords["use_audio_in_video"] is True
    assert call.config["temperature"] == 2.0
    assert call.config["do_sample"] is True
    assert not call.modes.training
    assert call.modes.dtype == "float32"
    # the first token comes from the prompt's pass, each later one from a pass of one token
    assert call.cached == tuple(range(length, length + new - 1))
    assert call.position_ids is not None
    assert call.position_ids.shape == (3, GROUP, length)
    first = int(call.position_ids[0, 0, -1]) + 1
    assert call.step_positions == tuple(range(first, first + new - 1))
    assert call.rope_deltas is not None
    assert call.rope_deltas.tolist() == [first - length] * GROUP
    assert call.first_logits is not None
    assert call.first_logits.shape[0] == GROUP


def test_logprobs_of_generate_and_of_the_scoring_forward(tmp_path: Path, loop: Loop) -> None:
    trace = one_step(tmp_path / "a", loop())
    call, scored = only(trace, GenerateCall), only(trace, ForwardCall)
    loss = only(trace, LossSeen)
    new = call.logprobs.shape[1]
    assert scored.logprobs.shape == (GROUP, call.sequences.shape[1] - 1)
    # the loop takes log_softmax, the recorder gathers and subtracts: equal up to float32 rounding
    assert torch.allclose(scored.logprobs[:, -new:], loss.logprobs, atol=1e-5)
    # at the first token both have the same history, at temperature 2 and 1
    logits = call.first_logits
    first = call.sequences[:, -new]
    at_two = (logits / 2).log_softmax(-1).gather(-1, first[:, None])[:, 0]
    at_one = logits.log_softmax(-1).gather(-1, first[:, None])[:, 0]
    assert torch.allclose(call.logprobs[:, 0], at_two, atol=1e-5)
    # prefill and whole sequence sum in different orders: float32 again, through a few layers
    assert torch.allclose(scored.logprobs[:, -new], at_one, atol=1e-3)


def test_every_sampled_token_has_its_logprob(tmp_path: Path, loop: Loop) -> None:
    """More tokens than are scored at once, and not a multiple of that number."""
    made = loop()
    _, batch = made.prepare()
    with recording(tmp_path / "a", made):
        out = made.model.generate(
            **batch,
            use_audio_in_video=True,
            max_new_tokens=37,
            min_new_tokens=37,
            do_sample=True,
            temperature=2.0,
            top_k=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    call = only(load_trace(tmp_path / "a" / "step-000000"), GenerateCall)
    logits = torch.stack(out.logits, 1) / 2.0
    tokens = out.sequences[:, -37:, None]
    wanted = logits.log_softmax(-1).gather(-1, tokens)[..., 0]
    assert call.logprobs.shape == (GROUP, 37)
    # float32: the recorder subtracts log-sum-exp after gathering
    assert torch.allclose(call.logprobs, wanted, atol=1e-5)


def test_without_a_cache_the_history_is_passed_again(tmp_path: Path, loop: Loop) -> None:
    made = loop()
    _, batch = made.prepare()
    length = batch["input_ids"].shape[1]
    with recording(tmp_path / "a", made):
        made.model.generate(
            **batch, use_audio_in_video=True, max_new_tokens=3, min_new_tokens=3, use_cache=False
        )
    call = only(load_trace(tmp_path / "a" / "step-000000"), GenerateCall)
    assert call.cached == (length, length + 1)


def test_checkpointing_in_train_mode_leaves_no_history_where_it_drops_the_cache(
    tmp_path: Path, loop: Loop
) -> None:
    made = loop()
    _, batch = made.prepare()
    made.model.gradient_checkpointing_enable()
    made.model.train()
    with warnings.catch_warnings():
        # a checkpointed block without gradients warns in some versions of transformers
        warnings.simplefilter("ignore")
        # 5.14 raises at the second token: it cannot go on without its cache
        with recording(tmp_path / "a", made), suppress(IndexError):
            made.model.generate(
                **batch, use_audio_in_video=True, max_new_tokens=3, min_new_tokens=3
            )
    call = only(load_trace(tmp_path / "a" / "step-000000"), GenerateCall)
    assert call.modes.checkpointing
    assert call.modes.training
    if cache_is_dropped():
        assert set(call.cached) == {0}
        assert any("Caching is incompatible" in text for text in call.warnings)
    else:
        length = batch["input_ids"].shape[1]
        assert call.cached == (length, length + 1)


@pytest.mark.parametrize("name", ["kv_store", "cache", "past_key_values"])
def test_a_cache_is_found_under_known_names_and_is_unknown_under_others(
    tmp_path: Path, loop: Loop, name: str
) -> None:
    """A cache under a name unknown to the recorder was recorded as a cache of no tokens, and the
    doctor reported that the model had lost its history."""
    made = loop()
    _, batch = made.prepare()
    length = batch["input_ids"].shape[1]

    def renamed(_module: Any, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        held = cache_among(keywords)
        return args, {**{k: v for k, v in keywords.items() if k not in CACHE}, name: held}

    def back(module: Any, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rest = {k: v for k, v in keywords.items() if k != name}
        return args, {**rest, cache_keyword(module): keywords[name]}

    with recording(tmp_path / "a", made):
        handles = [
            made.model.register_forward_pre_hook(renamed, with_kwargs=True, prepend=True),
            made.model.register_forward_pre_hook(back, with_kwargs=True),
        ]
        try:
            made.model.generate(
                **batch, use_audio_in_video=True, max_new_tokens=3, min_new_tokens=3
            )
        finally:
            for handle in handles:
                handle.remove()
    call = only(load_trace(tmp_path / "a" / "step-000000"), GenerateCall)
    assert call.cached == ((None, None) if name == "kv_store" else (length, length + 1))


def test_the_processor_call(tmp_path: Path, loop: Loop) -> None:
    made = loop()
    text, media = "<|audio_bos|><|AUDIO|><|audio_eos|>", np.zeros(16_000, np.float32)
    with recording(tmp_path / "a", made):
        made.processor(text=[text], audio=[media], return_tensors="pt", audios=[media], frames=3)
    call = only(load_trace(tmp_path / "a" / "step-000000"), ProcessorCall)
    assert call.texts == (text,)
    assert call.ignored == ("audios", "frames")
    assert [m.shape for m in call.audios] == [(16_000,)]
    assert call.audios[0].values is not None
    assert (call.audios[0].low, call.audios[0].std) == (0.0, 0.0)
    assert call.padding_side == made.processor.tokenizer.padding_side
    assert call.keywords["frames"] == 3
    assert call.keywords["audios"] == ("<array float32 (16000,)>",)


def test_ids_that_nobody_padded(tmp_path: Path, loop: Loop) -> None:
    """TRL asks for lists: nothing of its rows was kept, so no reward could be followed to its
    prompt, and completions of the rollout before were scored unseen."""
    made = loop()
    with recording(tmp_path / "a", made):
        lists = made.processor(text=["one", "one two three"])["input_ids"]
    call = only(load_trace(tmp_path / "a" / "step-000000"), ProcessorCall)
    short, long = map(len, lists)
    assert short < long
    kept = call.outputs["attention_mask"].bool()
    assert kept.sum(1).tolist() == [short, long]
    assert [
        row[own].tolist() for row, own in zip(call.outputs["input_ids"], kept, strict=True)
    ] == [*lists]


def test_a_step_cut_short_by_an_exception_is_kept(tmp_path: Path, loop: Loop) -> None:
    made = loop()

    def two_steps() -> None:
        made.step()
        # two placeholders for one waveform
        made.processor(text=["<|AUDIO|><|AUDIO|>"], audio=[np.zeros(16_000, np.float32)])

    # a bare StopIteration up to 5.22
    with pytest.raises((StopIteration, ValueError)) as raised, recording(tmp_path / "a", made):
        two_steps()
    text = f"{raised.type.__name__}: {raised.value}"
    trace = load_trace(tmp_path / "a" / "step-000001")
    assert trace.header["complete"] == "False"
    assert trace.header["raised"] == text
    assert trace.header["raised_in"] == "batch"
    assert only(trace, ProcessorCall).error == text


def test_templates_of_one_text_of_a_list_and_of_many(tmp_path: Path, loop: Loop) -> None:
    made = loop()
    clip = {"type": "video", "video": np.zeros((2, 28, 28, 3), np.uint8)}
    one = [{"role": "user", "content": [clip, {"type": "text", "text": "why?"}]}]
    with recording(tmp_path / "a", made):
        made.processor.apply_chat_template(one, tokenize=False)
        made.processor.apply_chat_template([one, one], tokenize=False)
        made.processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": "how?"}], tokenize=False
        )
    trace = load_trace(tmp_path / "a" / "step-000000")
    calls = calls_of(trace, TemplateCall)
    assert len(calls) == len(trace.stages) == 4
    assert calls[0].messages[0]["content"] == (
        {"type": "video", "video": "<array>"},
        {"type": "text", "text": "why?"},
    )
    assert calls[1].texts == calls[2].texts
    assert calls[1].nested
    assert calls[3].messages == ({"role": "user", "content": "how?"},)
    assert "how?" in calls[3].texts[0]


def test_rewards_are_recorded_and_the_trainers_list_is_restored(tmp_path: Path, loop: Loop) -> None:
    class Scorer:
        name = "scorer"

        def __call__(self, prompts: list[str], completions: list[str]) -> list[float | None]:
            return [None, 0.5]

    scorer = Scorer()
    made = loop()

    async def later(prompts: list[str], completions: list[str]) -> list[float]:
        return [0.25, 0.75]

    made.rewards += [scorer, later]
    with recording(tmp_path / "a", made):
        plain, watched, watched_later = made.rewards
        assert plain.__name__ == "length_reward"
        assert list(inspect.signature(plain).parameters) == ["prompts", "completions", "_"]
        assert isinstance(watched, Scorer)
        assert watched.name == "scorer"
        assert inspect.iscoroutinefunction(watched_later)
        plain(["q", "q"], ["a" * 50, ""], solution=["x", "y"])
        assert watched(prompts=["q", "q"], completions=["a", "b"]) == [None, 0.5]
        coroutine = watched_later(prompts=["q", "q"], completions=["a", "b"])
        with pytest.raises(StopIteration):
            coroutine.send(None)
        made.rewards.append(len)
    assert [f.__name__ for f in made.rewards if hasattr(f, "__name__")] == [
        *("length_reward", "later", "len")
    ]
    assert made.rewards[1] is scorer
    trace = load_trace(tmp_path / "a" / "step-000000")
    first, second, third = calls_of(trace, RewardCall)
    assert first.source == "plain_loop.length_reward"
    assert first.completions == ("a" * 50, "")
    assert first.columns == {"solution": ("x", "y")}
    assert first.values == (0.5, 0.0)
    assert (second.name, second.values) == ("Scorer", (None, 0.5))
    assert (third.name, third.values) == ("later", (0.25, 0.75))


def test_a_reward_that_raises(tmp_path: Path, loop: Loop) -> None:
    def broken(prompts: list[str], completions: list[str]) -> list[float]:
        raise KeyError("solution")

    made = loop()
    made.rewards[:] = [broken]
    with pytest.raises(KeyError), recording(tmp_path / "a", made):
        made.step()
    call = only(load_trace(tmp_path / "a" / "step-000000"), RewardCall)
    assert call.error == "KeyError: 'solution'"
    assert call.values == ()


def test_warnings_of_every_step_are_kept(tmp_path: Path, loop: Loop) -> None:
    made = loop()

    def step() -> None:
        # shown once per location, or once per process; the trainer's filters are unchanged
        warnings.warn("the first", stacklevel=1)
        logging.getLogger("somebody").warning("the %s", "second")
        made.step()

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("once")
        with recording(tmp_path / "a", made):
            step()
            step()
    for name in ("step-000000", "step-000001"):
        kept = only(load_trace(tmp_path / "a" / name), StepSeen).warnings
        assert {"the first", "the second"} <= set(kept)
    mine = [w for w in shown if str(w.message) == "the first"]
    assert len(mine) == 1
    assert mine[0].filename == __file__


def test_large_tensors_are_described(tmp_path: Path, loop: Loop) -> None:
    trace = one_step(tmp_path / "a", loop(), max_tensor_bytes=4096)
    call, forward = only(trace, GenerateCall), only(trace, ForwardCall)
    pixels = call.large["pixel_values_videos"]
    assert "pixel_values_videos" not in call.inputs
    assert pixels.dtype == "float32"
    assert len(pixels.samples) == 64
    assert pixels.low <= min(pixels.samples) <= pixels.mean <= max(pixels.samples) <= pixels.high
    assert call.inputs_embeds is None
    assert call.large["inputs_embeds"].shape[0] == GROUP
    assert "input_ids" in forward.inputs
    assert only(trace, ProcessorCall).videos[0].values is None


def test_the_bytes_of_a_step_are_bounded(tmp_path: Path, loop: Loop) -> None:
    big = one_step(tmp_path / "a", loop())
    small = one_step(tmp_path / "b", loop(), max_step_bytes=100_000)
    assert len(small.stages) == len(big.stages)
    sizes = [
        (tmp_path / name / "step-000000" / "tensors.safetensors").stat().st_size for name in "ab"
    ]
    assert sizes[0] > 500_000
    # media are bounded one by one, a few tensors by kind, and digests are of what is not kept
    assert sizes[1] < 200_000


def test_calls_of_a_step_are_bounded(tmp_path: Path, loop: Loop) -> None:
    made = loop()
    with recording(tmp_path / "a", made) as recorder:
        for _ in range(recorder.buffer.bounds.calls + 3):
            made.rewards[0](prompts=["q"], completions=["a"])
    trace = load_trace(tmp_path / "a" / "step-000000")
    assert len(trace.stages) == recorder.buffer.bounds.calls
    assert trace.header["calls_left_out"] == "3"


def test_a_noted_call_is_kept_unchanged_except_for_secrets(tmp_path: Path, loop: Loop) -> None:
    pixels = torch.zeros(3, 2, 2)
    medium = MediumSeen("image", pixels, (3, 2, 2), "float32", "0" * 64, 0.0, 0.0, 0.0, 0.0)
    noted = ProcessorCall(
        ("q",),
        False,
        (medium,),
        (),
        (),
        {"token": "x"},
        (),
        (),
        {"ids": torch.ones(1)},
        "left",
        None,
    )
    with recording(tmp_path / "a", loop()) as recorder:
        recorder.note(noted)
        pixels.fill_(1)  # a trainer may write into what it passed
    kept = only(load_trace(tmp_path / "a" / "step-000000"), ProcessorCall)
    assert kept.images[0].values.sum() == 0
    assert kept.images[0].shape == (3, 2, 2)
    assert kept.outputs["ids"].tolist() == [1.0]
    assert kept.keywords == {"token": "<redacted>"}


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_worker_records_nothing(tmp_path: Path, loop: Loop) -> None:
    made = loop()
    with recording(tmp_path / "a", made) as recorder:
        child = os.fork()
        if child == 0:
            made.processor(text=["hi"])
            os._exit(len(recorder.buffer.records))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        made.processor(text=["hi"])
        assert len(recorder.buffer.records) == 1
