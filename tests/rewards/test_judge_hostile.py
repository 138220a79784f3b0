"""A judge's reply is untrusted data: it may be endless, and it may contain our own key."""

from __future__ import annotations

import base64
import html
import json
import logging
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from judge_server import JudgeServer, chat, judge_server

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.redaction import REDACTED, Scrubber
from omni_grpo_core.rewards.judge import LONGEST_BODY, Endpoint, Judge
from omni_grpo_core.rewards.judge_cache import VerdictCache
from omni_grpo_core.rewards.judge_prompt import JudgeVerdict, Question
from omni_grpo_core.types import Score

QUESTION = Question("answer", "Who?", (), None, "a man", "a man")
KEY = 'sk-live/a"b\\c&<d>+0123456789%~XYZ='
"""Printable, and different after each kind of escaping."""

Reply = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with judge_server() as running:
        yield running


def ask(server: JudgeServer, reply: Reply | None = None, cache: Path | None = None) -> Judge:
    server.mode = reply or "answer"
    return Judge(Endpoint(server.url, "judge", attempts=1, cache=cache))


def raw(*parts: bytes) -> Reply:
    """A reply given byte by byte, status line included."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        for part in parts:
            handler.wfile.write(part)

    return send


def whole(body: bytes, status: str = "200 OK", *headers: str) -> Reply:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers])
    return raw(head.encode("latin-1") + b"\r\n\r\n", body)


# ------------------------------------------------------------------ the key

SPELLED: dict[str, str] = {
    "as it is": KEY,
    "in quotes": repr(KEY),
    "in a URL": quote(KEY, safe=""),
    "in a URL, lower case": quote(KEY, safe="").replace("%2F", "%2f").replace("%2B", "%2b"),
    "in a form": quote_plus(KEY),
    "in a URL in a URL": quote(quote(KEY, safe=""), safe=""),
    "in JSON": json.dumps(KEY),
    "in JSON in JSON": json.dumps(json.dumps(KEY)),
    "in JSON, all escaped": "".join(f"\\u{ord(c):04X}" for c in KEY),
    "in JSON, slashes escaped": json.dumps(KEY).replace("/", "\\/"),
    "in HTML": html.escape(KEY),
    "in HTML, by number": "".join(f"&#{ord(c)};" for c in KEY),
    "in HTML, by hexadecimal number": "".join(f"&#x{ord(c):X};" for c in KEY),
    "as basic authorization": base64.b64encode(f"user:{KEY}".encode()).decode(),
    "as basic authorization without a user": base64.b64encode(f":{KEY}".encode()).decode(),
    "as a bearer in base64": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
    "in base64 for URLs": base64.urlsafe_b64encode(KEY.encode()).decode(),
    "in base64 in JSON": base64.b64encode(KEY.encode()).decode().replace("/", "\\/"),
    "as bytes": repr(KEY.encode()),
}


def assert_nothing_of_the_key(text: str) -> None:
    """No eight consecutive characters of any spelling: half a key is half guessed."""
    for name, spelled in SPELLED.items():
        # the ends of base64 hold bits of what surrounds the key, and quotes are not part of it
        core = spelled[12:-4] if "base64" in name or "basic" in name else spelled
        for i in range(max(1, len(core) - 7)):
            assert core[i : i + 8] not in text, name


@pytest.mark.parametrize("name", SPELLED)
def test_a_key_is_recognised_in_any_spelling(name: str) -> None:
    text = f"before {SPELLED[name]} after"
    cleaned = Scrubber(KEY)(text)
    assert_nothing_of_the_key(cleaned)
    assert REDACTED in cleaned
    assert cleaned.startswith("before ")
    assert cleaned.endswith(" after")


def test_texts_without_the_key_are_unchanged() -> None:
    for secret in ("", "x", "abc", KEY):
        assert Scrubber(secret)("an x and an abc, 100% \\o/ &amp; sk-live") == (
            "an x and an abc, 100% \\o/ &amp; sk-live"
        )


@pytest.mark.parametrize("part", ["\\", "%25", "&#0", "\\u00", "%", "&", KEY[:-1], "\\" * 7 + "x"])
def test_cleaning_takes_time_proportional_to_the_text(part: str) -> None:
    """Not measured: a cost beyond proportion would take hours here."""
    text = part * (LONGEST_BODY // len(part))
    assert Scrubber(KEY)(text) == text
    assert Scrubber("\\" * 40 + "x" * 8)(text)


def error_body(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "code": 401}}).encode()


ECHOES: dict[str, Callable[[str], Reply]] = {
    "in the error's message": lambda k: whole(
        error_body(f"Incorrect API key provided: {k}"), "401 Unauthorized"
    ),
    "in an error that is no JSON": lambda k: whole(f"no: {k}".encode(), "403 Forbidden"),
    "in a server's error, which is retried": lambda k: whole(k.encode(), "500 Oops"),
    "in the status line": lambda k: whole(b"{}", f"401 Bearer {k}"),
    "in a header": lambda k: whole(b"{}", "401 No", f"WWW-Authenticate: Bearer {k}", f"X: {k}"),
    "in a header of a good reply": lambda k: whole(
        chat('{"reason": "r", "score": 8}'), "200 OK", f"X-Request-Authorization: {k}"
    ),
    "in a cookie": lambda k: whole(b"{}", "200 OK", f"Set-Cookie: session={k}"),
    "in a redirect": lambda k: whole(b"", "307 There", f"Location: http://127.0.0.1:1/?key={k}"),
    "in a coding": lambda k: whole(b"x", "200 OK", f"Content-Encoding: {k}"),
    "in a header line that is none": lambda k: raw(f"HTTP/1.1 200 OK\r\n{k}\r\n\r\n".encode()),
    "in the place of HTTP": lambda k: raw(f"{k}\r\n\r\n".encode()),
    "in a chunk's size": lambda k: raw(
        f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{k}\r\n".encode()
    ),
    "in a body's length": lambda k: raw(f"HTTP/1.1 200 OK\r\nContent-Length: {k}\r\n\r\n".encode()),
    "in a body that is no JSON": lambda k: whole(f"<html>{k}</html>".encode()),
    "in a body that is no object": lambda k: whole(json.dumps([k]).encode()),
    "in a body without choices": lambda k: whole(json.dumps({"you": k}).encode()),
    "in an answer that is no verdict": lambda k: whole(chat(f"You are {k}, I see.")),
    "in a verdict's reason": lambda k: whole(chat(json.dumps({"reason": f"'{k}'", "score": 8}))),
    "in a verdict's reason, escaped": lambda k: whole(
        chat('{"reason": "' + "".join(f"\\u{ord(c):04x}" for c in k) + '", "score": 8}')
    ),
    "in a verdict's score": lambda k: whole(chat(json.dumps({"reason": "r", "score": k}))),
    "as a verdict's name": lambda k: whole(chat(json.dumps({"reason": "r", "score": 1, k: 1}))),
    **{
        f"across a cut at {at} characters": lambda k, at=at: whole(chat("x" * at + k))  # type: ignore[misc]
        for at in (*range(30, 45), 75, *range(165, 205))
    },
}


@pytest.mark.parametrize("spelling", ["as it is", "in a URL", "as basic authorization"])
@pytest.mark.parametrize("where", ECHOES)
def test_an_echoed_key_goes_no_further(
    server: JudgeServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    where: str,
    spelling: str,
) -> None:
    """A gateway replied ``Incorrect API key provided: sk-…``, and the key was in the reason of
    every row, and from there in logs and recorded traces."""
    caplog.set_level(logging.DEBUG)
    judge = ask(server, ECHOES[where](SPELLED[spelling]), tmp_path / "verdicts.db")
    [score] = judge.ask([QUESTION])
    assert (score.value == 0.8) == ("verdict's reason" in where or "good reply" in where)
    assert score.reason
    output = capfd.readouterr()
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir()).decode("latin-1")
    for text in (score.reason, repr(judge.usage), caplog.text, output.out, output.err, kept):
        assert_nothing_of_the_key(text)


def test_library_logs_are_cleaned_only_while_the_judge_works(
    server: JudgeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ask(server, whole(b"{}", "401 No", f"X-Echo: {KEY}")).ask([QUESTION])
    assert any(REDACTED in r.getMessage() for r in caplog.records if r.name == "httpcore.http11")
    assert any("401" in record.getMessage() for record in caplog.records if record.name == "httpx")
    logging.getLogger("httpx").info("%s", KEY)
    assert KEY in caplog.text


def test_a_verdict_cached_before_cleaning_is_cleaned(server: JudgeServer, tmp_path: Path) -> None:
    with closing(VerdictCache(tmp_path / "verdicts.db")) as cache:
        cache.put(QUESTION.key("judge"), JudgeVerdict(5, f"as {KEY} says"))
    judge = ask(server, cache=tmp_path / "verdicts.db")
    assert judge.ask([QUESTION]) == [Score(0.5, f"as {REDACTED} says")]


@pytest.mark.parametrize(
    "address",
    [
        "http://user:{}@host/v1",
        "https://{}@host/v1",
        "http://host/v1?key={}",
        "http://host/v1#{}",
        "ftp://user:{}@host",
        "http://[{}@",
        "{}@host",
    ],
)
def test_an_address_with_a_key_is_rejected(address: str) -> None:
    """A configuration is stored with every run and in its traces."""
    with pytest.raises(ConfigError, match="judge base_url") as caught:
        Endpoint(address.format("sk-0123456789"), "m")
    assert "sk-0123456789" not in str(caught.value)


def test_a_key_instead_of_a_variable_name_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match="judge api_key_env") as caught:
        Endpoint("http://host/v1", "m", api_key_env="sk-0123456789")
    assert "sk-0123456789" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["sk-0123\n456789", "sk-0123 456789", "sk-0123é456789", "\udc80abc"]
)
def test_a_key_invalid_in_headers_is_a_config_error_that_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="judge key in OPENAI_API_KEY") as caught:
        Judge(Endpoint("http://127.0.0.1:1/v1", "m"))
    assert "0123" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-0123456789", "sk-0123456789\n", "", None])
def test_the_key_is_sent_as_a_bearer_token_if_set(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    sent: list[str | None] = []

    def reply(handler: BaseHTTPRequestHandler) -> None:
        sent.append(handler.headers["Authorization"])
        whole(chat('{"reason": "r", "score": 8}'))(handler)

    monkeypatch.delenv("OPENAI_API_KEY")
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    assert ask(server, reply).ask([QUESTION])[0].value == 0.8
    assert sent == ["Bearer sk-0123456789" if key else None]


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTP_PROXY"])
def test_a_proxy_that_cannot_be_used_is_a_config_error(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "nonsense://127.0.0.1:1")
    with pytest.raises(ConfigError, match="proxy"):
        ask(server).ask([QUESTION])


# ------------------------------------------------------------------ redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("to", ["another", "itself", "scheme-relative", "https", "nonsense"])
def test_a_redirect_is_not_followed(server: JudgeServer, status: int, to: str) -> None:
    """A client that follows sends the key along, or drops it and asks a stranger for a verdict."""
    with judge_server() as another:
        places = {"another": another.url, "itself": server.url, "https": "https://127.0.0.1:1/"}
        location = places.get(to, f"//127.0.0.1:{another.server_address[1]}/v1/chat/completions")
        reply = whole(b"", f"{status} There", f"Location: {location if to != 'nonsense' else to}")
        [score] = ask(server, reply).ask([QUESTION])
        assert another.seen == []
    assert score.value is None
    assert score.reason.startswith(f"judge: HTTP status {status}: a redirect to ")
    assert len(server.seen) == 1


def test_a_redirect_to_nowhere_is_a_bad_status(server: JudgeServer) -> None:
    [score] = ask(server, whole(b"", "302 Found")).ask([QUESTION])
    assert score.value is None
    assert score.reason.startswith("judge: HTTP status 302")


# ------------------------------------------------------------------ endless replies

HEAD = b"HTTP/1.1 200 OK\r\n"
MEGABYTE = 1 << 20


def packed(megabytes: int) -> Iterator[bytes]:
    """Endless gzip of spaces, a kilobyte per megabyte."""
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    start = packer.compress(b" " * MEGABYTE) + packer.flush(zlib.Z_FULL_FLUSH)
    part = packer.compress(b" " * MEGABYTE) + packer.flush(zlib.Z_FULL_FLUSH)
    yield start
    # fully flushed data is self-contained and may be repeated
    yield from [part * 64] * (megabytes // 64)


def endless(head: bytes, part: bytes, megabytes: int) -> Reply:
    return raw(head + b"\r\n", *[part] * (megabytes * MEGABYTE // len(part)))


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n"
PACKED = HEAD + b"Content-Encoding: gzip\r\n"
WITHOUT_END: dict[str, tuple[Reply, str]] = {
    "1.2 GB of text": (
        endless(HEAD + b"Content-Length: 1258291200\r\n", b" " * 65536, 1200),
        "bad verdict: a body of more than",
    ),
    "a body without a length": (endless(HEAD, b"x" * 65536, 1200), "bad verdict: a body of more"),
    "chunks for ever": (
        endless(CHUNKED, b"1000\r\n" + b" " * 4096 + b"\r\n", 1200),
        "bad verdict: a body of more than",
    ),
    "815 kB of gzip that are 1.2 GB": (
        raw(PACKED + b"\r\n", *packed(1200)),
        "bad verdict: a body of more than",
    ),
    "gzip of nothing for ever": (
        # an empty stored block, over and over
        endless(PACKED, b"\0\0\0\xff\xff" * 10_000, 1200),
        "bad verdict: a body",
    ),
    "an error of 1.2 GB": (
        endless(b"HTTP/1.1 401 No\r\n", b"x" * 65536, 1200),
        "HTTP status 401: a body of more than",
    ),
    "an error of 1.2 GB of gzip": (
        raw(b"HTTP/1.1 404 No\r\nContent-Encoding: gzip\r\n\r\n", *packed(1200)),
        "HTTP status 404: a body of more than",
    ),
    "a redirect with 1.2 GB": (
        endless(b"HTTP/1.1 302 No\r\nLocation: /\r\n", b"x" * 65536, 1200),
        "HTTP status 302: a redirect",
    ),
    "headers for ever": (
        raw(HEAD, *[b"X-More: and more\r\n" * 4096] * 16_000),
        "no connection",
    ),
    "a header for ever": (raw(HEAD + b"X: ", *[b"x" * 65536] * 16_000), "no connection"),
    "a status line for ever": (raw(*[b"HTTP/1.1 200 " * 5000] * 16_000), "no connection"),
    "a chunk's size for ever": (raw(CHUNKED + b"\r\n", *[b"1" * 65536] * 16_000), "no connection"),
    "a chunk's comment for ever": (
        raw(CHUNKED + b"\r\n1;", *[b"x" * 65536] * 16_000),
        "no connection",
    ),
    "trailers for ever": (
        raw(CHUNKED + b"\r\n0\r\n", *[b"X-More: and more\r\n" * 4096] * 16_000),
        "no connection",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_END)
def test_memory_stays_flat_whatever_is_sent(server: JudgeServer, name: str) -> None:
    """A body of 1.2 GB took 2.5 GB of memory, and 815 kB of gzip 1.7 GB, before it was rejected.

    The replies end after a gigabyte, so that a client that reads it all fails here instead of
    hanging.
    """
    reply, reason = WITHOUT_END[name]
    judge = ask(server, reply)
    judge.ask([QUESTION])  # imports and caches of the first call do not count
    tracemalloc.start()
    try:
        [score] = judge.ask([QUESTION])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert score.value is None
    assert score.reason.startswith(f"judge: {reason}")
    # a few copies of a bounded body, in UTF-8, as text and as its repr, and the client's own 2 MB
    assert peak < 10 * LONGEST_BODY + 2 * MEGABYTE


@pytest.mark.parametrize("size", [LONGEST_BODY, LONGEST_BODY + 1])
@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_the_limit_applies_to_the_decompressed_body(
    server: JudgeServer, size: int, coding: str
) -> None:
    body = chat('{"reason": "r", "score": 8}').ljust(size)
    if coding == "gzip":
        packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
        body = packer.compress(body) + packer.flush()
    [score] = ask(server, whole(body, "200 OK", f"Content-Encoding: {coding}")).ask([QUESTION])
    assert (score.value == 0.8) == (size == LONGEST_BODY)


@pytest.mark.parametrize(
    ("coding", "reason"),
    [
        ("gzip", "a body that cannot be decompressed"),
        ("br", "a body in 'br', which was not requested"),
        ("gzip, gzip", "a body in 'gzip, gzip', which was not requested"),
        ("deflate", "a body in 'deflate', which was not requested"),
    ],
)
def test_a_body_in_another_coding(server: JudgeServer, coding: str, reason: str) -> None:
    [score] = ask(server, whole(b"xyz", "200 OK", f"Content-Encoding: {coding}")).ask([QUESTION])
    assert score == Score(None, score.reason)
    assert score.reason.startswith(f"judge: bad verdict: {reason}")


@pytest.mark.parametrize("count", [10**10, -1, True, 1.5, "100", None, [1], 10**4000])
def test_an_invalid_token_count_costs_nothing(server: JudgeServer, count: object) -> None:
    """``10**4000`` tokens times a price was an OverflowError, and the verdict was lost."""
    body = json.loads(chat('{"reason": "r", "score": 8}')) | {
        "usage": {"prompt_tokens": count, "completion_tokens": 3}
    }
    server.mode = whole(json.dumps(body).encode())
    judge = Judge(Endpoint(server.url, "judge", prompt_price=1e6, completion_price=1e6))
    assert judge.ask([QUESTION]) == [Score(0.8, "r")]
    usage = asdict(judge.usage)
    assert [usage[n] for n in ("prompt_tokens", "completion_tokens", "dollars")] == [0, 3, 3.0]


@pytest.mark.parametrize("row", [(99, "r"), ("high", "r"), (None, "r"), (5, None), (5, b"\xff")])
def test_an_invalid_cached_verdict_is_requested_again(
    server: JudgeServer, tmp_path: Path, row: tuple[object, object]
) -> None:
    path = tmp_path / "verdicts.db"
    with closing(VerdictCache(path)) as cache:
        cache._db.execute("INSERT INTO verdict VALUES (?, ?, ?)", (QUESTION.key("judge"), *row))
    assert ask(server, cache=path).ask([QUESTION]) == [Score(0.8, "so it is")]
    with closing(VerdictCache(path)) as cache:
        assert cache.get(QUESTION.key("judge")) == JudgeVerdict(8, "so it is")
