"""``attach``: record a trainer through its own objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.recorder.adapters import ADAPTERS
from omni_grpo_core.recorder.adapters.adapter import part
from omni_grpo_core.recorder.record import Recorder, record
from omni_grpo_core.recorder.step_buffer import Bounds
from omni_grpo_core.recorder.trainer_watch import TrainerWatch, settings_of


def attach(
    trainer: Any,
    folder: str | Path,
    *,
    steps: int = 3,
    probe_rewards: bool = True,
    max_tensor_bytes: int = Bounds().tensor_bytes,
    max_step_bytes: int = Bounds().step_bytes,
) -> Recorder:
    """Record the next ``steps`` steps of a GRPO trainer: what
    :func:`~omni_grpo_core.recorder.record.record` sees, plus rows, advantages and losses::

        attach(trainer, "trace/")
        trainer.train()

    What the trainer was recognised as is logged, and noted in the recording. Of a trainer of no
    known family, and of any object with a model and a processor, only what ``record`` sees is kept.
    The recorder is returned started. It stops by itself after the last step, or when
    ``trainer.train`` returns or raises.

    Raises:
        ConfigError: there is no model or no processor; pass them to ``record``.
    """
    adapter = next((adapter for adapter in ADAPTERS if adapter.fits(trainer)), None)
    if adapter is None:
        raise ConfigError(
            "trainer",
            got=f"a {type(trainer).__name__} without a model and a processor",
            want="a trainer with both, such as TRL's GRPOTrainer",
            fix="pass its model, processor and reward functions to omni_grpo_core.record",
        )
    recorder = record(
        folder,
        model=part(trainer, adapter.model),
        processor=part(trainer, adapter.processor),
        reward_funcs=part(trainer, adapter.reward_funcs) or (),
        steps=steps,
        probe_rewards=probe_rewards,
        settings=settings_of(trainer),
        max_tensor_bytes=max_tensor_bytes,
        max_step_bytes=max_step_bytes,
    )
    recorder.trainer = adapter.recognised(trainer)
    recorder.watch(TrainerWatch(trainer, adapter, recorder.buffer, recorder.stop))
    return recorder.start()
