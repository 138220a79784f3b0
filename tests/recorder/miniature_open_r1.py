"""A minimal trainer in the style of open-r1-multimodal, VLM-R1 and HumanOmniV2.

The same methods in the same order with the same calls, rewritten: a ``vlm_module`` renders and
batches; the trainer generates, masks, scores, normalises, and computes its loss from its buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Inputs = Sequence[Mapping[str, Any]]


def media_token_ids(processor: Any) -> list[int]:
    tokens = (processor.image_token, processor.video_token, processor.audio_token)
    return [processor.tokenizer.convert_tokens_to_ids(token) for token in tokens]


def interleaving(processor: Any, videos: int) -> dict[str, Any]:
    """The keywords for audio in video that the installed transformers expects."""
    if hasattr(processor, "load_audio_from_video"):
        return {
            "load_audio_from_video": True,
            "audio_from_video_indices": list(range(videos)),
        }
    return {"use_audio_in_video": True}


class VlmModule:
    """What differs between model families."""

    multimodal = (
        *("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"),
        *("video_second_per_grid", "input_features", "feature_attention_mask"),
        "use_audio_in_video",
    )

    def prepare_prompt(self, processing_class: Any, inputs: Inputs) -> list[str]:
        texts = [
            processing_class.apply_chat_template(
                row["prompt"], tokenize=False, add_generation_prompt=True
            )
            for row in inputs
        ]
        return [text if isinstance(text, str) else text[0] for text in texts]

    def prepare_model_inputs(
        self, processing_class: Any, texts: list[str], media: Mapping[str, Any], flag: bool
    ) -> dict[str, Any]:
        return dict(
            processing_class(
                text=texts,
                **media,
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
                do_resize=False,
                **(interleaving(processing_class, len(media["videos"])) if flag else {}),
            )
        )


class MiniatureTrainer:
    """Rows have a ``prompt`` of messages, ``images``, ``videos``, ``audios`` and columns."""

    def __init__(
        self,
        model: Any,
        processing_class: Any,
        reward_funcs: list[Callable[..., Any]],
        rows: Inputs,
        **arguments: Any,
    ) -> None:
        self.args = SimpleNamespace(
            **{
                "num_generations": 2,
                "num_iterations": 1,
                "beta": 0.0,
                "epsilon": 0.2,
                "scale_rewards": True,
                "max_completion_length": 8,
                "learning_rate": 1e-4,
                "max_steps": 1,
                **arguments,
            }
        )
        self.num_generations = self.args.num_generations
        self.model = self.model_wrapped = model
        self.processing_class = processing_class
        self.reward_funcs = reward_funcs
        self.reward_weights = torch.ones(len(reward_funcs))
        self.vlm_module = VlmModule()
        self.rows = rows
        self.losses: list[float] = []
        self._metrics: dict[str, dict[str, list[float]]] = {"train": {"reward": []}}

    def _get_per_token_logps(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, **multimodal: Any
    ) -> Tensor:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, **multimodal).logits
        rows = zip(logits[:, :-1], input_ids[:, 1:], strict=True)
        return torch.stack([row.log_softmax(-1).gather(1, ids[:, None])[:, 0] for row, ids in rows])

    def _generate_and_score_completions(self, inputs: Inputs) -> dict[str, Any]:
        texts = self.vlm_module.prepare_prompt(self.processing_class, inputs)
        media = {
            name: [item for row in inputs for item in row[column]] or None
            for name, column in (("images", "images"), ("videos", "videos"), ("audio", "audios"))
        }
        flag = bool(inputs[0]["use_audio_in_video"])
        prompt = self.vlm_module.prepare_model_inputs(self.processing_class, texts, media, flag)
        prompt["use_audio_in_video"] = flag
        length = prompt["input_ids"].shape[1]
        self.model.eval()
        with torch.no_grad():
            sequences = self.model_wrapped.generate(
                **prompt,
                max_new_tokens=self.args.max_completion_length,
                do_sample=True,
                temperature=2.0,
                top_k=0,
                # as HumanOmniV2 does: a sampled placeholder would break the scoring forward
                suppress_tokens=media_token_ids(self.processing_class),
            )
        self.model.train()
        completion_ids = sequences[:, length:]
        eos = self.processing_class.tokenizer.eos_token_id
        ended = (completion_ids == eos).int().cumsum(1) - (completion_ids == eos).int()
        mask = (ended == 0).int()
        kept = {key: prompt[key] for key in VlmModule.multimodal if key in prompt}
        attention = torch.cat([prompt["attention_mask"], mask], 1)
        old = None
        if self.args.num_iterations > 1:
            with torch.no_grad():
                old = self._get_per_token_logps(self.model, sequences, attention, **kept)
                old = old[:, length - 1 :]
        advantages, partial = self._score_completions(inputs, completion_ids)
        return {
            "prompt_ids": prompt["input_ids"],
            "prompt_mask": prompt["attention_mask"],
            "completion_ids": completion_ids,
            "completion_mask": mask,
            "old_per_token_logps": old,
            "ref_per_token_logps": None,
            "advantages": advantages,
            "multimodal_inputs": kept,
            "patial_advantages": partial,
        }

    def _score_completions(self, inputs: Inputs, completion_ids: Tensor) -> tuple[Tensor, Any]:
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key != "prompt"}
        given = torch.tensor(
            [
                function(
                    prompts=[row["prompt"] for row in inputs], completions=completions, **columns
                )
                for function in self.reward_funcs
            ]
        )
        names = [function.__name__ for function in self.reward_funcs]
        full = [index for index, name in enumerate(names) if "patial" not in name]
        rewards = given[full].nansum(0)
        self._metrics["train"]["reward"].append(float(rewards.mean()))
        partial = [
            {
                "name": name,
                "reward": self._normalised(given[index]),
                "mask": torch.ones_like(completion_ids),
            }
            for index, name in enumerate(names)
            if index not in full
        ]
        return self._normalised(rewards), partial

    def _normalised(self, rewards: Tensor) -> Tensor:
        groups = rewards.view(-1, self.num_generations)
        centred = groups - groups.mean(1, keepdim=True)
        if self.args.scale_rewards:
            centred = centred / (groups.std(1, keepdim=True) + 1e-4)
        return centred.flatten()

    def compute_loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        scores = self._get_per_token_logps(model, ids, mask, **inputs["multimodal_inputs"])
        scores = scores[:, inputs["prompt_ids"].shape[1] - 1 :]
        advantages = inputs["advantages"][:, None]
        for partial in inputs["patial_advantages"]:
            advantages = advantages + partial["reward"][:, None] * partial["mask"]
        old = inputs["old_per_token_logps"]
        ratio = torch.exp(scores - (scores.detach() if old is None else old))
        clipped = ratio.clamp(1 - self.args.epsilon, 1 + self.args.epsilon)
        per_token = -torch.min(ratio * advantages, clipped * advantages)
        kept = inputs["completion_mask"]
        return (per_token * kept).sum() / kept.sum()

    def train(self) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.args.learning_rate)
        for _ in range(self.args.max_steps):
            repeated = [row for row in self.rows for _ in range(self.num_generations)]
            inputs = self._generate_and_score_completions(repeated)
            for _ in range(self.args.num_iterations):
                loss = self.compute_loss(self.model, inputs)
                torch.autograd.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                self.losses.append(float(loss.detach()))
