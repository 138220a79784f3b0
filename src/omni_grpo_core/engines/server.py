"""An engine in a process of its own, over HTTP on this machine: where it is killed or hangs, it is
ended and begun again, and the run goes on.

``python -m omni_grpo_core.engines.server --engine vllm`` serves a
:class:`~omni_grpo_core.engines.requests.Backend`; :class:`ServedBackend` is its client, and starts
one itself where it is given no address. Bodies are :mod:`~omni_grpo_core.engines.wire`: arrays and
JSON, nothing that runs code.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from omni_grpo_core.engines import wire
from omni_grpo_core.engines.requests import Answer, Backend, EngineLost, Request, Sampling
from omni_grpo_core.errors import OmniGrpoError
from omni_grpo_core.io.extras import extra

EngineName = Literal["vllm", "transformers"]
LOOPBACK = "127.0.0.1"
_LARGEST = 1 << 32
"""Bytes of a body."""


def backend_named(name: EngineName, settings: dict[str, Any] | None = None) -> Backend:
    """The engine of that name, in this process."""
    if name == "vllm":
        from omni_grpo_core.engines.vllm_backend import EngineSettings, VllmBackend

        return VllmBackend(EngineSettings(**(settings or {})))
    from omni_grpo_core.engines.transformers_backend import TransformersBackend

    return TransformersBackend()


class _Handler(BaseHTTPRequestHandler):
    backend: Backend
    lock: threading.Lock

    def do_GET(self) -> None:
        self._reply(200, json.dumps({"name": self.backend.name}).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), _LARGEST))
        try:
            with self.lock:  # an engine takes one call at a time
                self._reply(200, self._answer(body))
        except OmniGrpoError as error:
            text = {"item": error.item, "got": error.got, "want": error.want, "fix": error.fix}
            self._reply(500, json.dumps(text).encode())

    def _answer(self, body: bytes) -> bytes:
        if self.path == "/generate":
            return wire.pack_answers(self.backend.generate(*wire.unpack_requests(body)))
        if self.path == "/load":
            return json.dumps(
                {"read": self.backend.load(Path(json.loads(body)["folder"]))}
            ).encode()
        if self.path in ("/sleep", "/wake"):
            getattr(self.backend, self.path[1:])()
            return b"{}"
        raise EngineLost(
            "engine server",
            got=f"the path {self.path}",
            want="/generate, /load, /sleep or /wake",
            fix="correct it",
        )

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """No line for each request."""


def serve(backend: Backend, port: int = 0) -> ThreadingHTTPServer:
    """A server on the loopback address, not yet running; port 0: a free one."""
    handler = type("Handler", (_Handler,), {"backend": backend, "lock": threading.Lock()})
    return ThreadingHTTPServer((LOOPBACK, port), handler)


class ServedBackend:
    """A :class:`~omni_grpo_core.engines.requests.Backend` in another process.

    ``url``: of a running server; ``None``: one is started with ``engine`` and ``settings``, and
    started anew where it was lost. ``seconds``: how long a call may take before the engine counts
    as hung. Raises ``MissingExtra`` without httpx.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        engine: EngineName = "vllm",
        settings: dict[str, Any] | None = None,
        seconds: float = 600.0,
    ) -> None:
        with extra("vllm"):
            import httpx
        self._httpx = httpx
        self._own = url is None
        self._url, self._engine, self._settings = url, engine, settings or {}
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    @property
    def name(self) -> str:
        if self._url is None:
            return f"{self._engine}, in a process of its own"
        found = json.loads(self._call("GET", "/", b""))["name"]
        return f"{found} at {self._url}"

    @property
    def pid(self) -> int | None:
        """Of the process that was started here."""
        return self._process.pid if self._process else None

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        return wire.unpack_answers(
            self._call("POST", "/generate", wire.pack_requests(requests, sampling))
        )

    def load(self, folder: Path) -> str:
        body = json.dumps({"folder": str(folder)}).encode()
        return str(json.loads(self._call("POST", "/load", body))["read"])

    def sleep(self) -> None:
        self._call("POST", "/sleep", b"")

    def wake(self) -> None:
        self._call("POST", "/wake", b"")

    def restart(self) -> None:
        if not self._own:
            raise EngineLost(
                f"engine at {self._url}",
                got="a server that was not started here and is lost",
                want="a running one",
                fix="start it again and resume the run: saved states are complete",
            )
        self.close()

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with process:  # its pipe ends with it, and so does what reads that
                process.kill()
                self._reader.join()
        if self._own:
            self._url = None

    def _start(self) -> None:
        command = [sys.executable, "-m", "omni_grpo_core.engines.server", "--engine", self._engine]
        command += ["--settings", json.dumps(self._settings)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.strip():
            raise EngineLost(
                f"{self._engine} server",
                got=f"an end with exit code {self._process.wait()}",
                want="a server that starts",
                fix="read its output above",
            )
        self._url = line.strip()
        # what the engine prints goes on to stderr; a full pipe would stop it
        self._reader = threading.Thread(
            target=self._drain, args=(self._process.stdout,), daemon=True
        )
        self._reader.start()

    @staticmethod
    def _drain(lines: Any) -> None:
        for line in lines:
            sys.stderr.write(line)

    def _call(self, method: str, path: str, body: bytes) -> bytes:
        if self._url is None:
            self._start()
        try:
            reply = self._httpx.request(
                method, f"{self._url}{path}", content=body, timeout=self._seconds, trust_env=False
            )
        except self._httpx.TimeoutException as error:
            raise self._lost(f"no answer within {self._seconds:g} s") from error
        except self._httpx.TransportError as error:
            raise self._lost(f"{type(error).__name__}: {error}") from error
        if reply.status_code != 200:
            raise EngineLost(**reply.json())
        return bytes(reply.content)

    def _lost(self, got: str) -> EngineLost:
        ended = ""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):  # its connections close before it is gone
                ended = f"; its process ended with exit code {self._process.wait(1)}"
        return EngineLost(
            f"rollout engine at {self._url}",
            got=f"{got}{ended}",
            want="an answer",
            fix="read its output; for memory, lower vllm: memory; if it only is slow, raise vllm: "
            "seconds",
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the address, then serve until killed."""
    parser = argparse.ArgumentParser(prog="python -m omni_grpo_core.engines.server")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, default={})
    given = parser.parse_args(arguments)
    server = serve(backend_named(given.engine, given.settings), given.port)
    print(f"http://{LOOPBACK}:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
