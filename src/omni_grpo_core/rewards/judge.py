"""Rewards by an LLM judge over any OpenAI-compatible endpoint.

A judge that is down, slow, rate-limited or replies nonsense leaves its rows unscored (``None``)
with the reason: never 0, which would punish the policy for the judge, and never a crash.
What needs no judge is not sent to one: malformed and degenerate completions earn 0.

The endpoint is not trusted: its body is read up to a limit, redirects are not followed (they would
take the key along), and a key that it echoes appears in no reason, log or cache.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
import ssl
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.extras import extra
from omni_grpo_core.io.redaction import Scrubber
from omni_grpo_core.rewards import Reward, RewardRow
from omni_grpo_core.rewards.call import run_async
from omni_grpo_core.rewards.degenerate import degenerate_text
from omni_grpo_core.rewards.endpoint import Endpoint
from omni_grpo_core.rewards.judge_cache import VerdictCache
from omni_grpo_core.rewards.judge_prompt import (
    SCHEMA,
    TOP,
    Aspect,
    BadVerdict,
    JudgeVerdict,
    Question,
    read_verdict,
)
from omni_grpo_core.rewards.parse import Gold, gold, parse
from omni_grpo_core.types import Malformed, Parsed, Score

with extra("judge"):
    import httpx
    from tenacity import (
        AsyncRetrying,
        RetryCallState,
        retry_if_exception,
        stop_after_attempt,
        wait_random_exponential,
    )

__all__ = ["LONGEST_JUDGED", "Endpoint", "Judge", "JudgeReward", "Usage"]

LONGEST_JUDGED = 50_000
"""Characters of a section; a longer one is left unscored rather than paid for."""

LONGEST_BODY = 400_000
"""Bytes of a decompressed reply; a verdict takes a few thousand."""

_LONGEST_REASON = 200
_MOST_TOKENS = 10**9
"""Per request: a larger count is treated as invalid."""


class BadStatus(Exception):
    """A reply whose HTTP status is not a success."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(slots=True)
class Usage:
    """The cost of a judge so far. ``failures`` counts reasons of unscored rows."""

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
    """Queries an endpoint for many rows concurrently. ``usage`` counts over all calls.

    Raises :class:`~omni_grpo_core.errors.ConfigError` for a key or a cache that cannot be used.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.usage = Usage()
        self._key = _key(endpoint.api_key_env)
        self._clean = Scrubber(self._key)
        if endpoint.cache is not None:
            VerdictCache(endpoint.cache).close()

    def ask(self, questions: Sequence[Question]) -> list[Score]:
        """One score per question; equal questions are sent once. Never raises for anything the
        endpoint does. May be called with or without a running event loop."""
        return run_async(self._ask(questions)) if questions else []

    async def _ask(self, questions: Sequence[Question]) -> list[Score]:
        end = self.endpoint
        keys = [question.key(end.model) for question in questions]
        unique = dict(zip(keys, questions, strict=True))
        with nullcontext() if end.cache is None else closing(VerdictCache(end.cache)) as cache:
            scores: dict[str, Score] = {}
            for key in unique:
                known = self._known(cache, key)
                if known:
                    self.usage.cache_hits += 1
                    scores[key] = self._score(known)
            with self._clean.logs("httpx", "httpcore"):
                async with self._client() as client:
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

    def _client(self) -> httpx.AsyncClient:
        # bodies are decompressed here, within limits, so only what zlib can decompress is requested
        headers = {"Accept-Encoding": "gzip", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            trusted = _trusted(*map(os.environ.get, ("SSL_CERT_FILE", "SSL_CERT_DIR")))
            return httpx.AsyncClient(
                headers=headers, timeout=None, follow_redirects=False, verify=trusted
            )
        except Exception as error:
            # the client reads proxies and certificates from the environment
            raise ConfigError(
                "judge",
                got=self._clean(f"{type(error).__name__}: {error}"),
                want="an HTTP client that can be set up",
                fix="check the proxy and certificate variables of the environment",
            ) from error

    async def _one(
        self,
        client: httpx.AsyncClient,
        slots: asyncio.Semaphore,
        cache: VerdictCache | None,
        key: str,
        question: Question,
    ) -> Score:
        end = self.endpoint
        retrying = AsyncRetrying(
            stop=stop_after_attempt(end.attempts),
            wait=wait_random_exponential(multiplier=end.backoff, max=30),
            retry=retry_if_exception(_worth_retrying),
            before_sleep=self._count_retry,
            reraise=True,
        )
        async with slots:
            try:
                verdict: JudgeVerdict = await retrying(self._request, client, question)
            except Exception as error:
                # whatever the endpoint or client did: the row is unscored, with the reason
                return self._unscored(error)
        if cache is not None:
            try:
                cache.put(key, verdict)
            except sqlite3.Error as error:
                self.usage.failures[f"cache: {error}"] += 1
        return self._score(verdict)

    def _known(self, cache: VerdictCache | None, key: str) -> JudgeVerdict | None:
        try:
            return None if cache is None else cache.get(key)
        except sqlite3.Error as error:
            self.usage.failures[f"cache: {error}"] += 1
            return None

    async def _request(self, client: httpx.AsyncClient, question: Question) -> JudgeVerdict:
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
            # for the whole reply: a timeout per read would never stop a server that drips
            async with asyncio.timeout(end.timeout):
                content = await _post(client, end.url, json.dumps(request).encode())
        finally:
            took = time.perf_counter() - started
            self.usage.seconds += took
            self.usage.slowest = max(self.usage.slowest, took)
        body = _body(content)
        self._count_tokens(body.get("usage"))
        try:
            [choice] = body["choices"]
            reply = choice["message"]["content"]
        except (KeyError, ValueError, TypeError) as error:
            raise BadVerdict(f"no chat completion: {_text(content)}") from error
        verdict = read_verdict(reply)
        return JudgeVerdict(verdict.score, self._clean(verdict.reason))

    def _count_tokens(self, usage: object) -> None:
        counts = usage if isinstance(usage, dict) else {}
        prompt, completion = (
            value if type(value := counts.get(name)) is int and 0 <= value <= _MOST_TOKENS else 0
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
        elif isinstance(error, BadStatus):
            kind = f"HTTP status {error.status}"
        elif isinstance(error, BadVerdict):
            kind = "bad verdict"
        elif isinstance(error, httpx.TransportError):
            kind = "no connection"
        else:
            kind = type(error).__name__
        self.usage.failures[kind] += 1
        explained = isinstance(error, BadStatus | BadVerdict | httpx.TransportError)
        # cleaned before it is cut: half a key would not be recognised
        detail = self._clean(f": {error}") if explained else ""
        return Score(None, f"judge: {kind}{detail[:_LONGEST_REASON]}")

    def _score(self, verdict: JudgeVerdict) -> Score:
        # a cache may be older than the cleaning of its verdicts
        return Score(verdict.score / TOP, self._clean(verdict.reason))

    def _late(self) -> Score:
        kind = f"not reached before the deadline of {self.endpoint.deadline:g} s"
        self.usage.failures[kind] += 1
        return Score(None, f"judge: {kind}")


class JudgeReward(Reward):
    """A judged aspect of a completion: ``context``, ``reasoning``, or (for
    :class:`~omni_grpo_core.rewards.accuracy.Accuracy`) ``answer``.

    ``context`` is compared with a gold context; without one the row is unscored.
    """

    def __init__(self, aspect: Aspect, judge: Judge, *, name: str | None = None) -> None:
        super().__init__(name or aspect)
        self.aspect = aspect
        self.judge = judge

    def score(self, row: RewardRow) -> Score:
        return self.score_rows([row])[0]

    def score_rows(self, rows: Sequence[RewardRow]) -> list[Score]:
        asked = [self._question(row) for row in rows]
        verdicts = iter(self.judge.ask([q for q in asked if isinstance(q, Question)]))
        return [next(verdicts) if isinstance(q, Question) else q for q in asked]

    def _question(self, row: RewardRow) -> Question | Score:
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
            return Score(None, "no gold context to compare it with")
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


def _key(variable: str) -> str:
    """The API key, or an empty string. A trailing line break is not part of it."""
    key = os.environ.get(variable, "").strip()
    if re.fullmatch(r"[!-~]*", key):
        return key
    raise ConfigError(
        f"judge key in {variable}",
        got="characters that are not allowed in an HTTP header",
        want="printable ASCII without spaces",
        fix=f"set {variable} to the key only",
    )


def _worth_retrying(error: BaseException) -> bool:
    if isinstance(error, BadStatus):
        return error.status == 429 or error.status >= 500
    return isinstance(error, TimeoutError | httpx.TransportError)


@cache
def _trusted(*places: str | None) -> ssl.SSLContext:
    """The certificates of these variables, or certifi's: reading them takes longer than a reply."""
    return httpx.create_ssl_context()


async def _post(client: httpx.AsyncClient, url: str, request: bytes) -> bytes:
    """The body of the reply; raises :class:`BadStatus` unless the status is a success."""
    async with client.stream("POST", url, content=request) as response:
        if response.is_redirect:
            to = response.headers.get("location")
            raise BadStatus(response.status_code, f"a redirect to {to}, which is not followed")
        try:
            content = await _read(response)
        except BadVerdict as error:
            if response.is_success:
                raise
            raise BadStatus(response.status_code, str(error)) from error
        if not response.is_success:
            raise BadStatus(response.status_code, _text(content))
        return content


async def _read(response: httpx.Response) -> bytes:
    """A body of at most :data:`LONGEST_BODY` bytes, both compressed and decompressed.

    The client's own decompression turns 64 kB into 64 MB before any check is possible.
    """
    coding = response.headers.get("content-encoding", "identity").lower()
    if coding not in ("identity", "gzip"):
        raise BadVerdict(f"a body in {coding!r}, which was not requested")
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 16) if coding == "gzip" else None
    content, taken = bytearray(), 0
    async for chunk in response.aiter_raw():
        taken += len(chunk)
        try:
            content += unpack.decompress(chunk, LONGEST_BODY + 1) if unpack else chunk
        except zlib.error as error:
            raise BadVerdict(f"a body that cannot be decompressed: {error}") from error
        if max(taken, len(content)) > LONGEST_BODY:
            raise BadVerdict(f"a body of more than {LONGEST_BODY} bytes")
    return bytes(content)


def _text(content: bytes) -> str:
    # a body is shown on one line, without control characters for the terminal
    return repr(content.decode("utf-8", "replace"))


def _body(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadVerdict(f"the body is not JSON: {_text(content)}") from error
    if not isinstance(body, dict):
        raise BadVerdict(f"the body is not an object: {_text(content)}")
    return body
