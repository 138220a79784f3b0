"""The catalogue as a list, and a check that each fault changes what a recorder sees."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from omni_grpo_core.faults.boundary import BoundaryFault
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.fault import Fault
from omni_grpo_core.faults.makes import MAKES, Make
from omni_grpo_core.faults.plan import BY_ID, FAULTS, fault_tasks, makes_of
from omni_grpo_core.faults.seams import Loop
from omni_grpo_core.faults.trial import config_for, recorded, reference
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.trace.calls import RewardCall
from omni_grpo_core.trace.codec import equal
from omni_grpo_core.types import STAGES

QUICK = {
    ("text.role-typo", "buffered"),
    ("batch.audios-kwarg", "per-prompt"),
    ("batch.silent-clip", "reference"),
    ("pos.no-mask", "per-prompt"),
    ("logits.cache-differs", "buffered"),
    ("reward.option-format", "experience"),
    ("loss.shift", "reference"),
}
"""In the default run; the others, a second or two each, are slow tests."""
OF_LOOPS = [fault for fault in FAULTS if not isinstance(fault, BoundaryFault)]
"""Without those between trainer and engine."""


def test_ids_are_unique_and_there_are_enough() -> None:
    counts = Counter(fault.id for fault in FAULTS)
    assert not [name for name, count in counts.items() if count > 1]
    assert len(FAULTS) >= 120


def test_every_fault_has_a_story_and_a_source() -> None:
    for fault in FAULTS:
        assert fault.stage in STAGES
        assert fault.story.endswith(".")
        assert fault.source
        assert set(fault.needs) <= set(LoopConfig.__dataclass_fields__), fault.id
        assert all(fault.lacking.values()), fault.id
        assert all(fault.accepted.values()), fault.id


def test_every_fault_can_be_planted_in_three_loops_of_different_make() -> None:
    shapes = {fault.id: {make.shape for make in makes_of((fault,))} for fault in OF_LOOPS}
    assert {id: of for id, of in shapes.items() if len(of) < 3} == {}


def test_a_fault_of_the_boundary_is_planted_in_a_run_and_before_parity_where_it_is_of_input() -> (
    None
):
    places = {
        fault.id: {task.loop for task in fault_tasks([fault])}
        for fault in FAULTS
        if fault not in OF_LOOPS
    }
    both = {"engine.images-only", "engine.audio-dropped", "engine.expanded-twice", "engine.resized"}
    assert len(places) == 10
    assert {id for id, loops in places.items() if loops == {"engine", "parity"}} == both
    assert {id for id, loops in places.items() if loops == {"engine"}} == {*places} - both


def test_a_fault_of_the_notes_is_planted_where_there_are_notes() -> None:
    of = {fault.id: [make.name for make in makes_of((fault,))] for fault in FAULTS}
    assert of["loss.hidden-beta"] == ["reference", "per-prompt-noted", "buffered-noted"]
    assert of["loss.sign"] == ["reference", "per-prompt", "buffered", "experience"]
    assert of["pos.expanded-wrong"] == ["reference", "buffered", "experience"]


def test_every_stage_that_a_recorder_sees_has_faults() -> None:
    blamed = {fault.stage for fault in FAULTS}
    assert blamed >= {
        "conversation", "text", "media", "batch", "embeddings", "positions", "logits",
        "completion", "reward", "advantage", "loss", "gradient",
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@cache
def _clean(config: LoopConfig, steps: int, folder: Path, make: Make) -> list[Any]:
    fault = Fault("none", "sample", "", "", lambda loop: loop.replaced(), steps=steps)
    return _values(fault, config, folder, make)


def _values(
    fault: Fault, config: LoopConfig, folder: Path, make: Make = MAKES["reference"]
) -> list[Any]:
    here = folder / f"{fault.id}-{len(list(folder.iterdir()))}"
    traces, raised = recorded((fault,), config, here, make)
    assert (raised is not None) == fault.stops, raised
    return [record.value for _, trace in traces for record in trace.stages]


@pytest.mark.parametrize(
    ("fault", "make"),
    [
        pytest.param(
            fault,
            make,
            id=f"{fault.id}-{make.name}",
            marks=() if (fault.id, make.name) in QUICK else pytest.mark.slow,
        )
        for fault in FAULTS
        for make in makes_of((fault,))
    ],
)
def test_an_injected_loop_is_recorded_differently_from_a_clean_one(
    fault: Fault, make: Make, folder: Path
) -> None:
    if fault.absent:
        pytest.skip(fault.absent)
    config = config_for((fault,), make.config)
    assert config is not None
    clean = _clean(config, fault.steps, folder, make)
    faulty = _values(fault, config, folder, make)
    if fault.stage == "reward":
        # replacing the function alone does no harm: it must also pay differently
        assert _pay(faulty) != _pay(clean)
    else:
        assert len(clean) != len(faulty) or not all(map(equal, clean, faulty))


def _pay(values: list[Any]) -> list[Any]:
    """What each reward function pays, in the step and when it is probed; NaN as text."""
    calls = [value for value in values if isinstance(value, RewardCall)]
    paid = [
        (
            [str(value) for value in call.values],
            [(str(case["value"]), str(case["alone"])) for case in call.probe.values()],
        )
        for call in calls
    ]
    # a judge reward cannot be probed; a clean loop has none that pays nothing to anyone
    return sorted(paid, key=str)


def test_the_same_recording_twice_is_the_same(folder: Path) -> None:
    fault = Fault("again", "sample", "", "", lambda loop: loop.replaced())
    config = LoopConfig()
    # the first opens clips that are kept open afterwards
    _, one, other = (_values(fault, config, folder) for _ in range(3))
    assert len(one) == len(other)
    assert all(map(equal, one, other))


@pytest.mark.parametrize(
    ("fault", "make"),
    [
        # each fault in one loop by turns
        pytest.param(fault, makes_of((fault,))[place % 3], id=fault.id)
        for place, fault in enumerate(OF_LOOPS)
    ],
)
def test_everything_is_restored_even_after_an_error(fault: Fault, make: Make) -> None:
    config = config_for((fault,), make.config)
    assert config is not None
    loop = make.build(reference(config.dtype).policy, config)
    before = _state(loop)

    def broken() -> None:
        # no deprecation warnings either: the user did not set what is set and reset here
        with warnings.catch_warnings(action="error", category=FutureWarning), fault.inject(loop):
            raise KeyError(fault.id)

    with pytest.raises(KeyError, match=fault.id):
        broken()
    assert _state(loop) == before


def _state(loop: Loop) -> dict[str, Any]:
    """What a fault could leave behind: attributes of the loop, its processor and its model."""
    thinker = loop.thinker
    text = thinker.config.get_text_config()
    return {
        "loop": {name: id(value) for name, value in vars(loop).items()},
        "processor": {name: id(value) for name, value in vars(loop.processor).items()},
        "thinker": set(vars(thinker)),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in thinker.modules()),
        "learning": [p.requires_grad for p in loop.model.parameters()],
        "training": [m.training for m in loop.model.modules()],
        "sections": str(getattr(text, "rope_parameters", None)),
        "eos": thinker.generation_config.eos_token_id,
    }


def test_a_seam_that_has_gone_is_an_error() -> None:
    class Owner:
        there = 1

    with pytest.raises(AttributeError, match="gone"), patched(Owner(), gone=2):
        pass


def test_nested_faults_are_undone_in_reverse_order() -> None:
    class Owner:
        value = 0

    owner = Owner()
    with patched(owner, value=1):
        with patched(owner, value=2):
            assert owner.value == 2
        assert owner.value == 1
    assert owner.value == 0
    assert vars(owner) == {}


def test_conflicting_needs_make_no_pair() -> None:
    assert config_for((BY_ID["conv.silent-no-audio"], BY_ID["batch.truncated-left"])) is None
    both = config_for((BY_ID["loss.clip-side"], BY_ID["logits.low-precision"]))
    assert both is not None
    assert both.iterations == 2
