"""A check as one self-contained HTML page: no scripts, no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from omni_grpo_core.pipeline.check import CheckResult
from omni_grpo_core.pipeline.hints import STAGE_SUMMARY
from omni_grpo_core.report import pieces, varied
from omni_grpo_core.report.html import Decode, render
from omni_grpo_core.report.html.sample_view import SampleView, sample_view
from omni_grpo_core.report.html.words import (
    PROOF_IN_WORDS,
    ended,
    first_failure,
    health_words,
    not_judged,
)

MOST_SAMPLES = 12
"""Samples shown in full."""


def check_page(result: CheckResult, decode: Decode) -> str:
    """The page for ``result``: verdict, stages, modality proof, health, and samples with the
    model's input and answers.

    ``decode``: token ids -> text with special tokens kept (:meth:`Policy.decode`). The rows shown
    in full are chosen to cover every kind of input.
    """
    batch = result.values.get("batch")
    rows = () if batch is None else batch.rows
    shown = varied(rows, MOST_SAMPLES)
    samples = [sample_view(result.values, index, decode) for index in shown]
    return render(
        "check_page.html.j2",
        result=result,
        failure=first_failure(result),
        checks=sum(len(record.checks) for record in result.trace.stages),
        seconds=sum(record.seconds for record in result.trace.stages),
        does=STAGE_SUMMARY,
        proof_in_words=PROOF_IN_WORDS,
        not_judged=not_judged,
        health=asdict(result.health),
        health_words=health_words,
        samples=samples,
        pieces=pieces,
        ended=ended,
        open=_open(samples),
        rows=len(rows),
        left_out=[row.sample_id for i, row in enumerate(rows) if i not in shown],
    )


def _open(samples: Sequence[SampleView]) -> set[int]:
    """Samples shown expanded, by number: the first, and per audio mode the one with most runs."""
    modes = dict.fromkeys(sample.row.audio_in_video for sample in samples)
    richest = [
        max((s for s in samples if s.row.audio_in_video == mode), key=lambda s: len(s.ribbon))
        for mode in modes
    ]
    return {sample.number for sample in (*samples[:1], *richest)}
