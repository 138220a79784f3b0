"""Two processes that train together, recorded by the two lines alone."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from written_loop import Written, WrittenLoop, letters

from omni_grpo_core import record
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor.diagnose import diagnose
from omni_grpo_core.doctor.load import as_cases, read_traces

pytestmark = pytest.mark.slow


class RankLoop(WrittenLoop):
    """``averaged``: gradients over the ranks. ``alike``: weights that each started from."""

    averaged = alike = True

    def run_rank(self, folder: Path, rank: int) -> None:
        if not self.alike:
            with torch.no_grad():
                self.model.lm_head.weight.add_(1e-3 * rank)
        self.rewards = [letters]
        with record(
            folder, model=self.model, processor=self.policy.processor, reward_funcs=self.rewards,
            steps=2, probe_rewards=False,
        ):  # fmt: skip
            for step in range(2):
                one = self.rollout(5 * step + rank + 1)
                torch.autograd.backward(self.loss(one, [one]))
                for parameter in self.model.parameters() if self.averaged else ():
                    if parameter.grad is not None:
                        torch.distributed.all_reduce(parameter.grad)
                        parameter.grad /= 2
                self.optimizer.step()
                self.optimizer.zero_grad()


def joined(rank: int, port: int, loop: RankLoop, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    loop.run_rank(folder, rank)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("averaged", "alike", "cause"),
    [
        (True, True, None),
        (False, True, "step.ranks-apart"),
        (True, False, "step.ranks-unlike"),
    ],
)
def test_two_ranks(
    averaged: bool, alike: bool, cause: str | None, policy: Policy, tmp_path: Path
) -> None:
    loop = RankLoop(policy, Written())
    loop.averaged, loop.alike = averaged, alike
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # forked: a new process would spend its time importing torch and transformers
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=joined, args=(n, port, loop, tmp_path / "trace")) for n in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    cases = as_cases(read_traces(tmp_path / "trace"))
    assert [case.trace.header["ranks"] for case in cases] == ["2", "2"]
    found = [finding for case in cases for finding in diagnose(case).findings]
    broken = {finding.stage for finding in found if finding.severity == "breaks"}
    causes = {c.cause for finding in found for c in finding.causes if c.stage == "gradient"}
    assert broken == ({"gradient"} if cause else set()), found
    assert causes == ({cause} if cause else set())
