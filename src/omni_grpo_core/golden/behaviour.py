"""How a checkpoint behaves on the rows of a suite: right answers, form, degenerate output, and
whether each modality reaches the model.

A golden says *what changed*; this says whether the model is still as good. Rows that several cases
share are counted once, and run a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.golden.checking import contexts
from omni_grpo_core.golden.generations import garbage_of
from omni_grpo_core.golden.suite import Suite
from omni_grpo_core.pipeline.ablation import Judgement, ModalityProof, prove
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.pipeline.stages import Context, Values, make, put
from omni_grpo_core.types import MODALITIES, Parsed, Sample

_ROWS = 8
"""Rows in a batch: more would not fit beside a 7B model where they are videos."""
_STAGES = (
    *("sample", "conversation", "text", "media", "batch"),
    *("completion", "parsed", "reward"),
)
SHARES = {
    "accuracy": ("right answers", "fell"),
    "well_formed": ("well-formed completions", "fell"),
    "degenerate": ("degenerate completions", "rose"),
    "cap_rate": ("completions cut off at the limit", "rose"),
}
"""What each is, and how it gets worse."""


@dataclass(frozen=True, slots=True)
class ModalityBehaviour:
    """Over the ``rows`` that have the modality, greedy: ``accuracy`` as they are, ``without`` with
    black pictures or silence; ``moved``: share of completions that another row's content changes.
    """

    rows: int
    judgement: Judgement
    accuracy: float
    without: float
    moved: float


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Greedy, over ``rows`` rows; all but ``mean_length`` (tokens) are shares of them, 0 to 1."""

    rows: int
    accuracy: float
    well_formed: float
    degenerate: float
    cap_rate: float
    mean_length: float
    modalities: Mapping[str, ModalityBehaviour]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Behaviour:
        """From what :meth:`to_json` gave."""
        media = {name: ModalityBehaviour(**one) for name, one in data["modalities"].items()}
        return cls(**{**data, "modalities": media})


@dataclass(frozen=True, slots=True)
class Moved:
    """One thing that changed. ``worse``: for the worse."""

    sentence: str
    worse: bool


def behaviour_changes(was: Behaviour, now: Behaviour) -> tuple[Moved, ...]:
    """What changed from one behaviour to the other; empty if it is unchanged.

    Lengths and the accuracy without a modality are left out: drift alone turns near ties there.
    """
    found = []
    for name, (what, worse) in SHARES.items():
        before, after = getattr(was, name), getattr(now, name)
        if before != after:
            word = "rose" if after > before else "fell"
            found.append(Moved(f"{what} {word} from {before:.1%} to {after:.1%}", word == worse))
    for name in dict.fromkeys((*was.modalities, *now.modalities)):
        before, after = (side.modalities.get(name) for side in (was, now))
        lost = [one is not None and one.judgement == "lost" for one in (before, after)]
        if lost[0] != lost[1]:
            text = "no longer reaches the model" if lost[1] else "reaches the model again"
            found.append(Moved(f"{name} {text}", lost[1]))
    return tuple(found)


def behaviour(
    policy: Policy,
    suite: Suite,
    names: Sequence[str] = (),
    on_case: Callable[[str], None] = lambda case: None,
) -> Behaviour:
    """The behaviour on the rows of the cases ``names``, by default all. ``on_case`` is called with
    the rows before they run.

    Raises :class:`~omni_grpo_core.errors.OmniGrpoError` as the stages do.
    """
    batches = list(_batches(contexts(policy, suite, suite.chosen(names)).values()))
    total = sum(len(samples) for _, samples in batches)
    scores: list[tuple[float, bool, bool, bool, int]] = []
    proofs: dict[str, list[ModalityProof]] = {}
    for settings, samples in batches:
        on_case(f"rows {len(scores) + 1} to {len(scores) + len(samples)} of {total}")
        values = _values(Context(policy, settings, tuple(samples)))
        scores += _scores(policy, values)
        for modality in MODALITIES:
            proof = prove(policy, values, modality, settings)
            if proof is not None:
                proofs.setdefault(modality, []).append(proof)
    right, formed, garbage, capped, lengths = zip(*scores, strict=True)
    return Behaviour(
        rows=total,
        accuracy=fmean(right),
        well_formed=fmean(formed),
        degenerate=fmean(garbage),
        cap_rate=fmean(capped),
        mean_length=fmean(lengths),
        modalities={name: merged(found) for name, found in proofs.items()},
    )


def _batches(cases: Iterable[Context]) -> Iterator[tuple[Settings, list[Sample]]]:
    """Each row once for each of the settings it is used with, at most eight together."""
    seen: dict[Settings, dict[str, Sample]] = {}
    for case in cases:
        seen.setdefault(case.settings, {}).update({one.sample_id: one for one in case.samples})
    for settings, rows in seen.items():
        samples = list(rows.values())
        for begin in range(0, len(samples), _ROWS):
            yield settings, samples[begin : begin + _ROWS]


def _values(context: Context) -> Values:
    values: Values = {}
    for stage in _STAGES:
        put(values, stage, make(context, stage, values))
    return values


def _scores(policy: Policy, values: Values) -> Iterator[tuple[float, bool, bool, bool, int]]:
    """Of each completion: accuracy, well-formed, degenerate, cut off, tokens."""
    for completion, parsed, score in zip(
        values["completion"].completions,
        values["parsed"],
        values["reward"]["accuracy"],
        strict=True,
    ):
        yield (
            score.value or 0.0,
            isinstance(parsed, Parsed),
            bool(garbage_of(policy, completion, None)),
            completion.finish_reason == "length",
            len(completion.token_ids),
        )


def merged(proofs: Sequence[ModalityProof]) -> ModalityBehaviour:
    """One modality over several batches, weighted by rows: lost if it is lost in any of them."""
    rows = sum(proof.rows for proof in proofs)
    judgements = {proof.judgement for proof in proofs}
    order: tuple[Judgement, ...] = ("lost", "reaches", "not judged")

    def mean(shares: Iterable[float]) -> float:
        pairs = zip(shares, proofs, strict=True)
        return sum(share * proof.rows for share, proof in pairs) / rows

    return ModalityBehaviour(
        rows=rows,
        judgement=next(one for one in order if one in judgements),
        accuracy=mean(proof.accuracy for proof in proofs),
        without=mean(proof.without for proof in proofs),
        moved=mean(proof.moved for proof in proofs),
    )
