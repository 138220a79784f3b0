"""A chat template, tried out where it can do no harm. A part of ``policy.py``.

A template is a program that comes with the weights. transformers' sandbox keeps it from files and
from ``range(10**9)``, not from loops within loops nor from ``"x" * 10**10``. So it is run once, in
a process of its own with little time and memory, on a conversation of every mix of media. Their
texts are drawn, so that no template knows them by that. One that goes by what is left (how many
there are of a kind, the clock) can still do well here and badly later: the time of a real rendering
is not limited.
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
"""A published template takes a thousandth of one."""
BYTES = 1 << 29
MOST = 1 << 20
"""Characters of a rendered conversation of two short turns."""

_TRIAL = r"""
import json, resource, sys
told = json.load(sys.stdin.buffer)
resource.setrlimit(resource.RLIMIT_CPU, (told["seconds"], told["seconds"]))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from datetime import datetime
from jinja2 import nodes, ext
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
resource.setrlimit(resource.RLIMIT_AS, (told["bytes"], told["bytes"]))

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
for messages in told["conversations"]:
    try:
        text = environment.from_string(told["template"]).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True)
    except BaseException as error:
        # the first has every medium; that a template is not made for fewer is no fault
        if not faults or isinstance(error, MemoryError):
            faults.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])
    else:
        faults.append(f"{len(text)} characters" if len(text) > told["most"] else "")
sys.stdout.buffer.write(json.dumps(next(filter(None, faults), "")).encode())
"""


def _conversation(media: Iterable[str]) -> list[dict[str, object]]:
    """A short one that nobody saw before."""
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
def fault_of(template: str) -> str:
    """What is wrong with a template, or nothing."""
    mixes = (mix for count in (3, 2, 1, 0) for mix in combinations(MODALITIES, count))
    told = {
        "template": template, "conversations": [_conversation(mix) for mix in mixes],
        "seconds": CPU_SECONDS, "bytes": BYTES, "most": MOST,
    }  # fmt: skip
    # bytes both ways: the other process may have been told another encoding (PYTHONIOENCODING)
    done = subprocess.run(
        [sys.executable, "-P", "-c", _TRIAL],
        input=json.dumps(told).encode(), capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return f"more than {CPU_SECONDS} s or {BYTES >> 20} MiB to render two short turns"
    return str(json.loads(done.stdout))
