"""Settings of every test: few threads, no hub, no network, one hypothesis profile.

The environment is set when this file is loaded, before any test module can import torch or
transformers, which read it once.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

# fixtures shared between folders; modules, because mypy accepts only one file named conftest
pytest_plugins = [
    "shipped_fixtures",
    "qwen3_fixtures",
    "real_vocab_fixtures",
    "robustness_summary",
]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell without job control starts background processes like this, and the tests' own
    # processes, to which they send Ctrl-C, inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    # the workers run in parallel; thread pools in each would only make them wait for one another
    for pool in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[pool] = "1"

# A slow machine is not a bug: neither profile has a deadline. The default suite always runs the
# same examples; the slow profile draws new ones, keeps those that fail, tries them first next
# time, and prints how to reproduce them.
settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "slow",
    settings.get_profile("default"),
    max_examples=20_000,
    derandomize=False,
    database=DirectoryBasedExampleDatabase(Path(__file__).parent / ".hypothesis" / "examples"),
    print_blob=True,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    """Tests read what is printed where there is no terminal. Some CI forces one upon every
    program; by now pytest's own colours are chosen."""
    for name in ("FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE", "GITHUB_ACTIONS"):
        os.environ.pop(name, None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """Each worker begins with a part of its own and takes from the others when it has finished:
    tests of a module, and what they share, are seldom made twice. ``--dist`` chooses another."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    scheduler: object = WorkStealingScheduling(config, log)
    return scheduler


@pytest.fixture(autouse=True)
def process_restored() -> Iterator[None]:
    """Restores import path and environment, which a command that runs in this process changes for
    good. Accelerate keeps one state per process, and refuses a run with another precision."""
    path, environment = [*sys.path], {**os.environ}
    yield
    if accelerate := sys.modules.get("accelerate.state"):
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)
    sys.path[:] = path
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _is_loopback(host: object) -> bool:
    if host in ("", "localhost", b"localhost", None):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


def _guarded(call: Callable[..., Any]) -> Callable[..., Any]:
    def guard(sock: socket.socket, *args: Any) -> Any:
        address = args[-1]
        if sock.family != getattr(socket, "AF_UNIX", None) and not _is_loopback(address[0]):
            pytest.fail(f"a test tried to use the network: {address!r}")
        return call(sock, *args)

    return guard


@pytest.fixture(scope="session", autouse=True)
def loopback_only() -> Iterator[None]:
    """Fail any test that connects, sends or looks up a name beyond this machine.

    ``pytest.fail`` raises an exception that ``except Exception`` does not catch, so a client that
    retries or falls back on errors cannot hide the attempt.
    """
    look_up = socket.getaddrinfo

    def guarded_look_up(host: object, *args: Any, **kwargs: Any) -> Any:
        if not _is_loopback(host):
            pytest.fail(f"a test looked up a host name: {host!r}")
        return look_up(host, *args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield
