"""One setting measured: its parts in each way, the floor, and whether all ways agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor

from omni_grpo_core.bench import usual
from omni_grpo_core.bench.floor import floor
from omni_grpo_core.bench.measure import Cost, Speed, timed
from omni_grpo_core.bench.shapes import Setting, make_batch
from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.completions import pad_completions
from omni_grpo_core.core.forward import embed, prefill
from omni_grpo_core.core.policy import Policy, generating
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.core.towers import features
from omni_grpo_core.fast.rollout import Body
from omni_grpo_core.fast.step import FastStep
from omni_grpo_core.training.step import Scores, plain_scores, scoring
from omni_grpo_core.types import Batch, Embeddings, Rollout

Way = Literal["usual", "plain", "fast"]
WAYS: tuple[Way, ...] = ("usual", "plain", "fast")
TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Costs by way and part. ``sampling`` holds towers, prefill and decoding; ``step`` is sampling
    and update. ``failed``: by way, the parts that ran out of memory or raised, and how."""

    setting: Setting
    prompts: tuple[int, ...]
    costs: dict[Way, dict[str, Cost]]
    floor: dict[str, float]
    agreement: dict[str, float]
    failed: dict[Way, str]

    def step(self, way: Way) -> float | None:
        parts = self.costs.get(way, {})
        if "sampling" not in parts or "update" not in parts:
            return None
        return parts["sampling"].seconds + parts["update"].seconds

    @property
    def least(self) -> float:
        """The floor of a step."""
        return sum(self.floor[part] for part in ("towers", "prefill", "decode", "update"))

    def to_json(self) -> dict[str, Any]:
        completions = self.setting.completions * self.setting.tokens
        steps = {way: self.step(way) for way in self.costs}
        return {
            "setting": asdict(self.setting),
            "prompt_tokens": list(self.prompts),
            "floor_seconds": {**self.floor, "step": self.least},
            "ways": {
                way: {
                    "seconds": {part: cost.seconds for part, cost in parts.items()}
                    | ({} if (step := steps[way]) is None else {"step": step}),
                    "gib": {part: cost.gib for part, cost in parts.items()},
                    "tokens_per_second": completions / parts["sampling"].seconds
                    if "sampling" in parts
                    else None,
                    "times_the_floor": None if step is None else step / self.least,
                    "faster_than_usual": None
                    if step is None or steps.get("usual") is None
                    else (steps["usual"] or 0.0) / step,
                }
                for way, parts in self.costs.items()
            },
            "agreement": self.agreement,
            "failed": self.failed,
        }


def measure(
    policy: Policy,
    setting: Setting,
    speed: Speed,
    *,
    ways: Sequence[Way] = WAYS,
    checkpointing: bool = True,
    repeats: int = 1,
    agree: bool = True,
    body: Body | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Every part of every way, on the same weights, prompts and tokens. ``body``: what the
    fast step decodes with, if it is compiled."""
    bench = _Bench(policy, setting, checkpointing, repeats, say, body)
    costs: dict[Way, dict[str, Cost]] = {}
    failed: dict[Way, str] = {}
    for way in ways:
        costs[way], broken = bench.measure(way)
        if broken:
            failed[way] = "; ".join(broken)
    agreement = bench.agreement() if agree and {"plain", "fast"} <= set(ways) - set(failed) else {}
    return Measured(
        setting=setting,
        prompts=tuple(len(row.input_ids) for row in bench.batch.rows),
        costs=costs,
        floor=floor(policy, bench.batch, setting, speed, checkpointing=checkpointing),
        agreement=agreement,
        failed=failed,
    )


class _Bench:
    def __init__(
        self,
        policy: Policy,
        setting: Setting,
        checkpointing: bool,
        repeats: int,
        say: Callable[[str], None],
        body: Body | None,
    ) -> None:
        self.policy, self.setting, self.say = policy, setting, say
        self.checkpointing, self.repeats = checkpointing, repeats
        self.batch = make_batch(policy, setting)
        self.fast = FastStep(policy, body)
        generator = torch.Generator().manual_seed(0)
        allowed = (~policy.suppressed).nonzero()[:, 0].cpu()
        shape = setting.completions, setting.tokens
        ids = allowed[torch.randint(len(allowed), shape, generator=generator)]
        self.ids = ids.to(policy.device)
        self.mask = torch.ones_like(self.ids, dtype=torch.bool)
        self.advantages = torch.randn(shape[0], 1, generator=generator).to(policy.device)
        self.rolled: dict[Way, Rollout] = {}
        self._embeddings: Embeddings | None = None

    def measure(self, way: Way) -> tuple[dict[str, Cost], list[str]]:
        """The cost of each part, and the parts that ran out of memory or lack a kernel."""
        parts: dict[str, Callable[[], Any]]
        if way == "usual":
            inputs = usual.copies(self.policy, self.batch, self.setting.group)
            copied = self._copied()
            score = partial(usual.logprobs, self.policy, inputs)
            parts = {
                "towers": lambda: self._towers(copied),
                "sampling": lambda: self._generate(inputs),
                "scoring": lambda: self._score(way, score),
                "update": lambda: self._update(way, score),
            }
        else:
            scores: Scores = self.fast.scores
            if way == "plain":
                scores = partial(plain_scores, self.policy)
            score = partial(_logprobs, scores, self.batch)
            parts = {
                "towers": lambda: self._towers(self.batch),
                "prefill": self._prefill,
                "sampling": lambda: self._sample(way),
                "scoring": lambda: self._score(way, score),
                "update": lambda: self._update(way, score),
            }
        costs: dict[str, Cost] = {}
        broken = []
        for part, call in parts.items():
            try:
                self._warm_up(way, part, call)
                costs[part], _ = timed(call, self.policy.device, self.repeats)
                self.say(f"{way} {part}: {costs[part].seconds:.3f} s, {costs[part].gib:.1f} GiB")
            except RuntimeError as error:
                text = " ".join(str(error).split())[:300]
                broken.append(f"{part}: {type(error).__name__}: {text}")
                self.say(f"{way} {broken[-1]}")
            self.policy.model.zero_grad(set_to_none=True)
        if {"towers", "prefill", "sampling"} <= costs.keys():
            rest = costs["towers"].seconds + costs["prefill"].seconds
            sampling = costs["sampling"]
            costs["decode"] = Cost(max(0.0, sampling.seconds - rest), sampling.gib)
        return costs, broken

    def _warm_up(self, way: Way, part: str, call: Callable[[], Any]) -> None:
        """Libraries load and choose their kernels in a first call; a slow part has a short one."""
        if part == "sampling" and way != "fast":
            tokens = min(4, self.setting.tokens)
            if way == "plain":
                self._sample(way, tokens)
            return
        call()
        self.policy.model.zero_grad(set_to_none=True)

    def _copied(self) -> Batch:
        rows = [row for row in self.batch.rows for _ in range(self.setting.group)]
        return collate(rows, self.policy.pad_token_id)

    @torch.no_grad()
    def _towers(self, batch: Batch) -> None:
        features(self.policy, batch)

    @torch.no_grad()
    def _prefill(self) -> None:
        """With embeddings that are there already: towers are a part of their own."""
        if self._embeddings is None:
            self._embeddings = embed(self.policy, self.batch)
        with generating(self.policy.model):
            prefill(self.policy, self.batch, embeddings=self._embeddings)

    def _sample(self, way: Way, tokens: int | None = None) -> None:
        sample = self.fast.rollout if way == "fast" else partial(rollout, self.policy)
        rolled = sample(
            self.batch,
            group_size=self.setting.group,
            max_new_tokens=tokens or self.setting.tokens,
            temperature=TEMPERATURE,
            seed=0,
        )
        if tokens is None:
            self.rolled[way] = rolled

    def _generate(self, inputs: dict[str, Any]) -> None:
        with generating(self.policy.model):
            usual.sample(self.policy, inputs, self.setting.tokens)

    def _score(self, way: Way, score: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad(), scoring(self.policy.model, checkpointing=False):
            return score(self.ids, self.mask, temperature=TEMPERATURE)

    def _update(self, way: Way, score: Callable[..., Tensor]) -> None:
        """Forward and backward pass of one on-policy step: the gradient of the clipped loss."""
        with scoring(self.policy.model, checkpointing=self.checkpointing):
            logprobs = score(self.ids, self.mask, temperature=TEMPERATURE).float()
            ratio = torch.exp(logprobs - logprobs.detach())
            torch.autograd.backward(-(ratio * self.advantages).mean())

    # ----------------------------------------------------------------- agreement

    def agreement(self) -> dict[str, float]:
        """How far the fast step's ids, logprobs and gradients are from the plain one's."""
        plain, fast = (self.rolled[way].completions for way in ("plain", "fast"))
        firsts = [
            len([*takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))])
            for a, b in zip(*([c.token_ids for c in side] for side in (plain, fast)), strict=True)
        ]
        sides: dict[str, Callable[..., Tensor]] = {
            "plain": partial(_logprobs, partial(plain_scores, self.policy), self.batch),
            "fast": partial(_logprobs, self.fast.scores, self.batch),
        }
        logprobs = {name: self._score("fast", score) for name, score in sides.items()}
        gaps = (logprobs["plain"] - logprobs["fast"]).abs()
        drift = self._drift(self.rolled["fast"])
        gradients = [self._gradients(score) for score in sides.values()]
        relative = [
            float((a.float() - b.float()).norm() / a.float().norm().clamp_min(1e-12))
            for a, b in zip(*gradients, strict=True)
        ]
        dot = sum(float((a.float() * b.float()).sum()) for a, b in zip(*gradients, strict=True))
        norms = [sum(float(g.float().square().sum()) for g in one) ** 0.5 for one in gradients]
        return {
            "completions": len(plain),
            "equal_completions": sum(first == self.setting.tokens for first in firsts),
            "earliest_difference": min(firsts),
            "logprob_max": float(gaps.max()),
            "logprob_mean": float(gaps.mean()),
            "rollout_drift_max": float(drift.max()),
            "rollout_drift_mean": float(drift.mean()),
            "gradient_relative_median": sorted(relative)[len(relative) // 2],
            "gradient_relative_max": max(relative),
            "gradient_cosine": dot / max(norms[0] * norms[1], 1e-30),
        }  # fmt: skip

    def _drift(self, rolled: Rollout) -> Tensor:
        """Between sampling and scoring, both fast."""
        tokens = pad_completions(rolled.completions, self.policy.pad_token_id)
        with torch.no_grad(), scoring(self.policy.model, checkpointing=False):
            scored = self.fast.scores(
                self.batch, tokens.ids, tokens.mask, temperature=TEMPERATURE
            ).logprobs
        return (scored.cpu() - tokens.logprobs).abs()[tokens.mask]

    def _gradients(self, score: Callable[..., Tensor]) -> list[Tensor]:
        self._update("fast", score)
        parameters = [p for p in self.policy.model.parameters() if p.requires_grad]
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.policy.model.zero_grad(set_to_none=True)
        return found


def _logprobs(
    scores: Scores, batch: Batch, ids: Tensor, mask: Tensor, *, temperature: float
) -> Tensor:
    return scores(batch, ids, mask, temperature=temperature).logprobs
