import itertools
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "3_conversation.py"
SVG = EXAMPLE.with_name("conversation.svg")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="packet sockets exist only on Linux")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def may_capture() -> bool:
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM).close()
    except PermissionError:
        return False
    return True


def texts_of(svg: str) -> list[tuple[float, float, str]]:
    """Return each text of an SVG, with the position of its middle."""
    elements = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return [(float(element.attrib["x"]), float(element.attrib["y"]), element.text or "") for element in elements]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A conversation captured just now: the chart in the terminal, and the SVG."""
    pytest.importorskip("scapy", reason="scapy is not installed")
    if not may_capture():
        pytest.skip("capturing packets needs root")
    svg = tmp_path_factory.mktemp("conversation") / "conversation.svg"
    done = run(sys.executable, EXAMPLE, svg)
    assert done.returncode == 0, done.stderr
    return done.stdout, svg.read_text(encoding="utf-8")


def test_chart_begins_with_the_three_way_handshake(drawn: tuple[str, str]) -> None:
    """The first three segments are SYN, SYN ACK and ACK; each SYN counts one."""
    labels = re.findall(r"[─◀] ([A-Z].*?) ─", drawn[0])
    assert labels[:3] == ["SYN  seq 0", "SYN ACK  seq 0  ack 1", "ACK  seq 1  ack 1"]


def test_chart_shows_request_and_reply_field_by_field(drawn: tuple[str, str]) -> None:
    """The meaning of each field of the op protocol is below its bytes."""
    rows = [re.split(r" {2,}", line.strip("│ ")) for line in drawn[0].splitlines()]
    meanings = rows.index(["count 3", "operand 12", "operand -7", "operand 1", "operator +"])
    assert rows[meanings - 1] == ["03", "0c 00 00 00", "f9 ff ff ff", "01 00 00 00", "2b"]
    assert rows[rows.index(["result 6"]) - 1] == ["06 00 00 00"]


def test_acknowledgement_is_sequence_plus_bytes(drawn: tuple[str, str]) -> None:
    """The 14 bytes from number 1 are acknowledged with 15, not 16, and each explanation adds up."""
    chart = drawn[0]
    assert "seq 1  ack 1  14 bytes" in chart
    assert "ack 15 = 1 + 14 bytes" in chart
    assert "ack 5 = 1 + 4 bytes" in chart
    explanations = re.findall(r"ack (\d+) = (.*?)(?:;|  )", chart)
    assert len(explanations) >= 5
    for ack, total in explanations:
        assert int(ack) == sum(int(number) for number in re.findall(r"\d+", total))


def test_chart_ends_with_both_ends_acknowledged(drawn: tuple[str, str]) -> None:
    """Both sides send a FIN, each FIN counts one and is acknowledged, and then nothing follows."""
    chart = drawn[0]
    assert re.search(r"─ FIN ACK  seq 15 .*▶", chart)
    assert re.search(r"◀.* FIN ACK  seq 5 ", chart)
    assert chart.count("1 for the FIN") == 2
    assert re.findall(r"[─◀] ([A-Z].*?) ─", chart)[-1] in ("ACK  seq 16  ack 6", "ACK  seq 6  ack 16")


def test_time_flows_down_in_80_columns(drawn: tuple[str, str]) -> None:
    """The times never decrease from line to line, and the chart fits a terminal."""
    times = [int(number) for number in re.findall(r"^ *(\d+)  │", drawn[0], re.MULTILINE)]
    assert times[0] == 0
    assert times == sorted(times)
    assert max(map(len, drawn[0].splitlines())) <= 80


def test_svg_has_the_texts_of_the_terminal(drawn: tuple[str, str]) -> None:
    """The SVG has each segment, field and explanation of the terminal's chart."""
    chart, svg = drawn
    texts = {text for _, _, text in texts_of(svg)}
    labels = re.findall(r"[─◀] ([A-Z].*?) ─", chart)
    notes = re.findall(r"ack \d+ = .*?(?=  )", chart)
    assert {*labels, *notes, "operand -7", "f9 ff ff ff", "result 6"} <= texts


@pytest.mark.parametrize("source", ["captured", "committed"])
def test_no_two_texts_of_the_svg_overlap(source: str, request: pytest.FixtureRequest) -> None:
    """No text of the drawing overlaps another."""
    svg = request.getfixturevalue("drawn")[1] if source == "captured" else SVG.read_text(encoding="utf-8")
    texts = texts_of(svg)
    assert len(texts) > 30
    for (x, y, text), (other_x, other_y, other) in itertools.combinations(texts, 2):
        apart = abs(x - other_x) >= 4 * (len(text) + len(other)) or abs(y - other_y) >= 12
        assert apart, f"{text!r} overlaps {other!r}"


def test_committed_svg_is_drawn_by_the_current_example() -> None:
    """The committed drawing has the example's current style, for light and dark pages, and its texts."""
    svg = SVG.read_text(encoding="utf-8")
    style = re.search(r'STYLE = """(.*?)"""', EXAMPLE.read_text(encoding="utf-8"), re.DOTALL)
    assert style is not None
    assert style[1] in svg
    assert "prefers-color-scheme: dark" in svg
    texts = {text for _, _, text in texts_of(svg)}
    assert {"SYN  seq 0", "ack 15 = 1 + 14 bytes", "result 6"} <= texts
    assert "There is no general + 1: only a SYN and a FIN count like one byte each." in texts


def test_without_root_it_says_so_in_one_line() -> None:
    """Without the right to capture packets, it says in one line that it needs root."""
    pytest.importorskip("scapy", reason="scapy is not installed")
    unprivileged: list[str] = []
    if may_capture():
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("setpriv, to give up root's privileges, is not installed")
        unprivileged = [setpriv, "--bounding-set=-all"]

    done = run(*unprivileged, sys.executable, EXAMPLE)

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "3_conversation.py: capturing packets needs root: run it with sudo\n"


def test_without_scapy_it_says_so_in_one_line() -> None:
    """Without scapy, it says in one line what to install."""
    without = f"import runpy, sys; sys.modules['scapy'] = None; runpy.run_path({str(EXAMPLE)!r})"
    done = run(sys.executable, "-c", without)

    assert done.returncode == 1
    assert done.stderr == "3_conversation.py: needs scapy; from a clone of trioproto: pip install -e '.[examples]'\n"
