"""A check as one HTML page: no script, no network, everything inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from omni_grpo_core.pipeline.check import CheckResult
from omni_grpo_core.pipeline.hints import stage_words
from omni_grpo_core.report.html.page import environment
from omni_grpo_core.report.html.sample_view import SampleView, sample_view
from omni_grpo_core.report.html.words import (
    PROOF_IN_WORDS,
    first_failure,
    health_words,
    not_judged,
)
from omni_grpo_core.report.text import varied

MOST_SAMPLES = 12
"""Samples shown in full."""


@dataclass(frozen=True, slots=True)
class Number:
    """A health number and what it means."""

    name: str
    value: str
    meaning: str


def check_page(result: CheckResult, decode: Callable[[Sequence[int]], str]) -> str:
    """The page of ``result``: verdict, stages, modality proof, health, and samples with what the
    model was given and what it answered.

    ``decode``: token ids -> text with special tokens kept (:meth:`Policy.decode`). The rows shown
    in full are chosen so that every kind of input is among them.
    """
    batch = result.values.get("batch")
    rows = () if batch is None else batch.rows
    shown = varied(rows, MOST_SAMPLES)
    samples = [sample_view(result.values, index, decode) for index in shown]
    return (
        environment()
        .get_template("check_page.html.j2")
        .render(
            result=result,
            failure=first_failure(result),
            checks=sum(len(record.checks) for record in result.trace.stages),
            seconds=sum(record.seconds for record in result.trace.stages),
            stage_words=stage_words,
            proof_in_words=PROOF_IN_WORDS,
            not_judged=not_judged,
            health=[
                Number(field.name, f"{getattr(result.health, field.name):.3g}",
                       health_words(field.name))
                for field in fields(result.health)
            ],
            samples=samples,
            open=_open(samples),
            rows=len(rows),
            left_out=[row.sample_id for i, row in enumerate(rows) if i not in shown],
        )
    )  # fmt: skip


def _open(samples: Sequence[SampleView]) -> set[int]:
    """Numbers of samples: the first, and of each audio mode the one with the most runs."""
    modes = dict.fromkeys(sample.mode for sample in samples)
    richest = [
        max((s for s in samples if s.mode == mode), key=lambda s: len(s.ribbon)) for mode in modes
    ]
    return {sample.number for sample in (*samples[:1], *richest)}
