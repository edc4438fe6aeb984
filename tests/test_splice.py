"""Moving bytes inside the kernel: what goes through a pipe, and what happens where the system has no such thing."""

import errno
import os
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import arrival, fill, reset

from trioproto import receive_exactly
from trioproto.transport import (
    PIPE_SIZE,
    Pipe,
    SocketTransport,
)

linux_only = pytest.mark.skipif(not hasattr(os, "splice"), reason="no splice(2)")


def open_descriptors() -> int:
    """Count this process's descriptors."""
    return len(list(Path("/dev/fd").iterdir()))


@linux_only
async def test_splice(fast: tuple[SocketTransport, trio.SocketStream]) -> None:
    """What has arrived goes through a pipe to where there is room; the pipe leaves no descriptor behind."""
    transport, peer = fast
    before = open_descriptors()
    pipe = Pipe()
    assert transport.splice_to(pipe) == 0
    await arrival(peer, b"hello")
    assert transport.splice_to(pipe) == 5
    assert transport.splice_from(pipe) == 5
    assert await receive_exactly(peer, 5) == b"hello"
    await peer.send_eof()
    await trio.sleep(0.01)
    assert transport.splice_to(pipe) == 0
    pipe.close()
    assert open_descriptors() == before


@linux_only
async def test_splice_without_room(fast: tuple[SocketTransport, trio.SocketStream]) -> None:
    """Without room nothing is sent, and what the pipe holds stays there."""
    transport, peer = fast
    pipe = Pipe()
    await arrival(peer, b"hello")
    assert transport.splice_to(pipe) == 5
    fill(transport._stream)  # noqa: SLF001 - there is no other way to it
    assert transport.splice_from(pipe) == 0
    assert os.read(pipe.outlet, 100) == b"hello"
    pipe.close()


@linux_only
async def test_splice_on_a_connection_that_is_gone(fast: tuple[SocketTransport, trio.SocketStream]) -> None:
    """The errors are those of receiving and of sending."""
    transport, peer = fast
    pipe = Pipe()
    await arrival(peer, bytes(1000))
    assert transport.splice_to(pipe) == 1000
    reset(peer)
    await trio.sleep(0.01)
    with pytest.raises(trio.BrokenResourceError):
        transport.splice_to(pipe)
    with pytest.raises(trio.BrokenResourceError):
        transport.splice_from(pipe)
    await transport.aclose()
    with pytest.raises(trio.ClosedResourceError):
        transport.splice_to(pipe)
    with pytest.raises(trio.ClosedResourceError):
        transport.splice_from(pipe)
    pipe.close()


@linux_only
@pytest.mark.parametrize("name", ["ENOSYS", "EPERM", "EACCES", "EINVAL", "EOPNOTSUPP"])
async def test_splice_that_is_refused(
    name: str, fast: tuple[SocketTransport, trio.SocketStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system has no such thing, or a sandbox forbids it, the error says so, and nothing is broken."""
    transport, _peer = fast
    code = getattr(errno, name)

    def splice(source: int, target: int, count: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "splice", splice)
    pipe = Pipe()
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        transport.splice_to(pipe)
    assert caught.value.errno == code
    pipe.close()


def test_no_pipes_without_splice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no splice(2), such as on FreeBSD and macOS, there is no use for a pipe, and none is opened."""
    monkeypatch.delattr(os, "splice", raising=False)
    before = open_descriptors()
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
        Pipe()
    assert open_descriptors() == before


@linux_only
def test_pipes_when_the_user_may_not_have_larger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe of the default size does, too."""
    import fcntl  # noqa: PLC0415 - Windows has none

    def refuse(fd: int, command: int, argument: int) -> int:
        assert (command, argument) == (fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    Pipe().close()
