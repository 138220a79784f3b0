"""Causes of wrong rewards, mostly inferred from the probe completions that are scored wrongly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from omni_grpo_core.doctor.evidence import Case, Evidence, Explanation, Rule
from omni_grpo_core.doctor.signatures import Signature, only_fits, rule_of

# --------------------------------------------------------------------------- by known case


_BY_CASE: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "reward.first-answer": (
        ("gold only in the think",),
        "an <answer> written inside <think> is taken for the answer: the policy learns to write "
        "every option there",
        "parse the whole structure and read the last section's answer, not the first match of "
        "<answer>(.*?)</answer>",
    ),
    "reward.tagless-gold": (
        ("empty", "repeated token", "the incident", "token salad", "tags without end"),
        "a completion without an answer is read as an empty one: where the gold cannot be read "
        "either the two are equal, and garbage earns the reward",
        "give 0 to a completion whose answer cannot be read, and refuse a gold that cannot be",
    ),
    "reward.unanchored": (
        ("leading newline", "trailing junk"),
        "text after a complete structure costs nothing, so junk grows there, or a leading line "
        "break costs the whole reward",
        "strip the completion and match the pattern with fullmatch (^\\s* … \\s*$ and DOTALL)",
    ),
    "reward.substring": (
        ("no inside cannot", "right or wrong", "wrong or right"),
        "whatever contains the gold is paid: 'I cannot know' contains 'no', 'yes or no' contains "
        "both, so evasion is rewarded",
        "compare the whole answer with the gold, and give 0 where it says more than one",
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
    by_name: dict[str, dict[str, Evidence]] = {}
    for item in evidence:
        if item.stage == "reward" and item.fact == "probe-differs":
            by_name.setdefault(str(item.values["name"]), {})[str(item.values["case"])] = item
    inside = set(_BY_CASE["reward.substring"][0])
    for name, wrong in by_name.items():
        for cause, (names, harm, fix) in _BY_CASE.items():
            hits = [wrong[one] for one in names if one in wrong]
            # one kind of garbage may be paid by chance; all are where nothing can be read
            if cause == "reward.tagless-gold" and all(e.severity == "differs" for e in hits):
                continue
            # what takes any text that contains the answer takes it from the thoughts as well
            if hits and not (cause == "reward.first-answer" and inside & wrong.keys()):
                more = f" (and {len(hits) - 1} more like it)" if len(hits) > 1 else ""
                yield Explanation(
                    cause, "reward", hits[0].sentence + more, harm, f"in {name}: {fix}",
                    "omni-grpo rewards test, and the probe of the next recording",
                    proof=hits[0].sentence, explains=tuple(hits),
                )  # fmt: skip


# --------------------------------------------------------------------------- by one fact


def _judged(evidence: Evidence) -> bool:
    """Only of functions that ask others is it known what they caught."""
    names = f"{evidence.values['name']} {evidence.values.get('source', '')}".lower()
    said = _said(evidence)
    asks = bool(evidence.values.get("caught"))
    return asks or any(word in names or word in said for word in ("judge", "llm"))


def _said(evidence: Evidence) -> str:
    texts = (*evidence.values.get("caught", ()), *evidence.values.get("warnings", ()))
    return " ".join(map(str, texts)).lower()


_DOWN = (
    *("refused", "urlopen", "unreachable", "timed out", "timeout", "resolve", "connect", "http"),
    *("remotedisconnected", "reset by peer", "unreachable"),
)


def _unreachable(evidence: Evidence) -> bool:
    return any(word in _said(evidence) for word in _DOWN)


def _unreadable(evidence: Evidence) -> bool:
    words = ("convert", "parse", "read", "float", "json", "decod", "invalid literal")
    return not _unreachable(evidence) and any(word in _said(evidence) for word in words)


def _likelier(evidence: Evidence) -> bool:
    return _judged(evidence) and not _unreadable(evidence)


_UNSCORED = (
    "a judge that fails looks like a policy that fails: every completion loses the same reward, "
    "and nothing is raised"
)

_FACTS = (
    *(
        Signature(
            cause="reward.swallowed",
            fact=fact,
            harm="right answers earn nothing: code that turns exceptions into 0.0 looks like a "
            "policy that never learns",
            fix="remove the except around {name}'s scoring, run it on one right answer and fix "
            "what it raises; return None where scoring failed",
            confirm="the right answer earns the full reward",
            when=lambda e: bool(e.values["swallowed"]),
        )
        for fact in ("gold-unpaid", "swallows")
    ),
    Signature(
        cause="reward.gold-unpaid",
        fact="gold-unpaid",
        harm="right answers earn nothing, and no completion can ever earn more",
        fix="call {name} on one right answer by hand, and look where it is lost",
        confirm="the right answer earns the full reward",
        when=lambda e: not e.values["swallowed"] and e.severity == "breaks",
    ),
    Signature(
        cause="reward.inverted",
        fact="inverted",
        harm="the policy is paid for wrong answers, and unlearns the task",
        fix="return the score of {name} itself, not its negative, its error or its distance",
        confirm="a right answer earns more than a wrong one",
    ),
    Signature(
        cause="reward.floor",
        fact="floor",
        harm="the reward has a floor that takes no work to earn, and stays there when all else "
        "earns nothing ({value:g} forever)",
        fix="let {name} give 0 (or None) where it finds nothing to score; a default reward hides a "
        "policy that fails",
        confirm="omni-grpo rewards test passes its garbage cases",
    ),
    Signature(
        cause="reward.raised",
        fact="probe-raised",
        harm="a completion of this kind ends the run, or the exception is caught and becomes 0",
        fix="make {name} return None where it cannot score: {error}",
        confirm="omni-grpo rewards test module:function",
    ),
    Signature(
        cause="reward.judge-format",
        fact="constant",
        harm=_UNSCORED,
        fix="parse the first number in the judge's reply ('5 points' as well as '5'), and return "
        "None where there is none, never 0",
        confirm="print one of the judge's replies with the score made from it",
        when=lambda e: _judged(e) and _unreadable(e),
        prove=lambda _, e: e.sentence if e.values.get("reply") else "",
    ),
    Signature(
        cause="reward.judge-down",
        fact="constant",
        harm=_UNSCORED,
        fix="make sure that the judge is reachable from this machine, and return None for what "
        "could not be scored, never 0",
        confirm="send one request to the judge by hand",
        when=_likelier,
        prove=lambda _, e: e.sentence if _unreachable(e) else "",
    ),
    Signature(
        cause="reward.first-type",
        fact="rows-depend",
        harm="the first row decides how all others are scored: the same answer earns 1 in one "
        "batch and 0 in the next",
        fix="read {columns} (and every other column) at each row's own index, not at [0]",
        confirm="permute the rows: rewards must permute with them",
        when=lambda e: bool(e.values.get("columns")),
    ),
    Signature(
        cause="reward.by-position",
        fact="rows-depend",
        harm="completions are paid for others: the reward says nothing about what was sampled",
        fix="return {name}'s values in the order of its completions",
        confirm="permute the rows: rewards must permute with them",
        when=lambda e: bool(e.values.get("moved")),
    ),
    Signature(
        cause="reward.specials-kept",
        fact="special-tokens",
        harm="no completion that ends by itself can earn the full reward",
        fix="decode completions with skip_special_tokens=True before {name} gets them, or remove "
        "the final eos by its id",
        confirm="the text that a reward gets ends where the answer does",
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
        cause="reward.gold-by-question",
        fact="gold-of-another",
        harm="answers are compared with another row's gold: what is right earns nothing",
        fix="look golds up by sample id: rows may ask the same of other clips",
        confirm="the gold passed with each completion is that of its own row",
        when=lambda e: bool(e.values["by_question"]),
    ),
    Signature(
        cause="reward.other-gold",
        fact="gold-of-another",
        harm="answers are compared with another row's gold: what is right earns nothing",
        fix="carry each row's gold with it, and look it up by sample id where that cannot be",
        confirm="the gold passed with each completion is that of its own row",
        when=lambda e: not e.values["by_question"],
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
