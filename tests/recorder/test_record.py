"""Recording a plain loop: what is kept, that nothing changes, that everything is restored."""

from __future__ import annotations

import copy
import gc
import logging
import os
import random
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_thinker
from plain_loop import PlainLoop, one_step, recording

from omni_grpo_core import record
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.trace.calls import GenerateCall, SamplesSeen, calls_of
from omni_grpo_core.trace.codec import equal
from omni_grpo_core.trace.store import load_trace
from omni_grpo_core.types import Sample

Loop = Callable[..., PlainLoop]


@pytest.fixture
def loop(policy: Policy, samples: tuple[Sample, ...], settings: Settings) -> Loop:
    torch.manual_seed(1)

    def make(**keywords: Any) -> PlainLoop:
        return PlainLoop(policy, samples[0], settings, **keywords)

    return make


# ------------------------------------------------------------------ nothing changes


def random_state() -> tuple[Any, ...]:
    kept: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), kept[1].tolist(), kept[2]


def test_recording_changes_nothing(tmp_path: Path, loop: Loop) -> None:
    def run(folder: Path | None) -> tuple[PlainLoop, tuple[Any, ...]]:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        made = loop()
        if folder is None:
            made.step(), made.step()
        else:
            with recording(folder, made, probe_rewards=True):
                made.step(), made.step()
        return made, random_state()

    (plain, state), (watched, watched_state) = run(None), run(tmp_path / "trace")
    assert watched_state == state
    for (ids, loss), (watched_ids, watched_loss) in zip(plain.seen, watched.seen, strict=True):
        assert torch.equal(ids, watched_ids)
        assert loss == watched_loss
    weights = zip(plain.model.parameters(), watched.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    header = load_trace(tmp_path / "trace" / "step-000001").header
    assert "not_recorded" not in header


def hooks() -> int:
    from torch.optim import optimizer

    return len(optimizer._global_optimizer_pre_hooks) + len(optimizer._global_optimizer_post_hooks)


def touched(loop: PlainLoop) -> dict[str, Any]:
    """Everything that a recorder replaces."""
    kind, tokenizer = type(loop.processor), type(loop.processor.tokenizer)
    return {
        "call": kind.__call__,
        "template": kind.apply_chat_template,
        "own": set(vars(kind)),
        "tokenizer": tokenizer.apply_chat_template,
        "tokenizer's own": set(vars(tokenizer)),
        "model": set(vars(loop.model)),
        "hooks": [
            (len(m._forward_pre_hooks), len(m._forward_hooks), len(m._forward_hooks_always_called))
            for m in loop.model.modules()
        ],
        "optimizers": hooks(),
        "backward": torch.autograd.backward,
        "warn": warnings.warn,
        "handle": logging.Logger.handle,
        "once": getattr(logging.Logger, "warning_once", None),
        "rewards": list(loop.rewards),
    }


def calls_of_the_recorder(step: Callable[[], object]) -> set[str]:
    """Functions of the recorder that a step runs: a step that is not recorded pays for none."""
    called = set()

    def entered(frame: Any, event: str, _argument: object) -> None:
        if event == "call" and "/omni_grpo_core/recorder/" in frame.f_code.co_filename:
            called.add(frame.f_code.co_qualname)

    before = sys.getprofile()
    sys.setprofile(entered)
    try:
        step()
    finally:
        sys.setprofile(before)
    return called


def test_everything_is_restored(tmp_path: Path, loop: Loop) -> None:
    made = loop()
    before = touched(made)
    with recording(tmp_path / "a", made, steps=1) as recorder:
        while_on = touched(made)
        made.step()
        assert touched(made) == before, "after the last step, not only at the end of the block"
        assert not recorder.recording
        # the loop calls it by itself
        assert calls_of_the_recorder(made.step) == {"Recorder.note"}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["step-000000"]
    changed = {key for key, value in before.items() if while_on[key] != value}
    # a class's own names change only where it inherited the method before
    assert changed >= before.keys() - {"own", "tokenizer's own"}


def test_everything_is_restored_after_an_exception(tmp_path: Path, loop: Loop) -> None:
    made = loop()
    before = touched(made)
    with pytest.raises(ZeroDivisionError), recording(tmp_path / "a", made):
        raise ZeroDivisionError
    assert touched(made) == before


def test_a_model_copied_while_recorded_is_a_copy(tmp_path: Path, loop: Loop) -> None:
    made = loop()
    with recording(tmp_path / "a", made) as recorder:
        twin = copy.deepcopy(made.model)
        torch.nn.init.zeros_(twin.lm_head.weight)
        ids = torch.tensor([[1, 2, 3]])
        out = twin.generate(input_ids=ids, max_new_tokens=1, do_sample=False)
        # every logit is 0: the first id wins, which no trained head would choose
        assert out[0, -1] == 0
        assert recorder.recording
    [generated] = calls_of(load_trace(tmp_path / "a" / "step-000000"), GenerateCall)
    assert not generated.own


def test_a_processor_can_be_saved_while_recorded(tmp_path: Path, loop: Loop) -> None:
    made = loop()
    with recording(tmp_path / "a", made):
        made.processor.save_pretrained(tmp_path / "during")
    made.processor.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "after").iterdir():
        assert file.read_bytes() == (tmp_path / "during" / file.name).read_bytes()


def test_memory_is_released(tmp_path: Path, loop: Loop) -> None:
    made = loop()
    with recording(tmp_path / "a", made, steps=1) as recorder:
        made.step()
    model = weakref.ref(made.model)
    del made
    gc.collect()
    assert model() is None
    assert not recorder.recording


# ------------------------------------------------------------------ failures, misuse


def test_a_failure_of_the_recorder_does_not_reach_the_trainer(
    tmp_path: Path, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    def odd(prompts: list[str], completions: list[str]) -> Any:
        return ["high", "low"]

    made = loop()
    made.rewards[:] = [odd]
    with recording(tmp_path / "a", made):
        assert made.rewards[0](prompts=["q"], completions=["a"]) == ["high", "low"]
        made.note(SamplesSeen((), None))
    trace = load_trace(tmp_path / "a" / "step-000000")
    assert "could not convert string to float" in trace.header["not_recorded"]
    assert "not recorded: reward" in caplog.text


def test_an_unwritable_disk_ends_only_the_recording(
    tmp_path: Path, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").write_text("a file where the folder should be")
    made = loop()
    with recording(tmp_path / "a", made) as recorder:
        made.step()
        assert not recorder.recording
        made.step()
    assert len(made.seen) == 2
    assert "recording stopped" in caplog.text


def test_a_job_that_is_started_again_records_beside_its_first_recording(
    tmp_path: Path, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    """It died at start-up, because the crash before had left a folder."""
    made = loop()
    first = one_step(tmp_path / "a", made)
    for number in (1, 2):
        with recording(tmp_path / "a", made, steps=1):
            made.step()
        assert f"holds a recording: this one goes to {tmp_path / f'a-{number}'}" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a-1", "a-2"]
    assert equal(load_trace(tmp_path / "a" / "step-000000"), first)


def test_every_rank_of_a_job_started_again_records_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank had written a step when the job died, the other had not."""
    (tmp_path / "a" / "rank-1" / "step-000000").mkdir(parents=True)
    os.utime(tmp_path / "a" / "rank-1" / "step-000000", (0, 0))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with record(
            tmp_path / "a", model=toy_thinker.make(), processor=toy_thinker.ToyProcessor()
        ) as recorder:
            recorder.note(SamplesSeen((), None))
        header = load_trace(tmp_path / "a-1" / f"rank-{rank}" / "step-000000").header
        assert (header["rank"], header["world"]) == (rank, "2")


@pytest.mark.parametrize(
    ("stage", "break_it"),
    [
        ("batch", lambda made, model: made(text=3)),
        ("completion", lambda made, model: model.generate(input_ids=None)),
        ("logits", lambda made, model: model(input_ids=torch.tensor([[99]]))),
        ("loss", lambda made, model: torch.autograd.backward(torch.tensor(1.0))),
        (None, lambda made, model: [].pop()),
    ],
)
def test_a_step_of_nothing_but_an_exception_says_where_it_was_raised(
    tmp_path: Path, stage: str | None, break_it: Callable[[Any, Any], Any]
) -> None:
    """A run that died before its first call left no folder, and the one after it was judged."""
    model, processor = toy_thinker.make(), toy_thinker.ToyProcessor()
    with (
        pytest.raises(Exception, match=r".*") as raised,
        record(tmp_path / "a", model=model, processor=processor),
    ):
        break_it(processor, model)
    header = load_trace(tmp_path / "a" / "step-000000").header
    assert header["raised"] == f"{raised.type.__name__}: {raised.value}"
    assert header.get("raised_in") == stage
    assert header["complete"] == "False"


def test_a_program_that_exits_has_not_raised(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit),
        record(tmp_path / "a", model=toy_thinker.make(), processor=toy_thinker.ToyProcessor()),
    ):
        raise SystemExit(0)
    assert not (tmp_path / "a").exists()


def test_a_model_without_a_thinker_is_rejected(tmp_path: Path, loop: Loop) -> None:
    with pytest.raises(ConfigError, match="a Linear without a head"):
        record(tmp_path, model=torch.nn.Linear(1, 1), processor=loop().processor)


def test_zero_steps_and_unknown_notes_are_rejected(tmp_path: Path, loop: Loop) -> None:
    made = loop()
    with pytest.raises(ConfigError, match="steps"):
        recording(tmp_path, made, steps=0)
    with pytest.raises(ConfigError, match="note: found a str"):
        recording(tmp_path, made).note("loss 0.1")  # type: ignore[arg-type]
