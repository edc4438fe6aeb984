"""The tree of tasks: a server inside an app, recorded while it runs, and drawn.

Trio notifies an instrument of each task that starts and ends, and each task knows its nursery. That is enough to draw
what structured concurrency means: a nursery exits only when all its tasks have ended, so the tasks form a tree, and no
task outlives its parent.

Run it; it takes three seconds (the SVG is written if you name a file for it)::

    python examples/5b_task_tree.py [examples/task_tree.svg]

Note when each task ends. The crash ends connection 2, and nothing else. The stop ends connection 4 at once, because it
is idle, and lets connection 5 finish its request. After the grace period, connection 6 is still at work and is
cancelled, together with the tasks in its own nursery. Then the server returns. The app's own task is not affected.
"""

import contextlib
import functools
import itertools
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import attrs
import trio
import trio.testing

from trioproto import Connection, ServerStats, serve_tcp

# The recording.


@attrs.define(eq=False)
class Bar:
    """A task in the chart. Times are in seconds since the run began."""

    label: str
    start: float
    end: float = math.nan
    work: list[tuple[float, float]] = attrs.Factory(list)  # start and end of each request that it worked on
    ticks: list[float] = attrs.Factory(list)  # of the accept loop
    ending: str = ""  # why it ended
    nurseries: dict[trio.Nursery, list["Bar"]] = attrs.Factory(dict)  # the tasks in each of its nurseries


class Recorder(trio.abc.Instrument):
    """Records every task of a run; a task may add its own label, work and ticks."""

    def before_run(self) -> None:
        """Start recording. Trio calls this."""
        self.bars: dict[trio.lowlevel.Task, Bar] = {}
        self.began = trio.current_time()
        self.stop = math.nan  # when the server's stop began

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        """Begin a bar. Trio calls this."""
        self.bars[task] = Bar(task.name.rpartition(".")[2], self.now())

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        """End a bar. Trio calls this."""
        self.bars[task].end = self.now()

    def now(self) -> float:
        """Return the time since the run began."""
        return trio.current_time() - self.began

    def own_bar(self) -> Bar:
        """Return the bar of the task that calls this."""
        return self.bars[trio.lowlevel.current_task()]

    @contextlib.contextmanager
    def follow(self, label: str) -> Iterator[Bar]:
        """Label the task that runs the block, and record the exception that ends it."""
        bar = self.own_bar()
        bar.label = label
        try:
            yield bar
        except BaseException as error:
            bar.ending = f"crashed: {type(error).__name__}" if isinstance(error, Exception) else "cancelled"
            raise

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Record that the task is at work while it runs the block."""
        began = self.now()
        try:
            yield
        finally:
            self.own_bar().work.append((began, self.now()))

    def tree(self, label: str) -> Bar:
        """Return the bar with this label, with all bars below it."""
        for task, bar in self.bars.items():
            nursery = task.parent_nursery  # read after the run: `trio.Nursery.start` moves a task to another one
            if nursery is not None:
                self.bars[nursery.parent_task].nurseries.setdefault(nursery, []).append(bar)
        return next(bar for bar in self.bars.values() if bar.label == label)


# The scenario: an app with a server, and its clients.

TICK = 0.5  # seconds, like all times below
STOP = 1.6
GRACE_PERIOD = 1.0
OWN_TASK = 2.95

# What each client sends, and when; at the end it half-closes (""), or waits for end of stream. A line lists the seconds
# that each of its jobs takes: the handler does the first job itself, and starts a task for each of the others.
CLIENTS = [
    [(0.2, "0.4"), (1.0, "")],
    [(0.4, "0.2"), (0.7, "two")],  # not a number, which the handler does not expect
    [(0.6, "0.3"), (1.1, "")],
    [(0.9, "0.2")],
    [(1.1, "1.0")],
    [(1.3, "3 4 5")],
]


async def read_line(connection: Connection) -> bytes:
    """Receive one line: to this server, that is a request."""
    return await connection.receive_until(b"\n", max_bytes=1000)


async def app(
    recorder: Recorder, *, task_status: trio.TaskStatus[trio.SocketListener] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run a server and a task of the app's own, and stop the server after `STOP` seconds."""
    numbers = itertools.count(1)
    shutdown = trio.Event()

    async def handle(stream: trio.SocketStream) -> None:
        with recorder.follow(f"connection {next(numbers)}") as bar:
            async with Connection(stream, idle_timeout=300, request_timeout=30) as connection:
                async for line in connection.requests(read_line):
                    seconds, *more = map(float, line.split())
                    with recorder.work():
                        async with trio.open_nursery() as nursery:
                            for other in more:
                                nursery.start_soon(job, other)
                            await trio.sleep(seconds)
                    await connection.send_all(b"done\n")
            bar.ending = "stopped" if connection.stopping.is_set() else "client left"

    async def job(seconds: float) -> None:
        with recorder.follow(f"job of {seconds:g} s"), recorder.work():
            await trio.sleep(seconds)

    async def on_tick(_stats: ServerStats) -> None:
        bar = recorder.own_bar()
        bar.label = "accept loop"
        bar.ticks.append(recorder.now())

    async with trio.open_nursery() as nursery:
        serve = functools.partial(serve_tcp, host="127.0.0.1", shutdown=shutdown, grace_period=GRACE_PERIOD)
        (listener,) = await nursery.start(functools.partial(serve, tick=TICK, on_tick=on_tick), handle, 0)
        nursery.start_soon(trio.sleep, OWN_TASK, name="the app's own task")
        task_status.started(listener)
        await trio.sleep(STOP)
        recorder.stop = recorder.now()
        shutdown.set()


async def client(listener: trio.SocketListener, steps: list[tuple[float, str]]) -> None:
    """Connect at the time of the first step, and send each line at its time."""
    began = trio.current_time()
    await trio.sleep_until(began + steps[0][0])
    async with await trio.testing.open_stream_to_socket_listener(listener) as stream:
        for at, line in steps:
            await trio.sleep_until(began + at)
            if line:
                await stream.send_all(f"{line}\n".encode())
            else:
                await stream.send_eof()
        async for _ in stream:
            pass


async def scenario(recorder: Recorder) -> None:
    """Run the app and all clients. The chart shows only the app."""
    async with trio.open_nursery() as nursery:
        listener = await nursery.start(app, recorder)
        for steps in CLIENTS:
            nursery.start_soon(client, listener, steps)


# The drawing: in the terminal, and as SVG.

TITLE = "The tasks of an app with a server"
LESSON = (
    "A nursery exits when its last task has ended: no task outlives its parent.",
    "A crash ends one connection. A stop ends idle ones at once and lets the others",
    "finish; after the grace period, the rest are cancelled, with all their tasks.",
)


def rows(bar: Bar, depth: int = 0) -> Iterator[tuple[int, Bar | list[Bar]]]:
    """Yield the rows of the chart, with their depth: a task, then each of its nurseries, followed by its tasks."""
    yield depth, bar
    for tasks in bar.nurseries.values():
        yield depth + 1, tasks
        for task in tasks:
            yield from rows(task, depth + 2)


def draw_text(root: Bar, stop: float) -> Iterator[str]:
    """Yield the lines of the chart for a terminal of 80 columns."""
    left, scale = 24, 16  # columns, and columns for a second
    yield f"{'stop ▼':>{left + int(stop * scale) + 1}}{'grace period ▼':>{int(GRACE_PERIOD * scale)}}"
    for depth, row in rows(root):
        if isinstance(row, list):
            yield " " * depth + "nursery"
            continue
        start, end = int(row.start * scale), int(row.end * scale) + 1
        cells = [" "] * start + ["─"] * (end - start)
        for began, ended in row.work:
            start, end = int(began * scale), int(ended * scale) + 1
            cells[start:end] = "━" * (end - start)
        for tick in row.ticks:
            cells[int(tick * scale)] = "┼"
        yield f"{' ' * depth + row.label:{left}}{''.join(cells)} {row.ending}".rstrip()
    yield f"{'':{left}}{'0 s':16}{'1 s':16}{'2 s':16}3 s"
    yield "\n─ waiting   ━ at work on a request   ┼ tick of the accept loop\n"
    yield from LESSON


STYLE = """
    text { font: 14px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1f2328 }
    .title { font-size: 17px; font-weight: 600; text-anchor: middle }
    .lesson { text-anchor: middle }
    .note, .axis, .nursery { font-size: 12px; fill: #59636e }
    .axis { text-anchor: middle }
    .nursery { font-style: italic }
    .card { fill: #ffffff; stroke: #d1d9e0 }
    .frame { fill: #818b98; fill-opacity: .08; stroke: #818b98 }
    .grace { fill: #d4a72c; fill-opacity: .16 }
    .line { stroke: #59636e; stroke-dasharray: 4 3 }
    .waiting { fill: #b6d6fb }
    .working { fill: #0969da }
    .tick { stroke: #0a3069; stroke-width: 2 }
    .crashed { stroke: #cf222e; stroke-width: 3 }
    .cancelled { stroke: #bc4c00; stroke-width: 3 }
    @media (prefers-color-scheme: dark) {
      text { fill: #f0f6fc }
      .note, .axis, .nursery { fill: #9198a1 }
      .card { fill: #0d1117; stroke: #3d444d }
      .frame { fill: #9198a1; stroke: #656c76 }
      .grace { fill: #d29922 }
      .line { stroke: #9198a1 }
      .waiting { fill: #1f4a80 }
      .working { fill: #4493f8 }
      .tick { stroke: #cae8ff }
      .crashed { stroke: #f85149 }
      .cancelled { stroke: #f0883e }
    }
"""

WIDTH, LEFT, TOP, ROW, SECOND = 860, 196, 84, 24, 206  # pixels


def x(time: float) -> float:
    """Return the position of a time on the axis."""
    return round(LEFT + time * SECOND, 1)


def box(kind: str, start: float, end: float, y: int, height: int) -> str:
    """Draw a rectangle from one ``x`` to another."""
    return f'<rect class="{kind}" x="{start:g}" y="{y}" width="{end - start:g}" height="{height}"/>'


def text(kind: str, x: float, y: int, content: str) -> str:
    """Draw a text."""
    return f'<text class="{kind}" x="{x:g}" y="{y}">{escape(content)}</text>'


def draw_bar(bar: Bar, y: int) -> Iterator[str]:
    """Draw a task as a bar."""
    yield box("waiting", x(bar.start), x(bar.end), y + 5, 14)
    for start, end in bar.work:
        yield box("working", x(start), x(end), y + 5, 14)
    for tick in bar.ticks:
        yield f'<path class="tick" d="M{x(tick)} {y + 3} v18"/>'
    if bar.ending.startswith("crashed"):
        yield f'<path class="crashed" d="M{x(bar.end) - 5:g} {y + 7} l10 10 m0 -10 l-10 10"/>'
    if bar.ending == "cancelled":
        yield f'<path class="cancelled" d="M{x(bar.end)} {y + 2} v20"/>'
    if bar.ending:
        yield text("note", x(bar.end) + 10, y + 16, bar.ending)


def draw_frame(tasks: list[Bar], y: int, margin: int) -> str:
    """Draw a nursery as a frame around its tasks and everything below them."""
    start, end = min(task.start for task in tasks), max(task.end for task in tasks)
    height = ROW * sum(len(list(rows(task))) for task in tasks)
    return box("frame", x(start) - margin, x(end) + margin, y + 4, ROW - 8 + height + margin)


def draw_svg(root: Bar, stop: float) -> str:
    """Return the chart as an SVG, for light and dark pages."""
    shapes = [text("title", WIDTH / 2, 36, TITLE)]
    y = TOP
    for depth, row in rows(root):
        if isinstance(row, Bar):
            shapes += [text("task", 20 + 12 * depth, y + 17, row.label), *draw_bar(row, y)]
        else:
            shapes += [draw_frame(row, y, 12 - 2 * depth), text("nursery", 20 + 12 * depth, y + 17, "nursery")]
        y += ROW
    for time, what in [(stop, "stop"), (stop + GRACE_PERIOD, "grace period over")]:
        shapes.insert(0, f'<path class="line" d="M{x(time)} {TOP - 10} V{y + 4}"/>')
        shapes.append(text("axis", x(time), TOP - 16, what))
    shapes.insert(0, box("grace", x(stop), x(stop + GRACE_PERIOD), TOP - 10, y + 14 - TOP))
    shapes += [text("axis", x(second), y + 24, f"{second} s") for second in range(4)]
    y += 44
    shapes += [box("waiting", 206, 228, y, 14), text("note", 236, y + 11, "waiting")]
    shapes += [box("working", 336, 358, y, 14), text("note", 366, y + 11, "at work on a request")]
    shapes += [f'<path class="tick" d="M556 {y - 2} v18"/>', text("note", 566, y + 11, "tick of the accept loop")]
    shapes += [text("lesson", WIDTH / 2, y + 48 + 20 * number, line) for number, line in enumerate(LESSON)]
    y += 110
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}">',
        f"  <title>{TITLE}</title>\n  <desc>{' '.join(LESSON)}</desc>\n  <style>{STYLE}  </style>",
        f'  <rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{y - 1}" rx="10"/>',
        *(f"  {shape}" for shape in shapes),
        "</svg>\n",
    ]
    return "\n".join(lines)


def main() -> None:
    """Record the run, print its chart, and write the SVG if a file is named."""
    logging.disable()  # the chart shows what the server would log: the crash, and the end of the grace period
    recorder = Recorder()
    trio.run(scenario, recorder, instruments=[recorder])
    root = recorder.tree("app")
    for line in draw_text(root, recorder.stop):
        print(line)
    for name in sys.argv[1:]:
        Path(name).write_text(draw_svg(root, recorder.stop), encoding="utf-8")


if __name__ == "__main__":
    main()
