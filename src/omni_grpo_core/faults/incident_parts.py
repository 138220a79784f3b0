"""The parts of the incident that need no replay: settings, processes, data, folders."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from omni_grpo_core import tiny
from omni_grpo_core.core.batch import placeholder_ids, render
from omni_grpo_core.core.media import load_media
from omni_grpo_core.core.policy import load_policy
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.errors import BatchError
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.trial import reference
from omni_grpo_core.losses import LossConfig
from omni_grpo_core.losses.advantages import group_advantages
from omni_grpo_core.losses.policy_loss import Totals, policy_loss
from omni_grpo_core.pipeline.inputs import converse, make_batch
from omni_grpo_core.pipeline.stages import run
from omni_grpo_core.rewards.corpus import corpus
from omni_grpo_core.trace.calls import ProcessorCall

CONFIG = LoopConfig()
SALAD = next(case.completion for case in corpus() if "token salad" in case.name)
"""Fragments of many languages in random order, with little direct repetition."""


def spans(call: ProcessorCall) -> list[tuple[str, int]]:
    """The first row's runs of placeholders, in token order: modality and length."""
    names = {
        token: name
        for name, token in placeholder_ids(reference("float32").policy.processor).items()
    }
    ids = call.outputs["input_ids"][0].tolist()
    runs = [(token, len(list(run))) for token, run in groupby(ids)]
    return [(names[token], length) for token, length in runs if token in names]


def structure(messages: Sequence[Any]) -> list[str]:
    """The first conversation of a call, one line per message: role, and kinds of content."""
    conversation = messages if isinstance(messages[0], Mapping) else messages[0]
    lines = []
    for message in conversation:
        content = message["content"]
        kinds = ["text"] if isinstance(content, str) else [str(part["type"]) for part in content]
        lines.append(f"{message['role']}: {' + '.join(kinds)}")
    return lines


def longest_run(text: str) -> int:
    """The longest run of one repeated word.

    >>> longest_run("a b b b c")
    3
    """
    return max((len(list(run)) for _, run in groupby(re.findall(r"\w+", text))), default=0)


def rule(reason: str) -> str:
    """The name of the rule at the start of a reason of the degeneration gate."""
    return re.split(r"[:\d]", reason)[0].strip()


def warnings(cases: Sequence[Case]) -> list[str]:
    """Every warning."""
    return [text for case in cases for step in case.steps for text in step.warnings]


def settings_that_cannot_work() -> tuple[bool, str]:
    """Two completions per prompt, and a prompt cap below the number of media tokens."""
    pairs = ([0.0, 1.0], [0.1, 0.3], [0.4, 0.41])
    scaled = [group_advantages(pair, ["p", "p"], "group").values for pair in pairs]
    sizes = {round(float(abs(value)), 1) for values in scaled for value in values}
    held = reference("float32")
    samples = load_samples(tiny.data_file())[:1]
    conversations = converse(samples, held.settings)
    prompts = [render(conversation, held.policy.processor) for conversation in conversations]
    media = [load_media(conversation, held.settings.media) for conversation in conversations]
    short = replace(held.settings, max_prompt_length=24)
    try:
        make_batch(held.policy, prompts, conversations, media, short)
    except BatchError as error:
        refused = str(error)
    else:
        return False, "a prompt above the cap was accepted"
    return sizes == {0.7}, (
        "with two completions and scaled rewards every advantage is ±0.7, for a difference of 0.01 "
        f"or of 1; a cap below the media tokens is rejected: {refused}"
    )


def four_processes() -> tuple[bool, str]:
    """A step's loss computed as a whole, and as the sum of four processes' shares."""
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(8, 12, generator=generator, dtype=torch.float64)
    mask = torch.arange(12)[None] < torch.randint(3, 13, (8, 1), generator=generator)
    advantages = torch.randn(8, generator=generator, dtype=torch.float64)
    totals, config = Totals.of(mask), LossConfig(loss_type="dapo")

    def share(rows: slice) -> float:
        given = {
            "logprobs": logprobs[rows],
            "old_logprobs": logprobs[rows].detach(),
            "advantages": advantages[rows],
            "mask": mask[rows],
        }
        return float(policy_loss(config, totals=totals, **given))

    whole = share(slice(None))
    summed = sum(share(slice(start, start + 2)) for start in range(0, 8, 2))
    # float64 summed in a different order
    return abs(whole - summed) < 1e-12, (
        f"loss {whole:.9f} in one process, {summed:.9f} summed over four: each share is normalised "
        "by the whole step's tokens"
    )


def readers() -> tuple[bool, str]:
    """HumanOmniV2's rows, and a Social-IQ 2.0 row on a shipped clip."""
    shipped = load_samples(tiny.data_file())
    row = {
        "q": "How does he feel?",
        "vid_name": "clip-00",
        "ts": "0.00-1.00",
        "answer_idx": 1,
    }
    row |= {f"a{i}": text for i, text in enumerate(("calm", "glad", "sad", "angry"))}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "qa.json"
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        (asked,) = load_samples(file, root=tiny.data_file().parent)
    return len(shipped) == 22 and asked.solution == "<answer>B</answer>", (
        f"{len(shipped)} rows in HumanOmniV2's JSON, one in Social-IQ's: gold {asked.solution}"
    )


def good_path() -> tuple[bool, str]:
    """What ``omni-grpo check`` runs, on two shipped rows."""
    held = reference("float32")
    trace = run(held.policy, load_samples(tiny.data_file())[:2], held.settings).trace
    stages = [record.stage for record in trace.stages]
    sound = sum(record.ok for record in trace.stages)
    return sound == len(stages), f"{sound} of {len(stages)} stages pass on two shipped rows"


def checkpoints() -> tuple[bool, str]:
    """HumanOmniV2's layout: weights in one folder, the processor in another."""
    whole = tiny.checkpoint_dir()
    weights = ("config.json", "generation_config.json", "model.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        for name in weights:
            shutil.copy(whole / name, Path(folder) / name)
        policy = load_policy(folder, processor=whole)
    held = reference("float32").policy
    same = all(
        torch.equal(value, held.model.state_dict()[name])
        for name, value in policy.model.state_dict().items()
    )
    return same, f"{policy.family.name} loaded from weights and processor in separate folders"
