"""An engine in a process of its own: killed, hung, out of memory; begun again or said so."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.engines.engine import SeparateEngine
from omni_grpo_core.engines.requests import EngineLost
from omni_grpo_core.engines.server import ServedBackend
from omni_grpo_core.pipeline.inputs import Inputs, prepare
from omni_grpo_core.pipeline.settings import Settings, load_settings
from omni_grpo_core.tiny import checkpoint_dir, data_file
from omni_grpo_core.tolerances import ENGINE
from omni_grpo_core.types import Rollout

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(checkpoint_dir())


@pytest.fixture(scope="module")
def settings() -> Settings:
    return replace(load_settings(checkpoint_dir()), max_new_tokens=8)


@pytest.fixture(scope="module")
def inputs(policy: Policy, settings: Settings) -> Inputs:
    return prepare(policy, load_samples(data_file())[16:19], settings)


class Watched:
    """A served engine and what was said of it."""

    def __init__(self, policy: Policy, settings: Settings) -> None:
        # generous for a loaded machine; a hang is only as long as this
        self.backend = ServedBackend(engine="transformers", seconds=30)
        self.said: list[str] = []
        self.engine = SeparateEngine(
            policy,
            self.backend,
            settings,
            ENGINE["float32"],
            lambda: dict(policy.model.state_dict()),
            warn=self.said.append,
        )

    def rollout(self, inputs: Inputs) -> Rollout:
        return self.engine.rollout(inputs, group_size=2, max_new_tokens=8, temperature=1.0, seed=3)


@pytest.fixture
def watched(policy: Policy, settings: Settings) -> Iterator[Watched]:
    watched = Watched(policy, settings)
    watched.engine.push()
    yield watched
    watched.engine.close()


def test_what_was_killed_hangs_or_has_no_memory_is_begun_again(
    watched: Watched, inputs: Inputs
) -> None:
    before = watched.rollout(inputs)
    pids = []
    for harm in (
        lambda pid: os.kill(pid, signal.SIGKILL),
        lambda pid: os.kill(pid, signal.SIGSTOP),
        # what it has stays; anything more is refused
        lambda pid: resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, 1 << 20)),
    ):
        pid = watched.backend.pid
        assert pid is not None
        pids.append(pid)
        harm(pid)
        assert watched.rollout(inputs) == before
    assert len(set(pids)) == 3 == len(watched.said)
    assert "exit code -9" in watched.said[0]
    assert "no answer within 30 s" in watched.said[1]


def test_a_server_that_somebody_else_started_is_not_begun_again(
    watched: Watched, policy: Policy, settings: Settings, inputs: Inputs, tmp_path: Path
) -> None:
    other = ServedBackend(watched.backend._url, seconds=30)
    engine = SeparateEngine(
        policy, other, settings, ENGINE["float32"], lambda: dict(policy.model.state_dict())
    )
    engine.push()
    assert "its own copy of the policy at http://127.0.0.1" in other.name
    assert watched.backend.pid is not None
    os.kill(watched.backend.pid, signal.SIGKILL)
    with pytest.raises(EngineLost, match="not started here") as raised:
        engine.rollout(inputs, group_size=2, max_new_tokens=8, temperature=1.0, seed=3)
    assert "start it again and resume the run" in str(raised.value)
    engine.close()
