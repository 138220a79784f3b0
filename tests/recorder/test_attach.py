"""attach() on trainers as found in the wild."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from miniature_open_r1 import MiniatureTrainer

from omni_grpo_core import attach
from omni_grpo_core.core.media import load_media
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.pipeline.inputs import converse
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.trace.calls import (
    AdvantageSeen,
    ForwardCall,
    GenerateCall,
    LossSeen,
    RewardCall,
    SamplesSeen,
    StepSeen,
)
from omni_grpo_core.trace.store import load_trace
from omni_grpo_core.types import Sample, TextPart, Trace


def values(trace: Trace, kind: type) -> list[Any]:
    return [r.value for r in trace.stages if type(r.value) is kind]


def row(sample: Sample, settings: Settings) -> dict[str, Any]:
    """A row as the data set of such a trainer has it, media loaded."""
    [conversation] = converse([sample], settings)
    media = load_media(conversation, settings.media)
    prompt = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": part.ref.modality, part.ref.modality: part.ref.path}
                for part in message.parts
            ],
        }
        for message in conversation.messages
    ]
    return {
        "prompt": prompt,
        "images": [],
        "videos": [video.frames for video in media.videos],
        "audios": [audio.samples.numpy() for audio in media.audios],
        "use_audio_in_video": conversation.audio_in_video == "interleaved",
        "solution": sample.solution,
    }


def letters(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [len(set(c[0]["content"])) / 50 for c in completions]


def patial_length(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [len(c[0]["content"]) / 100 for c in completions]


def trainer(
    policy: Policy,
    samples: tuple[Sample, ...],
    settings: Settings,
    kind: type[MiniatureTrainer] = MiniatureTrainer,
    **arguments: Any,
) -> MiniatureTrainer:
    torch.manual_seed(5)
    return kind(
        copy.deepcopy(policy.model),
        policy.processor,
        [letters, patial_length],
        [row(sample, settings) for sample in samples[:2]],
        **arguments,
    )


def test_open_r1_style(
    tmp_path: Path, policy: Policy, samples: tuple[Sample, ...], settings: Settings
) -> None:
    made = trainer(policy, samples, settings)
    before = dict(vars(made))
    recorder = attach(made, tmp_path / "trace", steps=5)
    assert recorder.recording
    made.train()
    assert not recorder.recording, "train() has ended, although fewer steps ran than requested"
    assert vars(made).keys() == before.keys()
    assert made.reward_funcs == [letters, patial_length]
    trace = load_trace(tmp_path / "trace" / "step-000000")
    assert "not_recorded" not in trace.header
    assert [r.stage for r in trace.stages] == [
        *("sample", *["text"] * 4, "batch", "completion", "reward", "reward"),
        *("advantage", "logits", "loss", "loss", "gradient"),
    ]
    [rows], [advantage], [loss] = (
        values(trace, kind) for kind in (SamplesSeen, AdvantageSeen, LossSeen)
    )
    assert [r["solution"] for r in rows.rows] == [s.solution for s in samples[:2]]
    assert rows.group_ids == ("0", "1")
    assert advantage.group_ids == ("0", "0", "1", "1")
    assert advantage.scale == "group"
    assert advantage.weights == {"letters": 1.0, "patial_length": 1.0}
    assert list(advantage.spans) == ["patial_length"]
    partial = values(trace, RewardCall)[1]
    assert partial.name == "patial_length"
    groups = torch.tensor(partial.values).view(2, 2)
    centred = groups - groups.mean(1, keepdim=True)
    wanted = centred / (groups.std(1, keepdim=True) + 1e-4)
    # float32
    assert torch.allclose(advantage.partial["patial_length"], wanted.flatten(), atol=1e-5)
    reward = values(trace, type(trace["reward"].value))[0]
    assert advantage.rewards.tolist() == pytest.approx(reward.values)
    assert loss.loss == made.losses[0]
    assert loss.requires_grad
    assert loss.settings["beta"] == 0.0
    assert loss.metrics == {"reward": pytest.approx(float(advantage.rewards.mean()))}
    assert loss.logprobs.shape == loss.completion_ids.shape
    # the loop takes log_softmax, the recorder gathers and subtracts: equal up to float32 rounding
    [scored] = values(trace, ForwardCall)
    width = loss.completion_ids.shape[1]
    assert torch.allclose(scored.logprobs[:, -width:], loss.logprobs, atol=1e-5)
    [step] = values(trace, StepSeen)
    assert step.settings["num_generations"] == 2
    assert step.losses == (loss.loss,)


def test_a_second_iteration_is_a_step_without_a_rollout(
    tmp_path: Path, policy: Policy, samples: tuple[Sample, ...], settings: Settings
) -> None:
    made = trainer(policy, samples, settings, num_iterations=2)
    attach(made, tmp_path / "trace")
    made.train()
    first, second = (load_trace(tmp_path / "trace" / f"step-00000{i}") for i in range(2))
    assert len(values(first, ForwardCall)) == 2
    assert [r.stage for r in second.stages] == ["logits", "loss", "loss", "gradient"]
    old = values(second, LossSeen)[0].old_logprobs
    assert torch.equal(old, values(first, LossSeen)[0].old_logprobs)


class RollsOutInItsLoss(MiniatureTrainer):
    """VLM-R1: the loss takes rows, and takes up the rollout before in a second update."""

    held: Any = None

    def compute_loss(self, model: Any, inputs: Any) -> Any:
        if self.held is None:
            self.held = self._generate_and_score_completions(inputs)
        return super().compute_loss(model, self.held)

    def train(self) -> None:
        repeated = [row for row in self.rows for _ in range(self.num_generations)]
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.args.learning_rate)
        for _ in range(self.args.num_iterations):
            torch.autograd.backward(self.compute_loss(self.model, repeated))
            optimizer.step()
            optimizer.zero_grad()


def test_a_rollout_inside_the_loss(
    tmp_path: Path, policy: Policy, samples: tuple[Sample, ...], settings: Settings
) -> None:
    """The loss's inputs were rows, so no loss was noted at all."""
    made = trainer(policy, samples, settings, num_iterations=2, kind=RollsOutInItsLoss)
    assert isinstance(made, RollsOutInItsLoss)
    attach(made, tmp_path / "trace")
    made.train()
    for number in range(2):
        trace = load_trace(tmp_path / "trace" / f"step-00000{number}")
        [loss] = values(trace, LossSeen)
        assert torch.equal(loss.advantages, made.held["advantages"])
        assert torch.equal(loss.completion_ids, made.held["completion_ids"])
        assert loss.logprobs.shape == loss.completion_ids.shape


def test_attaching_changes_nothing(
    tmp_path: Path, policy: Policy, samples: tuple[Sample, ...], settings: Settings
) -> None:
    def run(folder: Path | None) -> list[float]:
        made = trainer(policy, samples, settings, max_steps=2)
        if folder is not None:
            attach(made, folder)
        made.train()
        return made.losses

    assert run(tmp_path / "trace") == run(None)


def test_a_train_that_raises_keeps_what_was_recorded(
    tmp_path: Path, policy: Policy, samples: tuple[Sample, ...], settings: Settings
) -> None:
    def broken(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        raise RuntimeError("no judge")

    made = trainer(policy, samples, settings)
    made.reward_funcs[:] = [broken]
    recorder = attach(made, tmp_path / "trace", probe_rewards=False)
    with pytest.raises(RuntimeError, match="no judge"):
        made.train()
    assert not recorder.recording
    trace = load_trace(tmp_path / "trace" / "step-000000")
    assert trace.header["raised"] == "RuntimeError: no judge"
    assert trace.header["raised_in"] == "reward"
    assert len(values(trace, GenerateCall)) == 1


class OwnLoop:
    """Nothing of TRL: a model and a tokenizer, under names of its own."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.tokenizer = copy.deepcopy(policy.model), policy.processor.tokenizer
        self.rewards = [letters]

    def train(self) -> None:
        ids = torch.tensor([self.tokenizer("A question?")["input_ids"]])
        self.policy(input_ids=ids, attention_mask=torch.ones_like(ids))
        self.rewards[0](prompts=["A question?"], completions=[[{"content": "An answer"}]])


class R1V(OwnLoop):
    """A loss that does everything, of rows that are each a group."""

    num_generations = 4

    def __init__(self, policy: Policy, *_: Any) -> None:
        super().__init__(policy)
        self.model, self.processing_class = self.policy, self.tokenizer
        self.reward_funcs = self.rewards

    def _get_per_token_logps(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits.log_softmax(-1)

    def compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        ids = torch.tensor([self.tokenizer(inputs[0]["problem"])["input_ids"]])
        return self._get_per_token_logps(model, ids).mean()

    def train(self) -> None:
        self.compute_loss(self.model, [{"problem": "Who?"}, {"problem": "Where?"}])


def test_a_rollout_without_a_method(tmp_path: Path, policy: Policy) -> None:
    """Rows of different prompts were one group."""
    made = R1V(policy)
    attach(made, tmp_path / "trace")
    made.train()
    trace = load_trace(tmp_path / "trace" / "step-000000")
    [rows] = values(trace, SamplesSeen)
    assert (len(rows.rows), rows.group_ids) == (2, ("0", "1"))
    assert values(trace, LossSeen) == []
    assert "not_recorded" not in trace.header


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            R1V,
            "R1V as R1-V; processor {tokenizer} (processing_class); rewards letters; "
            "loss compute_loss",
        ),
        (
            trainer,
            "MiniatureTrainer as open-r1-multimodal; processor Qwen2_5OmniProcessor "
            "(processing_class); rewards letters, patial_length; loss compute_loss",
        ),
        (
            lambda policy, *_: OwnLoop(policy),
            "OwnLoop as a loop of its own; processor {tokenizer} (tokenizer); rewards letters",
        ),
    ],
)
def test_what_was_recognised_is_said(
    make: Any,
    said: str,
    tmp_path: Path,
    policy: Policy,
    samples: tuple[Sample, ...],
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
    run_cli: Callable[..., tuple[int, str, str]],
) -> None:
    said = said.format(tokenizer=type(policy.processor.tokenizer).__name__)
    for folder in ("trace", "trace-1"):
        made = make(policy, samples, settings)
        attach(made, tmp_path / "trace", steps=1)
        made.train()
        assert load_trace(next((tmp_path / folder).glob("step-*"))).header["trainer"] == said
    first, second = (record.message for record in caplog.records if said in record.message)
    assert first == f"recording {said}; into {tmp_path / 'trace'}"
    assert second.startswith(f"recording {said}; {tmp_path / 'trace'} holds a recording")
    assert json.loads(run_cli("doctor", tmp_path / "trace", "--json")[1])["trainer"] == said
    shown = run_cli("doctor", tmp_path / "trace", "--html", tmp_path / "page.html")[1]
    assert said[:40] in shown
    assert said[:40] in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_an_object_without_a_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"omni_grpo_core\.record"):
        attach(object(), tmp_path)


@pytest.mark.slow
def test_trl(tmp_path: Path, policy: Policy) -> None:
    """A text-only model: TRL 1.16 mistakes the omni thinker for its text model and fails."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    Dataset: Any = pytest.importorskip("datasets").Dataset
    tokenizer = policy.processor.tokenizer
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

    def run(folder: Path | None) -> Any:
        made = GRPOTrainer(
            model=copy.deepcopy(model),
            reward_funcs=[letters],
            args=GRPOConfig(
                output_dir=str(tmp_path / "out"),
                per_device_train_batch_size=4,
                num_generations=2,
                max_completion_length=6,
                max_steps=2,
                temperature=2.0,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list(
                [
                    {"prompt": [{"role": "user", "content": f"Which letter follows {c}?"}]}
                    for c in "ABCD"
                ]
            ),
            processing_class=copy.deepcopy(tokenizer),
        )
        if folder is not None:
            attach(made, folder)
        made.train()
        return made

    plain, watched = run(None), run(tmp_path / "trace")
    losses = [
        [log["loss"] for log in t.state.log_history if "loss" in log] for t in (plain, watched)
    ]
    assert losses[0] == losses[1]
    weights = zip(plain.model.parameters(), watched.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    for number in range(2):
        trace = load_trace(tmp_path / "trace" / f"step-00000{number}")
        assert "not_recorded" not in trace.header
        [rows], [advantage], [loss] = (
            values(trace, kind) for kind in (SamplesSeen, AdvantageSeen, LossSeen)
        )
        assert len(rows.rows) == 2
        assert advantage.group_ids == ("0", "0", "1", "1")
        centred = advantage.rewards.view(2, 2) - advantage.rewards.view(2, 2).mean(1, keepdim=True)
        scaled = centred / (advantage.rewards.view(2, 2).std(1, keepdim=True) + 1e-4)
        assert torch.allclose(advantage.advantages, scaled.flatten(), atol=1e-5)  # float32
        assert loss.logprobs.shape == loss.completion_ids.shape
        assert loss.settings["loss_type"] == plain.args.loss_type
        assert len(values(trace, GenerateCall)) == 1
        assert len(values(trace, StepSeen)) == 1
        assert values(trace, ForwardCall)
