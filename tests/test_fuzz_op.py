"""A fuzz target for the op protocol's decoder. Here it runs for a bounded number of examples.

Any fuzzer can drive it for longer, through ``test_decoder.hypothesis.fuzz_one_input`` (Hypothesis, "Use with external
fuzzers").
"""

from collections.abc import Sequence

from helpers import decode_by_the_table, op_requests, request_bytes
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trioproto import ProtocolError
from trioproto.op import answer

# Noise alone hardly ever makes a request, so requests are mixed into it: whole ones, and ones that are cut short or
# whose operator is none.
pieces = st.one_of(
    op_requests.map(lambda request: request_bytes(*request)),
    st.tuples(st.integers(1, 3), st.binary(max_size=13)).map(lambda noise: bytes([noise[0]]) + noise[1]),
    st.binary(max_size=40),
)
streams = st.lists(pieces, max_size=8).map(b"".join)


@example(request_bytes([1] * 255, "-"), [1021])  # as long as a request can be
@settings(max_examples=500)
@given(streams, st.lists(st.integers(0, 300), max_size=30))
def test_decoder(data: bytes, sizes: Sequence[int]) -> None:
    """Whatever bytes come, and however they are cut, the replies are those of an independent decoder, and no error."""
    replies = rest = b""
    end = 0
    for size in [*sizes, len(data)]:
        start, end = end, min(end + size, len(data))
        expected, unfinished, malformed = decode_by_the_table(data[:end])
        rest += data[start:end]
        try:
            more, rest = answer(rest)
            replies += more
            while more:  # a malformed request behind others is an error only when it is the first
                more, rest = answer(rest)
        except ProtocolError:
            assert malformed
            assert replies == expected
            return
        assert (replies, rest, malformed) == (expected, unfinished, False)
