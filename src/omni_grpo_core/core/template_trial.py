"""Runs a chat template once where it can do no harm. A part of ``policy.py``.

A template is a program that comes with the weights. transformers' sandbox keeps it from files and
from ``range(10**9)``, but not from nested loops or ``"x" * 10**10``. So it is run once, in its own
process with limited time and memory, on a conversation with every mix of media. The texts are
random, so that no template can recognise them. One that goes by something else (the number of
media, the clock) can still behave here and misbehave later: real rendering has no time limit.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations

from omni_grpo_core.types import MODALITIES

CPU_SECONDS = 3
"""A published template takes a thousandth of a second."""
BYTES = 1 << 29
MOST = 1 << 20
"""Most characters of a rendered conversation of two short turns."""

_TRIAL = r"""
import json, resource, sys
job = json.load(sys.stdin.buffer)
resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"]))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from datetime import datetime
from jinja2 import nodes, ext
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
resource.setrlimit(resource.RLIMIT_AS, (job["bytes"], job["bytes"]))

class Generation(ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def refuse(message):
    raise TemplateError(message)

environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
environment.filters["tojson"] = lambda x, **given: json.dumps(
    x, **{"ensure_ascii": False, **given})
environment.globals["raise_exception"] = refuse
environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
faults = []
for messages in job["conversations"]:
    try:
        text = environment.from_string(job["template"]).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True)
    except BaseException as error:
        # the first has every medium; a template may fail on fewer
        if not faults or isinstance(error, MemoryError):
            faults.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])
    else:
        faults.append(f"{len(text)} characters" if len(text) > job["most"] else "")
sys.stdout.buffer.write(json.dumps(next(filter(None, faults), "")).encode())
"""


def _conversation(media: Iterable[str]) -> list[dict[str, object]]:
    """A short conversation with random text."""
    system, file, question = (secrets.token_hex(4) for _ in range(3))
    return [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {
            "role": "user",
            "content": [
                *({"type": kind, kind: file} for kind in media),
                {"type": "text", "text": f"{question}?"},
            ],
        },
    ]


@lru_cache
def template_fault(template: str) -> str:
    """What is wrong with a template, or ``""``."""
    mixes = (mix for count in (3, 2, 1, 0) for mix in combinations(MODALITIES, count))
    job = {
        "template": template, "conversations": [_conversation(mix) for mix in mixes],
        "seconds": CPU_SECONDS, "bytes": BYTES, "most": MOST,
    }  # fmt: skip
    # bytes both ways: the other process may use another encoding (PYTHONIOENCODING)
    done = subprocess.run(
        [sys.executable, "-P", "-c", _TRIAL],
        input=json.dumps(job).encode(), capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return f"more than {CPU_SECONDS} s or {BYTES >> 20} MiB to render two short turns"
    return str(json.loads(done.stdout))
