"""What the passes of one step share about its prompts: positions, and features of frozen towers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.family import published_name
from omni_grpo_core.core.forward import positions
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.towers import Features, features
from omni_grpo_core.fast.attention import windows
from omni_grpo_core.types import MODALITIES, Batch, Modality, Positions, Row

_TOWERS = ("visual.", "audio_tower.")


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """Kept for each row as long as it exists, at most until the next rollout: towers and positions
    are computed once for sampling, for the reference and for the update."""

    policy: Policy
    _rows: WeakKeyDictionary[Row, tuple[Positions, dict[Modality, Features] | None]] = field(
        default_factory=WeakKeyDictionary, repr=False
    )

    def forget(self) -> None:
        self._rows.clear()

    def positions(self, batch: Batch) -> Positions:
        """As :func:`~omni_grpo_core.core.forward.positions` gives them."""
        known = [self._known(row)[0] for row in batch.rows]
        ids = torch.ones(3, *batch.input_ids.shape, dtype=known[0].position_ids.dtype)
        for index, (row, pad) in enumerate(zip(known, batch.pads, strict=True)):
            ids[:, index, pad:] = row.position_ids[:, 0, -(batch.input_ids.shape[1] - pad) :]
        return Positions(ids, torch.cat([row.deltas for row in known]))

    def features(self, batch: Batch) -> dict[Modality, Features] | None:
        """The towers' features for a batch, in token order; ``None`` while something in the towers
        learns: each pass then needs its own."""
        rows = [self._known(row)[1] for row in batch.rows]
        if not self.frozen or any(row is None for row in rows):
            return None
        by_modality = {m: [row[m] for row in rows if row and m in row] for m in MODALITIES}
        return {modality: _joined(parts) for modality, parts in by_modality.items() if parts}

    @property
    def frozen(self) -> bool:
        """Whether nothing in the towers learns."""
        return not any(
            parameter.requires_grad
            for name, parameter in self.policy.model.named_parameters()
            if published_name(name).startswith(_TOWERS)
        )

    def _known(self, row: Row) -> tuple[Positions, dict[Modality, Features] | None]:
        if row not in self._rows:
            alone = collate([row], self.policy.pad_token_id)
            found = None
            if self.frozen:
                with torch.no_grad(), windows(self.policy.model):
                    found = features(self.policy, alone)
            self._rows[row] = positions(self.policy, alone), found
        return self._rows[row]


def _joined(parts: Sequence[Features]) -> Features:
    layers = zip(*(part.deep for part in parts), strict=True)
    return Features(
        torch.cat([part.tokens for part in parts]), tuple(torch.cat(layer) for layer in layers)
    )
