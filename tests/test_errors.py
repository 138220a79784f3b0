"""The tree of errors is as its docstring shows it, and each message has all five fields."""

from __future__ import annotations

import pickle

import pytest

from omni_grpo_core import errors
from omni_grpo_core.errors import ConfigError, MissingExtra, OmniGrpoError
from omni_grpo_core.types import STAGES


def public_errors() -> list[type[OmniGrpoError]]:
    return [
        value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, OmniGrpoError) and not name.startswith("_")
    ]


LEAVES = [kind for kind in public_errors() if kind is not OmniGrpoError]


def test_the_module_has_no_class_outside_the_tree() -> None:
    classes = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert classes == set(public_errors())


STAGED = [kind for kind in LEAVES if kind is not MissingExtra]


def test_a_missing_extra_is_a_config_error_and_an_import_error() -> None:
    assert MissingExtra.__bases__ == (ConfigError, ImportError)


@pytest.mark.parametrize("kind", STAGED)
def test_every_other_error_derives_directly_from_the_root_and_has_its_own_stage(
    kind: type[OmniGrpoError],
) -> None:
    assert kind.__bases__ == (OmniGrpoError,)
    assert kind.stage in STAGES
    assert [other for other in STAGED if other.stage == kind.stage] == [kind]


@pytest.mark.parametrize("kind", public_errors())
def test_the_message_says_stage_item_got_want_and_fix(kind: type[OmniGrpoError]) -> None:
    error = kind("row 7", got="no answer", want="one answer", fix="add it")
    assert str(error) == f"{kind.stage}: row 7: found no answer, wanted one answer; add it"


@pytest.mark.parametrize("kind", public_errors())
def test_an_error_survives_pickling(kind: type[OmniGrpoError]) -> None:
    error = kind("row 7", got="no answer", want="one answer", fix="add it")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert (copy.item, copy.got, copy.want, copy.fix) == (
        "row 7",
        "no answer",
        "one answer",
        "add it",
    )


def test_the_fields_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        OmniGrpoError("row 7", "no answer", "one answer", "add it")  # type: ignore[call-arg]
