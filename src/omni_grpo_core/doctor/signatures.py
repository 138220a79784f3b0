"""Causes recognised by one kind of evidence: a table of them is a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omni_grpo_core.doctor.evidence import Case, Evidence, Explanation, Rule, note_missing
from omni_grpo_core.types import STAGES, Stage


def _always(evidence: Evidence) -> bool:
    return True


Prove = Callable[[Case, Evidence], str]
"""The sentence of a proof that this evidence comes from a signature's cause, or ``""``."""


def observed(case: Case, evidence: Evidence) -> str:
    """The evidence is itself the cause: a keyword, a flag, an exception's text."""
    return evidence.sentence


def only_fits(case: Case, evidence: Evidence) -> str:
    """Other causes may leave the same evidence."""
    return ""


def alone(case: Case, evidence: Evidence) -> str:
    """It is reproduced by one kind of change and by no other, as its values say."""
    return evidence.sentence if evidence.values.get("alone", True) else ""


@dataclass(frozen=True, slots=True)
class Signature:
    """``fact``, where ``when`` is true, is explained by ``cause``. ``harm``, ``fix`` and
    ``confirm`` may refer to the evidence's ``{values}`` by name. ``prove``: tests the cause on the
    recording."""

    cause: str
    fact: str
    harm: str
    fix: str
    confirm: str = ""
    prove: Prove = observed
    when: Callable[[Evidence], bool] = field(default=_always)


def rule_of(name: str, table: Sequence[Signature]) -> Rule:
    """A rule that tries every signature on every piece of evidence that was not inherited."""

    def rule(case: Case, evidence: Sequence[Evidence]) -> Iterator[Explanation]:
        for signature in table:
            found = [
                item
                for item in evidence
                if item.fact == signature.fact
                and item.origin != "inherited"
                and signature.when(item)
            ]
            if found:
                yield _explained(case, signature, found)

    rule.__name__ = name
    rule.causes = tuple(signature.cause for signature in table)  # type: ignore[attr-defined]
    return rule


PREFIXES: Mapping[Stage, str] = {
    **{stage: stage for stage in STAGES},
    "conversation": "conv",
    "embeddings": "embed",
    "positions": "pos",
    "completion": "gen",
    "advantage": "adv",
    "gradient": "step",
}
"""The first part of a stage's cause ids."""


def reproduced(name: str) -> Callable[[Evidence], bool]:
    """Whether evidence is a value that a change of this name reproduces."""
    return lambda evidence: name in evidence.values.get("reproduced", ())


def rule_of_reproductions(*tables: Sequence[Signature]) -> Rule:
    """A rule that names what was reproduced (``values`` as ``reproduce.plain`` gives them) and has
    no story in ``tables``."""

    def causes_reproduced(case: Case, evidence: Sequence[Evidence]) -> Iterator[Explanation]:
        for item in evidence:
            known = any(
                signature.fact == item.fact and signature.when(item)
                for table in tables
                for signature in table
            )
            if known or item.origin == "inherited":
                continue
            for name in item.values.get("reproduced", ()):
                yield Explanation(
                    cause=f"{PREFIXES[item.stage]}.{name}",
                    stage=item.stage,
                    seen=item.sentence,
                    harm="the model does not get what the data and the settings say",
                    fix="find what does this between the reference's value and the recorded one, "
                    "and remove it",
                    confirm="record a step again: the two are equal",
                    proof=item.sentence,
                    explains=(item,),
                )

    return causes_reproduced


def _explained(case: Case, signature: Signature, found: Sequence[Evidence]) -> Explanation:
    first = found[0]
    values = _Values(first.values)
    others = len({(item.row, item.sentence) for item in found}) - 1
    more = f" (and {others} more like it)" if others else ""
    return Explanation(
        cause=signature.cause,
        stage=first.stage,
        seen=first.sentence + more,
        harm=signature.harm.format_map(values),
        fix=signature.fix.format_map(values),
        confirm=signature.confirm.format_map(values),
        proof=_proof(case, signature, first),
        explains=tuple(found),
    )


def _proof(case: Case, signature: Signature, evidence: Evidence) -> str:
    try:
        return signature.prove(case, evidence)
    except Exception as error:  # an unusual recording: the cause fits, and is not proved
        why = f"({type(error).__name__}: {error})"
        note_missing(case, f"the test of {signature.cause} failed on this recording {why}")
        return ""


class _Unknown(str):
    """A value that was not recorded, in any format."""

    def __format__(self, spec: str) -> str:
        return str(self)


class _Values(dict[str, Any]):
    """A value that was not recorded is shown as unknown instead of raising KeyError."""

    def __missing__(self, key: str) -> _Unknown:
        return _Unknown(f"({key} unknown)")
