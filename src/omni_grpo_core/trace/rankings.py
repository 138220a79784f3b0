"""Differences of what the model would say next."""

from __future__ import annotations

import json
from collections.abc import Iterator

from omni_grpo_core.trace.divergence import Difference, Tolerances, distance
from omni_grpo_core.trace.integers import Decode
from omni_grpo_core.trace.leaves import Ranking
from omni_grpo_core.trace.place import name, row_of


def ranking_differences(
    path: str, was: Ranking, now: Ranking, tolerances: Tolerances, decode: Decode | None
) -> Iterator[Difference]:
    """At most one difference: another likeliest token, or else the log-probability that moved
    most. Tokens may trade places within tolerance."""
    lane = tolerances.lane("float")
    old = dict(zip(was.ids, was.logprobs, strict=True))
    new = dict(zip(now.ids, now.logprobs, strict=True))
    # a token that only one side ranks is compared with the least that the other side ranks
    last_old, last_new = was.logprobs[-1], now.logprobs[-1]
    pairs = {token: (old.get(token, last_old), new.get(token, last_new)) for token in old | new}
    apart = {token: distance(*pair) for token, pair in pairs.items()}
    others = [(was.logsumexp, now.logsumexp), (was.entropy, now.entropy)]
    if not any(apart.values()) and not any(distance(*pair) for pair in others):
        return
    token = max(apart, key=lambda candidate: apart[candidate])
    most, mean = apart[token], sum(apart.values()) / len(apart)
    if all(lane.allows(*pair) for pair in [*pairs.values(), *others]):
        sentence = f"{name(path)}: logprobs moved by up to {most:.3g}, within tolerance"
        yield Difference(path, "within", sentence, row_of(path), None, most, mean)
        return
    words = {**was.words, **now.words}

    def word(token: int) -> str:
        text = decode([token]) if decode else words.get(token)
        return f"{token}" if text is None else f"{token} {json.dumps(text, ensure_ascii=False)}"

    if was.ids[0] != now.ids[0]:
        what = (
            f"the likeliest token is {word(now.ids[0])}, was {word(was.ids[0])} "
            f"(by a margin of {was.margin:.3g})"
        )
    else:
        what = f"logprob of {word(token)} moved by {most:.3g}"
    sentence = f"{name(path)}: {what}; entropy is {now.entropy:.4g}, was {was.entropy:.4g}"
    yield Difference(path, "differs", sentence, row_of(path), None, most, mean)
