"""Can garbage earn this reward? The same checks for any reward function.

Garbage earns the floor, gold the top, a trick gains nothing, permuting the rows permutes the
values, a batch equals its rows one by one, hostile text raises nothing, time grows linearly.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from omni_grpo_core.io.extras import require
from omni_grpo_core.rewards.accuracy import PACKAGES, Accuracy
from omni_grpo_core.rewards.call import RewardFunction, values_of
from omni_grpo_core.rewards.corpus import RewardCase, corpus
from omni_grpo_core.rewards.parse import render

Check = Literal[
    "callable", "exception", "value", "garbage", "gold", "trick", "permutation", "batch", "linear"
]

_SAME = 1e-9  # a batch on a GPU may sum in a different order than a single row
_FIRST_SIZE, _LAST_SIZE = 4_096, 262_144
_TOO_LONG = 1.0  # seconds: a function this slow has already shown how it grows
_NOTICEABLE = 0.02  # seconds: below this the clock cannot measure growth, and it does not matter
_STEEPEST = 1.5  # power of the length: 1 is linear, 2 quadratic, n·log n about 1.1


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed check of a function, and the case."""

    function: str
    check: Check
    case: str
    got: str
    want: str


@dataclass(frozen=True, slots=True)
class FunctionResult:
    """``values``: the function's value for each case on which it did not raise."""

    name: str
    ok: bool
    conversational: bool
    values: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class ConformanceReport:
    """``cases``: the number of completions given to each function."""

    functions: tuple[FunctionResult, ...]
    cases: int
    failures: tuple[Failure, ...]

    @property
    def ok(self) -> bool:
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """``functions[]``, ``cases``, ``failures[]`` and ``ok``, ready for ``json.dumps``."""
        return {
            "ok": self.ok,
            "cases": self.cases,
            "functions": [
                {**asdict(function), "values": {n: _plain(v) for n, v in function.values.items()}}
                for function in self.functions
            ],
            "failures": [asdict(failure) for failure in self.failures],
        }


def run(
    functions: Mapping[str, RewardFunction],
    *,
    floor: float = 0.0,
    top: float = 1.0,
    clock: Callable[[], float] = time.process_time,
) -> ConformanceReport:
    """Test functions with TRL's signature, by name.

    ``floor`` and ``top``: the most that garbage may earn, and what gold must earn. ``None``
    (unscored) is allowed for garbage and tricks, and for gold rows that the function does not
    apply to, but not for all of them. ``clock``: CPU time, so that a busy machine makes no function
    look slow.

    Raises :class:`~omni_grpo_core.errors.MissingExtra` for our accuracy without its packages.
    """
    if any(isinstance(function, Accuracy) for function in functions.values()):
        require("rewards", *PACKAGES)
    cases = corpus()
    results, failures = [], []
    for name, function in functions.items():
        trial = _Trial(name, function, floor, top, clock)
        trial.run(cases)
        results.append(
            FunctionResult(name, not trial.failures, trial.conversational, dict(trial.values))
        )
        failures += trial.failures
    return ConformanceReport(tuple(results), len(cases), tuple(failures))


class _Trial:
    """One function under test; later checks use the values of the first."""

    def __init__(
        self,
        name: str,
        function: RewardFunction,
        floor: float,
        top: float,
        clock: Callable[[], float],
    ) -> None:
        self.name, self.function = name, function
        self.floor, self.top, self.clock = floor, top, clock
        self.conversational = False
        self.failures: list[Failure] = []
        self.values: dict[str, float | None] = {}

    def run(self, cases: Sequence[RewardCase]) -> None:
        if not self._find_form(next(case for case in cases if case.kind == "gold")):
            return
        for case in cases:
            self._single(case)
        sound = [case for case in cases if case.name in self.values]
        for case in sound:
            self._worth(case)
        self._gold(sound)
        self._together(sound, "batch", "the values of its rows one by one")
        shuffled = random.Random(0).sample(sound, len(sound))
        self._together(shuffled, "permutation", "the same values in another row order")
        for kind, text in _GROWING.items():
            self._linear(kind, text, cases[0])

    def _call(self, cases: Sequence[RewardCase]) -> list[float | None]:
        columns: dict[str, Any] = {
            key: [case.columns[key] for case in cases] for key in cases[0].columns
        }
        # TRL passes these too
        columns |= {"completion_ids": [[0]] * len(cases), "trainer_state": None}
        texts = [case.completion for case in cases]
        completions: list[Any] = texts
        prompts: list[Any] = [case.prompt for case in cases]
        if self.conversational:
            completions = [[{"role": "assistant", "content": text}] for text in texts]
            prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return values_of(self.function, prompts, completions, columns)

    def _find_form(self, gold: RewardCase) -> bool:
        """Plain strings if the function accepts them, else conversations: TRL may pass either."""
        errors = []
        for self.conversational in (False, True):
            try:
                self._call([gold])
            except Exception as error:
                # a foreign function can raise anything; it goes into the report
                errors.append(_short(error))
            else:
                return True
        self._fail("callable", gold.name, " / ".join(dict.fromkeys(errors)), "one value per row")
        return False

    def _single(self, case: RewardCase) -> None:
        try:
            [value] = self._call([case])
        except Exception as error:
            # as above
            self._fail("exception", case.name, _short(error), "a value or None")
            return
        if value is not None and not math.isfinite(value):
            self._fail("value", case.name, str(value), "a finite number or None")
            return
        self.values[case.name] = value

    def _worth(self, case: RewardCase) -> None:
        value = self.values[case.name]
        if case.kind == "gold" or value is None:
            return
        if case.kind == "garbage" and value > self.floor + _SAME:
            self._fail("garbage", case.name, f"{value:g}", f"the floor, {self.floor:g}")
        plain = self.values.get(case.baseline) if case.baseline else None
        if plain is not None and value > plain + _SAME:
            self._fail("trick", case.name, f"{value:g}", f"{plain:g}, as for {case.baseline!r}")

    def _gold(self, cases: Sequence[RewardCase]) -> None:
        earned = {case.name: self.values[case.name] for case in cases if case.kind == "gold"}
        if all(value is None for value in earned.values()):
            self._fail("gold", "every gold", "unscored", f"the top, {self.top:g}")
        for name, value in earned.items():
            if value is not None and abs(value - self.top) > _SAME:
                self._fail("gold", name, f"{value:g}", f"the top, {self.top:g}")

    def _together(self, cases: Sequence[RewardCase], check: Check, want: str) -> None:
        try:
            values = self._call(cases)
        except Exception as error:
            # as above
            self._fail("exception", f"{len(cases)} rows at once", _short(error), "values or None")
            return
        for case, value in zip(cases, values, strict=True):
            if not _same(value, self.values[case.name]):
                alone = self.values[case.name]
                self._fail(check, case.name, f"{value} among others, {alone} alone", want)
                return

    def _linear(self, kind: str, text: Callable[[int], str], case: RewardCase) -> None:
        times: list[tuple[int, float]] = []
        size = _FIRST_SIZE
        while size <= _LAST_SIZE and (not times or times[-1][1] < _TOO_LONG):
            long = RewardCase(kind, "hostile", case.prompt, case.columns, text(size))
            try:
                times.append((size, min(self._seconds(long) for _ in range(2))))
            except Exception as error:
                # as above
                self._fail("exception", f"{kind}, {size} characters", _short(error), "no exception")
                return
            size *= 2
        (n1, t1), (n2, t2) = times[max(-3, -len(times))], times[-1]
        if t2 < _NOTICEABLE or n1 == n2:
            return
        power = math.log(t2 / max(t1, 1e-9)) / math.log(n2 / n1)
        if power > _STEEPEST:
            self._fail(
                "linear",
                kind,
                f"{t1:.3f} s for {n1} characters, {t2:.3f} s for {n2}: power {power:.1f}",
                "time proportional to the length",
            )

    def _seconds(self, case: RewardCase) -> float:
        started = self.clock()
        self._call([case])
        return self.clock() - started

    def _fail(self, check: Check, case: str, got: str, want: str) -> None:
        self.failures.append(Failure(self.name, check, case, got, want))


_GROWING: dict[str, Callable[[int], str]] = {
    "opening tags without end": lambda n: "<context>" * (n // 9),
    "near tags": lambda n: "<context><contex>c</contex>" * (n // 27),
    "first section over and over": lambda n: "<context>c</context>" * (n // 20),
    "white space between sections": lambda n: "<context>c</context>" + " " * n + "x",
    "a long think": lambda n: render("c", "word and other " * (n // 15), "A"),
    "a long answer": lambda n: render("c", "t", "A, " * (n // 3)),
}


def _same(a: float | None, b: float | None) -> bool:
    return a == b if a is None or b is None else abs(a - b) <= _SAME


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _plain(value: float | None) -> float | None:
    return None if value is None else round(value, 9)
