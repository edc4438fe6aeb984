import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "2_tcp_buffers.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the example reads its numbers from Linux's kernel")


@pytest.fixture(scope="module")
def sections() -> list[dict[str, str]]:
    """The printed sections: for each, the numbers by their labels."""
    run = subprocess.run([sys.executable, EXAMPLE], check=True, capture_output=True, text=True, timeout=60)
    assert max(map(len, run.stdout.splitlines())) <= 80
    return [
        dict(re.findall(r"^  (.+?) {2,}(\S+(?: of stream)?)", section, re.MULTILINE))
        for section in re.split(r"\n\n", run.stdout)
    ]


def test_sends_and_receives_do_not_match(sections: list[dict[str, str]]) -> None:
    """Several sends arrive in one receive, and one send arrives in several receives."""
    rows = sections[1]
    assert rows["5 sends of 3 bytes, no receive yet: segments"] == "5"
    assert rows["then receives, of 15 bytes"] == "1"
    (receives,) = (int(number) for label, number in rows.items() if label.startswith("receives, of"))
    assert receives > 1


def test_blocked_senders_bytes_are_in_one_buffer_or_the_other(sections: list[dict[str, str]]) -> None:
    """What is sent and not received is in the output or the input buffer; sending blocks when the window is closed."""
    rows = sections[2]
    sent = int(rows["sent, then blocked"])
    output = int(rows["of these in the sender's output buffer"])
    unread = int(rows["and in the receiver's input buffer"])
    assert output > 0
    assert unread > 0
    assert output + unread == sent
    assert int(rows["window at first: the receiver accepts"]) > 0
    assert int(rows["window now: the receiver accepts"]) < 10_000
    assert int(rows["window afterwards: the receiver accepts"]) > 10_000
    assert int(rows["then received, all as sent"]) == sent


def test_output_buffer_is_sent_after_close(sections: list[dict[str, str]]) -> None:
    """What a program sent before it closed its socket still arrives, followed by end of stream."""
    rows = sections[3]
    assert int(rows["in the output buffer when the sender closes"]) > 0
    assert rows["received after close, all as sent"] == rows["sent"]
    assert rows["and then"] == "end of stream"


def test_unread_input_is_lost_with_a_reset(sections: list[dict[str, str]]) -> None:
    """Bytes that the kernel acknowledged and the program never received are lost at close; the peer gets ECONNRESET."""
    rows = sections[4]
    assert rows["still in the sender's output buffer: all acknowledged"] == "0"
    assert rows["unread in the input buffer when the receiver closes"] == "10"
    assert rows["the sender receives"] == "0"
    assert rows["and then"] == "ECONNRESET"


def test_unread_input_discards_the_output_buffer(sections: list[dict[str, str]]) -> None:
    """A socket that is closed with unread input sends a reset instead of the rest of its output buffer."""
    rows = sections[5]
    left = int(rows["in the output buffer when the sender closes"])
    arrived = int(rows["of these received"])
    assert left > 0
    assert arrived == int(rows["sent"]) - left
    assert rows["and then"] == "ECONNRESET"
