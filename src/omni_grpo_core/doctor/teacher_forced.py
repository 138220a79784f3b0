"""Teacher forcing: the reference's scores of every token that a trainer recorded.

One forward of the reference's text model on the *recorded* embeddings, positions and mask, so that
a prompt that was already wrong stays as it was: any further difference was added by this call.
Final hidden states are kept and scores computed from them a row at a time, because scores of a real
vocabulary over a thousand tokens and eight rows are 5 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omni_grpo_core.core.policy import Policy, generating
from omni_grpo_core.doctor.evidence import Case, note_missing
from omni_grpo_core.doctor.rollouts import completion_ids, ids_of, prompt_length, until_end
from omni_grpo_core.tolerances import FOREIGN, Limit
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, Modes

Place = Literal["before", "at"]
"""Scores of a token are those *before* it; those *at* it predict the next one."""


@dataclass(frozen=True, slots=True, eq=False)
class Replayed:
    """``ids``: int64, (N, K), the tokens judged. ``mask``: bool, (N, K), those really sampled or
    attended to. ``hidden``: (N, K + 1, H), last hidden states of the reference from the position
    before the first judged token on. ``prompt``: number of tokens before the judged ones."""

    policy: Policy
    ids: Tensor
    mask: Tensor
    hidden: Tensor
    prompt: int

    def scores(self, row: int) -> Tensor:
        """float32, (K + 1, V)."""
        with torch.no_grad():
            found: Tensor = self.policy.model.lm_head(self.hidden[row]).float().cpu()
        return found

    def logprobs(
        self, temperature: float = 1.0, suppressed: Sequence[int] = (), place: Place = "before"
    ) -> Tensor:
        """float32, (N, K): of each token, from the scores before it (or at it, a known
        mistake)."""

        def one(scores: Tensor, ids: Tensor) -> Tensor:
            scores = scores[:-1] if place == "before" else scores[1:]
            table = log_table(scores, temperature, suppressed)
            return table.gather(1, ids[:, None])[:, 0]

        return torch.stack(self.each_row(one))

    def each_row(self, look: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """``look(scores (K + 1, V), ids (K,))`` of every row."""
        return [look(self.scores(row), ids) for row, ids in enumerate(self.ids)]


def log_table(scores: Tensor, temperature: float, suppressed: Sequence[int]) -> Tensor:
    """Log-probabilities of scores (K, V) at a temperature, without some ids."""
    scores = scores / temperature
    if suppressed:
        scores[:, list(suppressed)] = -torch.inf
    return scores.log_softmax(-1)


def replay_rollout(case: Case, call: GenerateCall) -> Replayed | None:
    """The reference on a rollout: its prompt as the text model got it, then the sampled tokens.

    ``None`` without a reference, or where something it needs was not kept.
    """
    return case.once(_replay_rollout, call)


def replay_forward(case: Case, call: ForwardCall) -> Replayed | None:
    """The reference on a scoring forward, over all tokens but the first."""
    return case.once(_replay_forward, call)


def _can_replay(case: Case) -> bool:
    """Features that a family adds in deeper layers of the text model are not recorded: without them
    the reference would disagree with every sound run."""
    if case.reference is None:
        return False
    family = case.reference.policy.family
    if family.deepstack:
        note_missing(case, f"{family.name} adds features inside the text model, which are not "
                    "recorded: no replay of rollouts and scoring forwards")  # fmt: skip
    return not family.deepstack


def _replay_rollout(case: Case, call: GenerateCall) -> Replayed | None:
    if not _can_replay(case):
        return None
    policy = _policy(case)
    ids = completion_ids(call)
    if ids is None or call.inputs_embeds is None or call.position_ids is None or not ids.shape[1]:
        note_missing(case, "a rollout's embeddings or positions were not kept: no replay of it")
        return None
    rows = len(ids)
    embeds = _spread(call.inputs_embeds, rows)
    positions = _spread(call.position_ids[-3:], rows, dim=1)
    mask = _prompt_mask(call, embeds.shape[1])
    if embeds is None or positions is None or mask is None or embeds.shape[1] != mask.shape[1]:
        return None
    mask = _spread(mask, rows)
    sampled = until_end(ids, ids_of(call.config.get("eos_token_id")))
    begin = starts(call, positions, mask)
    steps = torch.arange(ids.shape[1])
    after = (begin[:, None] + steps).to(positions.dtype)
    tokens = _embed(policy, ids).to(embeds.device)
    hidden = text_hidden(
        policy,
        torch.cat([embeds.to(tokens.dtype), tokens], 1),
        torch.cat([positions, after.expand(3, -1, -1)], 2),
        torch.cat([mask, sampled.to(mask.dtype)], 1),
    )
    width = ids.shape[1]
    return Replayed(policy, ids, sampled, hidden[:, -width - 1 :], prompt_length(call))


def _replay_forward(case: Case, call: ForwardCall) -> Replayed | None:
    if not _can_replay(case):
        return None
    policy = _policy(case)
    ids = call.inputs.get("input_ids")
    mask = call.inputs.get("attention_mask")
    if ids is None or call.inputs_embeds is None:
        note_missing(case, "a scoring forward's embeddings were not kept: no replay of it")
        return None
    mask = torch.ones_like(ids) if mask is None else mask
    if not call.inputs_embeds.shape[:2] == ids.shape == mask.shape:
        return None  # it went on from a cache
    positions = call.position_ids
    if positions is None:  # none were given: the text model counts from 0, padding included
        positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
    hidden = text_hidden(policy, call.inputs_embeds, positions[-3:], mask)
    attended = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    return Replayed(policy, ids[:, 1:].long(), attended, hidden, 1)


def _policy(case: Case) -> Policy:
    if case.reference is None:
        raise LookupError("no reference to replay on")
    return case.reference.policy


def _spread(values: Tensor, rows: int, dim: int = 0) -> Tensor:
    """One row per prompt where ``num_return_sequences`` made copies: repeated in a row."""
    have = values.shape[dim]
    return values if have == rows or rows % have else values.repeat_interleave(rows // have, dim)


def _prompt_mask(call: GenerateCall, width: int) -> Tensor | None:
    mask = call.inputs.get("attention_mask")
    if mask is not None:
        return mask
    embeds = call.inputs_embeds
    return None if embeds is None else torch.ones(len(embeds), width, dtype=torch.int64)


def starts(call: GenerateCall, positions: Tensor, mask: Tensor) -> Tensor:
    """Position of each row's first sampled token, (N,), in the trainer's own decoding.

    Right is one past the prompt's largest. The recorded ``rope_deltas`` show what was really used:
    libraries count them from the attended tokens or from the padded length, and the first row's
    recorded position shows which.
    """
    own = torch.where(mask[None].bool(), positions, 0).amax((0, 2)) + 1
    if call.rope_deltas is None or not call.step_positions:
        return own
    deltas = _spread(call.rope_deltas.reshape(-1), len(own)).to(own.dtype)
    if len(deltas) != len(own):
        return own
    bases = (mask.sum(1), torch.full_like(mask[:, 0], mask.shape[1]))
    used = [base.to(own.dtype) + deltas for base in bases]
    fitting = [each for each in used if float(each[0]) == call.step_positions[0]]
    # a first row without padding fits both: then take the one that is right for every row
    right = [each for each in fitting if torch.equal(each, own)]
    if fitting:
        return (right or fitting)[0]
    return own + (call.step_positions[0] - own[0])


@torch.no_grad()
def _embed(policy: Policy, ids: Tensor) -> Tensor:
    found: Tensor = policy.model.get_input_embeddings()(ids.to(policy.device))
    return found


@torch.no_grad()
def text_hidden(policy: Policy, embeds: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states, (N, length, H)."""
    with generating(policy.model):
        output = policy.text_model(
            inputs_embeds=embeds.to(policy.device, policy.model.dtype),
            attention_mask=mask.to(policy.device),
            position_ids=positions.to(policy.device),
            use_cache=False,
        )
    hidden: Tensor = output.last_hidden_state
    return hidden


# --------------------------------------------------------------------------- tolerance


def tolerance(modes: Modes, policy: Policy | None = None) -> Limit:
    """The limit of the lowest precision involved."""
    names = [modes.dtype, modes.autocast, None if policy is None else str(policy.model.dtype)]
    found = [FOREIGN.get((name or "").removeprefix("torch.")) for name in names]
    return max(filter(None, found), key=lambda limit: limit.mean, default=FOREIGN["bfloat16"])


def diff(a: Tensor, b: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and largest difference of two tables of logprobs where ``mask`` is True; infinite where
    one of them is not finite.

    >>> diff(torch.tensor([[1.0, 9.0]]), torch.tensor([[1.5, 0.0]]), torch.tensor([[True, False]]))
    (0.5, 0.5)
    """
    gap = (a.float() - b.float()).abs()[mask]
    if not len(gap):
        return 0.0, 0.0
    gap = torch.nan_to_num(gap, nan=torch.inf)
    return float(gap.mean()), float(gap.max())
