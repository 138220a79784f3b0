"""The open-r1 family on its real code: HumanOmniV2, VLM-R1, R1-V.

They are no packages: each is run from a checkout that the user names, and nothing of them is here.
``OMNI_HUMANOMNI=… OMNI_VLMR1=… OMNI_R1V=… tox -e openr1``. Expected are the commits in ``LANES``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conformance import Lane

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

RunCli = Callable[..., tuple[int, str, str]]
VARIABLES = {"humanomni": "OMNI_HUMANOMNI", "vlm-r1": "OMNI_VLMR1", "r1-v": "OMNI_R1V"}
_NAMES = {
    "humanomni": ("HumanOmniV2", "commit 9bf0e6f"),
    "vlm-r1": ("VLM-R1", "commit 90052f4"),
    "r1-v": ("R1-V", "commit bbbbe3d"),
}
LINES = (
    'with omni_grpo_core.record("trace/", model=trainer.model, '
    "processor=trainer.processing_class, reward_funcs=trainer.reward_funcs):\n    trainer.train()"
)
LANES = {
    key: Lane(f"open-r1-{key}", name, ("transformers", "trl"), LINES, commit)
    for key, (name, commit) in _NAMES.items()
}
ONE_PROMPT = {"per_device_train_batch_size": 1}
"""Of R1-V: that of each rank, with all its completions."""
FOLLOWED = ("generates in eval", "states rate")


@pytest.fixture(autouse=True)
def its_versions() -> None:
    trl = pytest.importorskip("trl", reason="open-r1's own versions: tox -e openr1")
    if not trl.__version__.startswith("0.16."):
        pytest.skip(f"open-r1's own versions: tox -e openr1; here is TRL {trl.__version__}")


def trained(folder: Path, trainer: str, ranks: int = 1, **setup: Any) -> Path:
    """Run a checkout as :mod:`open_r1_run` does, in one process a rank; its folder."""
    variable = VARIABLES[trainer]
    checkout = os.environ.get(variable)
    if not checkout:
        pytest.skip(f"a checkout of {LANES[trainer].trainer}: {variable}=PATH")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "setup.json"
    held = {"trainer": trainer, "checkout": checkout, "folder": str(folder), **setup}
    file.write_text(json.dumps(held), encoding="utf-8")
    runner = [sys.executable, str(Path(__file__).with_name("open_r1_run.py")), str(file)]
    given = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # helpers of the tests
    logs = [folder / f"log-{rank}" for rank in range(ranks)]
    started = []
    for rank, log in enumerate(logs):
        own = path | (given | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
        with log.open("w", encoding="utf-8") as into:
            started.append(
                subprocess.Popen(
                    runner, env={**os.environ, **own}, stdout=into, stderr=subprocess.STDOUT
                )
            )
    for process, log in zip(started, logs, strict=True):
        assert process.wait() == 0, log.read_text(encoding="utf-8")[-3000:]
    return folder


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def diagnosed(folder: Path, run_cli: RunCli) -> dict[str, Any]:
    code, out, err = run_cli("doctor", folder / "trace", "--json")
    assert code < 2, err
    report: dict[str, Any] = json.loads(out)
    return report


def broken(report: dict[str, Any]) -> dict[str, dict[str, bool]]:
    """Causes of what breaks, by stage: whether each is proved."""
    return {
        found["stage"]: {cause["cause"]: cause["proved"] for cause in found["causes"]}
        for found in report["findings"]
        if found["severity"] == "breaks"
    }


# --------------------------------------------------------------------------- HumanOmniV2


def test_the_incident_is_the_headline(tmp_path: Path, run_cli: RunCli) -> None:
    """Garbage from an untrained-looking policy: train mode, checkpointing, no cache. Two ranks of
    one row each, and a recording changes nothing: losses, ids and weights are bit-equal."""
    own = trained(tmp_path / "recorded", "humanomni", 2)
    report = diagnosed(own, run_cli)
    assert report["headline"]["stage"] == "completion"
    completion = next(one for one in report["findings"] if one["stage"] == "completion")
    assert completion["causes"][0]["cause"] == "gen.checkpointing-train"
    assert completion["causes"][0]["proved"]
    # true as well: frames at 4 a second, which the processor takes for 2
    assert broken(report)["media"] == {"media.fps-ignored": True}
    name = "generation in train mode under checkpointing, as published"
    LANES["humanomni"].fault("video and sound", name, report, stage="completion")
    bare = trained(tmp_path / "bare", "humanomni", 2, by="nothing")
    for rank in range(2):
        kept = [folder / f"kept-{rank}.json" for folder in (own, bare)]
        assert kept[0].read_text() == kept[1].read_text()


def test_after_the_advice_nothing_breaks(tmp_path: Path, run_cli: RunCli) -> None:
    report = diagnosed(trained(tmp_path, "humanomni", 2, plants=FOLLOWED), run_cli)
    assert (report["exit"], broken(report), report["raised"]) == (0, {}, None)
    LANES["humanomni"].sound("video and sound", "advice followed", report)


def test_judges_that_reach_no_gradient(tmp_path: Path, run_cli: RunCli) -> None:
    """The advantage of a partial reward is computed from the total."""
    judged = ("format", "accuracy", "context", "reasoning")
    report = diagnosed(
        trained(tmp_path, "humanomni", 2, plants=FOLLOWED, rewards=judged), run_cli
    )  # fmt: skip
    assert list(broken(report)) == ["advantage"]
    assert broken(report)["advantage"]["adv.partial-repeats"]
    name = "judges that reach no gradient, as published"
    LANES["humanomni"].fault("video and sound", name, report, stage="advantage")


# --------------------------------------------------------------------------- VLM-R1, R1-V

SOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "as published": ("vlm-r1", {}),
    "attach": ("vlm-r1", {"by": "attach"}),
    "one prompt": ("r1-v", {"flags": ONE_PROMPT}),
}
PLANTED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "advantages rolled": ("vlm-r1", {"plants": ["advantages rolled"]}, "advantage", "adv.rolled"),
    "rewards rolled": ("vlm-r1", {"plants": ["rewards rolled"]}, "reward", "reward.by-position"),
    "picture blanked while scoring": (
        "vlm-r1", {"plants": ["picture blanked while scoring"]}, "media", "media.zero",
    ),
    "learning rate 0": (
        "vlm-r1", {"flags": {"learning_rate": 0.0}}, "gradient", "step.rate-zero",
    ),
    "without checkpointing, as published": (
        "vlm-r1", {"flags": {"gradient_checkpointing": False}}, "completion", "gen.history-twice",
    ),
    "its picture blanked while scoring": (
        "r1-v", {"plants": ["picture blanked while scoring"], "flags": ONE_PROMPT},
        "media", "media.zero",
    ),
    "its learning rate 0": (
        "r1-v", {"flags": {**ONE_PROMPT, "learning_rate": 0.0}}, "gradient", "step.rate-zero",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_sound(name: str, tmp_path: Path, run_cli: RunCli) -> None:
    trainer, setup = SOUND[name]
    report = diagnosed(trained(tmp_path, trainer, **setup), run_cli)
    assert (report["exit"], broken(report), report["raised"]) == (0, {}, None)
    judged = {stage for stage, held in report["coverage"].items() if held["state"] == "sound"}
    assert {"text", "batch", "logits", "advantage", "loss", "gradient"} <= judged
    LANES[trainer].sound("image", name, report)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found_at_its_stage(
    name: str, tmp_path: Path, run_cli: RunCli
) -> None:
    trainer, setup, stage, cause = PLANTED[name]
    report = diagnosed(trained(tmp_path, trainer, **setup), run_cli)
    assert report["headline"]["stage"] == stage
    assert list(broken(report)) == [stage], "and nothing else is blamed"
    assert cause in broken(report)[stage]
    LANES[trainer].fault("image", name.removeprefix("its "), report, stage=stage)


@pytest.mark.parametrize(("trainer", "flags"), [("vlm-r1", {}), ("r1-v", ONE_PROMPT)])
def test_a_recording_changes_nothing(trainer: str, flags: dict[str, Any], tmp_path: Path) -> None:
    """Losses, the ids that are scored and weights, bit for bit."""
    kept = [
        trained(tmp_path / by, trainer, by=by, flags=flags) / "kept-0.json"
        for by in ("record", "nothing")
    ]
    assert kept[0].read_text() == kept[1].read_text()
