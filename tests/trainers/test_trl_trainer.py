"""The real TRL ``GRPOTrainer`` on tiny checkpoints: nothing that breaks where it is sound, and
mistakes planted in it found at their stage.

``tox -e trl`` runs these; elsewhere they are skipped unless TRL is new enough.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import Lane
from ranks import codes, together
from tiny_families import FAMILIES
from trl_cells import PLANTED, RANKS, SOUND, Given, modality_of
from trl_runs import pictures, text_rows, trained, videos

from omni_grpo_core.core.policy import Policy

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 and its packages: tox -e trl")
pytest.importorskip("datasets", reason="TRL 1.16 and its packages: tox -e trl")

RunCli = Callable[..., tuple[int, str, str]]
LANE = Lane(
    "trl",
    "TRL `GRPOTrainer`",
    packages=("trl", "transformers", "torch"),
    lines='with omni_grpo_core.record("trace/", model=trainer.model, processor=processor, '
    "reward_funcs=trainer.reward_funcs):\n    trainer.train()",
)


def diagnosed(trace: Path, run_cli: RunCli) -> tuple[int, dict[str, Any]]:
    code, out, err = run_cli("doctor", trace, "--json")
    assert code < 2, err
    return code, json.loads(out)


def broken(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [
        (found["stage"], [cause["cause"] for cause in found["causes"]])
        for found in report["findings"]
        if found["severity"] == "breaks"
    ]


def run(folder: Path, policy: Policy, given: Given) -> Path:
    """The recording of a run; of another family's model, where it names one."""
    own = dict(given)
    rows = own.pop("rows", text_rows)
    if callable(rows):
        if rows is not text_rows:
            pytest.importorskip("transformers", minversion="5.23", reason="TRL's media need it")
        rows = rows()
    peft = own.pop("peft", None)
    made = FAMILIES[own.pop("family")]() if "family" in own else (policy.model, policy.processor)
    return trained(folder, *made, rows, peft=peft and peft(), **own)


@pytest.mark.parametrize("name", SOUND)
def test_nothing_breaks_a_sound_run(
    name: str, policy: Policy, tmp_path: Path, run_cli: RunCli
) -> None:
    given = SOUND[name]
    code, report = diagnosed(run(tmp_path, policy, given), run_cli)
    LANE.sound(modality_of(given), name, report)
    assert (code, broken(report), report["raised"]) == (0, [], None)
    states = {stage: held["state"] for stage, held in report["coverage"].items()}
    judged = {stage for stage, state in states.items() if state in ("sound", "differs")}
    assert {"text", "batch", "positions", "reward", "advantage", "loss", "gradient"} <= judged
    if "family" not in given:
        assert {"logits", "completion"} <= judged
    assert not [note for note in report["missing"] if "failed on this recording" in note]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found_at_its_stage(
    name: str, policy: Policy, tmp_path: Path, run_cli: RunCli
) -> None:
    given, stage, cause = PLANTED[name]
    code, report = diagnosed(run(tmp_path, policy, given), run_cli)
    LANE.fault(modality_of(given), name, report, stage=stage)
    assert code == 1
    assert report["headline"]["stage"] == stage
    assert [found for found, _ in broken(report)] == [stage], "and nothing else is blamed"
    assert cause in dict(broken(report))[stage]


def _rank(folder: Path, policy: Policy, given: Given, rank: int) -> None:
    halved = {"per_device_train_batch_size": 4, **given}
    run(folder / str(rank), policy, halved)


@pytest.mark.parametrize("name", RANKS)
def test_on_two_ranks(name: str, policy: Policy, tmp_path: Path, run_cli: RunCli) -> None:
    given, stage, cause = RANKS[name]
    assert codes(together(2, partial(_rank, tmp_path, policy, given), tmp_path)) == [0, 0]
    trace = tmp_path / "trace"
    trace.mkdir()
    for rank in (0, 1):
        (tmp_path / str(rank) / "trace" / f"rank-{rank}").rename(trace / f"rank-{rank}")
    code, report = diagnosed(trace, run_cli)
    if not stage:
        LANE.sound(modality_of(given), name, report)
        assert (code, broken(report), report["raised"]) == (0, [], None)
        return
    LANE.fault(modality_of(given), name, report, stage=stage)
    assert [found for found, _ in broken(report)] == [stage]
    assert cause in dict(broken(report))[stage]


@pytest.mark.parametrize("rows", [text_rows, pictures, videos])
def test_a_recording_changes_nothing(
    rows: Callable[[], Any], policy: Policy, tmp_path: Path
) -> None:
    """Losses, completions and weights, bit for bit."""
    import trl
    import trl_runs

    kept: list[Any] = []

    class Kept(trl.GRPOTrainer):  # type: ignore[misc]
        def train(self, *given: Any, **more: Any) -> Any:
            made = super().train(*given, **more)
            weights = {name: w.detach().clone() for name, w in self.model.named_parameters()}
            losses = [log["loss"] for log in self.state.log_history if "loss" in log]
            kept.append((losses, list(self._logs["completion"]), weights))
            return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl, "GRPOTrainer", Kept)
        run(tmp_path / "with", policy, {"rows": rows, "logging_steps": 1})
        patch.setattr(trl_runs, "record", lambda *_, **__: nullcontext())
        run(tmp_path / "without", policy, {"rows": rows, "logging_steps": 1})
    (losses, texts, weights), (own_losses, own_texts, own_weights) = kept
    assert losses == own_losses
    assert len(losses) == 2
    assert texts == own_texts
    assert all(torch.equal(weight, own_weights[name]) for name, weight in weights.items())


def test_its_completion_tables_are_a_dump(policy: Policy, tmp_path: Path, run_cli: RunCli) -> None:
    run(tmp_path, policy, {"log_completions": True, "logging_steps": 1})
    code, out, _ = run_cli("doctor", "--dump", "trl", tmp_path / "out", "--json")
    report = json.loads(out)
    assert (code, report["steps"], report["findings"]) == (0, 2, [])
    assert report["coverage"]["advantage"]["state"] == "sound"
