"""Causes of wrong rewards, mostly inferred from the probe completions that are scored wrongly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from omni_grpo_core.doctor.checks.reward import GARBAGE
from omni_grpo_core.doctor.evidence import Case, Evidence, Explanation, Rule
from omni_grpo_core.doctor.signatures import Signature, only_fits, rule_of

_BARE_GOLD = "garbage against a gold without tags"


# --------------------------------------------------------------------------- by known case


_BY_CASE: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "reward.first-answer": (
        ("gold only in the think",),
        "an <answer> written inside <think> is taken for the answer: the policy learns to write "
        "every option there",
        "parse the whole structure and read the last section's answer, not the first match of "
        "<answer>(.*?)</answer>",
    ),
    "reward.unanchored": (
        ("leading newline", "trailing junk"),
        "text after a complete structure costs nothing, so junk grows there, or a leading line "
        "break costs the whole reward",
        "strip the completion and match the pattern with fullmatch (^\\s* … \\s*$ and DOTALL)",
    ),
    "reward.substring": (
        ("no inside cannot", "yes and no"),
        "'I cannot know' contains 'no', 'yes and no' contains both: evasion is rewarded",
        "compare the answer as a whole word, and give 0 where it says both",
    ),
    "reward.option-format": (
        (
            "option with a dot", "option in brackets", "option in lower case",
            "option with its text",
        ),
        "right answers earn nothing because of a dot, a bracket or lower case: the policy learns "
        "spelling instead of the task",
        "extract the letter from the answer ('A.', '(A)', 'a', 'A. Calm') before comparing",
    ),
    "reward.option-set": (
        ("set with a space", "set in another order"),
        "the same set of options earns less because of a space or another order",
        "split at commas, strip and compare as sets",
    ),
    "reward.number-format": (
        ("number with a comma", "number with a point", "no number"),
        "the same number in another notation earns nothing",
        "remove thousands separators and compare as numbers; give 0 to what is not a number",
    ),
    "reward.word-wer": (
        ("sign without spaces",),
        "in a language without spaces one wrong character makes the whole answer one wrong word",
        "split into characters where the text has no spaces (character error rate)",
    ),
}  # fmt: skip


def by_case(case: Case, evidence: Sequence[Evidence]) -> Iterator[Explanation]:
    """The probe completions that a function scores wrongly show what it gets wrong."""
    by_name: dict[str, list[Evidence]] = {}
    for item in evidence:
        if item.stage == "reward" and item.fact in ("probe-differs", "probe-raised"):
            by_name.setdefault(str(item.values["name"]), []).append(item)
    for name, items in by_name.items():
        wrong = {str(item.values["case"]): item for item in items}
        yield from _explained(name, wrong)


def _explained(name: str, wrong: Mapping[str, Evidence]) -> Iterator[Explanation]:
    dead = [c for c in wrong if c.startswith("gold ") and c != "gold only in the think"]
    if dead and all(_nothing(wrong[c]) for c in dead):
        first = wrong[dead[0]]
        yield Explanation(
            "reward.swallowed",
            "reward",
            first.sentence,
            f"right answers earn nothing ({', '.join(dead)}): where an exception becomes 0.0, an "
            "undefined name looks like a policy that never learns",
            f"remove the except around {name}'s scoring, run it on one right answer and fix what "
            "it raises; return None where scoring failed",
            "the right answer earns the full reward",
            explains=tuple(wrong.values()),
        )
        return
    raised = [c for c in wrong if wrong[c].fact == "probe-raised"]
    if raised:
        first = wrong[raised[0]]
        yield Explanation(
            "reward.raised",
            "reward",
            first.sentence,
            f"a completion of this kind ({', '.join(raised)}) ends the run, or the exception is "
            "caught and becomes 0",
            f"fix what {name} raises; return None where it cannot score",
            "omni-grpo rewards test module:function",
            proof=first.sentence,
            explains=tuple(wrong[c] for c in raised),
        )
    garbage = [c for c in GARBAGE if c in wrong and c != _BARE_GOLD]
    if garbage:
        first = wrong[garbage[0]]
        yield Explanation(
            "reward.floor",
            "reward",
            first.sentence,
            "garbage is rewarded: the reward has a floor that takes no work to earn, and stays "
            "there when all else earns nothing (0.10 forever)",
            f"let {name} give 0 (or None) where it finds nothing to score; a default reward hides "
            "a policy that fails",
            "omni-grpo rewards test passes its garbage cases",
            proof=first.sentence,
            explains=tuple(wrong[c] for c in garbage),
        )
    elif _BARE_GOLD in wrong and not isinstance(wrong[_BARE_GOLD].values["value"], str):
        yield Explanation(
            "reward.tagless-gold",
            "reward",
            wrong[_BARE_GOLD].sentence,
            "a gold without tags parses as an empty answer, and so does garbage: the two are "
            "equal, and garbage earns the full reward on such rows",
            f"let {name} reject a gold that does not parse, and give 0 to a completion that does "
            "not; add tags to the data",
            "garbage earns 0 on a row whose gold has no tags",
            proof=wrong[_BARE_GOLD].sentence,
        )
    for cause, (names, harm, fix) in _BY_CASE.items():
        hits = [wrong[c] for c in names if c in wrong and c not in raised]
        if not hits or (garbage and cause == "reward.unanchored"):
            continue
        more = f" (and {len(hits) - 1} more like it)" if len(hits) > 1 else ""
        yield Explanation(
            cause, "reward", hits[0].sentence + more, harm, f"in {name}: {fix}",
            "omni-grpo rewards test, and the probe of the next recording", proof=hits[0].sentence,
            explains=tuple(hits),
        )  # fmt: skip


def _nothing(evidence: Evidence) -> bool:
    return bool(evidence.values["value"] == 0)


# --------------------------------------------------------------------------- by one fact


def _judged(evidence: Evidence) -> bool:
    names = f"{evidence.values['name']} {evidence.values.get('source', '')}".lower()
    return "judge" in names or "judge" in _warnings(evidence) or "llm" in names


def _warnings(evidence: Evidence) -> str:
    return " ".join(map(str, evidence.values.get("warnings", ()))).lower()


_DOWN = ("refused", "urlopen", "unreachable", "timed out", "timeout", "resolve", "connect", "http")


def _unreachable(evidence: Evidence) -> bool:
    return any(word in _warnings(evidence) for word in _DOWN)


def _unreadable(evidence: Evidence) -> bool:
    words = ("convert", "parse", "read", "float", "json", "decode")
    return not _unreachable(evidence) and (
        any(word in _warnings(evidence) for word in words) or bool(evidence.values.get("probed"))
    )


def _likelier(evidence: Evidence) -> bool:
    return _judged(evidence) and not _unreadable(evidence)


_UNSCORED = (
    "a judge that fails looks like a policy that fails: every completion loses the same reward, "
    "and nothing is raised"
)

_FACTS = (
    Signature(
        cause="reward.judge-format",
        fact="constant",
        harm=_UNSCORED,
        fix="parse the first number in the judge's reply ('5 points' as well as '5'), and return "
        "None where there is none, never 0",
        confirm="print one of the judge's replies with the score made from it",
        when=lambda e: _judged(e) and _unreadable(e),
        prove=only_fits,
    ),
    Signature(
        cause="reward.judge-down",
        fact="constant",
        harm=_UNSCORED,
        fix="make sure that the judge is reachable from this machine, and return None for what "
        "could not be scored, never 0",
        confirm="send one request to the judge by hand",
        when=_likelier,
        prove=only_fits,
    ),
    Signature(
        cause="reward.floor",
        fact="constant",
        harm="everything earns {value:g}, whatever the completion says: no group gets a signal",
        fix="check what {name} really measures; a default reward hides that it measures nothing",
        confirm="omni-grpo rewards test module:function",
        when=lambda e: not _judged(e) and e.values["value"] != 0,
        prove=only_fits,
    ),
    Signature(
        cause="reward.swallowed",
        fact="constant",
        harm="everything earns 0: code that turns exceptions into 0.0 hides that it never scores",
        fix="call {name} on one right answer with its except removed",
        confirm="omni-grpo rewards test module:function",
        when=lambda e: not _judged(e) and e.values["value"] == 0,
        prove=only_fits,
    ),
    Signature(
        cause="reward.first-type",
        fact="rows-depend",
        harm="the first row decides the rule by which all others are scored: the same answer earns "
        "1 in one batch and 0 in the next",
        fix="read problem_type (and every other column) at each row's own index, not at [0]",
        confirm="permute the rows: rewards must permute with them",
    ),
    Signature(
        cause="reward.by-position",
        fact="columns-moved",
        harm="answers are compared with another row's gold: accuracy is at chance, and looks like "
        "a policy that does not learn",
        fix="carry each completion's columns with it through every sort, filter and gather; look "
        "them up by sample id, not by position",
        confirm="the gold passed with each completion belongs to its own question",
    ),
    Signature(
        cause="reward.nan",
        fact="not-a-number",
        harm="one NaN makes the sum of its row NaN, and the advantages of its whole group",
        fix="find the division in {name} whose divisor is 0 (an empty answer has length 0), and "
        "return None where there is nothing to score",
        confirm="every value is a finite number or None",
    ),
    Signature(
        cause="reward.raised",
        fact="raised",
        harm="the step fails, or the exception is caught and becomes 0",
        fix="make {name} return None where it cannot score: {error}",
        confirm="omni-grpo rewards test module:function",
        prove=only_fits,
    ),
)

RULES: tuple[Rule, ...] = (by_case, rule_of("causes_of_rewards", _FACTS))
