"""The error of a measurement, in a separate module, so that it can be imported without the extra ``bench``."""


class BenchError(Exception):
    """A measurement is impossible; the message says what to do."""
