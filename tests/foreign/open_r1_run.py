"""Trains a few steps with a published open-r1 checkout, in a process of its own: the checkouts
share a package's name. ``python open_r1_run.py SETUP.json``; see :class:`Setup`.

Writes ``trace`` and, to compare runs, ``kept-RANK.json``: losses, ids that were scored, a hash of
the weights.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_r1_stubs

SOURCES = {
    "humanomni": "src/open-r1-multimodal/src",
    "vlm-r1": "src/open-r1-multimodal/src",
    "r1-v": "src/r1-v/src",
}
"""Where a checkout has its package."""


@dataclass(frozen=True)
class Setup:
    """``trainer``: a key of ``SOURCES``. ``by``: ``"record"``, the README's two lines,
    ``"attach"``, or ``"nothing"``. ``plants``: names of mistakes in ``open_r1_plants``."""

    trainer: str
    checkout: str
    folder: str
    by: str = "record"
    plants: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ()
    flags: dict[str, Any] = field(default_factory=dict)


def main(setup: Setup) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(Path(setup.checkout) / SOURCES[setup.trainer]))
    open_r1_stubs.install()
    import torch

    torch.set_num_threads(1)
    folder = Path(setup.folder)

    def wrap(trainer: type) -> type:
        return recorded(trainer, setup, folder)

    if setup.trainer == "humanomni":
        import open_r1_humanomni as runs
    else:
        import open_r1_pictures as runs  # type: ignore[no-redef]
    runs.run(folder, wrap, setup.rewards or runs.REWARDS, **setup.flags)


def recorded(base: Any, setup: Setup, folder: Path) -> type:
    """The trainer with what a user writes around ``train``."""
    import open_r1_plants

    from omni_grpo_core import attach, record

    class Recorded(base):  # type: ignore[misc]
        def train(self, *given: Any, **more: Any) -> Any:
            self.scored: list[Any] = []
            with ExitStack() as stack:
                for name in setup.plants:
                    stack.enter_context(open_r1_plants.PLANTS[name](self))
                if setup.by == "attach":
                    attach(self, folder / "trace")
                elif setup.by == "record":
                    stack.enter_context(
                        record(
                            folder / "trace", model=self.model, processor=self.processing_class,
                            reward_funcs=self.reward_funcs,
                        )
                    )  # fmt: skip
                result = super().train(*given, **more)
            kept = {
                "losses": [log["loss"] for log in self.state.log_history if "loss" in log],
                "scored": self.scored,
                "weights": digest(self.model),
            }
            rank = os.environ.get("RANK", "0")
            (folder / f"kept-{rank}.json").write_text(json.dumps(kept), encoding="utf-8")
            return result

        def _get_per_token_logps(self, model: Any, ids: Any, *given: Any, **more: Any) -> Any:
            self.scored.append(ids.tolist())
            return super()._get_per_token_logps(model, ids, *given, **more)

        def save_model(self, *given: Any, **more: Any) -> None:
            """Is not needed."""

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            # transformers 4.57 passes the data set
            sampler = super()._get_train_sampler
            return sampler(dataset) if inspect.signature(sampler).parameters else sampler()

    Recorded.__name__ = base.__name__
    return Recorded


def digest(model: Any) -> str:
    held = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        held.update(name.encode() + weight.detach().float().numpy().tobytes())
    return held.hexdigest()


if __name__ == "__main__":
    main(Setup(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
