"""A look at the model itself: does it work with the checkpoint's own settings."""

from __future__ import annotations

from collections.abc import Iterator

from omni_grpo_core.doctor.evidence import Case, Evidence, Look
from omni_grpo_core.recorder.thinker import rope_sections


def look_rope(case: Case) -> Iterator[Evidence]:
    """The rope sections in force are those of the checkpoint."""
    told = case.trace.header.get("rope_sections")
    if told is None or case.reference is None:
        return
    body = case.reference.policy.model.model
    wanted = rope_sections(getattr(body, "language_model", body))
    if told != wanted:
        yield Evidence(
            "policy",
            "rope-sections-differ",
            f"the model rotates positions by the sections [{told or 'none'}], the checkpoint was "
            f"trained with [{wanted}]",
            values={"got": told, "want": wanted},
        )


LOOKS: tuple[Look, ...] = (look_rope,)
