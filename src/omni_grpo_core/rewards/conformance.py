"""Can garbage earn this reward? The same checks for any reward function, judged by its own kind.

Garbage earns the floor, gold the top, a trick gains nothing, permuting the rows permutes the
values, a batch equals its rows one by one, hostile text raises nothing, time grows linearly.

A function is tried in the layouts of :data:`~omni_grpo_core.rewards.corpus.LAYOUTS` and judged in
the one in which its golds earn most. A function of *content* pays the golds of some problem types
more than wrong answers, and is judged on those (all of them, for a function of *format*). A
*signed* one pays garbage nothing above 0 and golds something; a *penalty* pays nothing ever.
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
from omni_grpo_core.rewards.corpus import LAYOUTS, WRONG, Layout, RewardCase, corpus
from omni_grpo_core.rewards.parse import render

Check = Literal[
    "callable", "exception", "value", "garbage", "gold", "trick", "permutation", "batch", "linear"
]

Kind = Literal["content", "format", "signed", "penalty"]

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
    """``values``: the function's value for each case on which it did not raise. ``kind`` and
    ``layout``: how it was judged. ``pays``: the problem types whose gold earns more than a wrong
    answer, or anything if the function only looks at the format."""

    name: str
    ok: bool
    conversational: bool
    kind: Kind
    layout: str
    pays: tuple[str, ...]
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
    floor: float | None = None,
    top: float | None = None,
    clock: Callable[[], float] = time.process_time,
) -> ConformanceReport:
    """Test functions with TRL's signature, by name.

    ``floor`` and ``top``: the most that garbage may earn, and what every gold must earn; ``None``:
    what is right for the function's kind. A value of ``None`` (unscored) is allowed for garbage and
    tricks, and for gold rows that the function does not apply to, but not for all of them.
    ``clock``: CPU time, so that a busy machine makes no function look slow.

    Raises :class:`~omni_grpo_core.errors.MissingExtra` for our accuracy without its packages.
    """
    if any(isinstance(function, Accuracy) for function in functions.values()):
        require("rewards", *PACKAGES)
    results, failures = [], []
    for name, function in functions.items():
        trial = _Trial(name, function, floor, top, clock)
        trial.run()
        results.append(
            FunctionResult(
                name, not trial.failures, trial.conversational, trial.kind, trial.layout.name,
                trial.pays, dict(trial.values),
            )
        )  # fmt: skip
        failures += trial.failures
    return ConformanceReport(tuple(results), len(corpus()), tuple(failures))


class _Trial:
    """One function under test; later checks use the values of the first."""

    def __init__(
        self,
        name: str,
        function: RewardFunction,
        floor: float | None,
        top: float | None,
        clock: Callable[[], float],
    ) -> None:
        self.name, self.function = name, function
        self.floor, self.top, self.clock = floor, top, clock
        self.conversational = False
        self.layout: Layout = LAYOUTS[0]
        self.kind: Kind = "content"
        self.pays: tuple[str, ...] = ()
        self.failures: list[Failure] = []
        self.values: dict[str, float | None] = {}

    def run(self) -> None:
        if not self._find_form(next(case for case in corpus() if case.kind == "gold")):
            return
        self.layout = max(LAYOUTS, key=self._fit)
        cases = corpus(self.layout)
        for case in cases:
            self._single(case)
        sound = [case for case in cases if case.name in self.values]
        self._find_kind(sound)
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
        # TRL passes these too; a byte for a token
        ids = [list(case.completion.encode(errors="replace")) for case in cases]
        columns |= {"completion_ids": ids, "trainer_state": None}
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

    def _fit(self, layout: Layout) -> tuple[int, float]:
        """How many golds of a layout earn more than wrong answers, and what all of them earn."""
        values = {}
        for case in corpus(layout):
            if case.kind == "gold" or case.name.endswith(f": {WRONG}"):
                try:
                    [values[case.name]] = self._call([case])
                except Exception:
                    # as above; it is reported with the layout that is chosen
                    continue
        golds = {name: value for name, value in values.items() if name.endswith(": gold") and value}
        return len(_above_wrong(values)), sum(golds.values())

    def _find_kind(self, cases: Sequence[RewardCase]) -> None:
        earned = [value for value in self.values.values() if value is not None]
        paying = _above_wrong(self.values)
        types = [str(case.columns["problem_type"]) for case in cases if case.kind == "gold"]
        if earned and min(earned) < -_SAME:
            self.kind = "signed" if max(earned) > _SAME else "penalty"
        elif not paying:
            self.kind = "format"
        self.pays = paying or tuple(t for t in types if (self.values.get(f"{t}: gold") or 0) > 0)

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
        floor = self.floor or 0.0
        if case.kind == "garbage" and value > floor + _SAME:
            self._fail("garbage", case.name, f"{value:g}", f"the floor, {floor:g}")
        plain = self.values.get(case.baseline) if case.baseline else None
        # what is below 0 pays nothing: a longer answer may cost less
        pays = value > 0 or self.kind not in ("signed", "penalty")
        if plain is not None and value > plain + _SAME and pays:
            self._fail("trick", case.name, f"{value:g}", f"{plain:g}, as for {case.baseline!r}")

    def _gold(self, cases: Sequence[RewardCase]) -> None:
        earned = {case.name: self.values[case.name] for case in cases if case.kind == "gold"}
        if self.kind == "penalty" and self.top is None:
            return
        signed = self.kind == "signed" and self.top is None
        want = "above 0" if signed else f"the top, {1.0 if self.top is None else self.top:g}"
        if all(value is None for value in earned.values()):
            self._fail("gold", "every gold", "unscored", want)
        for name, value in earned.items():
            if value is None or (self.top is None and self.pays and name[:-6] not in self.pays):
                continue
            top = 1.0 if self.top is None else self.top
            if value <= 0 if signed else abs(value - top) > _SAME:
                self._fail("gold", name, f"{value:g}", want)

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


def _above_wrong(values: Mapping[str, float | None]) -> tuple[str, ...]:
    """Problem types whose gold earns more than a wrong answer, which may be unscored."""
    golds = {name[:-6]: value for name, value in values.items() if name.endswith(": gold")}
    wrong = {kind: values.get(f"{kind}: {WRONG}") for kind in golds}
    return tuple(
        kind
        for kind, value in golds.items()
        if value is not None and value > (wrong[kind] or 0.0) + _SAME
    )


def _same(a: float | None, b: float | None) -> bool:
    return a == b if a is None or b is None else abs(a - b) <= _SAME


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _plain(value: float | None) -> float | None:
    return None if value is None else round(value, 9)
