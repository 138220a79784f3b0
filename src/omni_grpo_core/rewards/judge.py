"""Rewards by an LLM judge over any OpenAI-compatible endpoint.

A judge that is down, slow, rate-limited or talking nonsense leaves its rows unscored (``None``)
with the reason: never 0, which would punish the policy for the judge, and never a crash.
What needs no judge is not sent to one: malformed and degenerate completions earn 0.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from openai import (
    APIConnectionError,
    APIStatusError,
    AsyncOpenAI,
    InternalServerError,
    OpenAIError,
    RateLimitError,
)
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from omni_grpo_core.rewards.base import Reward, Row
from omni_grpo_core.rewards.call import run_async
from omni_grpo_core.rewards.degenerate import degenerate_text
from omni_grpo_core.rewards.endpoint import Endpoint
from omni_grpo_core.rewards.gold import Gold, gold
from omni_grpo_core.rewards.judge_cache import VerdictCache
from omni_grpo_core.rewards.judge_prompt import (
    SCHEMA,
    TOP,
    Aspect,
    BadVerdict,
    Question,
    Verdict,
    read_verdict,
)
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.types import Malformed, Parsed, Score

__all__ = ["LONGEST_JUDGED", "Endpoint", "Judge", "JudgeReward", "Usage"]

LONGEST_JUDGED = 50_000
"""Characters of a section; a longer one is left unscored rather than paid for."""

_WORTH_RETRYING = (APIConnectionError, RateLimitError, InternalServerError, TimeoutError)


@dataclass(slots=True)
class Usage:
    """What a judge has cost so far. ``failures`` counts reasons of unscored rows."""

    requests: int = 0
    retries: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0
    seconds: float = 0.0
    slowest: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)


class Judge:
    """Asks an endpoint, many rows side by side. ``usage`` counts over all calls."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.usage = Usage()
        if endpoint.cache is not None:
            VerdictCache(endpoint.cache).__exit__(None, None, None)

    def ask(self, questions: Sequence[Question]) -> list[Score]:
        """One score a question; equal questions are asked once. Never raises for what the
        endpoint does. May be called with or without a running event loop."""
        return run_async(self._ask(questions)) if questions else []

    async def _ask(self, questions: Sequence[Question]) -> list[Score]:
        end = self.endpoint
        keys = [question.key(end.model) for question in questions]
        unique = dict(zip(keys, questions, strict=True))
        with nullcontext() if end.cache is None else VerdictCache(end.cache) as cache:
            scores: dict[str, Score] = {}
            for key in unique:
                known = None if cache is None else cache.get(key)
                if known:
                    self.usage.cache_hits += 1
                    scores[key] = _score(known)
            async with AsyncOpenAI(
                base_url=end.base_url,
                api_key=os.environ.get(end.api_key_env) or "none",
                max_retries=0,
                timeout=end.timeout,
            ) as client:
                slots = asyncio.Semaphore(end.concurrency)
                tasks = {
                    key: asyncio.create_task(self._one(client, slots, cache, key, question))
                    for key, question in unique.items()
                    if key not in scores
                }
                if tasks:
                    await asyncio.wait(tasks.values(), timeout=end.deadline)
                for key, task in tasks.items():
                    task.cancel()
                    done = task.done() and not task.cancelled()
                    scores[key] = task.result() if done else self._late()
                await asyncio.gather(*tasks.values(), return_exceptions=True)
        return [scores[key] for key in keys]

    async def _one(
        self,
        client: AsyncOpenAI,
        slots: asyncio.Semaphore,
        cache: VerdictCache | None,
        key: str,
        question: Question,
    ) -> Score:
        end = self.endpoint
        retrying = AsyncRetrying(
            stop=stop_after_attempt(end.attempts),
            wait=wait_random_exponential(multiplier=end.backoff, max=30),
            retry=retry_if_exception_type(_WORTH_RETRYING),
            before_sleep=self._count_retry,
            reraise=True,
        )
        async with slots:
            try:
                verdict: Verdict = await retrying(self._request, client, question)
            except Exception as error:
                # whatever the endpoint or its client did: the row is unscored and says why
                return self._unscored(error)
        if cache is not None:
            try:
                cache.put(key, verdict)
            except sqlite3.Error as error:
                self.usage.failures[f"cache: {error}"] += 1
        return _score(verdict)

    async def _request(self, client: AsyncOpenAI, question: Question) -> Verdict:
        end = self.endpoint
        request: dict[str, Any] = {
            "model": end.model,
            "messages": question.messages(),
            "temperature": 0,
            "max_tokens": end.max_tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA},
            },
        }
        started = time.perf_counter()
        self.usage.requests += 1
        try:
            # the client's own timeout is per read: a server that drips would never meet it
            async with asyncio.timeout(end.timeout):
                raw = await client.chat.completions.with_raw_response.create(**request)
        finally:
            took = time.perf_counter() - started
            self.usage.seconds += took
            self.usage.slowest = max(self.usage.slowest, took)
        body = _body(raw.http_response.content)
        self._count_tokens(body.get("usage"))
        try:
            reply = body["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise BadVerdict(f"no chat completion: {str(body)[:80]}") from error
        return read_verdict(reply)

    def _count_tokens(self, usage: object) -> None:
        told = usage if isinstance(usage, dict) else {}
        prompt, completion = (
            value if isinstance(value := told.get(name), int) else 0
            for name in ("prompt_tokens", "completion_tokens")
        )
        self.usage.prompt_tokens += prompt
        self.usage.completion_tokens += completion
        prices = (self.endpoint.prompt_price, self.endpoint.completion_price)
        self.usage.dollars += (prompt * prices[0] + completion * prices[1]) / 1e6

    def _count_retry(self, _: RetryCallState) -> None:
        self.usage.retries += 1

    def _unscored(self, error: Exception) -> Score:
        if isinstance(error, TimeoutError):
            kind = f"no answer within {self.endpoint.timeout:g} s"
        elif isinstance(error, APIStatusError):
            kind = f"HTTP status {error.status_code}"
        elif isinstance(error, BadVerdict):
            kind = "bad verdict"
        elif isinstance(error, APIConnectionError):
            kind = "no connection"
        else:
            kind = type(error).__name__
        self.usage.failures[kind] += 1
        detail = f": {error}" if isinstance(error, BadVerdict | OpenAIError) else ""
        return Score(None, f"judge: {kind}{detail[:200]}")

    def _late(self) -> Score:
        kind = f"not reached before the deadline of {self.endpoint.deadline:g} s"
        self.usage.failures[kind] += 1
        return Score(None, f"judge: {kind}")


class JudgeReward(Reward):
    """One aspect of a completion, judged: ``context``, ``reasoning``, or (for
    :class:`~omni_grpo_core.rewards.accuracy.Accuracy`) ``answer``.

    ``context`` needs a gold context to be held against; without one the row is unscored.
    """

    def __init__(self, aspect: Aspect, judge: Judge, *, name: str | None = None) -> None:
        super().__init__(name or aspect)
        self.aspect = aspect
        self.judge = judge

    def score(self, row: Row) -> Score:
        return self.score_rows([row])[0]

    def score_rows(self, rows: Sequence[Row]) -> list[Score]:
        asked = [self._question(row) for row in rows]
        verdicts = iter(self.judge.ask([q for q in asked if isinstance(q, Question)]))
        return [next(verdicts) if isinstance(q, Question) else q for q in asked]

    def _question(self, row: Row) -> Question | Score:
        truth = gold(row)
        parsed = parse(row.text)
        if isinstance(parsed, Malformed):
            return Score(0.0, f"malformed: {parsed.what} at {parsed.where}")
        judged = self._section(parsed)
        garbage = degenerate_text(judged)
        if garbage:
            return Score(0.0, f"degenerate: {garbage[0]}")
        if len(judged) > LONGEST_JUDGED:
            return Score(None, f"{len(judged)} characters are too many to judge")
        reference = self._reference(truth)
        if reference is None:
            return Score(None, "no gold context to hold it against")
        return Question(
            aspect=self.aspect,
            question=row.prompt,
            options=row.options,
            context=parsed.context.text if self.aspect == "reasoning" else None,
            reference=reference,
            judged=judged,
        )

    def _section(self, parsed: Parsed) -> str:
        if self.aspect == "context":
            return parsed.context.text
        return parsed.think.text if self.aspect == "reasoning" else parsed.answer.text

    def _reference(self, truth: Gold) -> str | None:
        if self.aspect == "context":
            return truth.context
        if self.aspect == "answer":
            return truth.answer
        return truth.answer if truth.think is None else f"{truth.answer}\n{truth.think}"


def _score(verdict: Verdict) -> Score:
    return Score(verdict.score / TOP, verdict.reason)


def _body(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadVerdict(f"the body is no JSON: {content[:40]!r}") from error
    if not isinstance(body, dict):
        raise BadVerdict(f"the body is no object: {content[:40]!r}")
    return body
