"""The trees of tasks in the modules' documentation are those of servers that run."""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import trio
from helpers import LIMIT

import trioproto.server
from trioproto.connection import Connection
from trioproto.process import service, workers

# Whom a task supervises, by their names, and the names themselves as far as the documentation gives them.
Pairs = set[tuple[str, str]]

ROOT = ""  # the task that awaits all of it


class Recorder(trio.abc.Instrument):
    """Records the pairs of parent and child tasks that are both trioproto's."""

    def __init__(self) -> None:
        self.pairs: Pairs = set()

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        if task.parent_nursery is not None:
            parent, child = task.parent_nursery.parent_task.name, task.name
            if parent.startswith("trioproto.") and child.startswith("trioproto."):
                self.pairs.add((short(parent), short(child)))


def short(name: str) -> str:
    """Leave out a task's module, and the function in which its own was defined."""
    name = re.sub(r"^trioproto\.([a-z]+\.)*", "", name).rpartition("<locals>.")[2]
    return ROOT if name in ("serve_until_signal", "supervise_until_signal") else name


def documented(module: ModuleType) -> Pairs:
    """Read a module's tree: each entry of a task, with the task above it, whatever nurseries are between."""
    (tree,) = re.findall(r"Task tree::\n\n((?:    .*\n)+)", f"{module.__doc__}\n")
    above = [(-1, ROOT)]
    pairs = set()
    for branch, entry in re.findall(r"^([ │]*[├└]── )(.*)$", tree, re.MULTILINE):
        while above[-1][0] >= len(branch):
            above.pop()
        name = re.split("[:,]", entry)[0]
        if re.fullmatch(r"\w+(\.\w+)*", name) and name != "nursery":
            pairs.add((above[-1][1], name))
            above.append((len(branch), name))
    return pairs


@pytest.fixture
def end_stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    reading, writing = os.pipe()
    monkeypatch.setattr(service, "_STDIN", reading)
    yield functools.partial(os.close, writing)
    os.close(reading)


async def test_tasks_of_a_server(end_stdin: Callable[[], None]) -> None:
    """One that runs until a signal has the tasks of service.py and, in the same task, those of server.py."""
    listening = trio.Event()
    addresses: list[str] = []

    async def push(stream: trio.SocketStream) -> None:
        async with Connection(stream, max_unsent=1000) as connection:
            connection.push(b"hello")
            await connection.stopping.wait()

    def announce(address: str) -> None:
        addresses.append(address)
        listening.set()

    recorder = Recorder()
    trio.lowlevel.add_instrument(recorder)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            serve = functools.partial(service.serve_until_signal, stop_at_eof=True, max_connections_per_client=1)
            nursery.start_soon(functools.partial(serve, announce=announce), push, 0)
            await listening.wait()
            host, _, port = addresses[0].rpartition(":")
            async with await trio.open_tcp_stream(host, int(port)) as client:
                assert await client.receive_some() == b"hello"
                async with await trio.open_tcp_stream(host, int(port)) as refused:
                    with pytest.raises(trio.BrokenResourceError):
                        await refused.receive_some()
                end_stdin()
                assert await client.receive_some() == b""
    trio.lowlevel.remove_instrument(recorder)

    assert recorder.pairs == documented(trioproto.server) | documented(service)
    assert len(recorder.pairs) == 7


async def test_tasks_of_a_supervisor_of_workers(end_stdin: Callable[[], None]) -> None:
    """It has the tasks of service.py without the server, and in their place those of workers.py."""
    recorder = Recorder()
    trio.lowlevel.add_instrument(recorder)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            supervise = functools.partial(
                workers.supervise_until_signal, stop_at_eof=True, announce=lambda _address: end_stdin()
            )
            nursery.start_soon(supervise, lambda _fds: [sys.executable, "-c", "import sys; sys.stdin.read()"], 2, 0)
    trio.lowlevel.remove_instrument(recorder)

    assert recorder.pairs == documented(workers) | documented(service)
