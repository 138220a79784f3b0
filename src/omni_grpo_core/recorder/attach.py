"""``attach``: record a trainer through its own objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.recorder.record import Recorder, record
from omni_grpo_core.recorder.step_buffer import Bounds
from omni_grpo_core.recorder.trainer_watch import Style, TrainerWatch, settings_of

OPEN_R1 = Style(
    name="open-r1",
    loss="compute_loss",
    scores="_get_per_token_logps",
    whole=True,
    partial="patial_advantages",
)


TRL = Style(
    name="trl",
    loss="_compute_loss",
    scores="_get_per_token_logps_and_entropies",
    whole=False,
)


STYLES = (TRL, OPEN_R1)
"""The first that fits the trainer is used."""


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

    The recorder is returned started. It stops by itself after the last step, or when
    ``trainer.train`` returns or raises.

    Raises:
        ConfigError: the trainer is of no known style; pass its objects to ``record``.
    """
    style = next((style for style in STYLES if style.fits(trainer)), None)
    if style is None:
        raise ConfigError(
            "trainer",
            got=f"a {type(trainer).__name__} without "
            + " or ".join(f"{style.rollout} and {style.loss}" for style in STYLES),
            want="TRL's GRPOTrainer, or a trainer of the open-r1-multimodal family",
            fix="pass its model, processor and reward functions to omni_grpo_core.record",
        )
    recorder = record(
        folder,
        model=trainer.model,
        processor=_processor_of(trainer),
        reward_funcs=getattr(trainer, "reward_funcs", ()),
        steps=steps,
        probe_rewards=probe_rewards,
        settings=settings_of(trainer),
        max_tensor_bytes=max_tensor_bytes,
        max_step_bytes=max_step_bytes,
    )
    recorder.watch(TrainerWatch(trainer, style, recorder.buffer, recorder.stop))
    return recorder.start()


def _processor_of(trainer: Any) -> Any:
    """The one that takes media: ms-swift's trainer has a tokenizer as its processing class, and the
    processor in its template.

    >>> from types import SimpleNamespace as Trainer
    >>> swift = Trainer(processing_class="tokenizer", template=Trainer(processor="processor"))
    >>> _processor_of(swift), _processor_of(Trainer(processing_class="processor"))
    ('processor', 'processor')
    """
    own = trainer.processing_class
    inner = getattr(getattr(trainer, "template", None), "processor", None)
    has_parts = getattr(own, "tokenizer", None) is not None
    return own if inner is None or has_parts else inner
