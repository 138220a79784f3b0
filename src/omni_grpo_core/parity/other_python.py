"""The other half of :func:`~omni_grpo_core.parity.run.run_in`: ``-m … REQUEST.json`` runs one path
in this Python and stores its traces."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from omni_grpo_core.io.console import quiet_libraries, quiet_transformers
from omni_grpo_core.io.strict import merge
from omni_grpo_core.parity.run import Task, run_path, save_traces
from omni_grpo_core.pipeline.settings import Settings


def main(request: Path) -> None:
    asked: dict[str, Any] = json.loads(request.read_text(encoding="utf-8"))
    processor, root = (asked[key] and Path(asked[key]) for key in ("processor", "root"))
    task = Task(
        checkpoint=Path(asked["checkpoint"]),
        data=Path(asked["data"]),
        settings=merge(Settings(), asked["settings"], str(request)),
        processor=processor,
        root=root,
        format=asked["format"],
        limit=asked["limit"],
    )
    traces = run_path(asked["path"], task.setup(), task.samples())
    save_traces(traces, Path(asked["into"]))


if __name__ == "__main__":
    quiet_libraries()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    quiet_transformers()
    main(Path(sys.argv[1]))
