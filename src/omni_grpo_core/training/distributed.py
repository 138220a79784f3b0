"""The processes of a run, through Accelerate: one, data-parallel, or sharded by FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from omni_grpo_core.errors import ConfigError, OmniGrpoError, one_line
from omni_grpo_core.io.extras import extra
from omni_grpo_core.training.config import TrainConfig
from omni_grpo_core.training.launcher import check_launcher, is_on
from omni_grpo_core.training.sharding import mixed_precision, whole, whole_after_backward

with extra("train"):
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import PartialState
    from accelerate.utils import (
        DistributedType,
        FullyShardedDataParallelPlugin,
        ProjectConfiguration,
        gather_object,
    )

T = TypeVar("T")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate as the launcher configured it.

    On CPU Accelerate silently ignores FSDP; it is enabled here, over gloo. Raises ``ConfigError``
    as :func:`~omni_grpo_core.training.launcher.check_launcher` does, and for what Accelerate cannot
    read.
    """
    check_launcher(os.environ)
    sharding = None
    if is_on(os.environ, "ACCELERATE_USE_FSDP"):
        # what Accelerate derives from its own setting would round what the scorer returns, and the
        # sums of gradients; each process reads the weights itself
        try:
            sharding = FullyShardedDataParallelPlugin(
                mixed_precision_policy=mixed_precision(config.precision),
                cpu_ram_efficient_loading=False,
            )
        except (LookupError, ValueError) as error:
            raise ConfigError(
                "accelerate configuration",
                got=f"fsdp_config with {one_line(error)}",
                want="values that Accelerate takes",
                fix="correct it: under version 2 fsdp_reshard_after_forward is true or false, not "
                "FULL_SHARD",
            ) from error
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="bf16" if config.precision == "bfloat16" else "no",
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(project_dir=config.out),
        fsdp_plugin=sharding,
        # a micro-batch without sound leaves the audio tower without a gradient
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if sharding is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = sharding
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


class AccelerateDistributed:
    """:class:`~omni_grpo_core.training.step.Distributed` through Accelerate."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    @property
    def world(self) -> int:
        return int(self._accelerator.num_processes)

    @property
    def main(self) -> bool:
        return bool(self._accelerator.is_main_process)

    @property
    def keeps_whole(self) -> bool:
        """Whether weights that are gathered for sampling stay so for the update."""
        if self._accelerator.distributed_type != DistributedType.FSDP:
            return False
        return self._accelerator.state.fsdp_plugin.reshard_after_forward is False

    def agree(self, action: Callable[[], T], *, main_only: bool = False) -> T:
        outcomes: list[tuple[T | None, OmniGrpoError | OSError | None]] = []
        if self.main or not main_only:
            try:
                outcomes = [(action(), None)]
            except (OmniGrpoError, OSError) as error:
                outcomes = [(None, error)]
        outcomes = self.gather(outcomes)
        for _, failed in outcomes:
            if failed is not None:
                raise failed
        return cast(T, outcomes[0][0])

    def gather(self, items: Sequence[T]) -> list[T]:
        gathered: list[T] = gather_object(list(items))
        return gathered

    def sum(self, numbers: Tensor) -> Tensor:
        summed: Tensor = self._accelerator.reduce(numbers.to(self._accelerator.device), "sum")
        return summed.cpu()

    def backward(self, loss: Tensor) -> None:
        # Accelerate's divides by its own setting of accumulation steps
        loss.backward()  # type: ignore[no-untyped-call]

    def unsynced(self, model: nn.Module) -> AbstractContextManager[Any]:
        if self.keeps_whole:
            return whole_after_backward(model)
        if self._accelerator.distributed_type == DistributedType.FSDP:
            # whole gradients on each process are more than it has memory for
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.no_sync(model)
        return context

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        norm: Any = self._accelerator.clip_grad_norm_(parameters, max_norm)
        return float(whole(norm)) if isinstance(norm, Tensor) else float(norm)
