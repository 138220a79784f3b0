"""The pages that are made from the code: ``python docs/generate.py`` writes them anew.

They are committed, so that they can be read without a build; ``tests/docs`` compares.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import types as python_types
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
from docstrings import as_markdown
from markdown_parts import code, page, table
from trainers_table import trainers

import omni_grpo_core

PAGES = Path(__file__).with_name("pages")
NOTE = """```python
import torch

from omni_grpo_core import load_policy, record, tiny
from omni_grpo_core.trace.calls import AdvantageSeen, SamplesSeen

policy = load_policy(tiny.checkpoint_dir())
with record("trace/", model=policy.model, processor=policy.processor) as recorder:
    rows = ({"problem": "Which colour is the bar?"},)
    recorder.note(SamplesSeen(rows=rows, group_ids=("row-1",)))
    recorder.note(
        AdvantageSeen(
            rewards=torch.tensor([1.0, 0.0]),
            group_ids=("row-1", "row-1"),
            advantages=torch.tensor([0.707, -0.707]),
            scale="group",
            weights={"accuracy": 1.0},
            spans={},
        )
    )
```"""

FORMATS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "Settings: `omni_grpo.json`, `--config`",
        "JSON or YAML. A checkpoint folder may hold an `omni_grpo.json`; `omni-grpo check --config "
        "FILE` goes over it, and so do the `settings` of a suite or of a training run.",
        ("pipeline.settings.Settings", "core.media_config.MediaConfig"),
    ),
    (
        "Golden suite: `golden/suite.yaml`",
        "",
        ("golden.suite", "golden.suite.Suite", "golden.suite.Case"),
    ),
    (
        "Training run: `omni-grpo train run.yaml`",
        "YAML or JSON. See [Training](training.md) for a run that works.",
        (
            "training.config.TrainConfig",
            "training.config.RewardEntry",
            "rewards.endpoint.Endpoint",
            "losses.LossConfig",
            "losses.RolloutCorrection",
            "training.config.OptimizerConfig",
            "training.config.LoraConfig",
            "training.config.GuardConfig",
        ),
    ),
    (
        "Rows: `--data rows.json`",
        "JSON, JSONL, parquet, arrow, a folder of `datasets` or `hub:NAME`; in the format of "
        "HumanOmniV2, Social-IQ 2.0, TRL, ms-swift, LLaVA, OpenAI or verl. `omni-grpo data check "
        "rows.json` reads every row without a model.",
        ("core.sample.load_samples", "types.Sample", "types.MediaRef"),
    ),
    (
        "A pipeline: `omni-grpo doctor --import module:function`",
        "",
        ("recorder.pipelines",),
    ),
    (
        "`Recorder.note(value)`",
        "`record` sees what a trainer calls. Rows, advantages and losses are the trainer's own "
        "variables: a loop hands them over by `recorder.note(value)`, and the doctor then judges "
        "these stages too. `attach` does it for the trainers that it knows. A value is one of the "
        "following; the three that a loop writes itself come first.\n\n" + NOTE,
        (
            "trace.calls.SamplesSeen",
            "trace.calls.AdvantageSeen",
            "trace.calls.LossSeen",
            "trace.calls.TemplateCall",
            "trace.calls.ProcessorCall",
            "trace.calls.MediumSeen",
            "trace.calls.GenerateCall",
            "trace.calls.ForwardCall",
            "trace.calls.Modes",
            "trace.calls.RewardCall",
            "trace.calls.StepSeen",
            "trace.calls.TensorSeen",
        ),
    ),
)
"""Heading, introduction, and what documents it: modules, functions and dataclasses."""


def text_of(thing: Any) -> str:
    return as_markdown(inspect.getdoc(thing) or "")


# --------------------------------------------------------------------------- API


def api() -> str:
    """Every public name: functions first, as data walks them, then classes and errors."""
    found = {name: getattr(omni_grpo_core, name) for name in dir(omni_grpo_core)}
    kinds: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": []}
    for name, value in sorted(found.items()):
        if isinstance(value, str | python_types.ModuleType):
            continue
        if value.__module__ == "omni_grpo_core.types":
            continue  # below
        if not isinstance(value, type):
            kind = "Functions"
        else:
            kind = "Errors" if issubclass(value, Exception) else "Classes"
        kinds[kind].append(f"::: {value.__module__}.{name}")
    names = ", ".join(f"`{name}`" for name in sorted(found))
    intro = (
        f"`from omni_grpo_core import …` gives {names}. These names are stable. Each is imported "
        "when it is asked for: `import omni_grpo_core` loads neither torch nor transformers."
    )
    types = (
        "## Types\n\nWhat goes from stage to stage. Everything is frozen. The shape letters are in "
        "the [glossary](glossary.md).\n\n::: omni_grpo_core.types\n    options:\n"
        "      show_root_heading: false\n      show_root_toc_entry: false"
    )
    parts = [f"## {kind}\n\n" + "\n\n".join(lines) for kind, lines in kinds.items() if lines]
    return page("API", [intro, *parts, types])


# --------------------------------------------------------------------------- CLI


def cli() -> str:
    from omni_grpo_core.cli.main import app
    from omni_grpo_core.io import exits

    codes = re.findall(r"^(\d+) +(.+)$", exits.__doc__ or "", re.MULTILINE)
    intro = (
        "Every command takes `--json`: one object on stdout, everything else on stderr. "
        "Exit codes:\n\n" + table(("code", "meaning"), codes)
    )
    return page("CLI", [intro, *_commands("omni-grpo", typer.main.get_command(app))])


def _commands(name: str, command: Any) -> Iterable[str]:
    if command.hidden:
        return
    children = getattr(command, "commands", {})
    if not children:
        yield _command(name, command)
    for child, found in sorted(children.items()):
        yield from _commands(f"{name} {child}", found)


def _command(name: str, command: Any) -> str:
    options, words = [], []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            shown = parameter.metavar or parameter.name.upper()
            words.append(shown if parameter.required else f"[{shown}]")
            options.append((f"`{shown}`", parameter.help or "", ""))
        elif not parameter.hidden and parameter.name != "help":
            names = " / ".join([*parameter.opts, *parameter.secondary_opts])
            options.append((f"`{names}`", parameter.help or "", _default(parameter)))
    usage = " ".join([name, *words, "[OPTIONS]"])
    parts = [f"## {name}", f"```text\n{usage}\n```", as_markdown(inspect.cleandoc(command.help))]
    if options:
        parts.append(table(("", "", "default"), options))
    return "\n\n".join(parts)


def _default(parameter: Any) -> str:
    value = parameter.default
    if value is None or value is False or value == () or callable(value) or value == "":
        return ""
    if value is True:
        return f"`{parameter.opts[0]}`"
    return f"`{getattr(value, 'value', value)}`"


# --------------------------------------------------------------------------- stages


def stages() -> str:
    """Names of checks are taken from a real pass, over rows of every kind."""
    from omni_grpo_core import load_policy, load_samples, load_settings, tiny
    from omni_grpo_core.pipeline.stages import GRAPH, Values, run

    folder = tiny.checkpoint_dir()
    rows = load_samples(tiny.data_file())
    passed = run(load_policy(folder), [rows[i] for i in (0, 16)], load_settings(folder))
    checks: dict[str, list[str]] = {
        record.stage: [check.name for check in record.checks] for record in passed.trace.stages
    }
    made = get_type_hints(Values)
    lines = []
    for name, stage in GRAPH.items():
        needs = ", ".join(f"`{need}`" for need in stage.needs) or "the rows"
        if stage.beside:
            needs += "; its checks also read " + ", ".join(f"`{one}`" for one in stage.beside)
        value = code(_type(made[name]))
        lines.append((f"`{name}`", value, needs, "<br>".join(checks.get(name, []))))
    intro = (
        "One graph, used by `omni-grpo check`, by goldens and by the doctor's replay. Each stage "
        "takes frozen values and returns a new one; a check compares it with something that cannot "
        "be wrong in the same way. Stages without checks are there for the checks of others, or "
        "for goldens. The last three, `advantage`, `loss` and `gradient`, belong to a training "
        "step: [Training](training.md)."
    )
    return page(
        "Stages and checks", [intro, table(("stage", "value", "made from", "checks"), lines)]
    )


# --------------------------------------------------------------------------- faults


def faults() -> str:
    from omni_grpo_core.faults.plan import FAULTS

    by_stage: dict[str, list[tuple[str, ...]]] = {}
    for fault in FAULTS:
        story = as_markdown(fault.story)
        if fault.versions:
            story += f" transformers `{fault.versions}` only."
        by_stage.setdefault(fault.stage, []).append((f"`{fault.id}`", story, fault.source))
    ordered = sorted(by_stage, key=omni_grpo_core.types.STAGES.index)
    parts = [
        f"## {stage}\n\n{table(('cause', 'what happens', 'met in'), by_stage[stage])}"
        for stage in ordered
    ]
    intro = (
        f"{len(FAULTS)} faults that real pipelines had. `omni-grpo faults` puts each into a clean "
        "trainer, or between trainer and rollout engine (`engine.`), and sees whether the doctor "
        "blames the right stage and names the cause; `omni-grpo faults --only ID` does it for one."
    )
    return page("Faults and causes", [intro, *parts])


# --------------------------------------------------------------------------- formats


def formats() -> str:
    intro = (
        "Everything that you write or hand over. Files are read strictly: an unknown key, or a "
        "value of another type, is an error that says what was found and what was wanted."
    )
    parts = [
        "\n\n".join(
            part for part in (f"## {title}", text, _example(title), *map(_described, paths)) if part
        )
        for title, text, paths in FORMATS
    ]
    return page("File formats and contracts", [intro, *parts])


def _example(title: str) -> str:
    """What the shipped checkpoint and clips have."""
    from omni_grpo_core import tiny

    if title.startswith("Settings"):
        text = (tiny.checkpoint_dir() / "omni_grpo.json").read_text(encoding="utf-8").strip()
        return f"The shipped tiny checkpoint's:\n\n```json\n{text}\n```"
    if title.startswith("Rows"):
        rows = json.loads(tiny.data_file().read_text(encoding="utf-8"))
        text = json.dumps([rows[0], rows[3]], indent=2)
        intro = "Two of the shipped rows; the second lists its sound by itself:"
        return f"{intro}\n\n```json\n{text}\n```"
    return ""


def _described(path: str) -> str:
    try:
        thing: Any = import_module(f"omni_grpo_core.{path}")
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        thing = getattr(import_module(f"omni_grpo_core.{module}"), name)
    if not (isinstance(thing, type) and is_dataclass(thing)):
        return text_of(thing)
    hints = get_type_hints(thing, localns={"Tensor": _tensor()})
    # a suite is given its file by whoever loads it
    keys = [f for f in fields(thing) if (thing.__name__, f.name) != ("Suite", "file")]
    docs = _field_docs(thing)
    heads: tuple[str, ...] = ("key", "type", "default", "")
    rows: list[tuple[str, ...]] = [
        (f"`{f.name}`", code(_type(hints[f.name])), _field_default(f), docs.get(f.name, ""))
        for f in keys
    ]
    if not docs:
        heads, rows = heads[:3], [row[:3] for row in rows]
    return f"### {thing.__name__}\n\n{text_of(thing)}\n\n" + table(heads, rows)


def _field_docs(thing: type) -> dict[str, str]:
    """The string that stands below each field in the source."""
    (made,) = ast.parse(inspect.cleandoc(inspect.getsource(thing))).body
    assert isinstance(made, ast.ClassDef)
    return {
        ast.unparse(entry.target): as_markdown(inspect.cleandoc(after.value.value))
        for entry, after in pairwise(made.body)
        if isinstance(entry, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


def _tensor() -> Any:
    from torch import Tensor

    return Tensor


def _type(hint: Any) -> str:
    """As it is written in the code: choices written out, modules left away."""
    if hint is type(None):
        return "None"
    arguments = get_args(hint)
    origin = getattr(hint, "__origin__", None)
    if isinstance(hint, python_types.UnionType) or str(origin) == "typing.Union":
        return " | ".join(map(_type, arguments))
    if str(origin) == "typing.Literal":
        return " | ".join(map(repr, arguments))
    name = getattr(origin or hint, "__name__", str(hint))
    if not arguments:
        return name
    return f"{name}[{', '.join('…' if one is ... else _type(one) for one in arguments)}]"


def _field_default(entry: Field[Any]) -> str:
    value = entry.default
    if entry.default_factory is not MISSING:
        value = entry.default_factory()
        if is_dataclass(value):
            return "its defaults"
    if value is MISSING:
        return "required"
    return f"`{value!r}`"


MADE: dict[str, Callable[[], str]] = {
    "api.md": api,
    "cli.md": cli,
    "stages.md": stages,
    "faults.md": faults,
    "formats.md": formats,
    "trainers.md": trainers,
}

if __name__ == "__main__":
    for name, make in MADE.items():
        (PAGES / name).write_text(make(), encoding="utf-8")
