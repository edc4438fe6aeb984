import itertools
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import trio

EXAMPLE = Path(__file__).parents[2] / "examples" / "5b_task_tree.py"
SVG = EXAMPLE.with_name("task_tree.svg")
example = runpy.run_path(str(EXAMPLE))

LATE = 0.3  # seconds of tolerance, for a busy machine
NS = "{http://www.w3.org/2000/svg}"

TREE = """
app
  serve_tcp
    accept loop
    connection 1
    connection 2
    connection 3
    connection 4
    connection 5
    connection 6
      job of 4 s
      job of 5 s
  the app's own task
"""


class Recorded:
    """A run of the scenario: the app's bar, all bars by label, when the stop began, and the end of the grace period."""

    def __init__(self) -> None:
        recorder = example["Recorder"]()
        trio.run(example["scenario"], recorder, instruments=[recorder])
        self.root = recorder.tree("app")
        self.stop = recorder.stop
        self.over = recorder.stop + example["GRACE_PERIOD"]
        self.bars = {bar.label: bar for _, bar in walk(self.root)}


def walk(bar: Any, depth: int = 0) -> Iterator[tuple[int, Any]]:
    yield depth, bar
    for child in itertools.chain(*bar.nurseries.values()):
        yield from walk(child, depth + 1)


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded()


# The run.


def test_every_task_is_in_the_nursery_of_its_supervisor(recorded: Recorded) -> None:
    """The app's nursery has the server, the server's has the connections, in the order in which they were spawned."""
    assert [f"{'  ' * depth}{bar.label}" for depth, bar in walk(recorded.root)] == TREE.strip().splitlines()


def test_no_task_outlives_its_parent(recorded: Recorded) -> None:
    """Each task starts after its parent and ends before it."""
    for _, bar in walk(recorded.root):
        for child in itertools.chain(*bar.nurseries.values()):
            assert bar.start <= child.start <= child.end <= bar.end, f"{child.label} in {bar.label}"


def test_crash_ends_one_bar_and_the_others_go_on(recorded: Recorded) -> None:
    """A crash ends only its own connection; its siblings and parents go on, and the server accepts further clients."""
    crashed = recorded.bars["connection 2"]
    assert crashed.ending == "crashed: ValueError"
    for label in ("app", "serve_tcp", "accept loop", "connection 1", "the app's own task"):
        assert recorded.bars[label].start < crashed.end < recorded.bars[label].end
    assert [bar.label for bar in recorded.bars.values() if "crashed" in bar.ending] == ["connection 2"]
    assert recorded.bars["connection 5"].start > crashed.end  # the server accepts others


def test_stop_ends_the_idle_connection_and_the_accept_loop_at_once(recorded: Recorded) -> None:
    """When the stop begins, the idle connection and the accept loop end at once."""
    idle = recorded.bars["connection 4"]
    assert idle.work[-1][1] < recorded.stop
    assert idle.ending == "stopped"
    for bar in (idle, recorded.bars["accept loop"]):
        assert 0 <= bar.end - recorded.stop < LATE


def test_request_under_way_is_finished_after_the_stop(recorded: Recorded) -> None:
    """A connection that is at work when the stop begins ends when its work is done, within the grace period."""
    under_way = recorded.bars["connection 5"]
    ((began, ended),) = under_way.work
    assert began < recorded.stop < ended
    assert ended - began == pytest.approx(1.0, abs=LATE)
    assert ended <= under_way.end < recorded.over
    assert under_way.ending == "stopped"


def test_end_of_grace_period_cancels_a_connection_with_all_tasks_below_it_and_nothing_else(recorded: Recorded) -> None:
    """A handler that is still running then is cancelled with its tasks; the server returns, and the app goes on."""
    cut = [bar for bar in recorded.bars.values() if bar.ending == "cancelled"]
    assert [bar.label for bar in cut] == ["connection 6", "job of 4 s", "job of 5 s"]
    for bar in (*cut, recorded.bars["serve_tcp"]):
        assert 0 <= bar.end - recorded.over < LATE
    assert recorded.bars["the app's own task"].end > recorded.bars["serve_tcp"].end


def test_accept_loop_ticks_on_schedule(recorded: Recorded) -> None:
    """The accept loop ticks every half second until the stop, whatever the connections do."""
    loop = recorded.bars["accept loop"]
    assert [tick - loop.start for tick in loop.ticks] == pytest.approx([0.5, 1.0, 1.5], abs=LATE / 2)
    assert not any(bar.ticks for bar in recorded.bars.values() if bar is not loop)


# The picture.


@pytest.fixture(params=["recorded", "committed"])
def svg(request: pytest.FixtureRequest, recorded: Recorded) -> str:
    if request.param == "committed":
        return SVG.read_text(encoding="utf-8")
    drawn: str = example["draw_svg"](recorded.root, recorded.stop)
    return drawn


def texts_of(svg: str) -> list[tuple[float, float, str, str]]:
    """Return each text's left edge, baseline, class and content."""
    texts = []
    for element in ET.fromstring(svg).iter(f"{NS}text"):
        kind, text = element.attrib["class"], element.text or ""
        middle = kind in ("title", "axis", "lesson")
        x = float(element.attrib["x"]) - (width(kind, text) / 2 if middle else 0)
        texts.append((x, float(element.attrib["y"]), kind, text))
    return texts


def width(kind: str, text: str) -> float:
    """Return how wide a text is in a wide font."""
    return len(text) * (7.0 if kind in ("note", "axis", "nursery") else 10.0 if kind == "title" else 8.0)


def boxes_of(svg: str, kind: str) -> list[tuple[float, float, float, float]]:
    """Return left, top, right and bottom of each rectangle of a class."""
    boxes = []
    for element in ET.fromstring(svg).iter(f"{NS}rect"):
        if element.attrib["class"] == kind:
            x, y, width, height = (float(element.attrib[name]) for name in ("x", "y", "width", "height"))
            boxes.append((x, y, x + width, y + height))
    return boxes


def coloured(style: str) -> set[str]:
    """Return the selectors that have a colour, such as ``.frame``."""
    rules = re.findall(r"^ *([a-z., ]+) \{(.*)\}", style, re.MULTILINE)
    return {name for names, rule in rules if "#" in rule for name in names.split(", ")}


def test_svg_has_a_title_and_both_colour_schemes(svg: str) -> None:
    """It has a title and a description, and each coloured element has a colour in the dark scheme, too."""
    root = ET.fromstring(svg)
    assert [root.findtext(f"{NS}{name}", "") != "" for name in ("title", "desc")] == [True, True]
    light, dark = (root.findtext(f"{NS}style") or "").split("@media (prefers-color-scheme: dark)")
    assert coloured(light) == coloured(dark) != set()
    assert {element.attrib["class"] for element in root.iter() if "class" in element.attrib} >= {
        "waiting",
        "working",
        "tick",
        "crashed",
        "cancelled",
        "frame",
        "grace",
        "line",
    }


def test_no_text_overlaps_another_or_leaves_the_picture(svg: str) -> None:
    """Texts do not overlap, and end inside the picture."""
    texts = texts_of(svg)
    assert len(texts) > 30
    for (x, y, kind, text), (other_x, other_y, other_kind, other) in itertools.combinations(texts, 2):
        beside = x + width(kind, text) <= other_x or other_x + width(other_kind, other) <= x
        assert beside or abs(y - other_y) >= 14, f"{text!r} overlaps {other!r}"
    right = float(ET.fromstring(svg).attrib["width"])
    assert [text for x, _, kind, text in texts if x < 10 or x + width(kind, text) > right] == []


def test_each_frame_encloses_the_bars_of_its_nursery(svg: str) -> None:
    """A frame spans from its first task's start to its last task's end, and lies within its parent's frame."""
    bars = sorted(boxes_of(svg, "waiting"), key=lambda box: box[1])[:-1]  # the last one explains the colour
    frames = sorted(boxes_of(svg, "frame"))
    assert len(bars) == 12
    assert len(frames) == 3
    for frame, inside in zip(frames, [bars[1:], bars[2:11], bars[9:11]], strict=True):
        left, top, right, bottom = frame
        assert [bar for bar in bars if top < bar[1] < bottom] == inside
        assert all(top < bar[1] and bar[3] < bottom for bar in inside)
        assert 0 < min(bar[0] for bar in inside) - left <= 10
        assert 0 < right - max(bar[2] for bar in inside) <= 10.1
    assert all(
        outer[1] < inner[1] and inner[3] < outer[3] and inner[2] < outer[2]
        for outer, inner in itertools.pairwise(frames)
    )


def test_bars_are_to_scale(recorded: Recorded) -> None:
    """Bars, axis, stop and grace period have the same number of pixels for each second."""
    svg = example["draw_svg"](recorded.root, recorded.stop)
    axis = {text: x + width(kind, text) / 2 for x, _, kind, text in texts_of(svg) if kind == "axis"}
    second = axis["1 s"] - axis["0 s"]
    bars = sorted(boxes_of(svg, "waiting"), key=lambda box: box[1])[:-1]
    for box, (_, bar) in zip(bars, walk(recorded.root), strict=True):
        assert box[0] - axis["0 s"] == pytest.approx(bar.start * second, abs=0.2)
        assert box[2] - axis["0 s"] == pytest.approx(bar.end * second, abs=0.2)
    assert axis["stop"] - axis["0 s"] == pytest.approx(recorded.stop * second, abs=0.2)
    assert axis["grace period over"] - axis["stop"] == pytest.approx(example["GRACE_PERIOD"] * second, abs=0.2)
    ((left, _, right, _),) = boxes_of(svg, "grace")
    assert [left, right] == pytest.approx([axis["stop"], axis["grace period over"]], abs=0.2)


def test_committed_svg_is_what_the_example_draws(recorded: Recorded) -> None:
    """It has the same texts in the same rows, and the same style; only its times may differ."""
    committed = SVG.read_text(encoding="utf-8")
    drawn = example["draw_svg"](recorded.root, recorded.stop)
    assert [(y, text) for _, y, _, text in texts_of(committed)] == [(y, text) for _, y, _, text in texts_of(drawn)]
    assert example["STYLE"] in committed


def test_program_shows_the_chart_in_80_columns_and_writes_the_svg(tmp_path: Path) -> None:
    """The terminal's chart shows how every task ended, and the file is the picture."""
    file = tmp_path / "tree.svg"
    run = subprocess.run([sys.executable, EXAMPLE, file], capture_output=True, text=True, timeout=30, check=True)

    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if re.search("[─━] ?[a-z:A-Z ]*$", line)]
    assert [re.split("  +", row.strip())[0] for row in rows] == [label.strip() for label in TREE.strip().splitlines()]
    endings = [re.split("[─━┼] ?", row)[-1] for row in rows]
    assert endings[3:11] == [
        "client left",
        "crashed: ValueError",
        "client left",
        "stopped",
        "stopped",
        "cancelled",
        "cancelled",
        "cancelled",
    ]
    assert endings[:3] == endings[11:] * 3 == [""] * 3
    assert rows[2].count("┼") == 3
    where = next(line.index("▼") for line in lines if "stop ▼" in line)
    assert abs(len(rows[2]) - 1 - where) <= 3  # the accept loop ends there
    assert [text for _, _, _, text in texts_of(file.read_text(encoding="utf-8"))] == [
        text for _, _, _, text in texts_of(SVG.read_text(encoding="utf-8"))
    ]
