"""One trial of a fault between trainer and engine: a real run that the proof should stop, whose
bundle the doctor reads; and, for a fault of input, the two sides' rows compared by ``parity``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from omni_grpo_core import tiny
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.doctor.diagnose import diagnose_run
from omni_grpo_core.doctor.load import as_cases, read_traces
from omni_grpo_core.engines import transformers_backend
from omni_grpo_core.engines.requests import Answer, Request, Sampling
from omni_grpo_core.engines.transformers_backend import TransformersBackend
from omni_grpo_core.faults.boundary import Boundary
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.fault import Fault
from omni_grpo_core.faults.trial import Blame, Summary, reference, summarise
from omni_grpo_core.parity.compare import compare_paths
from omni_grpo_core.parity.given import Given, Setup, given_rows, setup_of
from omni_grpo_core.parity.results import ParityReport
from omni_grpo_core.parity.run import run_path
from omni_grpo_core.parity.seen import header_of, listening, trace_of
from omni_grpo_core.pipeline.settings import load_settings
from omni_grpo_core.training.config import (
    GuardConfig,
    LoraConfig,
    OptimizerConfig,
    RewardEntry,
    TrainConfig,
)
from omni_grpo_core.training.loop import TrainResult, train
from omni_grpo_core.types import STAGES, Row, Sample, Stage, Trace

LEARNED = 0.03
"""Standard deviation of an adapter's second factor, which begins at 0: as after some steps."""


def distinct_letters(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[float]:
    """A reward that differs between any two samples of a policy."""
    return [len(set(text)) / 256 for text in completions]


def stopped_run(faults: Sequence[Fault], config: LoopConfig, folder: Path) -> TrainResult:
    """Two steps of a run on an engine with ``faults``; ``folder`` is new."""
    boundary = Boundary(TransformersBackend(), reference("float32").policy)
    with ExitStack() as stack:
        for fault in faults:
            stack.enter_context(fault.inject(boundary))
        return train(_run_of(config, folder), backend=boundary, watch=_learned)


def _run_of(config: LoopConfig, folder: Path) -> TrainConfig:
    shipped = json.loads(tiny.data_file().read_text(encoding="utf-8"))
    folder.mkdir(parents=True)
    data = folder / "rows.json"
    data.write_text(json.dumps([shipped[row] for row in config.rows]), encoding="utf-8")
    sampled = {
        name: getattr(config, name) for name in ("group_size", "max_new_tokens", "temperature")
    }
    return TrainConfig(
        checkpoint=str(tiny.checkpoint_dir()),
        data=str(data),
        root=str(tiny.data_file().parent),
        out=str(folder / "run"),
        settings=replace(load_settings(tiny.checkpoint_dir()), **sampled),
        rewards={f"{__name__}:distinct_letters": RewardEntry()},
        steps=2,
        batch_size=len(config.rows) * config.group_size,
        micro_batch_size=len(config.rows) * config.group_size,
        optimizer=OptimizerConfig(lr=config.learning_rate),
        lora=LoraConfig(rank=4) if config.lora else None,
        save_every=0,
        seed=config.seed,
        # of the tiny policy's completions, which are cut short, it would say the same
        guard=GuardConfig(preflight=False, patience=99, garbage=1.0),
        trackers=(),
    )


def _learned(policy: Policy) -> Any:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=LEARNED, generator=generator)
    return nullcontext()


def engine_trial(faults: Sequence[Fault], config: LoopConfig, *, causes: bool) -> Summary:
    """What the doctor says of a run's bundle; nothing of a run that finished."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = stopped_run(faults, config, Path(folder) / "trial").bundle
        if bundle is None:
            return Summary((), (), None)
        return summarise(diagnose_run(as_cases(read_traces(bundle)), causes=causes))


# --------------------------------------------------------------------------- parity


class Reader:
    """A backend that answers with nothing and keeps the rows that an engine would have read."""

    name = "reader"

    def __init__(self, policy: Policy) -> None:
        self.policy, self.rows = policy, list[Row]()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        self.rows = [transformers_backend.row_of(self.policy, one) for one in requests]
        return []

    def load(self, folder: Path) -> str:
        return ""

    def restart(self) -> None: ...
    def close(self) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...


def _read(setup: Setup, given: Given, faults: Sequence[Fault]) -> Trace:
    """What an engine behind the faults reads of a row."""
    reader = Reader(setup.policy)
    boundary = Boundary(reader, setup.policy)
    seconds = tuple(2 / video.sample_fps for video in given.media.videos)
    decided = given.conversation.audio_in_video
    request = Request(given.prompt.text, given.media, decided, seconds, 0)
    with ExitStack() as stack:
        for fault in faults:
            stack.enter_context(fault.inject(boundary))
        sounds = stack.enter_context(listening(setup.processor))
        boundary.generate([request], Sampling(1, 1, 0.0, (), ()))
    (row,) = reader.rows
    output: Mapping[str, Any] = {"input_ids": row.input_ids, **row.tensors}
    return trace_of(header_of("engine", setup), given, output, sounds, setup)


def compared(faults: Sequence[Fault], samples: Sequence[Sample]) -> ParityReport:
    """Our batch's rows beside what an engine behind ``faults`` reads of them."""
    setup = _setup()
    givens = list(given_rows(setup, samples))
    theirs = [_read(setup, given, faults) for given in givens]
    return compare_paths(run_path("ours", setup, samples), theirs, setup, givens.__getitem__)


@cache
def _setup() -> Setup:
    return setup_of(tiny.checkpoint_dir(), load_settings(tiny.checkpoint_dir()))


def parity_trial(faults: Sequence[Fault], config: LoopConfig, *, causes: bool) -> Summary:
    """What ``parity`` says of rows: each stage and cause once."""
    samples = load_samples(tiny.data_file())
    report = compared(faults, [samples[row] for row in config.rows])
    found: dict[Stage, Blame] = {}
    for row in report.rows:
        if row.verdict in ("equal", "within"):
            continue
        stage = cast(Stage, row.stage)
        old = found.get(stage, Blame(stage, "breaks", "", (), row.sentence))
        named = (*old.proved, *(f"parity.{cause.name}" for cause in row.causes if causes))
        found[stage] = replace(old, cause=(named or ("",))[0], proved=tuple(dict.fromkeys(named)))
    return Summary(tuple(found[stage] for stage in STAGES if stage in found), (), None)


TRIALS: Mapping[str, Callable[..., Summary]] = {"engine": engine_trial, "parity": parity_trial}
"""By the name of the place."""
