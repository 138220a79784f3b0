"""The guard in conftest.py stops every connection beyond this machine, and nothing else."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

DOCUMENTATION_HOST = "192.0.2.1"
"""RFC 5737: reserved, so that a hole in the guard would reach nobody."""


def test_connecting_elsewhere_fails_the_test() -> None:
    with socket.socket() as sock, pytest.raises(pytest.fail.Exception, match=DOCUMENTATION_HOST):
        sock.connect((DOCUMENTATION_HOST, 80))


def test_sending_a_datagram_elsewhere_fails_the_test() -> None:
    with (
        socket.socket(type=socket.SOCK_DGRAM) as sock,
        pytest.raises(pytest.fail.Exception, match=DOCUMENTATION_HOST),
    ):
        sock.sendto(b"x", (DOCUMENTATION_HOST, 9))


def test_looking_up_a_name_fails_the_test() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"nowhere\.invalid"):
        socket.create_connection(("nowhere.invalid", 80))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_is_allowed(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection((host, port)) as client, server.accept()[0] as peer:
            client.sendall(b"hello")
            assert peer.recv(5) == b"hello"


def test_unix_sockets_are_allowed(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        # relative to the folder: a unix address has at most about a hundred characters
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            server.bind("s")
            server.listen()
            client.connect("s")
        client.sendall(b"hello")
        with server.accept()[0] as peer:
            assert peer.recv(5) == b"hello"
