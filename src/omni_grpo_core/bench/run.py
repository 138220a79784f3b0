"""One setting measured: its parts in each way, the floor, and whether all ways agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from omni_grpo_core.errors import one_line
from omni_grpo_core.fast.attention import windows
from omni_grpo_core.fast.step import FastStep
from omni_grpo_core.training.host_gradients import HostGradients
from omni_grpo_core.training.step import Scores, plain_scores, scoring
from omni_grpo_core.types import Batch, Embeddings, Rollout, Row

Way = Literal["usual", "plain", "fast"]
WAYS: tuple[Way, ...] = ("usual", "plain", "fast")
TEMPERATURE = 1.0
Score = Callable[..., Tensor]
"""Logprobs, (N, C), of ``ids`` and ``mask`` at ``temperature``."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a setting is measured. ``micro_batch``: completions that the usual way's update takes at
    a time, all by default. ``offload_gradients``: in the fast way's update. ``repeats``: runs of
    each part. ``brief``: no scoring passes, and results are not compared. ``warm``: an earlier
    setting has loaded kernels; the fast way still compiles its own. ``say`` is called with
    each cost."""

    ways: Sequence[Way] = WAYS
    checkpointing: bool = True
    micro_batch: int | None = None
    offload_gradients: bool = False
    repeats: int = 1
    brief: bool = False
    warm: bool = False
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True, slots=True)
class Measured:
    """Costs by way and part. ``sampling`` holds towers, prefill and decoding;
    ``update_without_towers`` is the usual update without a backward pass through them; ``step`` is
    sampling and update, ``scored_step`` these and a scoring pass of its own. ``held_gib``: weights,
    and gradients if they stay on the device, which an update of each way holds. ``failed``: by way,
    the parts that ran out of memory or raised, and how."""

    setting: Setting
    prompts: tuple[int, ...]
    costs: dict[Way, dict[str, Cost]]
    floor: dict[str, float]
    held_gib: dict[Way, float]
    agreement: dict[str, float]
    failed: dict[Way, str]

    def seconds(self, way: Way) -> dict[str, float]:
        found = {part: cost.seconds for part, cost in self.costs.get(way, {}).items()}
        for name, parts in (
            ("step", ("sampling", "update")),
            ("scored_step", ("sampling", "scoring", "update")),
        ):
            if found.keys() >= set(parts):
                found[name] = sum(found[part] for part in parts)
        return found

    def to_json(self) -> dict[str, Any]:
        tokens = self.setting.completions * self.setting.tokens
        least = {
            **self.floor,
            "step": sum(self.floor[part] for part in ("towers", "prefill", "decode", "update")),
        }
        usually = self.seconds("usual")

        def ratios(way: Way) -> dict[str, float | None]:
            own = self.seconds(way)

            def over(top: float | None, part: str) -> float | None:
                return None if top is None or part not in own else top / own[part]

            step = own.get("step")
            return {
                "tokens_per_second": over(tokens, "sampling"),
                "step_tokens_per_second": over(tokens, "step"),
                "times_the_floor": None if step is None else step / least["step"],
                "faster_than_usual": over(usually.get("step"), "step"),
                "faster_than_usual_scored": over(usually.get("scored_step"), "step"),
            }

        return {
            "setting": asdict(self.setting),
            "prompt_tokens": list(self.prompts),
            "floor_seconds": least,
            "ways": {
                way: {
                    "seconds": self.seconds(way),
                    "gib": {part: cost.gib for part, cost in parts.items()},
                    "held_gib": self.held_gib[way],
                    **ratios(way),
                }
                for way, parts in self.costs.items()
            },
            "agreement": self.agreement,
            "failed": self.failed,
        }


def measure(policy: Policy, setting: Setting, speed: Speed, options: Options) -> Measured:
    """Every part of every way, on the same weights, prompts and tokens."""
    bench = _Bench(policy, setting, options)
    costs: dict[Way, dict[str, Cost]] = {}
    failed: dict[Way, str] = {}
    for way in options.ways:
        costs[way], broken = bench.measure(way)
        if broken:
            failed[way] = "; ".join(broken)
    whole = {"plain", "fast"} <= set(options.ways) - set(failed)
    return Measured(
        setting=setting,
        prompts=tuple(len(row.input_ids) for row in bench.batch.rows),
        costs=costs,
        floor=floor(policy, bench.batch, setting, speed, checkpointing=options.checkpointing),
        held_gib={way: bench.held(way) for way in options.ways},
        agreement=bench.agreement() if whole and not options.brief else {},
        failed=failed,
    )


class _Bench:
    def __init__(self, policy: Policy, setting: Setting, options: Options) -> None:
        self.policy, self.setting, self.options = policy, setting, options
        self.batch = make_batch(policy, setting)
        self.fast = FastStep(policy)
        generator = torch.Generator().manual_seed(0)
        allowed = (~policy.suppressed).nonzero()[:, 0].cpu()
        shape = setting.completions, setting.tokens
        ids = allowed[torch.randint(len(allowed), shape, generator=generator)]
        self.ids = ids.to(policy.device)
        self.mask = torch.ones_like(self.ids, dtype=torch.bool)
        self.advantages = torch.randn(shape[0], 1, generator=generator).to(policy.device)
        self.rolled: dict[Way, Rollout] = {}
        self.learning = [p for p in policy.model.parameters() if p.requires_grad]
        self.host: dict[Way, HostGradients] = {}
        if options.offload_gradients:
            self.host["fast"] = HostGradients(self.learning)

    def held(self, way: Way) -> float:
        parameters = [p for p in self.policy.model.parameters() if p.is_cuda]
        kept = 1 if way in self.host else 2
        size: int = sum(p.nbytes * (kept if p.requires_grad else 1) for p in parameters)
        return size / 2**30

    def measure(self, way: Way) -> tuple[dict[str, Cost], list[str]]:
        """The cost of each part, and the parts that ran out of memory or lack a kernel."""
        costs: dict[str, Cost] = {}
        broken = []
        for part, call in self._parts(way).items():
            if self.options.brief and part == "scoring":
                continue
            try:
                self._warm_up(way, part, call)
                found, _ = timed(call, self.policy.device, self.options.repeats)
                costs[part] = found
                self.options.say(f"{way} {part}: {found.seconds:.3f} s, {found.gib:.1f} GiB")
            except RuntimeError as error:
                broken.append(f"{part}: {type(error).__name__}: {one_line(error)}")
                self.options.say(f"{way} {broken[-1]}")
            self.policy.model.zero_grad(set_to_none=True)
        if {"towers", "prefill", "sampling"} <= costs.keys():
            rest = costs["towers"].seconds + costs["prefill"].seconds
            sampling = costs["sampling"]
            costs["decode"] = Cost(max(0.0, sampling.seconds - rest), sampling.gib)
        return costs, broken

    def _parts(self, way: Way) -> dict[str, Callable[[], Any]]:
        if way == "usual":
            rows = [row for row in self.batch.rows for _ in range(self.setting.group)]
            copies = collate(rows, self.policy.pad_token_id)
            size = self.options.micro_batch or len(rows)
            chunks = [
                (self._usual(rows[start : start + size]), slice(start, start + size))
                for start in range(0, len(rows), size)
            ]
            given = usual.inputs(self.policy, copies)
            parts: dict[str, Callable[[], Any]] = {
                "towers": lambda: self._towers(way, copies),
                "sampling": lambda: self._generate(given),
                "scoring": lambda: [self._score(*chunk) for chunk in chunks],
                "update": lambda: self._updates(chunks, mode=usual.training),
            }
            if self.options.checkpointing:
                parts["update_without_towers"] = lambda: self._updates(chunks)
            return parts
        score = self._scorer(way)
        with torch.no_grad():
            embeddings = embed(self.policy, self.batch)
        return {
            "towers": lambda: self._towers(way, self.batch),
            "prefill": lambda: self._prefill(embeddings),
            "sampling": lambda: self._sample(way),
            "scoring": lambda: self._score(score),
            "update": lambda: self._updates([(score, slice(None))], self.host.get(way)),
        }

    def _usual(self, rows: Sequence[Row]) -> Score:
        copies = collate(rows, self.policy.pad_token_id)
        return partial(usual.logprobs, self.policy, usual.inputs(self.policy, copies))

    def _scorer(self, way: Way) -> Score:
        scores: Scores = self.fast.scores if way == "fast" else partial(plain_scores, self.policy)

        def score(ids: Tensor, mask: Tensor, *, temperature: float) -> Tensor:
            return scores(self.batch, ids, mask, temperature=temperature).logprobs

        return score

    def _warm_up(self, way: Way, part: str, call: Callable[[], Any]) -> None:
        """Libraries load and choose their kernels in a first call; a slow part has a short one."""
        if self.options.warm and way != "fast":
            return
        if part == "sampling" and way != "fast":
            tokens = min(4, self.setting.tokens)
            if way == "plain":
                self._sample(way, tokens)
            else:
                rows = usual.inputs(self.policy, self.batch)
                self._generate(rows, tokens)
            return
        call()
        self.policy.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _towers(self, way: Way, batch: Batch) -> None:
        with windows(self.policy.model) if way == "fast" else nullcontext():
            features(self.policy, batch)

    @torch.no_grad()
    def _prefill(self, embeddings: Embeddings) -> None:
        with generating(self.policy.model):
            prefill(self.policy, self.batch, embeddings=embeddings)

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

    def _generate(self, given: dict[str, Any], tokens: int | None = None) -> None:
        with generating(self.policy.model):
            usual.sample(self.policy, given, tokens or self.setting.tokens)

    def _score(self, score: Score, chunk: slice = slice(None)) -> Tensor:
        with torch.no_grad(), scoring(self.policy.model, checkpointing=False):
            return score(self.ids[chunk], self.mask[chunk], temperature=TEMPERATURE)

    def _updates(
        self,
        chunks: Sequence[tuple[Score, slice]],
        host: HostGradients | None = None,
        mode: Callable[..., AbstractContextManager[None]] = scoring,
    ) -> None:
        """The gradients of one step, and no earlier ones."""
        self.policy.model.zero_grad(set_to_none=True)
        if host is not None:
            host.drop()
        with (
            nullcontext() if host is None else host.attached(),
            mode(self.policy.model, checkpointing=self.options.checkpointing),
        ):
            for score, chunk in chunks:
                self._update(score, chunk)

    def _update(self, score: Score, chunk: slice) -> None:
        """Forward and backward pass of one on-policy step: the gradient of the clipped loss."""
        logprobs = score(self.ids[chunk], self.mask[chunk], temperature=TEMPERATURE).float()
        ratio = torch.exp(logprobs - logprobs.detach())
        terms = ratio * self.advantages[chunk]
        loss = -terms.sum() / self.ids.numel()
        torch.autograd.backward(loss)

    # ----------------------------------------------------------------- agreement

    def agreement(self) -> dict[str, float]:
        """How far the fast step's ids, logprobs and gradients are from the plain one's."""
        plain, fast = (self.rolled[way].completions for way in ("plain", "fast"))
        firsts = [
            len([*takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))])
            for a, b in zip(*([c.token_ids for c in side] for side in (plain, fast)), strict=True)
        ]
        sides = {
            "plain": self._scorer("plain"),
            "fast": self._scorer("fast"),
            "usual": self._usual([r for r in self.batch.rows for _ in range(self.setting.group)]),
        }
        logprobs = {name: self._score(score) for name, score in sides.items()}
        gaps, usual_gaps = ((logprobs["plain"] - logprobs[way]).abs() for way in ("fast", "usual"))
        drift = self._drift(self.rolled["fast"])
        gradients = [self._gradients(sides[way], self.host.get(way)) for way in ("plain", "fast")]
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
            "usual_logprob_max": float(usual_gaps.max()),
            "usual_logprob_mean": float(usual_gaps.mean()),
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

    def _gradients(self, score: Score, host: HostGradients | None) -> list[Tensor]:
        self._updates([(score, slice(None))], host)
        made = [p.grad if host is None else host.gradient(p) for p in self.learning]
        self.policy.model.zero_grad(set_to_none=True)
        pairs = zip(self.learning, made, strict=True)
        return [torch.zeros_like(p) if g is None else g for p, g in pairs]
