"""A recorded step as one structure: which prompt, completion, rewards, scores and losses belong
together.

Calls are joined by content, never by order or count alone: a processor's row with the row that
generate got, its completion with the text that a reward got and with the rows that are scored. Any
number of calls of each kind, in micro-batches, repeated, sliced or shuffled, is one step; a rollout
of an earlier recorded step may be scored in this one. Order decides only between rows of equal
content, which are interchangeable, and where a recording has no content to compare.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.doctor.bundles import FedRow, ids_in, rows_in
from omni_grpo_core.doctor.evidence import Calls, Case
from omni_grpo_core.trace.calls import (
    AdvantageSeen,
    ForwardCall,
    GenerateCall,
    LossGradient,
    LossSeen,
    ProcessorCall,
    RewardCall,
    SamplesSeen,
    StepSeen,
    TemplateCall,
)

_SPECIAL = re.compile(r"<\|[^|]*\|>|\s+")

# --------------------------------------------------------------------------- completions


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled completion. ``call``: that made it, ``at``: its row of the sequences. ``prompt``:
    the row that generate got. ``ids``: all that follows the prompt, padding included. ``end``:
    tokens up to and including generate's own first eos. ``texts``: its decodes up to that eos,
    special tokens kept, then skipped; none where nothing could decode it. ``group``: equal for
    completions of equal prompts, media included, in the same step; steps have other numbers."""

    call: GenerateCall
    at: int
    prompt: FedRow
    ids: tuple[int, ...]
    end: int
    texts: tuple[str, ...]
    group: int

    @property
    def sampled(self) -> tuple[int, ...]:
        """Its ids up to and including the first eos."""
        return self.ids[: self.end]


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """The completions of a step, and of the rollout before it, with what later calls made of them.

    ``completions``: in order of generation. ``earlier``: those of ``case.before``. ``entries``: for
    each reward call, by number, the completion of each of its texts. ``scored``: for each forward
    the completion of each row. ``None``: not known from content.
    """

    completions: tuple[Completion, ...]
    earlier: tuple[Completion, ...]
    entries: tuple[tuple[Completion | None, ...], ...]
    scored: Mapping[ForwardCall, tuple[Completion | None, ...]]
    rewards: Mapping[Completion, Mapping[str, float | None]]

    def rewards_of(self, completion: Completion) -> Mapping[str, float | None]:
        """What each reward function gave a completion, by name."""
        return self.rewards.get(completion, {})


def joined(case: Case) -> Joined:
    """The step's completions, joined with their prompts, rewards and scores."""
    return case.once(_joined)


def rows_of_gradient(case: Case, seen: LossGradient) -> tuple[Completion | None, ...]:
    """The completion of each row of a loss's gradient."""
    if seen.forward >= len(case.forwards):
        return ()
    return joined(case).scored[case.forwards[seen.forward]]


def prompts_of(case: Case, call: GenerateCall) -> list[int] | None:
    """Which prompt each sequence of a call answers, media included: numbers in order of appearance;
    ``None`` where media cannot be told apart."""
    own = [c for c in joined(case).completions if c.call is call]
    if not own or any(held is None for c in own for held in c.prompt.media.values()):
        return None
    labels: dict[int, int] = {}
    return [labels.setdefault(c.group, len(labels)) for c in own]


def _joined(case: Case) -> Joined:
    before = None if case.before is None else joined(case.before)
    earlier = () if before is None else before.completions
    own = _completions(case, 1 + max((c.group for c in earlier), default=-1))
    # a function's next call goes on with the completions that it has not scored
    taken: dict[str, dict[Completion, int]] = {}
    entries = tuple(
        _entries(call, sampled_before(case, call, own), earlier, taken.setdefault(call.name, {}))
        for call in case.rewards
    )
    rewards = {} if before is None else {c: dict(v) for c, v in before.rewards.items()}
    for call, found in zip(case.rewards, entries, strict=True):
        for completion, value in zip(found, call.values, strict=False):
            if completion is not None:
                rewards.setdefault(completion, {})[call.name] = value
    uses: dict[tuple[object, ...], dict[Completion, int]] = {}
    scored = {}
    for forward in case.forwards:
        kind = (forward.modes.grad_enabled, forward.modes.adapter, forward.own)
        rows = rows_in(case, forward)
        held = [_scored_as(row, own) or _scored_as(row, earlier) for row in rows]
        scored[forward] = _by_media(rows, held, uses.setdefault(kind, {}))
    return Joined(own, earlier, entries, scored, rewards)


def sampled_before(
    case: Case, call: RewardCall, completions: Sequence[Completion]
) -> list[Completion]:
    """Those that a reward call may be about: what is sampled later may have the same words."""
    later = {id(v) for v in dropwhile(lambda value: value is not call, case.values)}
    return [one for one in completions if id(one.call) not in later]


def _completions(case: Case, first: int) -> tuple[Completion, ...]:
    found: list[Completion] = []
    groups: dict[object, int] = {}
    for call in case.generated:
        prompts, ids = rows_in(case, call), completion_ids(call)
        if ids is None or not prompts or len(ids) % len(prompts):
            continue
        eos = ids_of(call.config.get("eos_token_id"))
        ends = until_end(ids, eos).sum(1).tolist() if ids.numel() else [0] * len(ids)
        texts = _texts(case, call, ids, ends)
        for at, row in enumerate(ids.tolist()):
            # num_return_sequences repeats every row inside generate
            prompt = prompts[at // (len(ids) // len(prompts))]
            group = groups.setdefault(prompt.key, first + len(groups))
            found.append(Completion(call, at, prompt, tuple(row), ends[at], texts[at], group))
    return tuple(found)


def _texts(
    case: Case, call: GenerateCall, ids: Tensor, ends: Sequence[int]
) -> list[tuple[str, ...]]:
    kept, skipped = (call.decoded.get(kind, ()) for kind in ("kept", "skipped"))
    if len(kept) == len(ids):
        more = skipped if len(skipped) == len(kept) else kept
        return list(zip(kept, more, strict=True))
    if case.reference is None:
        return [()] * len(ids)
    tokenizer = case.reference.policy.processor.tokenizer
    eos = ids_of(call.config.get("eos_token_id"))
    found = []
    for row, end in zip(ids.tolist(), ends, strict=True):
        inner = row[: end - (end > 0 and row[end - 1] in eos)]
        found.append(
            tuple(
                tokenizer.decode(
                    inner, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )
                for skip in (False, True)
            )
        )
    return found


def is_decode(text: str, completion: Completion) -> bool:
    """Whether a text is the decode of a completion: up to, with or padded after its eos, special
    tokens kept or skipped, white space around it removed or not.

    What follows the eos when it is kept can only be special tokens.
    """
    for whole in completion.texts:
        if text.strip() == whole.strip():
            return True
        rest = text.strip().removeprefix(whole.strip())
        if len(rest) < len(text.strip()) and _only_special(rest):
            return True
    return False


def _only_special(text: str) -> bool:
    """
    >>> _only_special("<|im_end|><|endoftext|>"), _only_special("</answer>")
    (True, False)
    """
    while text.startswith("<|"):
        inside, closed, text = text[2:].partition("|>")
        if not closed or not inside:
            return False
        text = text.lstrip()
    return not text or text in ("</s>", "<eos>", "<pad>")


def bare(text: str) -> str:
    """What of a text a decode cannot change: without special tokens, white space and case.

    >>> bare("Yes <|im_end|>")
    'yes'
    """
    return _SPECIAL.sub("", text).casefold()


def texts_in(call: RewardCall) -> list[tuple[str, ...]]:
    """What may be the completions of a reward call: the argument of that name, else every other
    text or list of texts, as functions have signatures of their own."""
    if call.completions:
        return [call.completions]
    columns = [(v,) if isinstance(v, str) else v for v in call.columns.values()]
    return [
        tuple(held)
        for held in columns
        if isinstance(held, list | tuple) and held and all(isinstance(one, str) for one in held)
    ]


def _entries(
    call: RewardCall,
    own: Sequence[Completion],
    earlier: Sequence[Completion],
    used: dict[Completion, int],
) -> tuple[Completion | None, ...]:
    """By text; among equal texts by order, continuing after the completion before."""
    by_text: dict[str, list[Completion]] = {}
    pool = (*own, *earlier)
    place = {completion: at for at, completion in enumerate(pool)}
    for completion in pool:
        for text in {text.strip() for text in completion.texts}:
            by_text.setdefault(text, []).append(completion)

    def decoded_as(text: str) -> list[Completion]:
        found = by_text.get(text.strip()) or [c for c in pool if is_decode(text, c)]
        return found or [c for c in pool if bare(text) in map(bare, c.texts)]

    found: list[Completion | None] = []
    last = -1
    for text in next((t for t in texts_in(call) if any(map(decoded_as, t))), call.completions):
        among = decoded_as(text)
        fewest = min((used.get(c, 0) for c in among), default=0)
        fresh = [c for c in among if used.get(c, 0) == fewest]
        chosen = next((c for c in fresh if place[c] > last), fresh[0] if fresh else None)
        if chosen is not None:
            used[chosen] = used.get(chosen, 0) + 1
            last = place[chosen]
        found.append(chosen)
    return tuple(found)


def _scored_as(row: FedRow, pool: Iterable[Completion]) -> list[Completion]:
    """The completions of which a row is prompt and completion, up to its eos at least; all of the
    completion may be masked out, as capped ones are."""
    return [c for c in pool if is_scored_as(row.ids, c) or (row.ids == c.prompt.ids
            and is_scored_as(row.raw[_first_kept(row):], c))]  # fmt: skip


def is_scored_as(ids: Sequence[int], completion: Completion) -> bool:
    """Whether ids are a prompt and its completion, up to its eos at least. The very last token may
    be left out, as it is only predicted. What follows is padding: generate's own, or one token
    repeated."""
    prompt = completion.prompt.ids
    start, end = len(prompt), len(prompt) + completion.end
    given, whole = tuple(ids), (*prompt, *completion.sampled)
    if given[:end] != whole:
        return len(given) == end - 1 > start and given == whole[:-1]
    rest = given[end:]
    return len(set(rest)) <= 1 or rest == completion.ids[completion.end :][: len(rest)]


def _first_kept(row: FedRow) -> int:
    return int(row.kept.nonzero()[0]) if row.ids else len(row.raw)


def _by_media(
    rows: Sequence[FedRow], found: Sequence[Sequence[Completion]], used: dict[Completion, int]
) -> tuple[Completion | None, ...]:
    """The completion of each row, of those that have its ids. Rows of equal ids may have different
    media, which tell them apart, but not where other rows have media of others; those of equal
    content are interchangeable."""
    alike = [
        [c for c in among if same_media(c.prompt, row)]
        for row, among in zip(rows, found, strict=True)
    ]
    told = all(own or not among for own, among in zip(alike, found, strict=True))
    chosen: list[Completion | None] = []
    for own, among in zip(alike, found, strict=True):
        known = own if told else among if len({c.group for c in among}) == 1 else ()
        one = min(known, key=lambda completion: used.get(completion, 0), default=None)
        if one is not None:
            used[one] = used.get(one, 0) + 1
        chosen.append(one)
    return tuple(chosen)


def same_media(made: FedRow, taken: FedRow) -> bool:
    """Whether a later row holds the media of an earlier one, cast or not."""
    for modality in {*made.media, *taken.media}:
        items, others = made.media.get(modality, ()), taken.media.get(modality, ())
        if items is None or others is None or len(items) != len(others):
            return False
        if any(one.gives(other) is None for one, other in zip(items, others, strict=True)):
            return False
    return True


# --------------------------------------------------------------------------- rollouts


@dataclass(frozen=True, slots=True, eq=False)
class RolloutRecord:
    """Calls of a step that content joins: from the rows that were drawn to the losses on their
    completions. ``values``: in order."""

    values: tuple[object, ...]

    drawn = Calls(SamplesSeen)
    templates = Calls(TemplateCall)
    processed = Calls(ProcessorCall)
    generates = Calls(GenerateCall)
    forwards = Calls(ForwardCall)
    rewards = Calls(RewardCall)
    advantages = Calls(AdvantageSeen)

    @property
    def samples(self) -> SamplesSeen | None:
        return self.drawn[-1] if self.drawn else None

    @property
    def generated(self) -> GenerateCall | None:
        """Its only call of generate; ``None`` where it has several."""
        return self.generates[0] if len(self.generates) == 1 else None

    @property
    def advantage(self) -> AdvantageSeen | None:
        return self.advantages[-1] if self.advantages else None


@dataclass(frozen=True, slots=True, eq=False)
class LossRecord:
    """One loss, the scoring forward that its logprobs came from, and the rollout it is about."""

    loss: LossSeen
    forward: ForwardCall | None
    rollout: RolloutRecord | None


def rollouts(case: Case) -> tuple[RolloutRecord, ...]:
    """The rollouts of a step, in order."""
    kinds = (SamplesSeen, GenerateCall, RewardCall, AdvantageSeen)
    return tuple(
        one for one in batches(case) if any(isinstance(value, kinds) for value in one.values)
    )


def batches(case: Case) -> tuple[RolloutRecord, ...]:
    """All calls of a step but those of the optimizer, split into what content joins."""
    return case.once(_batches)


def _batches(case: Case) -> tuple[RolloutRecord, ...]:
    values = [value for value in case.values if not isinstance(value, StepSeen)]
    links = _Links(case, values)
    owner = list(range(len(values)))

    def root(at: int) -> int:
        while owner[at] != at:
            at = owner[at]
        return at

    for at, value in enumerate(values):
        for other in links.of(at, value):
            first, second = sorted((root(at), root(other)))
            owner[second] = first
    found: dict[int, list[object]] = {}
    for at, value in enumerate(values):
        found.setdefault(root(at), []).append(value)
    return tuple(RolloutRecord(tuple(held)) for held in found.values())


class _Links:
    """The earlier calls that a call belongs with: by content, else the ones just before it."""

    def __init__(self, case: Case, values: Sequence[object]) -> None:
        self.case, self.values = case, values
        self.at = {id(value): at for at, value in enumerate(values)}

    def of(self, at: int, value: object) -> list[int]:
        if isinstance(value, SamplesSeen):
            return []
        found = [before for before in self._by_content(at, value) if before < at]
        return found or self._by_order(at, value)

    def _by_content(self, at: int, value: object) -> list[int]:
        case = self.case
        if isinstance(value, ProcessorCall):
            texts = set(value.texts)
            return self._latest(at, TemplateCall, lambda made: texts & set(made.texts))
        if isinstance(value, GenerateCall):
            wanted = {row.ids for row in rows_in(case, value)}
            return self._latest(
                at, ProcessorCall, lambda made: wanted & {r.ids for r in rows_in(case, made)}
            )
        if isinstance(value, ForwardCall):
            return self._calls(joined(case).scored[value])
        if isinstance(value, RewardCall):
            number = sum(isinstance(v, RewardCall) for v in self.values[:at])
            return self._calls(joined(case).entries[number])
        if isinstance(value, LossGradient) and value.forward < len(case.forwards):
            return [self.at[id(case.forwards[value.forward])]]
        if isinstance(value, LossSeen):
            return self._calls(completions_of(case, value))
        return []

    def _by_order(self, at: int, value: object) -> list[int]:
        """New rows, or a conversation rendered after something was made or scored, begin one; so
        does whatever is generated after rewards."""
        ended = begun = False
        for before in range(at - 1, -1, -1):
            held = self.values[before]
            ended |= isinstance(held, GenerateCall | RewardCall | ForwardCall)
            begun |= isinstance(held, SamplesSeen)
            if isinstance(value, TemplateCall) and ended and not begun:
                return []
            if isinstance(value, ProcessorCall | GenerateCall) and isinstance(held, RewardCall):
                return []
            if not isinstance(held, LossSeen | LossGradient):
                return [before]
        return []

    def _latest(self, at: int, kind: type[Any], shares: Any) -> list[int]:
        """The nearest earlier calls of a kind that share content, back to the first that has all
        of it again."""
        found: list[int] = []
        seen: set[object] = set()
        for before in range(at - 1, -1, -1):
            held = self.values[before]
            common = shares(held) if isinstance(held, kind) else None
            if common and not common <= seen:
                found.append(before)
                seen |= common
        return found

    def _calls(self, completions: Iterable[Completion | None]) -> list[int]:
        made = {id(c.call): None for c in completions if c is not None}
        return [self.at[one] for one in made if one in self.at]


def losses_of(case: Case) -> tuple[LossRecord, ...]:
    """The losses of a step, in order."""
    return case.once(_losses_of)


def _losses_of(case: Case) -> tuple[LossRecord, ...]:
    of_call = {id(call): one for one in rollouts(case) for call in one.generates}
    found: list[LossRecord] = []
    before: list[ForwardCall] = []
    for value in case.values:
        if isinstance(value, ForwardCall):
            before.append(value)
        elif isinstance(value, LossSeen):
            scored = [f for f in before if f.modes.adapter != "off" and f.error is None]
            about = next((c for c in completions_of(case, value) if c is not None), None)
            rollout = None if about is None else of_call.get(id(about.call))
            records = rollouts(case)
            if rollout is None and records:
                rollout = records[len(found) % len(records)]
            found.append(LossRecord(value, scored[-1] if scored else None, rollout))
        elif isinstance(value, StepSeen):
            before = []
    return tuple(found)


def completions_of(case: Case, loss: LossSeen) -> tuple[Completion | None, ...]:
    """The completion of each row of a loss, by its ids up to their end."""
    if loss.completion_ids is None:
        return ()
    step, used = joined(case), dict[Completion, int]()
    found: list[Completion | None] = []
    for row in loss.completion_ids.tolist():
        among = [c for c in (*step.completions, *step.earlier) if tuple(row[: c.end]) == c.sampled]
        chosen = min(among, key=lambda c: used.get(c, 0)) if among else None
        if chosen is not None:
            used[chosen] = used.get(chosen, 0) + 1
        found.append(chosen)
    return tuple(found)


# --------------------------------------------------------------------------- values


def prompt_length(call: GenerateCall) -> int:
    """Prompt tokens at the start of the sequences."""
    ids = ids_in(call)
    return 0 if ids is None else int(ids.shape[1])


def cached_twice(call: GenerateCall) -> bool:
    """Whether the prompt was in the cache and fed again beside it: generate that has neither
    ``use_cache`` nor the opposite makes a cache and feeds it the whole sequence at every step."""
    return bool(call.cached) and call.cached[0] == 2 * prompt_length(call)


def completion_ids(call: GenerateCall) -> Tensor | None:
    """int64, (N, C): the sampled ids, including padding after the end."""
    if call.sequences is None:
        return None
    return call.sequences[:, prompt_length(call) :].long()


def ids_of(value: Any) -> tuple[int, ...]:
    """Token ids of a setting that may hold one, several or none.

    >>> ids_of(3), ids_of([3, 4]), ids_of(None)
    ((3,), (3, 4), ())
    """
    if value is None or value is False:
        return ()
    return tuple(int(i) for i in value) if isinstance(value, list | tuple) else (int(value),)


def until_end(ids: Tensor, eos: Sequence[int]) -> Tensor:
    """bool, (N, C): True up to and including the first of ``eos``.

    >>> until_end(torch.tensor([[5, 2, 2], [5, 5, 5]]), [2]).tolist()
    [[True, True, False], [True, True, True]]
    """
    ended = torch.isin(ids, torch.tensor(list(eos), dtype=ids.dtype)).long()
    return (ended.cumsum(1) - ended) == 0


def temperature_of(call: GenerateCall) -> float:
    """The divisor of the scores; 1 for greedy decoding, NaN where it is not known."""
    sampling = bool(call.config.get("do_sample", False))
    return float(call.config.get("temperature") or 1.0) if sampling else 1.0


def first_step(case: Case) -> bool:
    """Whether the trainer still has the weights it loaded: no optimizer step yet."""
    return all(step.step == 0 for step in case.steps)


def world_size(case: Case) -> int:
    """Processes that trained together; this recording is of one of them."""
    number = case.trace.header.get("world", "1")
    return int(number) if number.isdigit() else 1


def settings_of(case: Case) -> dict[str, Any]:
    """The run's settings, as recorded with its losses and steps."""
    found: dict[str, Any] = {}
    for loss in case.losses:
        found |= dict(loss.settings)
    for step in case.steps:
        found |= dict(step.settings)
    return found


def whole_groups(case: Case, seen: AdvantageSeen) -> bool:
    """Whether every group of a rollout is complete here: other processes may have the rest."""
    size = settings_of(case).get("num_generations")
    counts = [seen.group_ids.count(name) for name in dict.fromkeys(seen.group_ids)]
    return world_size(case) == 1 or (isinstance(size, int) and all(c >= size for c in counts))
