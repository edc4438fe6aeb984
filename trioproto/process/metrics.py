"""Metrics of a server for Prometheus, summed over all of its workers.

Requires the extra ``metrics`` (prometheus-client). The HTTP server of prometheus-client runs in threads and cannot be
used here: a supervisor forks, which is not safe with threads (`subprocess.Popen`, ``preexec_fn``), and it logs a
traceback when a peer disconnects. Instead, an ordinary handler answers one request on each connection.
"""

import logging
from collections.abc import Iterator

import trio
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from trioproto.addresses import format_address
from trioproto.connection import Connection
from trioproto.process.scoreboard import Scoreboard
from trioproto.server import DURATIONS, serve_listeners

_log = logging.getLogger(__name__)

# The time-out of a scrape, and how many there may be at once, so that scrapes do not use up the clients' descriptors.
SCRAPE_SECONDS = 10.0
MAX_SCRAPES = 10

_MAX_HEAD = 8192  # bytes of a request, before the empty line
_PATHS = (b"/", b"/metrics")


async def serve_metrics(listeners: list[trio.SocketListener], scoreboard: Scoreboard) -> None:
    """Serve the numbers in ``scoreboard`` at ``/metrics`` on ``listeners`` (HTTP/1.1, RFC 9112), forever.

    On cancellation, the listeners are closed.
    """
    for listener in listeners:
        _log.info("metrics on http://%s/metrics", format_address(listener.socket.getsockname()))
    registry = registry_of(scoreboard)

    async def answer(stream: trio.SocketStream) -> None:
        async with Connection(stream, idle_timeout=SCRAPE_SECONDS, request_timeout=SCRAPE_SECONDS) as connection:
            head = await connection.receive_until(b"\r\n\r\n", max_bytes=_MAX_HEAD)
            match head.split(b"\r\n")[0].split(b" "):
                case [b"GET", target, _] if target.partition(b"?")[0] in _PATHS:
                    status, type_, body = "200 OK", CONTENT_TYPE_PLAIN_0_0_4, generate_latest(registry)
                case _:
                    status, type_, body = "404 Not Found", "text/plain", b"There is only GET /metrics.\n"
            start = f"HTTP/1.1 {status}\r\nContent-Type: {type_}\r\nContent-Length: {len(body)}\r\n"
            await connection.send_all(f"{start}Connection: close\r\n\r\n".encode() + body)

    await serve_listeners(answer, listeners, max_connections=MAX_SCRAPES)


def registry_of(scoreboard: Scoreboard) -> CollectorRegistry:
    """Return a prometheus_client registry with the metrics of all workers."""
    registry = CollectorRegistry()
    registry.register(_Scoreboard(scoreboard))
    return registry


class _Scoreboard(Collector):
    """Provides prometheus_client with the current metrics."""

    def __init__(self, scoreboard: Scoreboard) -> None:
        self._scoreboard = scoreboard

    def collect(self) -> Iterator[Metric]:
        stats = self._scoreboard.total()
        for name, documentation, number in (
            ("connections_accepted", "Connections accepted", stats.accepted),
            (
                "connections_refused",
                "Connections closed unserved: too many from one client, or not from a trusted proxy",
                stats.refused,
            ),
            ("connections_crashed", "Connections whose handler raised an exception", stats.crashed),
            ("accept_errors", "Accept errors: connection lost, out of descriptors or memory", stats.accept_errors),
            ("received_bytes", "Bytes received from clients", stats.received),
            ("sent_bytes", "Bytes sent to clients", stats.sent),
            ("requests", "Requests read", stats.requests),
        ):
            yield CounterMetricFamily(f"trioproto_{name}", documentation, number)
        ended = CounterMetricFamily("trioproto_connections_ended", "Connections ended, by how", labels=["how"])
        for how, number in stats.ended.items():
            ended.add_metric([how], number)
        yield ended
        yield GaugeMetricFamily("trioproto_connections_active", "Connections open now", stats.active)
        if most := sum(self._scoreboard.most):
            yield GaugeMetricFamily("trioproto_connections_max", "Connections that may be open at once", most)
        buckets = []
        count = 0
        for bound, number in zip([*map(str, DURATIONS), "+Inf"], stats.durations, strict=True):
            count += number
            buckets.append((bound, count))
        documentation = "Durations of connections that have ended"
        yield HistogramMetricFamily(
            "trioproto_connection_duration_seconds", documentation, buckets=buckets, sum_value=stats.seconds
        )
