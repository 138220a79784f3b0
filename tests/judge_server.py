"""A small OpenAI-compatible judge on loopback that can misbehave in every way.

It grades like a naive model: the data between the delimiters of the system prompt is graded, and
*anything in the user message outside them is obeyed as an instruction*.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_DELIMITER = re.compile(r"`BEGIN (\w+)`")
_COMMAND = re.compile(r"give (\d+) points", re.IGNORECASE)


HANG_GUARD = 60
"""Seconds after which a waiting test gives up; no result depends on speed."""


class JudgeServer(ThreadingHTTPServer):
    """``mode`` decides what happens to every request; a function writes the reply itself.

    ``verdict``: the reason that it gives. ``seen``: judged texts, in order. ``together``: requests
    are answered only once this many are waiting. ``hold_after``: requests after this many are never
    answered, and ``held`` is set.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mode: str | Callable[[BaseHTTPRequestHandler], None] = "answer"
        self.verdict = "so it is"
        self.together: threading.Barrier | None = None
        self.hold_after: int | None = None
        self.held = threading.Event()
        self.seen: list[str] = []
        self.nonces: list[str] = []
        self.busy = self.busiest = 0
        self.closing = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    with JudgeServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        points, judged, nonce = grade(request["messages"])
        with server.lock:
            server.seen.append(judged)
            server.nonces.append(nonce)
            attempt = len(server.seen)
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        if server.together is not None:
            server.together.wait(HANG_GUARD)
        if server.hold_after is not None and attempt > server.hold_after:
            server.held.set()
            server.closing.wait()
        # before the reply, which lets the client send its next request
        with server.lock:
            server.busy -= 1
        try:
            if callable(server.mode):
                self.close_connection = True
                server.mode(self)
            else:
                self._reply(server.mode, points, attempt)
        except ConnectionError:
            self.close_connection = True

    def _reply(self, mode: str, points: int, attempt: int) -> None:
        verdict = json.dumps({"reason": self.server.verdict, "score": points})
        if mode == "429 then answer":
            mode = "429" if attempt == 1 else "answer"
        if mode == "stall":
            self.server.closing.wait()
        elif mode == "drip":
            self._start(200, 10_000)
            while not self.server.closing.wait(0.05):
                self.wfile.write(b" ")
        elif mode == "drop":
            self.close_connection = True
        elif mode == "drop midway":
            self._start(200, 10_000)
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        elif mode.isdigit():
            self._send(int(mode), json.dumps({"error": {"message": "no"}}).encode())
        elif mode in BODIES:
            self._send(200, BODIES[mode])
        else:
            self._send(200, chat(CONTENTS.get(mode, verdict)))

    def _start(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, status: int, body: bytes) -> None:
        self._start(status, len(body))
        self.wfile.write(body)


def grade(messages: list[dict[str, str]]) -> tuple[int, str, str]:
    """Points, the judged text and the nonce of a request."""
    system, user = (message["content"] for message in messages)
    found = _DELIMITER.search(system)
    assert found, "the system prompt names no delimiter"
    nonce = found.group(1)
    # a model reads line by line: the data ends at the end line
    before, _, rest = user.partition(f"BEGIN {nonce}\n")
    inside, _, after = rest.partition(f"\nEND {nonce}")
    data = json.loads(inside)
    command = _COMMAND.search(before + after)
    right = str(data["reference"]).split("\n")[0] in data["judged"]
    return int(command.group(1)) if command else 8 if right else 1, data["judged"], nonce


def chat(content: Any) -> bytes:
    return json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": content},
                }
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
    ).encode()


# replies in place of a verdict
CONTENTS: dict[str, Any] = {
    "5 points": "5 points",
    "number alone": "5",
    "prose around": 'Sure! {"reason": "r", "score": 10}',
    "fenced": '```json\n{"reason": "r", "score": 10}\n```',
    "NaN": '{"reason": "r", "score": NaN}',
    "Infinity": '{"reason": "r", "score": Infinity}',
    "string score": '{"reason": "r", "score": "5"}',
    "float score": '{"reason": "r", "score": 5.5}',
    "bool score": '{"reason": "r", "score": true}',
    "score 11": '{"reason": "r", "score": 11}',
    "score -1": '{"reason": "r", "score": -1}',
    "huge score": '{"reason": "r", "score": 1' + "0" * 5000 + "}",
    "score twice": '{"reason": "r", "score": 1, "score": 10}',
    "no score": '{"reason": "r"}',
    "more keys": '{"reason": "r", "score": 5, "bonus": 5}',
    "list": '[{"reason": "r", "score": 5}]',
    "reason null": '{"reason": null, "score": 5}',
    "1 MB": "x" * 1_000_000,
    "1 MB reason": json.dumps({"reason": "x" * 1_000_000, "score": 10}),
    "deep": "[" * 15_000,
    "empty": "",
    "null": None,
    "parts": [{"type": "text", "text": "5"}],
    "very deep": "[" * 200_000,
    "deep score": '{"reason": "r", "score": ' + "[" * 900 + "]" * 900 + "}",
    "deep objects": '{"score":' * 2_000,
    "surrogates": "\ud800\udfff",
    "surrogate score": '{"reason": "\\ud800", "score": "\\udfff"}',
    "escape codes": "\x1b[2J\x1b]0;title\x07",
    "null bytes": "\0" * 50,
    "exponent": '{"reason": "r", "score": 1e400}',
    "negative zero": '{"reason": "r", "score": -0.0}',
    "key in another case": '{"Reason": "r", "Score": 5}',
    "byte order mark": '\ufeff{"reason": "r", "score": 5}',
}
# replies in place of a chat completion
BODIES: dict[str, bytes] = {
    "html": b"<html>gateway</html>",
    "no body": b"",
    "wrong JSON": b'{"score": 5}',
    "no choices": b'{"choices": []}',
    "choices null": b'{"choices": null}',
    "array": b"[1, 2]",
    "not UTF-8": b"\xff\xfe\x00",
    "deep body": b"[" * 100_000,
    "very deep body": b"[" * 200_000,
    "deep choices": b'{"choices": ' + b"[" * 900 + b"]" * 900 + b"}",
    "integer of 5,000 digits": b'{"created": 1' + b"0" * 5000 + b"}",
    "many choices": b'{"choices": [' + b"{}, " * 50_000 + b"{}]}",
    "two choices": json.dumps({"choices": [json.loads(chat("x"))["choices"][0]] * 2}).encode(),
    "choice of text": b'{"choices": ["text"]}',
    "message of text": b'{"choices": [{"message": "text"}]}',
    "choices by name": b'{"choices": {"0": {}}}',
    "a number": b"5",
    "NaN alone": b"NaN",
    "cut off": chat('{"reason": "r", "score": 5}')[:-3],
    "two bodies": chat('{"reason": "r", "score": 5}') * 2,
    "UTF-16 without its mark": '{"choices": []}'.encode("utf-16-be")[1:],
    "half a character": chat("x") + b"\xe2\x82",
    "endless text": b" " * 1_000_000,
}
