"""When one process of a run is gone, the others stop at once and say which.

Collectives wait for a lost process until their time limit, tens of minutes, and name none. So every
process keeps a connection to the main one, whose end the system reports however a process dies; the
main process passes it on. A host that is lost is noticed by TCP within a minute. A process that
hangs is not noticed here: that takes the collectives' limit.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from omni_grpo_core.errors import TrainError

GRACE = 5.0
"""Seconds in which a process may end in order before it is ended: a collective of NCCL cannot be
interrupted."""
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
_CODE = 2
_CONNECT = 60.0
_LOST, _FAILED, _BYE = b"lost", b"failed", b"bye"


class Liveness:
    """One process's connections, as a context: leaving it says how this process ended."""

    def __init__(self, rank: int, world: int, gather: Callable[[Sequence[str]], list[str]]) -> None:
        """Every process has to create its own. ``gather``: strings of all processes by rank."""
        self._rank = rank
        self._ended, self._noticed = threading.Event(), threading.Event()
        self._lost = 0
        self._links: dict[socket.socket, int] = {}
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        own = secrets.token_hex(16)
        server = None
        if rank == 0:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                server = socket.create_server((host, 0), family=family, backlog=world)
            except OSError:  # an address that a router maps to this machine
                server = socket.create_server(("", 0), family=family, backlog=world)
            own = f"{server.getsockname()[1]} {own}"
        port, token = gather([own])[0].split()
        self._names = gather([f"{rank} of {world} (pid {os.getpid()} on {socket.gethostname()})"])
        if server is not None:
            self._accept(server, token, world)
        else:
            link = socket.create_connection((host, int(port)), timeout=_CONNECT)
            link.sendall(f"{token} {rank}\n".encode())
            self._add(link, 0)
        threading.Thread(target=self._follow, daemon=True).start()

    def _accept(self, server: socket.socket, token: str, world: int) -> None:
        server.settimeout(_CONNECT)
        with server:
            while len(self._links) + 1 < world:
                link, _ = server.accept()
                link.settimeout(_CONNECT)
                said, _, rank = _line(link).decode(errors="replace").partition(" ")
                if secrets.compare_digest(said.encode(), token.encode()) and rank.isdecimal():
                    self._add(link, int(rank))

    def _add(self, link: socket.socket, rank: int) -> None:
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._links[link] = rank

    def __enter__(self) -> Liveness:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._send(_BYE if kind is None else _FAILED, self._rank)

    def lost(self, seconds: float) -> TrainError | None:
        """The error that names the process that was lost; waits for it to be noticed."""
        noticed = self._noticed.wait(seconds)
        return self._error(self._lost) if noticed else None

    def _error(self, rank: int) -> TrainError:
        return TrainError(
            "processes of the run",
            got=f"process {self._names[rank]} ended",
            want="all of them running until the end",
            fix="read what it printed last, or look whether the system killed it (out of memory?); "
            "then start the same command again: it goes on from the last saved state",
        )

    def _follow(self) -> None:
        """The thread: until something ends a process, or all have said that they are done."""
        with selectors.DefaultSelector() as ready:
            for link in self._links:
                ready.register(link, selectors.EVENT_READ)
            while ready.get_map():
                for key, _ in ready.select():
                    source = key.fileobj
                    assert isinstance(source, socket.socket)
                    said, _, about = _line(source).partition(b" ")
                    rank = int(about or self._links[source])
                    if said == _BYE:
                        ready.unregister(source)
                        continue
                    if self._rank == 0:
                        self._send(said or _LOST, rank)
                    self._stop(rank, at_once=said != _FAILED)
                    return

    def _send(self, said: bytes, rank: int) -> None:
        for link in self._links:
            try:
                link.sendall(b"%s %d\n" % (said, rank))
            except OSError:
                continue  # it is gone too

    def _stop(self, rank: int, *, at_once: bool) -> None:
        self._lost = rank
        self._noticed.set()
        if at_once:
            print(f"process {self._names[rank]} ended: stopping", file=sys.stderr, flush=True)
        if self._ended.wait(GRACE):
            return
        print(f"error: {self._error(rank)}", file=sys.stderr, flush=True)
        os._exit(_CODE)


def _line(link: socket.socket) -> bytes:
    """What the other side says, without the end of the line; nothing if it is gone."""
    said = b""
    try:
        while not said.endswith(b"\n"):
            more = link.recv(1)
            if not more:
                return b""
            said += more
    except OSError:
        return b""
    return said.rstrip(b"\n")
